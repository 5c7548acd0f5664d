"""Pictures, captions and sources for small builds, and what came of a build."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training.lrs2m.build import main
from training.lrs2m.shards import read_shard


THINGS = [
    "airport",
    "beach",
    "bridge",
    "canal",
    "church",
    "desert",
    "farm",
    "forest",
    "harbour",
    "lake",
    "meadow",
    "port",
]


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture of smooth patches, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def short_caption(index: int) -> str:
    return f"A {THINGS[index % len(THINGS)]} of number {index} beside a road."


def long_caption(index: int) -> str:
    return (
        f"The image shows a {THINGS[index % len(THINGS)]} with the number {index} from above. A grey road runs from the "
        "left edge to the right edge, and three red cars are parked beside it. Below the road lies a dark green field "
        "with a small blue pond, and in the upper right corner there are some houses with orange roofs and gardens."
    )


def source(route: str, read: dict, **fields) -> dict:
    """A source of a recipe, with the captioners `mllm` and `llm` where its route needs them."""
    texts = {}
    if route in ("expand", "anchor"):
        texts["long"] = {"captioner": "mllm", "prompt": "expand@1" if route == "expand" else "anchor@1"}
    if route in ("compress", "anchor"):
        texts["short"] = {"captioner": "llm", "prompt": "compress@1"}
    return {"name": "tiles", "route": route, "licence": "CC0-1.0", "read": read} | texts | fields


def build(recipe: Path, folder: Path, *more: str) -> int:
    return main(["--config", str(recipe), "--output", str(folder), *more])


def rows_of(folder: Path) -> list[dict]:
    """All rows of a finished data set, by id."""
    files = [folder / file["path"] for split in manifest_of(folder)["splits"].values() for file in split["files"]]
    return sorted((row for file in files for row in read_shard(file)), key=lambda row: row["id"])


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def entries(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
