"""Plans of drawn aerial scenes, what stands where: the vocabulary of the embedded data set and the random plan of a scene.

A scene is a 3 x 3 grid of cells, numbered 0..8 row by row. Six to eight cells hold an object. The main kind of the
scene's class fills two or three of them in one colour and never appears otherwise; every other kind appears once, or
twice in the same colour. Nothing here knows about pixels or words: `scene_drawing` and `scene_captions` do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar


GENERATOR_VERSION = "1.0"

Item = TypeVar("Item")

# RGB; far from each other and from the muted grounds, so that a tiny image tower tells them apart quickly.
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 240),
    "black": (24, 24, 30),
    "red": (212, 38, 40),
    "yellow": (248, 216, 40),
    "green": (48, 196, 60),
    "turquoise": (40, 208, 208),
    "blue": (40, 74, 222),
    "purple": (176, 60, 200),
}

COLOUR_NAMES = tuple(COLOURS)

KINDS = tuple("house tank boat plane court turbine greenhouse tent trees cars stadium warehouse".split())  # noqa: SIM905


@dataclass(frozen=True)
class SceneClass:
    """One class of scenes: its main kind and the grounds it may lie on."""

    name: str
    main_kind: str
    grounds: tuple[str, ...]


CLASSES = (
    SceneClass("airport", "plane", ("concrete", "grass")),
    SceneClass("campsite", "tent", ("meadow", "sand")),
    SceneClass("car park", "cars", ("asphalt", "gravel")),
    SceneClass("farm", "greenhouse", ("soil", "crops")),
    SceneClass("harbour", "boat", ("water", "sand")),
    SceneClass("oil depot", "tank", ("concrete", "gravel")),
    SceneClass("sports park", "court", ("grass", "asphalt")),
    SceneClass("village", "house", ("grass", "soil")),
    SceneClass("wind farm", "turbine", ("crops", "water")),
    SceneClass("woodland", "trees", ("forest", "meadow")),
)
CLASS_NAMES = tuple(scene_class.name for scene_class in CLASSES)
CLASS_OF = {scene_class.name: scene_class for scene_class in CLASSES}

LINES = ("road", "river", "railway", "path")
LINES_ON_WATER = ("road", "railway")
LINE_VARIANTS = 6
ORIENTATIONS = ("vertical", "horizontal")

CELLS = tuple(range(9))
SIZES = 3  # sizes an object is drawn in, 0 the smallest
TURNS = 4  # small rotations an object is drawn in


class SceneObject(NamedTuple):
    """One object in one cell; `shift` moves it inside the cell, in 64ths of the scene's side."""

    kind: str
    colour: str
    cell: int  # 0..8, row by row
    shift: tuple[float, float]  # x, y
    size: int  # 0..SIZES - 1
    turn: int  # 0..TURNS - 1
    quarter: int  # 0 or 1: a further quarter turn


class SceneLine(NamedTuple):
    """A road, river, railway or path along the gap before the second (gap 0) or third (gap 1) column or row."""

    kind: str
    orientation: str
    gap: int  # 0: left or upper, 1: right or lower
    variant: int


@dataclass(frozen=True)
class Scene:
    """The plan of a scene. `objects` starts with those of the main kind."""

    class_name: str
    ground: str
    line: SceneLine | None
    objects: tuple[SceneObject, ...]

    @property
    def main_kind(self) -> str:
        """The kind that fills several cells in this class."""
        return CLASS_OF[self.class_name].main_kind

    def groups(self) -> list[list[SceneObject]]:
        """Objects of the same kind and colour together, the main kind first."""
        groups: dict[tuple[str, str], list[SceneObject]] = {}
        for item in self.objects:
            groups.setdefault((item.kind, item.colour), []).append(item)
        return list(groups.values())

    def empty_cells(self) -> list[int]:
        """Cells without an object."""
        taken = {item.cell for item in self.objects}
        return [cell for cell in CELLS if cell not in taken]


def scene_random(seed: int, split: str, index: int, purpose: str) -> random.Random:
    """
    The random stream of one purpose ("plan", "pixels" or "words") of one scene: independent of all others.

    Args:
        seed: of the data set.
        split: `train`, `validation` or `test`.
        index: number of the scene in its split.
        purpose: what the numbers are for.

    Returns:
        A generator in its first state.
    """
    return random.Random(f"aerial scenes {GENERATOR_VERSION}/{seed}/{split}/{index}/{purpose}")


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """Choose one of the items; four times as fast as `rng.choice`, and a scene needs a hundred of them."""
    return items[int(rng.random() * len(items))]


def pick_number(rng: random.Random, count: int) -> int:
    """Choose one of 0..count - 1."""
    return int(rng.random() * count)


def _line(rng: random.Random, ground: str) -> SceneLine | None:
    if rng.random() < 0.2:
        return None
    kinds = LINES_ON_WATER if ground == "water" else LINES
    return SceneLine(pick(rng, kinds), pick(rng, ORIENTATIONS), pick_number(rng, 2), pick_number(rng, LINE_VARIANTS))


def _shift(rng: random.Random, cell: int, line: SceneLine | None) -> tuple[float, float]:
    """A random shift in 64ths of the side; objects beside a line keep a little away from it."""
    shift = [3.2 * rng.random() - 1.6, 3.2 * rng.random() - 1.6]
    if line is not None:
        axis = 0 if line.orientation == "vertical" else 1
        column_or_row = (cell % 3, cell // 3)[axis]
        if column_or_row == line.gap:
            shift[axis] = -0.6 - 1.2 * rng.random()
        elif column_or_row == line.gap + 1:
            shift[axis] = 0.6 + 1.2 * rng.random()
    return shift[0], shift[1]


def plan_scene(rng: random.Random, class_name: str | None = None, with_line: bool = True) -> Scene:
    """
    The random plan of a scene, of a random class unless one is named; `with_line=False`: without road or river.

    Args:
        rng: chooses.
        class_name: of the scene; None: any.
        with_line: whether there may be a road or a river.

    Returns:
        The plan.
    """
    scene_class = CLASS_OF[class_name] if class_name else pick(rng, CLASSES)
    ground = pick(rng, scene_class.grounds)
    line = _line(rng, ground) if with_line else None
    total = pick(rng, (6, 7, 7, 8, 8))
    cells = rng.sample(CELLS, total)

    things = [(scene_class.main_kind, pick(rng, COLOUR_NAMES))] * (3 if rng.random() < 0.25 else 2)
    others = [kind for kind in KINDS if kind != scene_class.main_kind]
    things += [(kind, pick(rng, COLOUR_NAMES)) for kind in rng.sample(others, total - len(things))]
    if rng.random() < 0.2:  # one of the other kinds comes twice
        things[-1] = things[-2]

    objects = tuple(
        SceneObject(
            kind=kind,
            colour=colour,
            cell=cell,
            shift=_shift(rng, cell, line),
            size=pick_number(rng, SIZES),
            turn=pick_number(rng, TURNS),
            quarter=pick_number(rng, 2),
        )
        for (kind, colour), cell in zip(things, cells, strict=True)
    )
    return Scene(scene_class.name, ground, line, objects)
