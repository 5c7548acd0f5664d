"""Pictures of what a data set holds; every function writes one PNG and returns its path."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm

from evaluation.figures.retrieval import (
    CLIP_POSITIONS,
    FAINT,
    GREY,
    INK,
    LINES,
    LONG_POSITIONS,
    blank_figure,
    style_axes,
)


BIN = 5  # tokens
_COLORS = {"long": LINES[0], "short": LINES[1]}


def draw_token_lengths(histograms: Mapping[str, Sequence[int]], path: Path, name: str = "") -> Path:
    """
    Draw the lengths of the long and the short texts (paper, Fig. 6).

    Args:
        histograms: for `long` and `short` the number of texts by their number of tokens, from 0 on.
        path: PNG to write.
        name: of the data set, for the heading.

    Returns:
        `path`.
    """
    binned = {}
    for which, counts in histograms.items():
        counts = np.asarray(counts)
        binned[which] = np.pad(counts, (0, -len(counts) % BIN)).reshape(-1, BIN).sum(axis=1)
    end = max(BIN * max(map(len, binned.values())), LONG_POSITIONS + 2 * BIN)
    top = max(counts.max() for counts in binned.values())
    figure = blank_figure(8.2, 4.2)
    axes = figure.add_axes((0.1, 0.14, 0.86, 0.64))
    for which, counts in binned.items():
        starts = BIN * np.arange(len(counts))
        color = _COLORS[which]
        axes.bar(starts, counts, width=BIN, align="edge", color=color, alpha=0.72, edgecolor="white", linewidth=0.5)
    for positions in (CLIP_POSITIONS, LONG_POSITIONS):
        axes.axvline(positions, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.text(positions, 1.08 * top, f"{positions}", color=INK, fontsize=8.5, ha="center", va="bottom")
    axes.set(xlim=(0, end), ylim=(0, 1.06 * top))
    axes.set_xlabel("tokens of a text, start and end included", color=INK, labelpad=6)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    style_axes(axes)
    figure.text(0.1, 0.93, "How long the captions are", fontsize=13, weight="bold", color=INK)
    subtitle = f"texts by length, {BIN} tokens a bar" + (f", in {name}" if name else "")
    figure.text(0.1, 0.875, f"{subtitle} · dotted: what CLIP (77) and LRSCLIP (248) read", fontsize=9.5, color=GREY)
    for column, which in enumerate(binned):
        figure.text(0.8 + 0.09 * column, 0.93, f"■ {which}", fontsize=10, color=_COLORS[which])
    figure.savefig(path)
    return path


def draw_map(places: np.ndarray, path: Path, name: str = "") -> Path:
    """
    Draw where on Earth the images are, on a graticule; no coastlines, which would need a file from elsewhere.

    Args:
        places (180, 360): rows by degree of latitude, from the south, and of longitude, from the west.
        path: PNG to write.
        name: of the data set, for the heading.

    Returns:
        `path`.
    """
    figure = blank_figure(9.4, 5.3)
    axes = figure.add_axes((0.065, 0.09, 0.82, 0.72))
    latitude, longitude = np.nonzero(places)
    counts = places[latitude, longitude]
    norm = LogNorm(1, max(10, counts.max()))
    dots = axes.scatter(
        longitude - 179.5, latitude - 89.5, c=counts, s=9, marker="s", cmap="viridis_r", norm=norm, linewidths=0
    )
    axes.set(xlim=(-180, 180), ylim=(-90, 90), xticks=range(-180, 181, 60), yticks=range(-90, 91, 30), aspect="equal")
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}°{'W' if value < 0 else 'E' if value else ''}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}°{'S' if value < 0 else 'N' if value else ''}")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.axhline(0, color=GREY, linewidth=0.8)
    for tropic in (-23.44, 23.44):
        axes.axhline(tropic, color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0, labelsize=9, pad=6)
    axes.tick_params(axis="x", pad=12)  # the corner's two labels apart
    axes.spines[:].set_color(FAINT)
    bar = figure.colorbar(dots, cax=figure.add_axes((0.915, 0.2, 0.016, 0.5)))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    bar.ax.tick_params(which="both", colors=GREY, labelsize=8.5)
    figure.text(0.065, 0.93, "Where the images are", fontsize=13, weight="bold", color=INK)
    subtitle = f"{counts.sum():,} rows with coordinates" + (f" of {name}" if name else "")
    figure.text(0.065, 0.88, f"{subtitle} · rows a degree · dashed: tropics", fontsize=9.5, color=GREY)
    figure.savefig(path)
    return path
