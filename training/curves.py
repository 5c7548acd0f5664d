"""The picture of a run: losses, and recall on the held-out pairs, by step."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_lrsclip.files.atomic import replacing


LOSSES = {"loss": "#22303c", "long_loss": "#1769aa", "short_loss": "#d1603d"}
RECALLS = {"mR": "#22303c", "long_mR": "#1769aa", "short_mR": "#d1603d"}


def draw_curves(records: list[dict], path: Path) -> Path:
    """
    Writes a PNG of the losses and, where there are any, of the validations; drawn from `log.jsonl` alone, so that a
    resumed run's is whole.

    Args:
        records: the log's lines.
        path: replaced in one step.
    """
    validations = [record for record in records if record["kind"] == "validation"]
    figure = Figure(figsize=(11 if validations else 6, 4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if validations else 1, squeeze=False)[0]
    _draw(axes[0], [record for record in records if record["kind"] == "train"], LOSSES, "loss")
    if validations:
        _draw(axes[1], validations, RECALLS, "recall on held-out pairs, %", marker="o")
    with replacing(path) as growing:
        figure.savefig(growing, format="png")
    return path


def _draw(axes: Axes, records: list[dict], colours: dict[str, str], label: str, marker: str | None = None) -> None:
    for name, colour in colours.items():
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points), color=colour, linewidth=1.4, marker=marker, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.grid(color="#d9dfe5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if records:
        axes.legend(frameon=False)
