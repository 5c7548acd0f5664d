"""A picture of an ablation: a panel per task, what was measured here beside the paper's figures where it prints them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.figures.retrieval import GREY, INK, blank_figure, style_axes

from .studies import TASKS, Study


HERE, PAPER = "#1769aa", "#d1a03d"
PANEL, HEIGHT, HEAD, FOOT, LEFT = 3.0, 3.6, 0.85, 0.75, 0.55  # inches
MANY = 6  # points whose figures have room to be written


class Point(NamedTuple):
    """A figure and the ends of its bar; percent, Rmi from 0 to 1."""

    value: float
    low: float
    high: float


def draw_study(
    study: Study,
    here: Mapping[str, Mapping[str, Point]],
    paper: Mapping[str, Mapping[str, float]] | None,
    path: Path,
    subtitle: str,
) -> Path:
    """
    Draw a study: lines where the paper plots lines, bars where it prints a table.

    Args:
        study: what is drawn.
        here: by task and arm.
        paper: by arm and task, as printed; None where the paper prints no figures.
        path: of the PNG.
        subtitle: what the bars at the points are.

    Returns:
        `path`.
    """
    width = LEFT + PANEL * max(2, len(here))
    figure = blank_figure(width, HEIGHT)
    names = [arm.name for arm in study.arms]
    for index, (task, points) in enumerate(here.items()):
        box = (LEFT + PANEL * index, FOOT, PANEL - 0.55, HEIGHT - HEAD - FOOT - 0.15)
        axes = figure.add_axes([box[0] / width, box[1] / HEIGHT, box[2] / width, box[3] / HEIGHT])
        if study.figure:
            _lines(axes, names, points)
        else:
            _bars(axes, names, points, paper and {name: row[task] for name, row in paper.items()})
        axes.set_xticklabels([name.replace(" on ", "\non ") for name in names])
        axes.set_title(TASKS[task], fontsize=10, color=INK, loc="left")
        axes.set_xlabel(study.axis, fontsize=9, color=GREY)
        style_axes(axes, 8)
    figure.text(0.15 / width, 1 - 0.3 / HEIGHT, study.title, fontsize=13, weight="bold", color=INK)
    figure.text(0.15 / width, 1 - 0.55 / HEIGHT, subtitle, fontsize=9, color=GREY)
    if not study.figure and paper:
        for position, (color, text) in enumerate(((HERE, "■ here"), (PAPER, "■ paper"))):
            figure.text(1 - (1.5 - 0.7 * position) / width, 1 - 0.3 / HEIGHT, text, fontsize=10, color=color)
    figure.savefig(path)
    return path


def _lines(axes: Any, names: Sequence[str], points: Mapping[str, Point]) -> None:
    values = [points[name].value for name in names]
    positions = range(len(names))
    lows, highs = ([getattr(points[name], end) for name in names] for end in ("low", "high"))
    axes.fill_between(positions, lows, highs, color=HERE, alpha=0.15)
    axes.plot(positions, values, color=HERE, linewidth=2, marker="o", markersize=5, markeredgecolor="white")
    best = max(positions, key=lambda x: values[x])
    axes.plot([best], [values[best]], marker="o", markersize=8, color=HERE)
    low, high = min(lows), max(highs)
    room = 0.1 * (high - low) or 1.0
    axes.set(xlim=(-0.3, len(names) - 0.7), ylim=(low - room, high + room), xticks=list(positions))
    for x in positions if len(names) <= MANY else sorted({0, best, len(names) - 1}):
        label = _written(values[x])
        axes.annotate(label, (x, values[x]), (0, 7), textcoords="offset points", fontsize=8, color=INK, ha="center")


def _bars(axes: Any, names: Sequence[str], points: Mapping[str, Point], paper: Mapping[str, float] | None) -> None:
    width = 0.38
    shown = [point.high for point in points.values()] + list((paper or {}).values())
    for x, name in enumerate(names):
        point = points[name]
        left = x - (width / 2 if paper else 0)
        axes.bar(left, point.value, width, color=HERE)
        axes.plot([left, left], [point.low, point.high], color=INK, linewidth=1)
        axes.text(left, point.high + 0.015 * max(shown), _written(point.value), fontsize=8, color=INK, ha="center")
        if paper and name in paper:
            axes.bar(x + width / 2, paper[name], width, color=PAPER)
            text = _written(paper[name])
            axes.text(x + width / 2, paper[name] + 0.015 * max(shown), text, fontsize=8, color=GREY, ha="center")
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 1.12 * max(shown)), xticks=range(len(names)))


def _written(value: float) -> str:
    return f"{value:.3f}" if value <= 1 else f"{value:.1f}"
