"""The pieces a drawn aerial scene is put together from: grounds, roads and rivers, and objects seen from above.

Every piece is drawn once per process (at four times its size, then reduced) and kept: a scene is then a crop and a
dozen pastes. Lengths named `unit` are pixels of a scene of side 64; `scale` is the scene's side divided by 64.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .layout import COLOURS, KINDS, ORIENTATIONS, SIZES, TURNS


RGB = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 4
MARGIN = 12  # of the grounds to black and white; leaves room for a scene's own tint
BORDER_GRAIN = 20  # unit, size of the bends of a border between two grounds
PLAIN = 120  # the shade that leaves the object's colour as it is
LIGHT_FROM = math.radians(-135)  # the sun stands in the upper left (y points down)
SHADOW_OFFSET = 1.8  # unit, right and down
SPRITE_UNITS = 24  # side of the square a sprite is drawn in
DIAMETERS = (15.0, 16.0, 17.0)  # unit, by size
TURN_DEGREES = (-13.0, -4.0, 5.0, 14.0)

# base colour, contrast of coarse blotches, contrast of fine grain, furrows (period in units, contrast)
GROUNDS: dict[str, tuple[RGB, float, float, tuple[float, float]]] = {
    "asphalt": ((104, 106, 112), 5, 4, (0, 0)),
    "concrete": ((150, 149, 144), 6, 4, (16, 5)),
    "crops": ((128, 138, 88), 5, 4, (5, 11)),
    "forest": ((78, 98, 72), 13, 7, (0, 0)),
    "grass": ((112, 132, 92), 8, 4, (0, 0)),
    "gravel": ((138, 130, 122), 6, 10, (0, 0)),
    "meadow": ((136, 140, 96), 15, 6, (0, 0)),
    "sand": ((184, 168, 132), 8, 5, (0, 0)),
    "soil": ((134, 108, 86), 6, 5, (4, 10)),
    "water": ((82, 112, 130), 7, 4, (7, 4)),
}

# what lies right under and around an object: colour and opacity
PATCHES: dict[str, tuple[RGB, float]] = {
    "house": ((118, 130, 96), 0.7),
    "tank": ((150, 146, 140), 0.8),
    "boat": ((78, 108, 128), 0.95),
    "plane": ((122, 124, 128), 0.85),
    "court": ((96, 120, 92), 0.7),
    "turbine": ((150, 140, 116), 0.6),
    "greenhouse": ((126, 106, 86), 0.75),
    "tent": ((142, 136, 100), 0.7),
    "trees": ((92, 110, 78), 0.8),
    "cars": ((108, 110, 114), 0.9),
    "stadium": ((104, 128, 92), 0.85),
    "warehouse": ((142, 138, 132), 0.8),
}

PALE = ("white", "yellow", "turquoise")  # colours whose details are drawn dark

LINE_WIDTHS = {"road": 4.4, "river": 6.0, "railway": 4.0, "path": 2.8}


class Pen:
    """Draws one object in its own frame (-1..1, the bow or the front upwards) with the light fixed to the ground.

    The three channels are coverage, shade (PLAIN leaves the colour as it is) and share of the contrasting colour.
    """

    def __init__(self, side: int, radius: float, degrees: float) -> None:
        self.radius = radius * SUPERSAMPLING
        self.centre = side * SUPERSAMPLING / 2
        self.angle = math.radians(degrees)
        self.image = Image.new("RGB", (side * SUPERSAMPLING,) * 2)
        self.canvas = ImageDraw.Draw(self.image)

    def shape(self, points: Sequence[Point], shade: float = PLAIN, contrast: float = 0, erased: bool = False) -> None:
        """
        Fill a polygon.

        Args:
            points: corners (x, y) in the object's frame, each from -1 to 1.
            shade: from 0, black; PLAIN leaves the colour as it is.
            contrast: of the contrasting colour, 0 to 255.
            erased: cuts the polygon out instead.
        """
        cos, sin = math.cos(self.angle) * self.radius, math.sin(self.angle) * self.radius
        placed = [(self.centre + x * cos - y * sin, self.centre + x * sin + y * cos) for x, y in points]
        self.canvas.polygon(placed, fill=(0, 0, 0) if erased else (255, int(shade), int(contrast)))

    def box(self, x0: float, y0: float, x1: float, y1: float, shade: float = PLAIN, contrast: float = 0) -> None:
        """
        Fill a rectangle.

        Args:
            x0, y0, x1, y1: two corners in the object's frame.
            shade, contrast: as for [`Pen.shape`].
        """
        self.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], shade, contrast)

    def disc(
        self, x: float, y: float, rx: float, ry: float, shade: float = PLAIN, contrast: float = 0, erased: bool = False
    ) -> None:
        """
        Fill an ellipse.

        Args:
            x, y: the middle in the object's frame.
            rx, ry: the radii.
            shade, contrast, erased: as for [`Pen.shape`].
        """
        steps = [math.tau * step / 24 for step in range(24)]
        self.shape([(x + rx * math.cos(step), y + ry * math.sin(step)) for step in steps], shade, contrast, erased)

    def lit(self, dx: float, dy: float) -> float:
        """Shade of a roof face that falls towards (dx, dy)."""
        return PLAIN + 26 * math.cos(math.atan2(dy, dx) + self.angle - LIGHT_FROM)


def _house(pen: Pen) -> None:
    corners = ((-0.95, -0.75), (0.95, -0.75), (0.95, 0.75), (-0.95, 0.75))
    left, right = (-0.3, 0.0), (0.3, 0.0)
    pen.shape([corners[0], corners[1], right, left], pen.lit(0, -1))
    pen.shape([corners[1], corners[2], right], pen.lit(1, 0))
    pen.shape([corners[2], corners[3], left, right], pen.lit(0, 1))
    pen.shape([corners[3], corners[0], left], pen.lit(-1, 0))
    pen.box(0.4, -0.5, 0.62, -0.28, 70, 120)


def _tank(pen: Pen) -> None:
    pen.disc(0, 0, 0.92, 0.92, 88)
    pen.disc(0, 0, 0.76, 0.76, PLAIN)
    pen.disc(-0.18, -0.18, 0.4, 0.4, 140)
    pen.box(-0.05, -0.9, 0.05, 0.0, PLAIN, 160)


def _boat(pen: Pen) -> None:
    hull = [(0, -1.15), (0.4, -0.7), (0.54, -0.1), (0.5, 0.75), (0.36, 1.05)]
    pen.shape(hull + [(-x, y) for x, y in reversed(hull)], PLAIN)
    pen.box(-0.25, 0.1, 0.25, 0.7, PLAIN, 200)
    pen.box(-0.05, -0.7, 0.05, 0.1, 80)


def _plane(pen: Pen) -> None:
    wing = [(0.1, -0.3), (1.08, 0.22), (1.08, 0.5), (0.1, 0.22)]
    tail = [(0.1, 0.68), (0.46, 0.9), (0.46, 1.08), (0.1, 0.94)]
    for part in (wing, tail):
        pen.shape(part, 112)
        pen.shape([(-x, y) for x, y in part], 128)
    body = [(0, -1.1), (0.15, -0.85), (0.17, 0.6), (0.06, 1.05)]
    pen.shape(body + [(-x, y) for x, y in reversed(body)], PLAIN)
    pen.box(-0.09, -0.86, 0.09, -0.7, PLAIN, 200)


def _court(pen: Pen) -> None:
    pen.box(-1.0, -0.68, 1.0, 0.68, PLAIN)
    for x0, y0, x1, y1 in (
        (-0.82, -0.52, 0.82, -0.42),
        (-0.82, 0.42, 0.82, 0.52),
        (-0.82, -0.5, -0.72, 0.5),
        (0.72, -0.5, 0.82, 0.5),
        (-0.05, -0.6, 0.05, 0.6),
    ):
        pen.box(x0, y0, x1, y1, PLAIN, 235)


def _turbine(pen: Pen) -> None:
    for blade in range(3):
        angle = math.tau * blade / 3 - math.pi / 2
        cos, sin = math.cos(angle), math.sin(angle)
        profile = ((0.0, -0.14), (0.3, -0.24), (1.12, -0.06), (1.12, 0.1), (0.3, 0.16), (0.0, 0.14))
        pen.shape([(a * cos - b * sin, a * sin + b * cos) for a, b in profile], PLAIN + 8 * blade)
    pen.disc(0, 0, 0.27, 0.27, 100)
    pen.disc(0, 0, 0.12, 0.12, PLAIN, 200)


def _greenhouse(pen: Pen) -> None:
    for middle in (-0.68, 0.0, 0.68):
        pen.box(middle - 0.24, -0.95, middle, 0.95, pen.lit(-1, 0))
        pen.box(middle, -0.95, middle + 0.24, 0.95, pen.lit(1, 0))


def _tent(pen: Pen) -> None:
    tips = ((0.0, -1.08), (1.08, 0.0), (0.0, 1.08), (-1.08, 0.0))
    for tip, following in zip(tips, tips[1:] + tips[:1], strict=True):
        pen.shape([tip, following, (0, 0)], pen.lit(tip[0] + following[0], tip[1] + following[1]))
    pen.disc(0, 0, 0.14, 0.14, PLAIN, 200)


def _trees(pen: Pen) -> None:
    crowns = ((-0.5, -0.5, 0.46), (0.48, -0.42, 0.5), (-0.44, 0.5, 0.5), (0.5, 0.52, 0.42), (0.0, 0.02, 0.4))
    for x, y, r in crowns:
        pen.disc(x, y, r, r, 94)
        pen.disc(x - 0.09, y - 0.09, r * 0.74, r * 0.74, PLAIN)
        pen.disc(x - 0.16, y - 0.16, r * 0.34, r * 0.34, 150)


def _cars(pen: Pen) -> None:
    for x in (-0.7, 0.0, 0.7):
        for y in (-0.52, 0.52):
            pen.box(x - 0.25, y - 0.42, x + 0.25, y + 0.42, PLAIN)
            pen.box(x - 0.19, y - 0.2, x + 0.19, y - 0.02, 60, 60)


def _stadium(pen: Pen) -> None:
    pen.disc(0, 0, 1.12, 0.95, 96)
    pen.disc(0, 0, 1.0, 0.83, PLAIN)
    pen.disc(-0.03, -0.03, 0.7, 0.52, 134)
    pen.disc(0, 0, 0.6, 0.42, erased=True)


def _warehouse(pen: Pen) -> None:
    pen.box(-0.95, -0.95, -0.55, 0.95, pen.lit(-1, 0))
    pen.box(-0.55, -0.95, -0.15, 0.95, pen.lit(1, 0))
    pen.shape([(-0.95, 0.95), (-0.55, 0.55), (0.95, 0.55), (0.95, 0.95)], pen.lit(0, 1))
    pen.shape([(-0.55, 0.55), (-0.15, 0.15), (0.95, 0.15), (0.95, 0.55)], pen.lit(0, -1))


_DRAWN = (_house, _tank, _boat, _plane, _court, _turbine, _greenhouse, _tent, _trees, _cars, _stadium, _warehouse)
DRAWERS: dict[str, Callable[[Pen], None]] = dict(zip(KINDS, _DRAWN, strict=True))
UPRIGHT = {"tank", "turbine", "tent", "trees", "plane"}  # drawn without a quarter turn


@functools.cache
def _shape(kind: str, size: int, turn: int, quarter: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage, shade and contrast of an object, (S, S) float32 each, coverage and contrast in 0..1."""
    assert 0 <= size < SIZES and 0 <= turn < TURNS
    side = round(SPRITE_UNITS * scale)
    pen = Pen(side, DIAMETERS[size] / 2 * scale, TURN_DEGREES[turn] + 90 * quarter)
    DRAWERS[kind](pen)
    layers = np.asarray(pen.image.resize((side, side), Image.Resampling.BOX), np.float32) / 255  # (S, S, 3)
    coverage = layers[..., 0]
    safe = np.maximum(coverage, 1e-3)  # shade and contrast were averaged together with the empty surroundings
    return coverage, layers[..., 1] / safe * (255 / PLAIN), np.minimum(layers[..., 2] / safe, 1)


def _patch(kind: str, variant: int, side: int, scale: float) -> np.ndarray:
    """Opacity (side, side) of the plot an object lies on: rounded and slightly irregular."""
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = grid[None, :], grid[:, None]
    angle = np.arctan2(y, x)
    exponent = 2.0 if kind in ("tank", "turbine", "trees", "boat") else 5.0
    radius = (np.abs(x) ** exponent + np.abs(y) ** exponent) ** (1 / exponent)  # (side, side)
    edge = 0.86 + 0.04 * np.sin(3 * angle + 2.1 * variant) + 0.03 * np.sin(5 * angle + 1.3 * variant)
    return np.clip((edge - radius) * side / 2 / (1.2 * scale) + 0.5, 0, 1) * PATCHES[kind][1]


def _over(
    upper: np.ndarray, upper_opacity: np.ndarray, lower: np.ndarray, lower_opacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and opacity of one layer upon another: (..., 3) and (H, W) each."""
    opacity = upper_opacity + lower_opacity * (1 - upper_opacity)
    share = (upper_opacity / np.maximum(opacity, 1e-3))[..., None]
    return upper * share + lower * (1 - share), opacity


@functools.cache
def _surroundings(kind: str, size: int, turn: int, quarter: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The plot of an object with its shadow, whatever the object's colour: RGB (S, S, 3) and opacity (S, S)."""
    coverage, _, _ = _shape(kind, size, turn, quarter, scale)
    offset = round(SHADOW_OFFSET * scale)
    mask = Image.fromarray((np.roll(coverage, (offset, offset), (0, 1)) * 255).astype(np.uint8))
    shadow = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.8 * scale)), np.float32) / 255 * 0.42  # (S, S)
    plot = np.array(PATCHES[kind][0], np.float32)
    return _over(np.array((22, 26, 34), np.float32), shadow, plot, _patch(kind, turn + size, len(coverage), scale))


@functools.cache
def object_stamp(
    kind: str, colour: str, size: int, turn: int, quarter: int, scale: float
) -> tuple[Image.Image, Image.Image, tuple[int, int, int, int]]:
    """
    An object on its plot, with its shadow.

    Args:
        kind, colour: of the object.
        size, turn: numbers of its variants.
        quarter: quarters that it is turned by.
        scale: pixels of the picture for one of the plan.

    Returns:
        RGB (S, S), opacity (S, S), and the box of the object alone (x0, y0, x1, y1).
    """
    coverage, shade, contrast = _shape(kind, size, turn, quarter, scale)
    base = np.array(COLOURS[colour], np.float32)
    other = np.array((96, 98, 104) if colour in PALE else (236, 236, 232), np.float32)
    body = np.minimum(base * shade[..., None], 255)  # (S, S, 3)
    body += (other - body) * contrast[..., None]
    pixels, opacity = _over(body, coverage, *_surroundings(kind, size, turn, quarter, scale))

    rows, columns = np.nonzero(coverage.max(1) > 0.4)[0], np.nonzero(coverage.max(0) > 0.4)[0]
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray((opacity * 255).astype(np.uint8)), box


def smooth_noise(rng: np.random.Generator, side: int, grain: float) -> np.ndarray:
    """
    Smooth noise of about unit deviation, (side, side) float32; `grain` is the size of its blotches in pixels.

    Args:
        rng: its source.
        side: pixels.
        grain: pixels of a blotch.

    Returns:
        (side, side) float32.
    """
    cells = max(2, round(side / grain))
    image = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


@functools.cache
def ground_texture(ground: str, quarters: int, side: int, scale: float) -> np.ndarray:
    """
    A large piece of ground to cut scenes from, turned by some quarters: (side, side, 3) uint8.

    Args:
        ground: its kind.
        quarters: quarters that it is turned by.
        side: pixels.
        scale: pixels of the picture for one of the plan.

    Returns:
        (side, side, 3) uint8.
    """
    if quarters:
        return np.ascontiguousarray(np.rot90(ground_texture(ground, 0, side, scale), quarters))
    base, coarse, fine, (period, furrows) = GROUNDS[ground]
    rng = np.random.default_rng(zlib.crc32(ground.encode()))
    level = coarse * (smooth_noise(rng, side, 14 * scale) + 0.5 * smooth_noise(rng, side, 5 * scale))
    level = level + fine * smooth_noise(rng, side, max(1.0, 2.0 * scale))
    if period:
        row = np.arange(side, dtype=np.float32)[:, None] + 1.2 * scale * smooth_noise(rng, side, 20 * scale)
        level = level + furrows * np.sin(math.tau * row / (period * scale))
    level = np.round(level / 6) * 6  # few levels, the same in all channels: small PNGs
    return np.clip(np.array(base, np.float32) + level[..., None], MARGIN, 255 - MARGIN).astype(np.uint8)


def _line_profile(kind: str, distance: np.ndarray, along: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Colours (H, W, 3) and opacity (H, W) of a line, from the distance to its middle and the way along it."""
    half = LINE_WIDTHS[kind] / 2 * scale
    opacity = np.clip(half - np.abs(distance) + 0.5, 0, 1)
    inner = np.clip(half - 1.0 * scale - np.abs(distance) + 0.5, 0, 1)[..., None]
    middle = np.clip(0.5 * scale - np.abs(distance) + 0.5, 0, 1)[..., None]
    step = (np.sin(math.tau * along / ((3.2 if kind == "railway" else 8) * scale)) > 0)[..., None]

    def rgb(*values: int) -> np.ndarray:
        return np.array(values, np.float32)

    if kind == "road":
        colours = rgb(170, 168, 160) * (1 - inner) + rgb(92, 92, 98) * inner
        colours = np.where(step, colours * (1 - middle) + rgb(214, 210, 196) * middle, colours)
    elif kind == "river":
        colours = rgb(96, 106, 92) * (1 - inner) + rgb(66, 104, 132) * inner
    elif kind == "railway":
        colours = np.where(step, rgb(86, 72, 64), rgb(148, 140, 130))
        rails = np.clip(1.0 - np.abs(np.abs(distance) / scale - 1.1), 0, 1)[..., None]
        colours = colours * (1 - rails) + rgb(58, 56, 58) * rails
    else:
        colours = rgb(196, 176, 140) + 0 * inner
    return np.broadcast_to(colours, (*distance.shape, 3)), opacity


def draw_line(
    kind: str, orientation: str, middle: float, size: tuple[int, int], scale: float, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """
    A line across an image of `size` (width, height), swaying about `middle` pixels: RGB and opacity (H, W).

    Args:
        kind: one of `LINE_WIDTHS`.
        orientation: `horizontal` or `vertical`.
        middle: pixels from the edge.
        size: width and height in pixels.
        scale: pixels of the picture for one of the plan.
        rng: sways it.

    Returns:
        RGB (H, W) and opacity (H, W).
    """
    assert orientation in ORIENTATIONS
    width, height = size if orientation == "vertical" else size[::-1]
    along = np.arange(height, dtype=np.float32)[:, None] + 0.5
    across = np.arange(width, dtype=np.float32)[None, :] + 0.5
    sway = {"road": 0.5, "river": 1.3, "railway": 0.2, "path": 1.2}[kind] * scale
    phase, waves = rng.uniform(0, math.tau), rng.uniform(0.7, 1.5)
    distance = across - middle - sway * np.sin(math.tau * waves * along / (64 * scale) + phase)
    colours, opacity = _line_profile(kind, distance, along, scale)
    if orientation == "horizontal":
        colours, opacity = colours.transpose(1, 0, 2), opacity.T
    return (
        Image.fromarray(np.ascontiguousarray(colours, np.float32).astype(np.uint8)),
        Image.fromarray((np.ascontiguousarray(opacity) * 255).astype(np.uint8)),
    )


@functools.cache
def line_stamp(kind: str, orientation: str, gap: int, variant: int, side: int) -> tuple[Image.Image, Image.Image]:
    """
    A line over a whole scene: RGB (side, side) and opacity (side, side).

    Args:
        kind, orientation: as for [`draw_line`].
        gap: number of the place where the line runs.
        variant: number of the form.
        side: pixels of the scene.

    Returns:
        RGB (side, side) and opacity (side, side).
    """
    rng = np.random.default_rng((zlib.crc32(kind.encode()), gap, variant))
    return draw_line(kind, orientation, (gap + 1) * side / 3, (side, side), side / 64, rng)
