"""Pictures of retrieval; every function writes one PNG and returns its path."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.image_processing_lrsclip import to_rgb

from ..retrieval import TOKEN_BIN


CLIP_POSITIONS, LONG_POSITIONS = 77, 248
INK, GREY, PALE, FAINT = "#22303c", "#7b8794", "#aeb8c1", "#d9dfe5"
RIGHT, BEYOND = "#1f9d55", "#1769aa"
LINES = ("#1769aa", "#d1603d", "#6b7785", "#1f9d55", "#8a5aa8", "#b8860b", "#00838f", "#ad1457")
FONT, TEXT_SIZE, LEADING, SPACE = "DejaVu Sans", 8.2, 0.165, 0.045  # points; inches between lines, between words
DPI = 160


def blank_figure(width: float, height: float) -> Figure:
    """A white figure in inches, drawn without pyplot, so that nothing global is touched."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, size: float = 9) -> None:
    """Leave of the axes a grid of horizontal lines and ticks in grey, `size` points high."""
    axes.tick_params(colors=GREY, length=0, labelsize=size)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def draw_recall_vs_tokens(
    curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path, dataset: str = "", longest: int = 248
) -> Path:
    """
    Draw R@1 text to image against tokens kept, a line per model (paper, Fig. 3).

    Args:
        curves: per model its points `{"tokens": …, "text_to_image_R@1": …}` by rising length; the last one is the
            model's number of positions, from where the line goes on dashed: longer texts change nothing.
        path: PNG to write.
        dataset: its name, for the heading.
        longest: tokens of the longest text, where the axis ends if no model reads that far.

    Returns:
        `path`.
    """
    figure = blank_figure(8.2, 4.7)
    axes = figure.add_axes((0.085, 0.13, 0.66, 0.665))
    end = max(points[-1]["tokens"] for points in curves.values())
    end = max(end, min(longest, 2 * end)) if len(curves) == 1 else end
    top = max(point["text_to_image_R@1"] for points in curves.values() for point in points)
    ticks = sorted({point["tokens"] for points in curves.values() for point in points})
    limit = min(100.0, max(5.0, 1.12 * top)) if top < 90 else 103.0
    labels = []
    for (label, points), color in zip(curves.items(), itertools.cycle(LINES)):
        x, y = [point["tokens"] for point in points], [point["text_to_image_R@1"] for point in points]
        dots = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white"}
        axes.plot(x, y, color=color, linewidth=2.2, zorder=3, clip_on=False, **dots)
        if x[-1] < end:
            dashes = {"linestyle": (0, (2, 2)), "alpha": 0.7}
            axes.plot([x[-1], end], [y[-1]] * 2, color=color, linewidth=1.6, zorder=2, **dashes)
        labels.append((y[-1], f"{label if len(label) < 27 else label[:25] + '…'}  {y[-1]:.1f}", color))
    axes.axvline(CLIP_POSITIONS, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.text(CLIP_POSITIONS, 1.012 * limit, "CLIP reads 77", color=GREY, fontsize=8.5, ha="center", va="bottom")
    axes.set(xlim=(0, end), ylim=(0, limit), xticks=[0, *ticks] if end in ticks else [0, *ticks, end])
    for tick in axes.get_xticklabels():
        tick.set_fontweight("bold" if tick.get_text() == str(CLIP_POSITIONS) else "normal")
    axes.set_xlabel("tokens kept of each text", color=INK, labelpad=6)
    style_axes(axes)
    _label_ends(axes, labels, end, limit)
    figure.text(0.085, 0.93, "How much of a long text each model uses", fontsize=13, weight="bold", color=INK)
    subtitle = "R@1 text to image, %" + (f", on {dataset}" if dataset else "")
    dashed = any(points[-1]["tokens"] < end for points in curves.values())
    subtitle += " · dashed: beyond the model's positions, nothing more is read" if dashed else ""
    figure.text(0.085, 0.877, subtitle, fontsize=9.5, color=GREY)
    figure.savefig(path)
    return path


def _label_ends(axes: Any, labels: list[tuple[float, str, str]], x: float, limit: float) -> None:
    """Names the lines at their right ends, pushed apart where they would overlap."""
    gap = 0.055 * limit
    placed: list[float] = []
    order = sorted(range(len(labels)), key=lambda index: labels[index][0])
    for index in order:
        placed.append(max(labels[index][0], placed[-1] + gap if placed else 0))
    overshoot = max(0.0, placed[-1] - limit)
    for position in range(len(placed) - 1, -1, -1):  # push down again what left the axes
        above = placed[position + 1] - gap if position + 1 < len(placed) else placed[position] - overshoot
        placed[position] = min(placed[position], above)
    for position, index in zip(placed, order, strict=True):
        y, text, color = labels[index]
        arrow = {"arrowstyle": "-", "color": color, "alpha": 0.5, "linewidth": 0.8}
        arrow |= {"shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
        style = {"color": color, "fontsize": 9.5, "va": "center"}
        axes.annotate(text, (x, y), (x * 1.03, position), annotation_clip=False, arrowprops=arrow, **style)


def draw_token_lengths(counts: Sequence[int], path: Path, dataset: str = "") -> Path:
    """
    Draw how long the texts are (paper, Fig. 6), with the lengths that a model of 77 and of 248 positions reads whole.

    Args:
        counts: texts by their number of tokens, in bins of `TOKEN_BIN` from 0 on.
        path: PNG to write.
        dataset: its name, for the heading.

    Returns:
        `path`.
    """
    figure = blank_figure(8.2, 3.9)
    axes = figure.add_axes((0.085, 0.15, 0.88, 0.62))
    starts = [TOKEN_BIN * index for index in range(len(counts))]
    axes.bar(starts, counts, width=TOKEN_BIN, align="edge", color=BEYOND, edgecolor="white", linewidth=0.8)
    end = max(starts[-1] + TOKEN_BIN, CLIP_POSITIONS + 3 * TOKEN_BIN)
    axes.set(xlim=(0, end), ylim=(0, 1.05 * max(counts)))
    read = f"dotted: what CLIP reads ({CLIP_POSITIONS})"
    for positions in (CLIP_POSITIONS, LONG_POSITIONS)[: 1 + (end > LONG_POSITIONS)]:
        axes.axvline(positions, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.text(positions, 1.07 * max(counts), f"{positions}", color=INK, fontsize=8.5, ha="center", va="bottom")
    axes.set_xlabel("tokens of a text, start and end included", color=INK, labelpad=6)
    style_axes(axes)
    figure.text(0.085, 0.92, "How long the texts are", fontsize=13, weight="bold", color=INK)
    subtitle = f"{sum(counts):,} texts" + (f" of {dataset}" if dataset else "")
    whole = end <= LONG_POSITIONS
    read += f"; LRSCLIP reads {LONG_POSITIONS}, all of each" if whole else f" and LRSCLIP ({LONG_POSITIONS})"
    figure.text(0.085, 0.855, f"{subtitle} · {read}", fontsize=9.5, color=GREY)
    figure.savefig(path)
    return path


# ------------------------------------------------------------------------------------------------------------ gallery


class Sheet:
    """A page on which positions are inches from the top left corner."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = blank_figure(width, height)

    def text(
        self, x: float, y: float, text: str, size: float = 8.5, color: str = GREY, weight: str = "normal"
    ) -> None:
        """
        Write a line of text.

        Args:
            x, y: where it begins, on its base line.
            text: is set as it is, dollar signs too.
            size: points.
            color, weight: as matplotlib names them.
        """
        x, y = x / self.width, 1 - y / self.height
        self.figure.text(x, y, text, fontsize=size, color=color, weight=weight, family=FONT, parse_math=False)

    def rule(self, x: float, y: float, length: float) -> None:
        """
        Draw a thin horizontal line.

        Args:
            x, y: its left end.
            length: inches.
        """
        corner = (x / self.width, 1 - y / self.height)
        self.figure.add_artist(Rectangle(corner, length / self.width, 0, edgecolor=FAINT, linewidth=0.8))

    def tile(
        self, x: float, y: float, side: float, image: Image.Image, color: str, line: float, style: Any = "-"
    ) -> None:
        """
        Show an image in a frame.

        Args:
            x, y: the upper left corner.
            side: inches.
            image: its middle square is shown.
            color, line, style: of the frame, as matplotlib names them; `line` in points.
        """
        box = (x / self.width, 1 - (y + side) / self.height, side / self.width, side / self.height)
        axes = self.figure.add_axes(box, xticks=[], yticks=[])
        square = ImageOps.fit(to_rgb(image), (256, 256), Image.Resampling.BICUBIC)  # the middle, as models see it
        axes.imshow(square, aspect="auto")
        for spine in axes.spines.values():
            spine.set(edgecolor=color, linewidth=line, linestyle=style)


def draw_retrieval_gallery(
    examples: Sequence[Mapping[str, Any]], images: ImageFiles, path: Path, label: str = "", positions: int = 248
) -> Path:
    """
    Draw texts with the images that a model ranks first for them (paper, Fig. 1 and 8).

    Args:
        examples: as `evaluation.retrieval` returns them: `text`, `word_tokens`, `image`, `rank`, `found`.
        images: all images, indexed by `image` and `found`.
        path: PNG to write.
        label: the model's name, for the heading.
        positions: tokens that the model reads; words beyond are set pale.

    Returns:
        `path`.
    """
    text_width, side, gap, margin, head = 4.6, 1.42, 0.12, 0.35, 0.95  # inches
    left = margin + text_width + 0.3  # where the images start
    layouts = [_wrap(example, text_width, positions) for example in examples]
    heights = [max(side + 0.55, LEADING * words[-1].line + 0.62) for words in layouts]
    shown = max(len(example["found"]) for example in examples)
    missed = any(example["image"] not in example["found"] for example in examples)
    right = left + shown * (side + gap) + (0.25 + side if missed else -gap)
    sheet = Sheet(max(right + margin, 10.5), head + sum(heights) + 0.1)
    sheet.text(margin, 0.38, f"What {label or 'the model'} finds for a text", 14, INK, "bold")
    sheet.text(margin, 0.66, _legend(layouts, missed), 9.5)
    top = head
    for example, words, height in zip(examples, layouts, heights, strict=True):
        sheet.rule(margin, top - 0.06, sheet.width - 2 * margin)
        for word in words:
            sheet.text(margin + word.x, top + 0.19 + LEADING * word.line, word.text, TEXT_SIZE, word.color)
        for rank, index in enumerate(example["found"]):
            x, hit = left + rank * (side + gap), index == example["image"]
            sheet.text(x, top + 0.14, str(rank + 1), color=RIGHT if hit else GREY, weight="bold" if hit else "normal")
            sheet.tile(x, top + 0.22, side, images[index], RIGHT if hit else FAINT, 4 if hit else 1)
        if example["image"] not in example["found"]:
            x = left + shown * (side + gap) + 0.25
            sheet.text(x, top + 0.14, f"{example['rank'] + 1:,} · described", color=RIGHT)
            sheet.tile(x, top + 0.22, side, images[example["image"]], RIGHT, 2, (0, (2, 2)))
        top += height
    sheet.figure.savefig(path)
    return path


def _legend(layouts: Sequence[Sequence["_Word"]], missed: bool) -> str:
    """Explains what is to be seen, and only that."""
    colors = {word.color for words in layouts for word in words}
    parts = ["Texts spread evenly over the test set, not picked", "green: the image that the text describes"]
    parts += ["dashed: its place when it is not among the first"] * missed
    parts += ["blue words: beyond CLIP's 77 tokens"] * (BEYOND in colors)
    parts += ["pale words: not read"] * (PALE in colors)
    return " · ".join(parts)


class _Word(NamedTuple):
    text: str
    line: int
    x: float  # inches from the left
    color: str


def _wrap(example: Mapping[str, Any], width: float, positions: int) -> list[_Word]:
    """The words of a text, placed in lines of at most `width` inches, coloured by the tokens before them."""
    font = FontProperties(family=FONT, size=TEXT_SIZE)
    figure = blank_figure(1, 1)
    renderer = figure.canvas.get_renderer()
    words, line, x = [], 0, 0.0
    for word, tokens in zip(example["text"].split(), example["word_tokens"], strict=True):
        size = renderer.get_text_width_height_descent(word, font, ismath=False)[0] / figure.dpi
        if x and x + size > width:
            line, x = line + 1, 0.0
        needed = tokens + 2  # with the start and the end token
        color = PALE if needed > positions else BEYOND if needed > CLIP_POSITIONS else INK
        words.append(_Word(word, line, x, color))
        x += size + SPACE
    return words
