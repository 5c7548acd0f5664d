"""Pictures of semantic localization; every function writes one PNG and returns its path."""

import math
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from modeling_lrsclip.image_processing_lrsclip import to_rgb

from ..benchmarks.localization_data import LocalizationData
from .retrieval import DPI, GREY, INK, RIGHT


SCENE_PIXELS = 640  # longer side of a scene in the picture
HEAT, STRENGTH = colormaps["inferno"], 0.8  # colours of the map, and how much they cover where it is highest
PANEL, GAP, MARGIN, HEAD, FOOT = 2.75, 0.12, 0.4, 1.05, 0.3  # inches
CAPTION, LINE, WRAP = 0.62, 0.17, 84  # inches above a pair of panels, inches a line, characters a line


def draw_localization(result: Mapping[str, Any], data: LocalizationData, path: Path, label: str = "") -> Path:
    """
    Draw scenes beside the map that a model makes for a query, the annotated regions outlined in both.

    Args:
        result: of [`~evaluation.localization.LocalizationTask.evaluate`]; its `examples` are drawn.
        data: the scenes and queries that were measured.
        path: PNG to write.
        label: the model's name, for the heading.

    Returns:
        `path`.
    """
    examples = result["examples"]
    columns = min(2, len(examples))
    rows = math.ceil(len(examples) / columns)
    cell_width, cell_height = 2 * PANEL + GAP + MARGIN, CAPTION + PANEL + FOOT
    width, height = MARGIN + columns * cell_width, HEAD + rows * cell_height
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def say(x: float, y: float, text: str, size: float, color: str = GREY, weight: str = "normal") -> None:
        """Text at inches from the upper left corner."""
        style = {"fontsize": size, "color": color, "weight": weight, "parse_math": False}
        figure.text(x / width, 1 - y / height, text, va="baseline", **style)

    say(MARGIN, 0.45, f"Where {label or 'the model'} looks for a text", 14, INK, "bold")
    what = f"{data.name}, protocol {result['protocol']} · queries spread evenly, not picked · green: the annotated regions"
    say(MARGIN, 0.73, what, 9.5)
    for number, example in enumerate(examples):
        query = example["query"]
        left, top = MARGIN + number % columns * cell_width, HEAD + number // columns * cell_height
        lines = textwrap.wrap(textwrap.shorten(data.texts[query], 2 * WRAP - 10, placeholder=" …"), WRAP)
        for above, line in enumerate(reversed(lines), start=1):
            say(left, top + CAPTION - 0.1 - LINE * above, line, 8.5, INK)
        say(left, top + CAPTION - 0.1, _figures(result, query), 8)
        scene = _scene(data, data.text_to_image[query])
        for index, pixels in enumerate((scene, _heated(scene, np.asarray(example["map"], np.float32)))):
            x = left + index * (PANEL + GAP)
            box = (x / width, 1 - (top + CAPTION + PANEL) / height, PANEL / width, PANEL / height)
            axes = figure.add_axes(box, xticks=[], yticks=[])
            axes.imshow(pixels, extent=_extent(data, query), aspect="equal", interpolation="bilinear")
            axes.set(xlim=_extent(data, query)[:2], ylim=_extent(data, query)[2:])
            axes.spines[:].set_visible(False)
            axes.set_anchor("NW")
            _outline(axes, data.regions[query])
    figure.savefig(path)
    return path


def _figures(result: Mapping[str, Any], query: int) -> str:
    return "   ".join(f"{name} {values[query]:.2f}" for name, values in result["per_query"].items())


def _extent(data: LocalizationData, query: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the scene in its own pixels."""
    height, width = data.sizes[data.text_to_image[query]]
    return (0, width, height, 0)


def _scene(data: LocalizationData, image: int) -> np.ndarray:
    """(h, w, 3) uint8, the scene made smaller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # scenes are large
        scene = to_rgb(data.images[image]).copy()
    scene.thumbnail((SCENE_PIXELS, SCENE_PIXELS))
    return np.asarray(scene)


def _heated(scene: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The scene under the colours of a map; where the map is 0 the scene is left dark."""
    large = Image.fromarray(heat).resize((scene.shape[1], scene.shape[0]), Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(large) / 255, 0, 1)  # (h, w)
    colors = 255 * HEAT(share)[..., :3]
    opacity = (0.35 + (STRENGTH - 0.35) * share)[..., None]
    return (scene * (1 - opacity) + colors * opacity).astype(np.uint8)


def _outline(axes: Any, regions: list[list[list[float]]]) -> None:
    for region in regions:
        outline = Polygon(region, closed=True, fill=False, edgecolor=RIGHT, linewidth=2, joinstyle="round")
        outline.set_path_effects([Stroke(linewidth=4, foreground="white"), Normal()])
        axes.add_patch(outline)
