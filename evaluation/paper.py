"""
The paper's own figures, and what was measured here beside them.

`paper_tables.json` holds Tables I to X of arXiv:2503.19311 as printed, with the misprints found in them. It is a file
so that `model_cards/`, which imports nothing from here, can read it too.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any


PAPER_FILE = Path(__file__).with_name("paper_tables.json")
ARXIV = "arXiv:2503.19311"
_WEIGHT_FILES = re.compile(r"\.(pt|pth|bin|safetensors)$")
_HUB_SIZES = {"vitbasepatch": "vitb", "vitlargepatch": "vitl", "vithugepatch": "vith"}  # openai/clip-vit-base-patch32


@cache
def paper_tables() -> dict[str, Any]:
    """The whole of `paper_tables.json`; not to be changed."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


def paper_figures(model: str, task: str, dataset: str) -> dict[str, float] | None:
    """
    One row of Tables II to V, as printed.

    Args:
        model: key such as `lrsclip-vit-b-16`, `clip-vit-l-14`, `selo-v1`.
        task: `zcrl`, `zcrs`, `zic` or `selo`.
        dataset: key such as `rsitmd-l`, `rsicd`, `resisc45`, `air-slt`; for `zic` also `mean`, of the six sets.

    Returns:
        `dict` by the names of our metrics, in percent (`selo`: 0 to 1), or None where the paper has no such row.
    """
    for table in paper_tables()["tables"].values():
        if table["task"] != task:
            continue
        if "columns" in table:  # Table IV has a column per data set
            row = table["rows"].get(model)
            values = [row[table["columns"].index(dataset)]] if row and dataset in table["columns"] else None
        else:
            values = table["rows"].get(dataset, {}).get(model)
        if values:
            return dict(zip(paper_tables()["metrics"][task], values, strict=True))
    return None


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
    keys = {_squeeze(key): key for key in (*paper_tables()["datasets"], *seen)}
    key = keys.get(_squeeze(name))
    if key and task in ("zcrl", "zcrs"):
        key = keys.get(_squeeze(key.removesuffix("-l") + ("-l" if task == "zcrl" else "")))
    return key


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def beside_paper(result: dict[str, Any]) -> dict[str, Any]:
    """
    What the paper says to a result: nothing, where it has no row of this model on this very data.

    Args:
        result: with `model`, `task`, `dataset`, `metrics` and, where there are any, `images` and `texts` (counts),
            `protocol` and `prompts`.

    Returns:
        `dict`, each left out when empty: `seen` (why it is not zero-shot, in the paper or not), `paper_model` (its key
        there), `paper` (figures as printed), `gap` (measured minus paper), `remarks` (sentences on what to mind in
        comparing the two).
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
        ours = result["metrics"]
        beside["paper_model"] = model
        beside["paper"] = figures
        beside["gap"] = {name: round(ours[name] - value, 4) for name, value in figures.items() if name in ours}
        beside["remarks"] = _remarks(model, task, dataset)
    return {name: value for name, value in beside.items() if value}


def seen_in_training(model: str, dataset: str) -> str | None:
    """Why a model's figure on a data set is not zero-shot; None: nothing known of that."""
    seen = paper_tables()["seen"].get(model.split("-vit-")[0])
    return seen["why"] if seen and dataset in seen["datasets"] else None


def _other_procedure(result: dict[str, Any]) -> str | None:
    """What was done otherwise than in the paper."""
    if result.get("protocol", "v1") != "v1":
        return f"its SeLo follows protocol v1, this result {result['protocol']}"
    templates = result.get("prompts", {}).get("template_set", "paper")
    return f"it used one prompt template, this result the set {templates!r}" if templates != "paper" else None


def _other_counts(result: dict[str, Any], dataset: str) -> str | None:
    """Where the data is not the paper's test split by its number of images and texts."""
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
