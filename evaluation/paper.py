"""
The paper's own figures and others' figures of the same models, and what was measured here beside them.

`paper_tables.json` holds Tables I to X of arXiv:2503.19311 (version 1) as printed, with the misprints found in them; what
is known of version 2, whose models are called DGTRS-CLIP; and figures that others printed, by their source. It is a
file so that `model_cards/`, which imports nothing from here, can read it too.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


PAPER_FILE = Path(__file__).with_name("paper_tables.json")
ARXIV = "arXiv:2503.19311"
VERSION_2 = "v2"  # key of `sources`
_WEIGHT_FILES = re.compile(r"\.(pt|pth|bin|safetensors)$")
_HUB_SIZES = {"vitbasepatch": "vitb", "vitlargepatch": "vitl", "vithugepatch": "vith"}  # openai/clip-vit-base-patch32


@cache
def paper_tables() -> dict[str, Any]:
    """The whole of `paper_tables.json`; not to be changed."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


def paper_figures(model: str, task: str, dataset: str) -> dict[str, float] | None:
    """
    Row of Tables II to V of version 1, as printed; for DGTRS-CLIP what is known of version 2.

    Args:
        model: key such as `lrsclip-vit-b-16`, `dgtrs-clip-vit-b-16`, `clip-vit-l-14`, `selo-v1`.
        task: `zcrl`, `zcrs`, `zic` or `selo`.
        dataset: key such as `rsitmd-l`, `rsicd`, `resisc45`, `air-slt`; for `zic` also `mean`, of the six sets.

    Returns:
        `dict` by the names of our metrics, in percent (`selo`: 0 to 1), or None where the paper has no such row.
    """
    second = [table for table in paper_tables()["further"] if table["source"] == VERSION_2]
    rows = (_row(table, model, task, dataset) for table in [*paper_tables()["tables"].values(), *second])
    return next(filter(None, rows), None)


def other_figures(model: str, task: str, dataset: str) -> dict[str, dict[str, float]]:
    """
    Figures that others than the paper's authors printed for a model on a data set, in percent.

    Args:
        model, task, dataset: as for [`paper_figures`].

    Returns:
        `dict`: key of `sources` in `paper_tables.json` -> figures by the names of our metrics.
    """
    others = [table for table in paper_tables()["further"] if table["source"] != VERSION_2]
    rows = {table["source"]: _row(table, model, task, dataset) for table in others}
    return {source: figures for source, figures in rows.items() if figures}


def _row(table: dict[str, Any], model: str, task: str, dataset: str) -> dict[str, float] | None:
    if table["task"] != task:
        return None
    if "columns" in table:  # Table IV has a column per data set
        row = table["rows"].get(model)
        values = [row[table["columns"].index(dataset)]] if row and dataset in table["columns"] else None
    else:
        values = table["rows"].get(dataset, {}).get(model)
    return dict(zip(paper_tables()["metrics"][task], values, strict=True)) if values else None


def ablation_figures(study: str) -> dict[str, dict[str, float]] | None:
    """
    Rows of Tables VI to IX: setting -> figure by task.

    Args:
        study: `pcm`, `framework`, `short_text`, `init`; `batch_size`, `subset_size`, `model_size` and `loss_weight`
            are plotted in the paper without a printed figure and give None.

    Raises:
        `ValueError`: for another name.
    """
    ablations = paper_tables()["ablations"]
    studies = {name: entry for name, entry in ablations.items() if isinstance(entry, dict) and "source" in entry}
    if study not in studies:
        raise ValueError(f"the paper has no ablation {study!r}; it has {', '.join(studies)}.")
    rows = studies[study].get("rows")
    return rows and {name: dict(zip(ablations["columns"], row, strict=True)) for name, row in rows.items()}


def model_key(label: str) -> str | None:
    """`runs/lrsclip-vit-b-16`, `cwz14/LRSCLIP_ViT-B-16`, `LRSCLIP_ViT-B-16.pt` -> `lrsclip-vit-b-16`; None: no row."""
    name = _squeeze(_WEIGHT_FILES.sub("", label.split("/")[-1]))
    for long, short in _HUB_SIZES.items():
        name = name.replace(long, short)
    return {_squeeze(key): key for key in paper_tables()["names"]}.get(name)


def dataset_key(task: str, name: str) -> str | None:
    """`RSITMD` -> `rsitmd-l` for `zcrl` and `rsitmd` for `zcrs`, whichever of the two it is called; None: not there."""
    seen = (key for family in paper_tables()["seen"].values() for key in family["datasets"])
    columns = (key for table in paper_tables()["further"] for key in table.get("columns", ()) if key != "mean")
    keys = {_squeeze(key): key for key in (*paper_tables()["datasets"], *seen, *columns)}
    key = keys.get(_squeeze(name))
    if key and task in ("zcrl", "zcrs"):
        key = keys.get(_squeeze(key.removesuffix("-l") + ("-l" if task == "zcrl" else "")))
    return key


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def beside_paper(result: dict[str, Any]) -> dict[str, Any]:
    """
    The paper's figures and remarks beside a result: nothing, where it has no row of this model on this very data.

    Args:
        result: with `model`, `task`, `dataset`, `metrics` and, where there are any, `images` and `texts` (counts),
            `protocol` and `prompts`.

    Returns:
        `dict`, each left out when empty: `seen` (why it is not zero-shot, in the paper or not), `paper_model` (its key
        there), `paper` (figures as printed), `gap` (measured minus paper), `remarks` (sentences on what to mind in
        comparing the two), `others` (a `dict` for each source that printed figures too: `source`, `figures`, and `gap`
        where it measured the same way on as many images).
    """
    model, task = model_key(result["model"]), result["task"]
    dataset = dataset_key(task, result["dataset"])
    if model is None or dataset is None:
        return {}
    beside: dict[str, Any] = {"seen": seen_in_training(model, dataset)}
    figures = paper_figures(model, task, dataset)
    if figures and (other := _other_procedure(result) or _other_counts(result, dataset)):
        beside["remarks"] = [f"Not compared with the paper: {other}."]
    elif figures:
        beside |= {"paper_model": model, "paper": figures, "gap": _gap(result, figures)}
        beside["remarks"] = _remarks(model, task, dataset)
    others = other_figures(model, task, dataset).items()
    beside["others"] = [_beside_other(result, dataset, source, figures) for source, figures in others]
    return {name: value for name, value in beside.items() if value}


def _gap(result: dict[str, Any], figures: dict[str, float]) -> dict[str, float]:
    ours = result["metrics"]
    return {name: round(ours[name] - value, 4) for name, value in figures.items() if name in ours}


def _beside_other(result: dict[str, Any], dataset: str, source: str, figures: dict[str, float]) -> dict[str, Any]:
    described = paper_tables()["sources"][source]
    beside: dict[str, Any] = {"source": described["name"], "figures": figures, "remark": described["read_in"]}
    known = {**paper_tables()["datasets"].get(dataset, {}), **described.get("datasets", {}).get(dataset, {})}
    same_counts = all(result.get(noun, known[noun]) == known[noun] for noun in ("images", "texts") if noun in known)
    templates = described.get("template_set")
    if same_counts and (templates is None or result.get("prompts", {}).get("template_set") == templates):
        beside["gap"] = _gap(result, figures)
    else:
        beside["remark"] += "; not the same images or prompts as here, so no gap is shown"
    return beside


def paper_note(results: Sequence[dict[str, Any]]) -> list[str]:
    """The lines below a table that say where its rows of others come from, and what to mind in comparing."""
    lines = []
    if any("paper" in result for result in results):
        second = any(result.get("paper_model", "").startswith("dgtrs") for result in results)
        version = f"; DGTRS-CLIP: {paper_tables()['sources'][VERSION_2]['read_in']}" if second else ""
        lines.append(f"paper: as printed in {ARXIV}{version}; gap: measured minus paper.")
    lines += dict.fromkeys(text for result in results for text in result.get("remarks", []))
    others = [other for result in results for other in result.get("others", [])]
    return lines + list(dict.fromkeys(f"{other['source']}: {other['remark']}." for other in others))


def seen_in_training(model: str, dataset: str) -> str | None:
    """Reason why a model's figure on a data set is not zero-shot; None: none is known."""
    seen = paper_tables()["seen"].get(model.split("-vit-")[0])
    return seen["why"] if seen and dataset in seen["datasets"] else None


def _other_procedure(result: dict[str, Any]) -> str | None:
    """Sentence on what was done otherwise than in the paper; None: nothing."""
    if result.get("protocol", "v1") != "v1":
        return f"its SeLo follows protocol v1, this result {result['protocol']}"
    templates = result.get("prompts", {}).get("template_set", "paper")
    return f"it used one prompt template, this result the set {templates!r}" if templates != "paper" else None


def _other_counts(result: dict[str, Any], dataset: str) -> str | None:
    """Sentence on data that by its number of images and texts is not the paper's test split; None: it may be."""
    known = paper_tables()["datasets"][dataset]
    other = [noun for noun in ("images", "texts") if noun in known and result.get(noun, known[noun]) != known[noun]]
    counts = " and ".join(f"{known[noun]:,} {noun} (here {result[noun]:,})" for noun in other)
    return f"its {known['name']} has {counts}" if counts else None


def _remarks(model: str, task: str, dataset: str) -> list[str]:
    errata = [
        f"{erratum['where']}: {erratum['says']}"
        for erratum in paper_tables()["errata"]
        if any(cell[:3] == [task, dataset, model] for cell in erratum.get("cells", ()))
    ]
    general = paper_tables()["remarks"].get(task)
    return [general, *errata] if general else errata
