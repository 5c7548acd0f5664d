"""Plans of what there is to do: which scenes are new or changed, their windows and blocks, and whose turn each block is."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from modeling_lrsclip.encoding.rasters import Raster, RasterError, ValueRange
from modeling_lrsclip.files.hashing import json_sha256

from .index_store import IndexProblem
from .scenes import Scene, SceneFacts, SceneList, content_hash, describe_scene, stat_files
from .windows import Grid, WindowSize, scene_grids


OPENING_THREADS = 8


@dataclass(frozen=True)
class WindowOptions:
    """Everything beside the model that decides what is encoded of a scene."""

    sizes: tuple[WindowSize, ...]
    stride: float = 0.5  # step between windows as a share of their side
    bands: tuple[int | str, ...] | None = None  # red, green, blue or one for grey; None: as the file says
    value_range: ValueRange | None = None  # None: 8 bits as stored, others by percentiles of each scene
    nodata: float | None = None  # None: as the file says
    max_empty: float = 0.5  # windows with more than this share of nothing are left out

    def __post_init__(self):
        if not self.sizes:
            raise ValueError("window: at least one size is needed.")
        if not 0 < self.stride <= 1:
            raise ValueError(f"stride {self.stride:g}: a share of the window's side is needed, above 0 and at most 1.")
        if not 0 <= self.max_empty < 1:
            raise ValueError(f"max_empty {self.max_empty:g}: a share from 0 to below 1 is needed.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "sizes": [str(size) for size in self.sizes],
            "stride": self.stride,
            "bands": None if self.bands is None else list(self.bands),
            "range": None if self.value_range is None else str(self.value_range),
            "nodata": self.nodata,
            "max_empty": self.max_empty,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WindowOptions":
        """Rebuild what [`WindowOptions.to_dict`] wrote."""
        return cls(
            tuple(WindowSize.parse(size) for size in values["sizes"]),
            values["stride"],
            None if values["bands"] is None else tuple(values["bands"]),
            None if values["range"] is None else ValueRange.parse(values["range"]),
            values["nodata"],
            values["max_empty"],
        )

    def open(self, path: str) -> Raster:
        """The scene's raster, to be read with these bands and this stretch."""
        return Raster(path, self.bands, self.value_range, self.nodata)


@dataclass(frozen=True)
class PlannedScene:
    """A scene that is to be encoded."""

    facts: SceneFacts
    key: str  # 16 hexadecimal digits: the names of its blocks' files begin with them
    windows: int
    blocks: int

    def grids(self, options: WindowOptions) -> list[Grid]:
        """Windows of all scales."""
        facts = self.facts
        return scene_grids(facts.width, facts.height, options.sizes, options.stride, facts.pixel_size)

    def block_name(self, number: int) -> str:
        """File name of a block."""
        return f"{self.key}-{number:06d}.parquet"


Blocks = Sequence[tuple[PlannedScene, int]]  # scene and number of each


@dataclass
class Plan:
    """Work of one command, the scenes that it has to encode; every shard of it makes the same plan."""

    model: dict[str, Any]  # `id`, `weights_sha256`, `dimensions`, `dtype`
    options: WindowOptions
    coordinates: str  # "wgs84" or "pixels"
    scenes: list[PlannedScene] = field(default_factory=list)  # new or changed
    skipped: list[dict[str, Any]] = field(default_factory=list)  # `scene`, `reason`
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the index as it is, unchanged ones
    changed: list[str] = field(default_factory=list)  # among `scenes`: in the index with other content
    gone: list[str] = field(default_factory=list)  # in the index, and no longer on disk
    dropped: list[str] = field(default_factory=list)  # in the index, and to be taken out
    renewed: bool = False  # facts of unchanged sources (their times) are to be written

    def blocks(self, shard: int = 1, shards: int = 1) -> list[tuple[PlannedScene, int]]:
        """
        Blocks of a shard, scene by scene.

        Args:
            shard, shards: which of how many, from 1. A block's shard follows from its scene's key and its number alone.
        """
        return [
            (scene, number)
            for scene in self.scenes
            for number in range((shard - 1 - int(scene.key, 16)) % shards, scene.blocks, shards)
        ]

    @cached_property
    def fingerprint(self) -> str:
        """Hash by which shards of one command know each other."""
        keys = [scene.key for scene in self.scenes]
        windows = [self.options.to_dict(), self.coordinates]
        return json_sha256([self.model["weights_sha256"], *windows, keys, sorted(self.sources)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; [`Plan.from_dict`] reads them."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {"options": self.options.to_dict(), "scenes": [asdict(scene) for scene in self.scenes]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Rebuild what [`Plan.to_dict`] gave."""
        scenes = []
        for scene in values["scenes"]:
            facts = dict(scene["facts"])
            facts["files"] = tuple(tuple(file) for file in facts["files"])
            facts["transform"] = tuple(facts["transform"])
            facts["pixel_size"] = facts["pixel_size"] and tuple(facts["pixel_size"])
            scenes.append(PlannedScene(SceneFacts(**facts), scene["key"], scene["windows"], scene["blocks"]))
        plain = {name: values[name] for name in _PLAIN}
        return cls(options=WindowOptions.from_dict(values["options"]), scenes=scenes, **plain)


_PLAIN = ("model", "coordinates", "skipped", "sources", "changed", "gone", "dropped", "renewed")


def make_plan(listed: SceneList, options: WindowOptions, model: dict[str, Any], index: dict | None = None) -> Plan:
    """
    Compares scenes with an index and opens those that are new or changed, their headers only.

    Args:
        listed: the scenes that were named.
        options: how they are cut and rendered.
        model: facts of the model.
        index: content of `index.json`, where scenes are to be added to an index.

    Returns:
        What is to be encoded, kept and taken out.

    Raises:
        `ValueError`: where no scene can be used.
        [`~geosearch.index_store.IndexProblem`]: where scenes with and without coordinates would come together.
    """
    sources = dict(index["sources"]) if index else {}
    plan = Plan(model, options, index["coordinates"] if index else "", skipped=list(listed.skipped), sources=sources)
    plan.gone = sorted(path for path in sources if not os.path.exists(path))
    to_open = [scene for scene in listed.scenes if not _is_unchanged(scene, plan)]
    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        opened = list(pool.map(lambda scene: _open_scene(scene, options), to_open))
    usable = [result for result in opened if isinstance(result, tuple)]
    plan.skipped += [result for result in opened if isinstance(result, dict)]
    _choose_coordinates(plan, [facts for facts, _ in usable])
    for facts, grids in usable:
        if (facts.crs is not None) != (plan.coordinates == "wgs84"):
            plan.skipped.append({"scene": facts.path, "reason": _wrong_coordinates(facts)})
            continue
        if facts.path in plan.sources:
            plan.changed.append(facts.path)
        content = [facts.path, facts.files, options.to_dict(), model["weights_sha256"], model.get("dtype")]
        windows, blocks = sum(map(len, grids)), sum(grid.blocks for grid in grids)
        plan.scenes.append(PlannedScene(facts, json_sha256(content)[:16], windows, blocks))
    if not plan.scenes and not plan.sources:
        first = plan.skipped[0]["reason"] if plan.skipped else "none was named"
        count = len(listed.scenes) + len(listed.skipped)
        raise ValueError(f"none of {count} scenes can be indexed; the first: {first}")
    return plan


def _is_unchanged(scene: Scene, plan: Plan) -> bool:
    """Whether the index holds a scene as it is: by size and time, else by content."""
    known = plan.sources.get(scene.path)
    if known is None:
        return False
    try:
        files = stat_files(scene.path, [file for file, *_ in known["files"]])
    except RasterError:
        return False
    if [list(file) for file in files] == [list(file) for file in known["files"]]:
        return True
    same = [file[:2] for file in files] == [tuple(file[:2]) for file in known["files"]]
    try:
        same = same and content_hash(files) == known["sha256"]
    except OSError:
        return False
    if same:
        plan.sources[scene.path] = {**known, "files": [list(file) for file in files]}
        plan.renewed = True
    return same


def _open_scene(scene: Scene, options: WindowOptions) -> tuple[SceneFacts, list[Grid]] | dict[str, Any]:
    try:
        with options.open(scene.path) as raster:
            facts = describe_scene(scene, raster)
            return facts, scene_grids(facts.width, facts.height, options.sizes, options.stride, facts.pixel_size)
    except ValueError as error:
        reason = str(error)
        return {"scene": scene.path, "reason": reason if scene.path in reason else f"{scene.path}: {reason}."}


def _choose_coordinates(plan: Plan, facts: Sequence[SceneFacts]) -> None:
    if not plan.coordinates:
        plan.coordinates = "wgs84" if any(fact.crs for fact in facts) or not facts else "pixels"
    elif facts and all((fact.crs is not None) != (plan.coordinates == "wgs84") for fact in facts):
        kinds = ("scenes on the Earth", "pictures without coordinates")
        has, named = kinds if plan.coordinates == "wgs84" else kinds[::-1]
        advice = "index those into a folder of their own"
        raise IndexProblem(f"the index holds {has}, and only {named} were named: {advice}.")


def _wrong_coordinates(facts: SceneFacts) -> str:
    if facts.crs is None:
        return (
            f"{facts.path} has no coordinate reference system or no transform, and the other scenes have: "
            f"index such scenes apart, or write the coordinates into the file (gdal_edit, gdalwarp)."
        )
    return f"{facts.path} has coordinates, and the index holds pictures without: index such scenes apart."
