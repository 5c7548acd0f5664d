"""Landscapes of drawn scenes side by side, with queries and the polygons where each query is true."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from .captions import sentence, true_facts, with_article, write_short_text
from .drawing import draw_ground, draw_objects
from .layout import CLASS_NAMES, LINES, ORIENTATIONS, Scene, pick, plan_scene
from .sprites import BORDER_GRAIN, draw_line, smooth_noise


Polygon = list[list[int]]  # [[x, y], ...] in pixels
Scenes = dict[tuple[int, int], Scene]  # by row and column

GRID = 4  # scenes along each side of a canvas
SCENE_QUERIES = 4  # queries made of a scene's short caption
CLASS_QUERIES = 4  # queries that name a class
SWAY, SOFT = 2.5, 4  # of the borders between scenes, in 64ths of a scene: how far they waver, how wide they are


class Query(NamedTuple):
    """A text and the polygons of the places where it is true."""

    text: str
    polygons: list[Polygon]


class District(NamedTuple):
    """A rectangle of scenes of one class, in scenes."""

    top: int
    bottom: int
    left: int
    right: int

    def touches(self, other: District) -> bool:
        """Whether the two share a border or a corner."""
        across = self.left <= other.right and other.left <= self.right
        return across and self.top <= other.bottom and other.top <= self.bottom

    def polygon(self, side: int) -> Polygon:
        """Its outline, for scenes of `side` pixels."""
        top, bottom, left, right = (edge * side for edge in self)
        return [[left, top], [right, top], [right, bottom], [left, bottom]]


def district_of_one(row: int, column: int) -> District:
    """The district of a single scene."""
    return District(row, row + 1, column, column + 1)


def plan_canvas(rng: random.Random) -> Scenes:
    """GRID x GRID scenes; neighbours are of different classes, and no scene has a road or river."""
    names: dict[tuple[int, int], str] = {}
    for row in range(GRID):
        for column in range(GRID):
            taken = {names.get((row, column - 1)), names.get((row - 1, column))}
            names[row, column] = pick(rng, [name for name in CLASS_NAMES if name not in taken])
    return {cell: plan_scene(rng, name, with_line=False) for cell, name in names.items()}


def _blended_ground(rng: random.Random, scenes: Scenes, tiles: int, side: int, whole: bool) -> np.ndarray:
    """
    The grounds of all scenes, running into each other along wavering borders: (tiles * side, tiles * side, 3). Each is
    drawn over the `whole` landscape, or as far as its borders waver.
    """
    total, scale = tiles * side, side / 64
    noise = np.random.default_rng(rng.getrandbits(64))
    x, y = (
        np.arange(total, dtype=np.float32)[axis]
        + 0.5
        + SWAY * scale * smooth_noise(noise, total, BORDER_GRAIN * scale)
        for axis in (np.s_[None, :], np.s_[:, None])
    )  # each (total, total): the place that a pixel's ground is taken for
    soft, reach = SOFT * scale, total if whole else math.ceil((4 * SWAY + SOFT) * scale)
    pixels = np.zeros((total, total, 3), np.float32)
    weights = np.full((total, total, 1), 1e-6, np.float32)
    for (row, column), scene in sorted(scenes.items()):
        rows, columns = (slice(max(at * side - reach, 0), min((at + 1) * side + reach, total)) for at in (row, column))
        middle_x, middle_y = (column + 0.5) * side, (row + 0.5) * side
        near_x, near_y = x[rows, columns], y[rows, columns]
        # the outer scenes reach beyond the landscape, so that its rim is covered as well
        far_x = np.maximum(near_x - middle_x if column < tiles - 1 else 0, middle_x - near_x if column else 0)
        far_y = np.maximum(near_y - middle_y if row < tiles - 1 else 0, middle_y - near_y if row else 0)
        inside = np.clip((side / 2 - np.maximum(far_x, far_y)) / soft + 0.5, 0, 1)[..., None]
        ground = draw_ground(rng, scene.ground, min(side + 2 * reach, total), scale)
        pixels[rows, columns] += inside * ground[: inside.shape[0], : inside.shape[1]]
        weights[rows, columns] += inside
    return (pixels / weights).astype(np.uint8)


def draw_landscape(rng: random.Random, scenes: Scenes, tiles: int, side: int, whole: bool) -> Image.Image:
    """
    Draw scenes side by side; roads and rivers run between them, along the borders of the grid.

    Args:
        rng: chooses.
        scenes: `tiles` x `tiles` of them.
        tiles: scenes along a side.
        side: pixels of a scene.
        whole: draws each scene's ground over all of the landscape first, which takes a time that grows with the square of
            the number of scenes.

    Returns:
        The picture, of `tiles * side` pixels a side.
    """
    image = Image.fromarray(_blended_ground(rng, scenes, tiles, side, whole))
    for orientation in ORIENTATIONS:
        for border in rng.sample(range(1, tiles), min(2, tiles - 1)):
            noise = np.random.default_rng(rng.getrandbits(64))
            pixels, opacity = draw_line(pick(rng, LINES), orientation, border * side, image.size, side / 64, noise)
            image.paste(pixels, (0, 0), opacity)
    for (row, column), scene in sorted(scenes.items()):
        draw_objects(image, scene, side, (column * side, row * side))
    return image


def write_queries(
    rng: random.Random, scenes: Scenes, districts: Sequence[District], side: int, classes: int, captions: int
) -> list[Query]:
    """
    Ask for classes of districts, and for scenes by their short captions.

    Args:
        rng: chooses.
        scenes: of a landscape.
        districts: each of scenes of one class.
        side: pixels of a scene.
        classes: number of queries that name a class, at most.
        captions: number of queries that are a scene's caption, at most.

    Returns:
        The queries, each with all the places where it is true.
    """
    queries = []
    name_of = {district: scenes[district.top, district.left].class_name for district in districts}
    names = sorted(set(name_of.values()))
    for name in rng.sample(names, min(classes, len(names))):
        a_class = with_article(name)
        text = pick(rng, (f"{a_class}.", f"{a_class} seen from above.", f"this is {a_class}."))
        polygons = [district.polygon(side) for district in districts if name_of[district] == name]
        queries.append(Query(sentence(text), polygons))
    facts = {cell: true_facts(scene) for cell, scene in sorted(scenes.items())}
    for cell in rng.sample(sorted(scenes), min(captions, len(scenes))):
        short = write_short_text(rng, scenes[cell])
        cells = [other for other, known in facts.items() if known.issuperset(short.facts)]
        queries.append(Query(short.text, [district_of_one(*other).polygon(side) for other in cells]))
    return queries


def draw_canvas(rng: random.Random, side: int) -> tuple[Image.Image, list[Scene], list[Query]]:
    """A landscape of GRID x GRID scenes of `side` pixels each, its scenes row by row, and its queries."""
    scenes = plan_canvas(rng)
    image = draw_landscape(rng, scenes, GRID, side, whole=True)
    districts = [district_of_one(*cell) for cell in scenes]
    return image, list(scenes.values()), write_queries(rng, scenes, districts, side, CLASS_QUERIES, SCENE_QUERIES)
