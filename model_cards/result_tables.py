"""
The results of one model as a card's tables and its `model-index`.

Every number shown comes out of results.json or of the paper's own figures (`evaluation/paper_tables.json`, read as a
file: this folder imports nothing from `evaluation/`).
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult


PAPER_FILE = Path(__file__).parents[1] / "evaluation" / "paper_tables.json"
NOT_YET = "not yet measured here"
TASKS = {
    "zcrl": "Long-text retrieval (ZCRL)",
    "zcrs": "Short-text retrieval (ZCRS)",
    "zic": "Zero-shot classification (ZIC)",
    "selo": "Semantic localization (SeLo)",
}
HUB_TASKS = {
    "zcrl": "image-text-retrieval",
    "zcrs": "image-text-retrieval",
    "zic": "zero-shot-image-classification",
    "selo": "semantic-localization",
}
DIGITS = {"selo": 4}  # the paper prints percent with 2
LESS_IS_BETTER = "Ras"


@cache
def paper_tables() -> dict[str, Any]:
    """The paper's figures as printed, see `evaluation/paper.py`."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


def paper_rows(model: str | None, task: str) -> dict[str, dict[str, float]]:
    """Data set -> figures by metric, for one model (a key such as `lrsclip-vit-b-16`) and task, in the paper's order."""
    second = [table for table in paper_tables()["further"] if table["source"] == "v2"]  # of the paper
    metrics, figures = paper_tables()["metrics"][task], {}
    for table in [*paper_tables()["tables"].values(), *second]:
        if table["task"] != task:
            continue
        if "columns" in table:
            row = zip(table["columns"], table["rows"].get(model, ()))
            figures |= {name: {metrics[0]: value} for name, value in row}
        else:
            rows = table["rows"].items()
            figures |= {name: dict(zip(metrics, models[model])) for name, models in rows if model in models}
    return figures


def select_model(document: dict[str, Any], weights_sha256: str, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """
    The description and the results of the model with these weights.

    Args:
        document: content of `results.json`.
        weights_sha256: hash of the weights.
        folder: theirs, for the error.

    Returns:
        Description and results.

    Raises:
        `ValueError`: for a document that is not evaluation.run's, that measured other weights only, or that holds a metric
            which can be none.
    """
    if not isinstance(document, dict) or not {"models", "results", "environment"} <= document.keys():
        missing = "no models, results and environment"
        raise ValueError(f"the results hold {missing}; give the results.json of evaluation.run.")
    for model in document["models"]:
        if model.get("weights_sha256") == weights_sha256:
            results = [result for result in document["results"] if result["model"] == model["label"]]
            for result in results:
                _check_metrics(result)
            return model, results
    hashes = [(model.get("label"), model.get("weights_sha256")) for model in document["models"]]
    measured = ", ".join(f"{label} ({sha256[:12] if sha256 else 'no hash'})" for label, sha256 in hashes)
    raise ValueError(
        f"the results are those of {measured or 'no model'}, not of the weights in {folder} ({weights_sha256[:12]}); "
        f"measure these: python -m evaluation.run --model {folder} …"
    )


def _check_metrics(result: dict[str, Any]) -> None:
    most = 1 if result["task"] == "selo" else 100
    for name, value in result["metrics"].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= most:  # NaN is neither
            raise ValueError(
                f"the results say {name} = {value} for {result['task']} on {result['dataset']}, which lies between 0 and "
                f"{most}; give the results.json as evaluation.run wrote it."
            )


# -------------------------------------------------------------------------------------------------------------- tables


def results_section(results: Sequence[dict[str, Any]], paper_model: str | None) -> str:
    """
    The four tables, as Markdown: measured, and where the paper has the model, its figure and the gap.

    Args:
        results: of one model, as in results.json.
        paper_model: whose rows of the paper stand beside, or in place of, what was measured; None for no model of it.
    """
    parts = []
    for task, title in TASKS.items():
        rows = paper_rows(paper_model, task)
        measured = [_with_paper(result, rows) for result in results if result["task"] == task]
        parts += [f"### {title}", ""]
        if measured or rows:
            lines = _one_metric_table if len(paper_tables()["metrics"][task]) == 1 else _table
            parts += [*lines(task, measured, rows), "", *_notes(task, measured)]
        else:
            parts += [f"{NOT_YET.capitalize()}.", ""]
    return "\n".join(parts).strip()


def _table(task: str, measured: Sequence[dict[str, Any]], paper: dict[str, dict[str, float]]) -> list[str]:
    """A row measured, one of the paper and one of the gap for each data set; metrics in columns."""
    metrics = paper_tables()["metrics"][task]
    lines = [_line(["data set", "", *map(_heading, metrics)]), _rule(2, len(metrics))]
    for result in measured:
        lines.append(_line([_dataset(result), "measured", *_cells(task, result["metrics"], metrics)]))
        if "paper" in result:
            lines.append(_line(["", "paper", *_cells(task, result["paper"], metrics)]))
            lines.append(_line(["", "gap", *_cells(task, result["gap"], metrics, "+")]))
    for key, figures in _unmeasured(measured, paper).items():
        lines.append(_line([_paper_name(key), NOT_YET, *["–"] * len(metrics)]))
        lines.append(_line(["", "paper", *_cells(task, figures, metrics)]))
    return lines


def _one_metric_table(task: str, measured: Sequence[dict[str, Any]], paper: dict[str, dict[str, float]]) -> list[str]:
    """A row for each data set; measured, paper and gap in columns."""
    metrics = paper_tables()["metrics"][task]
    lines = [_line([f"{metrics[0]}, %", "measured", "paper", "gap"]), _rule(1, 3)]
    for result in measured:
        kinds = [("metrics", ""), ("paper", ""), ("gap", "+")]
        cells = [cell for kind, sign in kinds for cell in _cells(task, result.get(kind, {}), metrics, sign)]
        lines.append(_line([_dataset(result), *cells]))
    for key, figures in _unmeasured(measured, paper).items():
        # The paper's mean is of its six sets; what was measured of them is shown set by set.
        cell = "–" if key == "mean" and measured else NOT_YET
        lines.append(_line([_paper_name(key), cell, *_cells(task, figures, metrics), "–"]))
    return lines


def _with_paper(result: dict[str, Any], paper: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The paper's figure and the gap of a model that evaluation.run did not know by its name, on the very same data."""
    if "paper" in result or "remarks" in result:
        return result
    for key, figures in paper.items():
        known = paper_tables()["datasets"].get(key, {})
        counted = all(result.get(noun) == known[noun] for noun in ("images", "texts") if noun in known)
        if _squeeze(key) == _squeeze(result["dataset"]) and counted:
            metrics = result["metrics"]
            gap = {name: round(metrics[name] - value, 4) for name, value in figures.items() if name in metrics}
            return result | {"paper": figures, "gap": gap}
    return result


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _unmeasured(measured: Sequence[dict[str, Any]], paper: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The paper's rows that stand beside nothing measured."""
    shown = [result["paper"] for result in measured if "paper" in result]
    return {key: figures for key, figures in paper.items() if figures not in shown}


def _dataset(result: dict[str, Any]) -> str:
    counts = [f"{result[noun]:,} {noun}" for noun in ("images", "texts") if noun in result]
    counted = f" ({', '.join(counts)})" if counts else ""
    return result["dataset"] + counted + (" †" if "seen" in result else "")


def _paper_name(key: str) -> str:
    return paper_tables()["datasets"][key]["name"] if key in paper_tables()["datasets"] else f"{key} of the six"


def _heading(metric: str) -> str:
    name = metric.replace("text_to_image_", "T→I ").replace("image_to_text_", "I→T ")
    return f"{name} ↓" if metric == LESS_IS_BETTER else name


def _cells(task: str, values: dict[str, float], metrics: Sequence[str], sign: str = "") -> list[str]:
    digits = DIGITS.get(task, 2)
    return [f"{values[name]:{sign}.{digits}f}" if name in values else "–" for name in metrics]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(words: int, numbers: int) -> str:
    return "|" + "|".join([":--"] * words + ["--:"] * numbers) + "|"


def _notes(task: str, measured: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- † seen, not zero-shot: {result['seen']}." for result in measured if "seen" in result]
    lines += [f"- {remark}" for result in measured for remark in result.get("remarks", [])]
    return [*dict.fromkeys(lines), ""] if lines else []


def tokens_section(results: Sequence[dict[str, Any]]) -> str:
    """Markdown on the length of the measured texts, the share that the model cut, and recall against tokens kept."""
    counted = [result for result in results if {"tokens", "share_truncated", "texts"} <= result.keys()]
    if not counted:
        return f"How many of a benchmark's texts are cut, and recall against the number of tokens kept: {NOT_YET}."
    lines = [_line(["texts of", "number", "mean tokens", "longest", "cut, %"]), _rule(1, 4)]
    for result in counted:
        tokens = result["tokens"]
        numbers = [f"{result['texts']:,}", f"{tokens['mean']:.1f}", f"{tokens['longest']}"]
        lines.append(_line([_named(result), *numbers, f"{100 * result['share_truncated']:.2f}"]))
    for result in counted:
        if curve := result.get("curve"):
            lines += ["", f"R@1 on {_named(result)} when only the first tokens of each text are kept:", ""]
            lines += [_line(["tokens kept", *(str(point["tokens"]) for point in curve)]), _rule(1, len(curve))]
            for metric in ("text_to_image_R@1", "image_to_text_R@1"):
                lines.append(_line([_heading(metric), *(f"{point[metric]:.2f}" for point in curve)]))
    return "\n".join(lines)


def _named(result: dict[str, Any]) -> str:
    return f"{result['dataset']}, {TASKS.get(result['task'], result['task'])}"


# ---------------------------------------------------------------------------------------------------------- model-index


def eval_results(results: Sequence[dict[str, Any]]) -> list[EvalResult]:
    """
    The measured metrics for the card's `model-index`; never a figure of the paper, nor one on data seen in training.

    The task's short name is the configuration and the protocol, if any, goes with it: without that, the Hub would
    merge long and short retrieval on the same images.
    """
    entries = []
    for result in results:
        if "seen" in result:
            continue
        task = result["task"]
        hashes = {name: result[name] for name in ("images_sha256", "texts_sha256", "labels_sha256") if name in result}
        for metric, value in result["metrics"].items():
            entries.append(
                EvalResult(
                    task_type=HUB_TASKS.get(task, task),
                    task_name=TASKS.get(task, task),
                    dataset_type=result["dataset"].lower(),
                    dataset_name=result["dataset"],
                    dataset_config="-".join([task, *filter(None, [result.get("protocol")])]),
                    dataset_split="test",
                    dataset_args=hashes or None,
                    metric_type=metric,
                    metric_name=metric.replace("_", " "),
                    metric_value=round(value, DIGITS.get(task, 2)),
                )
            )
    return entries
