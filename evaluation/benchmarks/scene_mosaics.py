"""Large drawn landscapes with the regions that each query describes, for semantic localization.

    python -m evaluation.benchmarks.scene_mosaics OUT --mosaics 4 --seed 0

writes `OUT/localization.jsonl` (`image`, `text`, `polygons`: what `evaluation.benchmarks.localization_data` reads) and
the images it names, `OUT/mosaics/0.png`, …, of 2048 x 2048 pixels. A mosaic is made of the same scenes as the embedded
data set: 8 x 8 of them, in districts of one class. Queries name the class of a district, or are the short caption of a
scene; their polygons are all the places where they are true.

The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .aerial_scenes.canvas import District, Query, Scenes, draw_landscape, write_queries
from .aerial_scenes.drawing import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from .aerial_scenes.layout import CLASS_NAMES, CLASS_OF, pick, plan_scene, scene_random


TILES, TILE_PIXELS = 8, 256  # scenes along each side of a mosaic, and pixels along each side of a scene
LARGEST_DISTRICT = 3  # scenes along a side
CLASS_QUERIES, SCENE_QUERIES = 2, 2  # of a mosaic


def _cut(rng: random.Random, whole: District) -> Iterator[District]:
    """Cuts a rectangle in two until no side is longer than a district's may be."""
    height, width = whole.bottom - whole.top, whole.right - whole.left
    if max(height, width) <= LARGEST_DISTRICT:
        yield whole
    elif height > width or (height == width and rng.random() < 0.5):
        middle = whole.top + rng.randint(1, height - 1)
        yield from _cut(rng, whole._replace(bottom=middle))
        yield from _cut(rng, whole._replace(top=middle))
    else:
        middle = whole.left + rng.randint(1, width - 1)
        yield from _cut(rng, whole._replace(right=middle))
        yield from _cut(rng, whole._replace(left=middle))


def plan_mosaic(rng: random.Random, tiles: int) -> tuple[list[District], list[str], Scenes]:
    """Districts, the class of each, and the scene at every (row, column); no scene has a road or river of its own."""
    districts = list(_cut(rng, District(0, tiles, 0, tiles)))
    names: list[str] = []
    scenes = {}
    for index, district in enumerate(districts):
        taken = {names[other] for other in range(index) if district.touches(districts[other])}
        free = [name for name in CLASS_NAMES if name not in taken] or list(CLASS_NAMES)
        names.append(pick(rng, free))
        ground = pick(rng, CLASS_OF[names[-1]].grounds)
        for row in range(district.top, district.bottom):
            for column in range(district.left, district.right):
                scene = plan_scene(rng, names[-1], with_line=False)
                scenes[row, column] = dataclasses.replace(scene, ground=ground)
    return districts, names, scenes


def draw_mosaic(
    rng: random.Random, tiles: int = TILES, side: int = TILE_PIXELS
) -> tuple[Image.Image, list[District], list[Query]]:
    """
    A landscape of `tiles` x `tiles` scenes of `side` pixels each, its districts, and its queries.

    Args:
        rng: chooses.
        tiles: scenes along a side.
        side: pixels of a scene.

    Returns:
        The picture, its districts, and its queries with their regions.
    """
    districts, _, scenes = plan_mosaic(rng, tiles)
    image = draw_landscape(rng, scenes, tiles, side, whole=False)
    queries = write_queries(rng, scenes, districts, side, CLASS_QUERIES, SCENE_QUERIES)
    rng.shuffle(queries)
    return image, districts, queries


def write_mosaics(
    out: str | Path, mosaics: int, seed: int = 0, tiles: int = TILES, tile_pixels: int = TILE_PIXELS
) -> int:
    """
    Draws the data set into the folder `out`; `localization.jsonl` is written last.

    Args:
        out: folder.
        mosaics: number of landscapes.
        seed: of the data set.
        tiles: scenes along a side of one.
        tile_pixels: of a scene's side.

    Returns:
        Number of queries.

    Raises:
        ValueError: a count or size is impossible.
    """
    for name, value, low, high in (
        ("--mosaics", mosaics, 1, None),
        ("--tiles", tiles, 2, None),
        ("--tile-pixels", tile_pixels, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
    ):
        if value < low or (high and value > high):
            raise ValueError(f"{name} is {value}; it must be at least {low}" + (f", at most {high}." if high else "."))
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the data set needs a folder.")
    from modeling_lrsclip.files.atomic import make_folder  # slow to import; the workers do without

    make_folder(out)
    temporary = Path(tempfile.mkdtemp(prefix=".mosaics-", dir=out))
    try:
        lines, folder = [], temporary / "mosaics"
        folder.mkdir()
        for index in tqdm(range(mosaics), "drawing", unit="mosaic", disable=None):
            image, _, queries = draw_mosaic(scene_random(seed, "mosaics", index, "mosaic"), tiles, tile_pixels)
            image.save(folder / f"{index}.png")
            for query in queries:
                row = {"image": f"mosaics/{index}.png", "text": query.text, "polygons": query.polygons}
                lines.append(json.dumps(row) + "\n")
        (out / "localization.jsonl").unlink(missing_ok=True)
        shutil.rmtree(out / "mosaics", ignore_errors=True)
        folder.rename(out / "mosaics")
        (out / "localization.jsonl").write_text("".join(lines), encoding="utf-8")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.benchmarks.scene_mosaics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--mosaics", type=int, default=4, help="number of landscapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=TILES, help="scenes along each side of a mosaic")
    parser.add_argument("--tile-pixels", type=int, default=TILE_PIXELS, help="side of a scene in pixels")
    arguments = parser.parse_args(argv)
    try:
        queries = write_mosaics(**vars(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    side = arguments.tiles * arguments.tile_pixels
    print(f"{arguments.mosaics} mosaics of {side} x {side} pixels with {queries} queries -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
