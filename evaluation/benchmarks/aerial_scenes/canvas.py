"""Large landscapes of several drawn scenes, with queries and the polygons where each query is true."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from evaluation.benchmarks.aerial_scenes.captions import sentence, true_facts, with_article, write_short_text
from evaluation.benchmarks.aerial_scenes.drawing import draw_ground, draw_objects
from evaluation.benchmarks.aerial_scenes.layout import CLASS_NAMES, LINES, ORIENTATIONS, Scene, pick, plan_scene
from evaluation.benchmarks.aerial_scenes.sprites import BORDER_GRAIN, draw_line, smooth_noise


Polygon = list[list[int]]  # [[x, y], ...] in pixels

GRID = 4  # scenes along each side of a canvas
SCENE_QUERIES = 4  # queries made of a scene's short caption
CLASS_QUERIES = 4  # queries that name a class


@dataclass(frozen=True)
class Query:
    """A text and the polygons of the places where it is true."""

    text: str
    polygons: list[Polygon]


def plan_canvas(rng: random.Random) -> list[Scene]:
    """GRID x GRID scenes, row by row; neighbours are of different classes, and no scene has a road or river."""
    names: list[str] = []
    for place in range(GRID * GRID):
        taken = {names[place - 1]} if place % GRID else set()
        if place >= GRID:
            taken.add(names[place - GRID])
        names.append(pick(rng, [name for name in CLASS_NAMES if name not in taken]))
    return [plan_scene(rng, name, with_line=False) for name in names]


def _blended_ground(rng: random.Random, scenes: list[Scene], side: int) -> np.ndarray:
    """The grounds of all scenes, running into each other along wavering borders: (GRID * side, GRID * side, 3)."""
    total = GRID * side
    scale = side / 64
    noise = np.random.default_rng(rng.getrandbits(64))
    x, y = (
        np.arange(total, dtype=np.float32)[axis] + 0.5 + 2.5 * scale * smooth_noise(noise, total, BORDER_GRAIN * scale)
        for axis in (np.s_[None, :], np.s_[:, None])
    )  # each (total, total)
    soft = 4 * scale  # width of the border in pixels
    pixels = np.zeros((total, total, 3), np.float32)
    weights = np.full((total, total, 1), 1e-6, np.float32)
    for place, scene in enumerate(scenes):
        middle_x, middle_y = ((place % GRID + 0.5) * side, (place // GRID + 0.5) * side)
        # the outer scenes reach beyond the canvas, so that its rim is covered as well
        far_x = np.maximum(x - middle_x if place % GRID < GRID - 1 else 0, middle_x - x if place % GRID else 0)
        far_y = np.maximum(y - middle_y if place // GRID < GRID - 1 else 0, middle_y - y if place // GRID else 0)
        inside = np.clip((side / 2 - np.maximum(far_x, far_y)) / soft + 0.5, 0, 1)[..., None]
        pixels += inside * draw_ground(rng, scene.ground, total, scale)
        weights += inside
    return (pixels / weights).astype(np.uint8)


def tile_polygon(place: int, side: int) -> Polygon:
    """The outline of the scene at a place of the grid."""
    x, y = place % GRID * side, place // GRID * side
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def _queries(rng: random.Random, scenes: list[Scene], side: int) -> list[Query]:
    queries = []
    names = sorted({scene.class_name for scene in scenes})
    for name in rng.sample(names, min(CLASS_QUERIES, len(names))):
        a_class = with_article(name)
        text = pick(rng, (f"{a_class}.", f"{a_class} seen from above.", f"this is {a_class}."))
        places = [place for place, scene in enumerate(scenes) if scene.class_name == name]
        queries.append(Query(sentence(text), [tile_polygon(place, side) for place in places]))
    facts = [true_facts(scene) for scene in scenes]
    for chosen in rng.sample(scenes, SCENE_QUERIES):
        short = write_short_text(rng, chosen)
        places = [place for place, known in enumerate(facts) if known.issuperset(short.facts)]
        queries.append(Query(short.text, [tile_polygon(place, side) for place in places]))
    return queries


def draw_canvas(rng: random.Random, side: int) -> tuple[Image.Image, list[Scene], list[Query]]:
    """A landscape of GRID x GRID scenes of `side` pixels each, its scenes row by row, and its queries.

    Roads and rivers run between the scenes, along the borders of the grid.
    """
    scenes = plan_canvas(rng)
    image = Image.fromarray(_blended_ground(rng, scenes, side))
    for orientation in ORIENTATIONS:
        for border in rng.sample(range(1, GRID), 2):
            noise = np.random.default_rng(rng.getrandbits(64))
            pixels, opacity = draw_line(pick(rng, LINES), orientation, border * side, image.size, side / 64, noise)
            image.paste(pixels, (0, 0), opacity)
    for place, scene in enumerate(scenes):
        draw_objects(image, scene, side, (place % GRID * side, place // GRID * side))
    return image, scenes, _queries(rng, scenes, side)
