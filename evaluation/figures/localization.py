"""Pictures of semantic localization; every function writes one PNG and returns its path."""

import math
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Polygon
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from modeling_lrsclip.image_processing_lrsclip import to_rgb

from ..benchmarks.localization_data import LocalizationData
from .retrieval import INK, RIGHT, Sheet


SCENE_PIXELS = 640  # longer side of a scene in the picture
HEAT, STRENGTH = colormaps["inferno"], 0.8  # colours of the map, and how much they cover where it is highest
PANEL, GAP, MARGIN, HEAD, FOOT = 2.75, 0.12, 0.4, 1.65, 0.3  # inches
SCALE = (1.5, 0.1)  # inches, width and height of the scale of colours
CAPTION, LINE, WRAP = 0.62, 0.17, 84  # inches above a pair of panels, inches a line, characters a line


def draw_localization(result: Mapping[str, Any], data: LocalizationData, path: Path, label: str = "") -> Path:
    """
    Draw scenes beside the map that a model makes for a query: the annotated regions outlined, the highest point crossed.

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
    sheet = Sheet(width, height)
    sheet.text(MARGIN, 0.45, f"Where {label or 'the model'} looks for a text", 14, INK, "bold")
    what = f"{data.name}, protocol {result['protocol']} · queries spread evenly, not picked"
    sheet.text(MARGIN, 0.73, what, 9.5)
    marks = "green: the annotated regions, where it should look · white cross: where it looks most"
    sheet.text(MARGIN, 0.97, marks, 9.5)
    measures = (
        "Rsu: attention within the regions · Ras: distance from their middles (lower is better)",
        "Rda: how concentrated it is there · Rmi: the three together; all from 0 to 1",
    )
    for line, text in enumerate(measures):
        sheet.text(MARGIN, 1.19 + LINE * line, text, 8)
    _scale_of_colors(sheet)
    for number, example in enumerate(examples):
        query = example["query"]
        left, top = MARGIN + number % columns * cell_width, HEAD + number // columns * cell_height
        lines = textwrap.wrap(textwrap.shorten(data.texts[query], 2 * WRAP - 10, placeholder=" …"), WRAP)
        for above, line in enumerate(reversed(lines), start=1):
            sheet.text(left, top + CAPTION - 0.1 - LINE * above, line, 8.5, INK)
        figures = "   ".join(f"{name} {values[query]:.2f}" for name, values in result["per_query"].items())
        sheet.text(left, top + CAPTION - 0.1, figures, 8)
        heat = np.asarray(example["map"], np.float32)
        image = data.text_to_image[query]
        scene, (scene_height, scene_width) = _scene(data, image), data.sizes[image]
        extent = (0, scene_width, scene_height, 0)  # left, right, bottom and top, in the scene's own pixels
        for index, pixels in enumerate((scene, _heated(scene, heat))):
            x = left + index * (PANEL + GAP)
            box = (x / width, 1 - (top + CAPTION + PANEL) / height, PANEL / width, PANEL / height)
            axes = sheet.figure.add_axes(box, xticks=[], yticks=[])
            axes.imshow(pixels, extent=extent, aspect="equal", interpolation="bilinear")
            axes.set(xlim=extent[:2], ylim=extent[2:])
            axes.spines[:].set_visible(False)
            axes.set_anchor("NW")
            _outline(axes, data.regions[query])
            _cross(axes, heat, extent)
    sheet.figure.savefig(path)
    return path


def _scale_of_colors(sheet: Sheet) -> None:
    """The colours of the maps, in the heading's last line."""
    (wide, high), y = SCALE, HEAD - 0.05
    left = MARGIN + 1.1
    box = (left / sheet.width, 1 - y / sheet.height, wide / sheet.width, high / sheet.height)
    axes = sheet.figure.add_axes(box, xticks=[], yticks=[])
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT, aspect="auto")
    axes.spines[:].set_visible(False)
    sheet.text(MARGIN, y, "attention from 0", 8)
    sheet.text(left + wide + 0.07, y, "to 1, the highest of the scene", 8)


def _cross(axes: Any, heat: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Mark the highest point of a map; of equals, their middle."""
    rows, columns = np.nonzero(heat >= heat.max())
    height, width = heat.shape
    x, y = (columns.mean() + 0.5) / width * extent[1], (rows.mean() + 0.5) / height * extent[2]
    outlined = [Stroke(linewidth=4, foreground=INK), Normal()]
    axes.plot([x], [y], "x", color="white", markersize=9, markeredgewidth=2, path_effects=outlined, clip_on=False)


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
