"""A small archive of georeferenced imagery with places whose descriptions are known, to try a search on.

    python -m evaluation.benchmarks.scene_archive OUT --scenes 3 --seed 0

writes `OUT/scenes/*.tif`, GeoTIFFs of 8192 x 8192 pixels of half a metre: 16 bit, bands blue, green, red and near
infrared, a wedge of nodata in a corner, each in a UTM zone of its own, every third one rotated. On fields and woods lie
scenes of the embedded data set, 256 pixels wide and 128 or a multiple of it from the edge: models trained on that data
set know whole scenes, and half a scene for no scene. `OUT/places.jsonl` has each one's `text` (its long caption), `scene`
and `pixel_box` (left, top, width, height); it is written last.

The same arguments give the same pixels and places.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp, Resampling
from rasterio.windows import Window
from tqdm import tqdm

from .aerial_scenes.captions import write_long_text
from .aerial_scenes.drawing import draw_ground, draw_scene
from .aerial_scenes.layout import pick, plan_scene, scene_random
from .aerial_scenes.sprites import GROUNDS


SPLIT = "archive"
SIDE, PLACE_SIDE, SLOT = 8192, 256, 512  # pixels of a GeoTIFF, of a described scene, of the square that it lies in
STEP = 128  # pixels: windows of the side of a described scene, half a window apart, frame each one exactly
FIELD = 1024  # pixels of a field of one ground between the scenes
PIXEL_METRES = 0.5
ZONES = ("EPSG:32633", "EPSG:32718", "EPSG:32755", "EPSG:32610", "EPSG:32637")  # Europe, South America, Australia, …
ORIGINS = ((500_000, 5_500_000), (300_000, 8_600_000), (690_000, 6_100_000), (550_000, 4_180_000), (400_000, 100_000))
TURN = 17.0  # degrees by which every third GeoTIFF is rotated
WEDGE = 0.22  # of the side: a corner of nodata
NODATA = 0
# Of each band: the value of black, and how much a level of 255 adds.
BANDS = (("blue", 2, 900, 18), ("green", 1, 760, 21), ("red", 0, 610, 25), ("nir", None, 1500, 30))


def draw_archive_scene(seed: int, number: int, side: int = SIDE) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """
    The picture of one GeoTIFF, and what lies where in it.

    Args:
        seed: of the archive.
        number: of the scene.
        side: pixels.

    Returns:
        `(side, side, 3)` uint8, and for each described scene its `text` and `pixel_box`.
    """
    rng = scene_random(seed, SPLIT, number, "ground")
    picture = np.empty((side, side, 3), dtype=np.uint8)
    for top in range(0, side, FIELD):
        for left in range(0, side, FIELD):
            height, width = min(FIELD, side - top), min(FIELD, side - left)
            ground = draw_ground(rng, pick(rng, tuple(GROUNDS)), FIELD, PLACE_SIDE / 64)
            picture[top : top + height, left : left + width] = ground[:height, :width]
    places = []
    slots = side // SLOT
    for slot in range(slots * slots):
        scene_rng = scene_random(seed, SPLIT, number * slots * slots + slot, "plan")
        scene = plan_scene(scene_rng)
        steps = (SLOT - PLACE_SIDE) // STEP
        left, top = (start * SLOT + STEP * round(rng.random() * steps) for start in (slot % slots, slot // slots))
        text = write_long_text(scene_rng, scene)
        image, _ = draw_scene(scene_rng, scene, PLACE_SIDE)
        picture[top : top + PLACE_SIDE, left : left + PLACE_SIDE] = np.asarray(image)
        if left + top >= WEDGE * side:
            places.append({"text": text, "pixel_box": [left, top, PLACE_SIDE, PLACE_SIDE]})
    return picture, places


def write_archive_scene(path: Path, picture: np.ndarray, number: int) -> None:
    """
    Writes a picture as a tiled 16-bit GeoTIFF with overviews, a strip of it at a time.

    Args:
        path: GeoTIFF to write.
        picture: (H, W, 3) uint8.
        number: of the scene, which decides where on Earth it lies.
    """
    side = len(picture)
    x, y = ORIGINS[number % len(ORIGINS)]
    transform = Affine.translation(x, y) @ Affine.rotation(TURN if number % 3 == 2 else 0.0)
    transform = transform @ Affine.scale(PIXEL_METRES, -PIXEL_METRES)
    profile = {
        "driver": "GTiff", "dtype": "uint16", "count": len(BANDS), "width": side, "height": side, "nodata": NODATA,
        "crs": ZONES[number % len(ZONES)], "transform": transform, "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "zstd", "zstd_level": 1, "predictor": 2, "num_threads": 1,
    }  # fmt: skip
    unfinished = path.with_suffix(".unfinished.tif")
    with rasterio.open(unfinished, "w", **profile) as dataset:
        dataset.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
        for band, (name, *_) in enumerate(BANDS, 1):
            dataset.set_band_description(band, name)
        dataset.update_tags(TIFFTAG_DATETIME=f"{2021 + number % 4}:06:1{number % 10} 10:30:00")
        for top in range(0, side, 512):
            strip = picture[top : top + 512].astype(np.int32)
            nothing = np.arange(side)[None, :] + np.arange(top, top + len(strip))[:, None] < WEDGE * side
            for band, (_, channel, black, gain) in enumerate(BANDS, 1):
                # Near infrared: what is green and not red reflects it.
                levels = strip[..., channel] if channel is not None else 96 + (strip[..., 1] - strip[..., 0]) // 2
                values = (black + gain * levels).astype(np.uint16)
                values[nothing] = NODATA
                dataset.write(values, band, window=Window(0, top, side, len(strip)))
        factors = [2**power for power in range(2, 1 + int(math.log2(max(4, side // 256))))]
        dataset.build_overviews(factors, Resampling.average)
    os.replace(unfinished, path)


def _make(task: tuple[Path, int, int, int]) -> list[dict[str, Any]]:
    folder, seed, number, side = task
    picture, places = draw_archive_scene(seed, number, side)
    name = f"scenes/{('north', 'south', 'turned')[number % 3]}-{number}.tif"
    write_archive_scene(folder / name, picture, number)
    return [{"scene": name, **row} for row in places]


def write_archive(
    out: str | Path, scenes: int = 3, seed: int = 0, side: int = SIDE, workers: int | None = None
) -> int:
    """
    Draws the archive into the folder `out`.

    Args:
        out: is made.
        scenes: number of GeoTIFFs.
        seed: of everything drawn.
        side: of a GeoTIFF in pixels.
        workers: processes; default one a core. The result does not depend on it.

    Returns:
        Number of described places.

    Raises:
        `ValueError`: for an impossible count or size.
    """
    if scenes < 1:
        raise ValueError(f"--scenes is {scenes}; at least 1 is needed.")
    if side < SLOT:
        raise ValueError(f"--side is {side}; at least {SLOT} pixels are needed.")
    from modeling_lrsclip.files.atomic import make_folder  # slow to import; the workers do without

    out = Path(out)
    make_folder(out / "scenes")
    (out / "places.jsonl").unlink(missing_ok=True)
    tasks = [(out, seed, number, side) for number in range(scenes)]
    workers = min(workers or os.cpu_count() or 1, scenes)
    bar = {"desc": "drawing", "unit": "scene", "total": scenes, "disable": None}
    if workers == 1:
        made = [_make(task) for task in tqdm(tasks, **bar)]
    else:  # spawned, not forked: the caller may have threads
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = list(tqdm(pool.map(_make, tasks), **bar))
    lines = [json.dumps(row) + "\n" for places in made for row in places]
    (out / "places.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.benchmarks.scene_archive", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--scenes", type=int, default=3, help="number of GeoTIFFs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=SIDE, help="of a GeoTIFF in pixels")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    options = parser.parse_args(argv)
    try:
        places = write_archive(**vars(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    side = options.side
    print(f"{options.scenes} GeoTIFFs of {side:,} x {side:,} pixels with {places:,} described places -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
