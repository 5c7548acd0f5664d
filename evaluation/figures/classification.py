"""Pictures of zero-shot classification; every function writes one PNG and returns its path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .retrieval import BEYOND, FAINT, GREY, INK, RIGHT, blank_figure


WRONG = "#d1603d"
RIGHT_SHADES = LinearSegmentedColormap.from_list("right", ["#ffffff", RIGHT])
WRONG_SHADES = LinearSegmentedColormap.from_list("wrong", ["#ffffff", "#f2b8a0", WRONG])
NUMBERED = 32  # classes up to which every cell says its percentage


def draw_confusion_matrix(result: Mapping[str, Any], path: Path, label: str = "", dataset: str = "") -> Path:
    """
    Draw which classes a model takes for which: a row per true class, its images' predictions in percent, and the class's
    accuracy at the right.

    Args:
        result: of [`~evaluation.classification.ClassificationTask.evaluate`].
        path: PNG to write.
        label, dataset: names of the model and of the data set, for the heading.

    Returns:
        `path`.
    """
    names = [row["name"] for row in result["per_class"]]
    counts = np.asarray(result["confusion"], dtype=float)  # (C, C)
    images = counts.sum(axis=1, keepdims=True)  # (C, 1)
    shares = 100 * counts / np.maximum(images, 1)  # (C, C) of each row, percent
    size = len(names)
    cell = 0.34 if size <= NUMBERED else 0.22  # inches
    longest = max(map(len, names))
    left, top, right, bottom = 0.55 + 0.075 * longest, 1.0, 2.35, 0.5 + 0.07 * longest
    width, height = max(left + size * cell + right, 7.5), top + size * cell + bottom
    figure = blank_figure(width, height)
    box = (left / width, bottom / height, size * cell / width, size * cell / height)
    axes = figure.add_axes(box)
    _draw_cells(axes, shares, images[:, 0])
    axes.set_xticks(range(size), names, rotation=90, fontsize=8, color=INK, parse_math=False)
    axes.set_yticks(range(size), names, fontsize=8, color=INK, parse_math=False)
    axes.set_xlabel("taken for", color=GREY, fontsize=9, labelpad=6)
    axes.set_ylabel("true class", color=GREY, fontsize=9, labelpad=6)
    _draw_accuracies(figure, box, result["per_class"])
    _head(figure, result, label, dataset)
    figure.savefig(path)
    return path


def _draw_cells(axes: Any, shares: np.ndarray, images: np.ndarray) -> None:
    size = len(shares)
    diagonal = np.eye(size, dtype=bool)
    colors = np.where(diagonal[..., None], RIGHT_SHADES(shares / 100), WRONG_SHADES(np.minimum(shares / 50, 1)))
    colors[images == 0] = (0.94, 0.95, 0.96, 1)
    axes.imshow(colors, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=FAINT, linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(FAINT)
    if size > NUMBERED:
        return
    for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
        share = shares[row, column]
        dark = share > (60 if row == column else 35)
        style = {"color": "white" if dark else INK, "weight": "bold" if row == column else "normal"}
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, **style)


def _draw_accuracies(figure: Figure, box: tuple[float, ...], classes: list[dict[str, Any]]) -> None:
    """Bars of accuracy beside the rows, with the number of images."""
    inch = 1 / figure.get_figwidth()
    axes = figure.add_axes((box[0] + box[2] + 0.18 * inch, box[1], 1.1 * inch, box[3]))
    axes.set(xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5))
    axes.axis("off")
    for row, entry in enumerate(classes):
        if entry["images"]:
            axes.add_patch(Rectangle((0, row - 0.32), 100, 0.64, color=FAINT, linewidth=0))
            axes.add_patch(Rectangle((0, row - 0.32), entry["accuracy"], 0.64, color=BEYOND, linewidth=0))
        says = f"{entry['accuracy']:.0f} % of {entry['images']:,}" if entry["images"] else "no image"
        axes.text(106, row, says, fontsize=7.5, color=INK if entry["images"] else GREY, va="center", clip_on=False)


def _head(figure: Figure, result: Mapping[str, Any], label: str, dataset: str) -> None:
    metrics, height = result["metrics"], figure.get_figheight()
    heading = " · ".join(part for part in (dataset, label) if part) or "Zero-shot classification"
    x = 0.3 / figure.get_figwidth()
    figure.text(x, 1 - 0.38 / height, heading, fontsize=13, weight="bold", color=INK, parse_math=False)
    accuracy, per_class = metrics["accuracy"], metrics["mean_per_class_accuracy"]
    says = f"{accuracy:.1f} % of {result['images']:,} images right, {per_class:.1f} % per class on average · rows in %"
    prompt = f"“{result['prompts']['templates'][0]}”" + ("" if len(result["prompts"]["templates"]) == 1 else ", …")
    figure.text(x, 1 - 0.62 / height, says, fontsize=9.5, color=GREY)
    figure.text(x, 1 - 0.82 / height, f"prompt {prompt}", fontsize=9.5, color=GREY, parse_math=False)
