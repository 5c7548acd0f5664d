"""
Zero-shot classification (ZIC): each image goes to the class whose prompt is most similar to it.

Shapes: M images, C classes, T templates, D width of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_lrsclip.encoding import Embeddings, Encoder
from modeling_lrsclip.encoding.model_inputs import encode_texts, share_truncated, token_lengths
from modeling_lrsclip.encoding.ties import SCORE_TIE
from modeling_lrsclip.files.hashing import json_sha256

from .benchmarks.class_names import Templates, known_datasets, load_templates
from .benchmarks.classification_data import ClassificationData, find_sources, load_classification
from .paper import paper_note
from .results import SEEN, Aside, Column, Gap, Table, rows_beside, seen_notes
from .retrieval import check_embeddings, check_indices


# ------------------------------------------------------------------------------------------------------------- measure


class Predictions(NamedTuple):
    """The class that each image was taken for. `predicted` equals the label exactly where the label won alone."""

    predicted: Tensor  # (M,) int64, class index
    correct: Tensor  # (M,) bool


def classify(image_embeds: Any, class_embeds: Any, labels: Any) -> Predictions:
    """
    The most similar class of each image by dot product.

    Ties count against the model: where another class scores as high as the right one, the first such class is the
    prediction. Scores are summed in float64 and tie within `SCORE_TIE`, so that equal embeddings tie on every processor.

    Args:
        image_embeds: (M, D) tensor or array, unit rows.
        class_embeds: (C, D) tensor or array, unit rows; at least two.
        labels: (M,) integers, the class of image i.

    Returns:
        [`Predictions`] of the M images.

    Raises:
        `ValueError`: for shapes that do not fit, values that are not finite, labels out of range, fewer than two
            classes.
    """
    images, classes = check_embeddings({"image_embeds": image_embeds, "class_embeds": class_embeds}, least=(1, 2))
    labels = check_indices("labels", labels, len(images), len(classes), "image", "class").to(images.device)
    scores = images.double() @ classes.double().T  # (M, C)
    right_scores = scores.gather(1, labels[:, None]).squeeze(1)  # (M,)
    scores.scatter_(1, labels[:, None], -torch.inf)
    rival_score = scores.amax(dim=1)  # (M,) the best of the wrong classes
    rival = (scores >= rival_score[:, None] - SCORE_TIE).int().argmax(dim=1)  # (M,) the first that scores as high
    correct = right_scores > rival_score + SCORE_TIE
    return Predictions(torch.where(correct, labels, rival), correct)


def confusion_matrix(labels: Any, predicted: Any, classes: int) -> Tensor:
    """
    (C, C) int64 counts: row i, column j holds the images of class i that were taken for class j.

    Args:
        labels: (M,) true class of each image.
        predicted: (M,) class it was taken for.
        classes: C.

    Returns:
        (C, C) int64.
    """
    labels, predicted = torch.as_tensor(labels), torch.as_tensor(predicted)
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def classification_metrics(confusion: Any) -> dict[str, float]:
    """
    `accuracy` over all images, and `mean_per_class_accuracy` over the classes that have images; in percent.

    Args:
        confusion: (C, C) counts of [`confusion_matrix`].
    """
    confusion = torch.as_tensor(confusion)
    right, images = confusion.diagonal(), confusion.sum(dim=1)  # (C,)
    present = images > 0
    if not present.any():
        raise ValueError("the confusion matrix counts no image.")
    return {
        "accuracy": 100 * right.sum().item() / images.sum().item(),
        "mean_per_class_accuracy": 100 * (right[present] / images[present]).double().mean().item(),
    }


def class_embeddings(encoder: Encoder, class_names: Sequence[str], templates: Templates) -> Embeddings:
    """
    Unit embeddings of classes: the mean of the unit embeddings of a class's prompts, made a unit vector again.

    Args:
        encoder: the model.
        class_names: C names, as the prompts are to word them.
        templates: T prompts with a place for the name.

    Returns:
        (C, D) embeddings, and the seconds that encoding the prompts took.
    """
    prompts = [prompt for name in class_names for prompt in templates.fill(name)]
    embeds, seconds = encoder.texts(encode_texts(encoder.processor, prompts))  # (C * T, D)
    means = embeds.view(len(class_names), -1, embeds.shape[1]).mean(dim=1)  # (C, D)
    return Embeddings(F.normalize(means, dim=1), seconds)


# ---------------------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class ClassificationTask:
    """
    Zero-shot classification: loads images by class, and measures a model on them.

    Args:
        templates: a set of `benchmarks/classes/templates.json`, or a text file with one template a line.
        wording: of the class names, `human` or `folder`; see [`~benchmarks.class_names.Dataset.wordings`].

    Raises:
        `ValueError`: for templates that are not there or have no place for the class name.
    """

    templates: str = "paper"
    wording: str = "human"

    def __post_init__(self):
        load_templates(self.templates)

    def find_sources(self, path: str) -> list[str]:
        return find_sources(path)

    def load(self, source: str, allow_missing: int = 0) -> ClassificationData:
        return load_classification(source, allow_missing)

    def evaluate(self, encoder: Encoder, data: ClassificationData) -> dict[str, Any]:
        """
        Measures one model on one data set.

        Returns:
            `dict`: ready for JSON: `metrics` (percent), `per_class`, `confusion` (rows: true class), `labels`,
            `predictions` and `correct` per image, `prompts`, ….
        """
        templates, dataset = load_templates(self.templates), data.dataset
        names = dataset.wordings(self.wording)
        image_embeds, image_seconds = encoder.images(data.images)  # (M, D)
        class_embeds, text_seconds = class_embeddings(encoder, names, templates)  # (C, D)
        predicted, correct = classify(image_embeds, class_embeds, data.labels)
        confusion = confusion_matrix(data.labels, predicted, len(names))
        right, counts = confusion.diagonal().tolist(), confusion.sum(dim=1).tolist()
        per_class = [
            {"class": folder, "name": name, "images": count, "accuracy": 100 * hits / count if count else None}
            for folder, name, count, hits in zip(dataset.folders, names, counts, right, strict=True)
        ]
        prompts = [prompt for name in names for prompt in templates.fill(name)]
        lengths = token_lengths(encoder.processor, prompts)
        worded = {"template_set": templates.name, "version": templates.version, "templates": list(templates.templates)}
        return {
            "metrics": classification_metrics(confusion),
            "images": len(data.images),
            "classes": len(names),
            "data": data.describe(),
            "class_names": dataset.describe(self.wording),
            "prompts": worded | {"first": prompts[0], "sha256": json_sha256(prompts)},
            "share_truncated": share_truncated(lengths, encoder.positions),
            "seconds": {"images": image_seconds, "texts": text_seconds},
            "images_sha256": data.images.content_hash,
            "labels_sha256": data.labels_hash,
            "per_class": per_class,
            "confusion": confusion.tolist(),
            "labels": data.labels,
            "predictions": predicted.tolist(),
            "correct": correct.int().tolist(),
        }


# --------------------------------------------------------------------------------------------------------------- table


def classification_table(title: str, results: Sequence[dict[str, Any]]) -> Table:
    """
    Accuracy with a row per model and a column per data set, as the paper's Table IV; below it the paper's row and the
    gap, where there is one.

    Args:
        results: of this task, with `model`, `dataset`, and what [`~evaluation.paper.beside_paper`] adds. A figure of a
            model that has seen the data set is marked; it does not compete, and leaves no mean.
    """
    first = [dataset.name for dataset in known_datasets().values()]  # the columns of Table IV, in its order
    names = dict.fromkeys(result["dataset"] for result in results)
    datasets = sorted(names, key=lambda name: first.index(name) if name in first else len(first))
    in_paper = [dataset.name for dataset in known_datasets().values() if dataset.in_paper]
    averaged = in_paper if set(in_paper) <= set(datasets) else datasets
    columns = [Column("model"), *(Column(name, "", 1, True) for name in datasets)]
    columns.append(Column("mean" if len(datasets) > 1 else "per class", "" if len(datasets) > 1 else "mean", 1, True))
    table = Table(title + (f" · {datasets[0]}" if len(datasets) == 1 else ""), columns)
    for label in dict.fromkeys(result["model"] for result in results):
        by_dataset = {result["dataset"]: result for result in results if result["model"] == label}
        measured = {name: result["metrics"]["accuracy"] for name, result in by_dataset.items()}
        cells = measured | {name: f"{measured[name]:.1f} {SEEN}" for name in measured if "seen" in by_dataset[name]}
        if len(datasets) == 1:
            last = by_dataset[datasets[0]]["metrics"]["mean_per_class_accuracy"]
        else:
            last = _mean([cells.get(name) for name in averaged])
        table.rows.append([label, *(cells.get(name) for name in datasets), last])
        table.rows += _paper_rows(by_dataset, datasets, averaged)
    table.note = _note(results, datasets, averaged)
    return table


def _mean(cells: Sequence[Any]) -> float | None:
    """None where a figure is missing or marked."""
    return sum(cells) / len(cells) if all(isinstance(cell, float) for cell in cells) else None


def _paper_rows(by_dataset: dict[str, dict[str, Any]], datasets: Sequence[str], averaged: Sequence[str]) -> list[list]:
    """The paper's and others' figures of one model and the gaps to them; nothing where there are none."""
    beside: dict[tuple[str, type[Aside]], dict[str, Any]] = {}
    for dataset, result in by_dataset.items():
        of = "paper"
        for name, kind, figures in rows_beside(result):
            of = name if kind is Aside else of  # a gap is that to the row above it
            beside.setdefault((of, kind), {})[dataset] = kind(figures["accuracy"])
    rows = []
    for name, kind in sorted(beside, key=lambda key: (key[0] != "paper", key[0], key[1] is Gap)):
        cells = beside[name, kind]
        mean = _mean([cells.get(dataset) for dataset in averaged]) if len(datasets) > 1 else None
        label, shown = name if kind is Aside else "gap", "" if mean is None else kind(mean)
        rows.append([f"  {label}", *(cells.get(dataset, "") for dataset in datasets), shown])
    return rows


def _note(results: Sequence[dict[str, Any]], datasets: Sequence[str], averaged: Sequence[str]) -> str:
    prompts, wording = results[0]["prompts"], results[0]["class_names"]["wording"]
    names = {"folder": "folders' names as class names", "human": "class names as in evaluation/benchmarks/classes"}
    templates = f"Templates {prompts['template_set']}, {names[wording]}: {prompts['first']!r}, …"
    lines = [f"Accuracy in % over all images. {templates}"]
    if list(averaged) != list(datasets):
        lines.append(f"mean: of the paper's {len(averaged)} data sets.")
    if parts := [r["dataset"] for r in results if r["data"]["expected"] and not r["data"]["whole"]]:
        lines.append(f"Only a part of {', '.join(dict.fromkeys(parts))} was here.")
    return "\n".join([*lines, *paper_note(results), *seen_notes(results)])
