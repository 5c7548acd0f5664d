"""
What the guard against near-duplicates finds, beside `imagehash`, and time and memory of what `training.lrs2m` does with a
whole data set, at the size of LRS2M.

    python -m tests.speed.lrs2m_quality kinds --tiles FOLDER
    python -m tests.speed.lrs2m_quality overlap --tiles FOLDER
    python -m tests.speed.lrs2m_quality duplicates [--images 1000 200000 2000000] [--no-crops] [--folder DIR] [--tiles FOLDER]
    python -m tests.speed.lrs2m_quality statistics [--images 2000000] [--folder DIR]

`kinds` stores every image below a folder of real tiles and shows altered copies of them, then unrelated images: each
tile's quarters, which share no pixel, and drawn scenes. `imagehash` has each tile's own hash beside it, at 8 bits and at 10.
`overlap` shows tiles that share 25 to 75 % with a stored one, to the guard and to SIFT with a geometric check. `duplicates`
shows altered copies of half of the tiles (or, without a folder, of drawn scenes) to a guard that has stored them among
mixtures of the other half's cuts, which are unlike each other but have the frequencies of aerial images.
`statistics` reads as many rows without pixels.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import faiss
import imagehash
import numpy as np
import pyarrow
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from pyarrow import parquet

from evaluation.benchmarks.aerial_scenes.data_set import scene_row
from modeling_lrsclip.encoding.imagery import is_image_file
from training.lrs2m.data_row import schema
from training.lrs2m.duplicates.finder import DuplicateFinder, Query
from training.lrs2m.duplicates.fingerprints import SIDE, coefficients, hashes, thumbnail, turned
from training.lrs2m.duplicates.store import INSIDE, ImageStore
from training.lrs2m.duplicates.workers import Guard
from training.lrs2m.statistics import write


PIECE = 2500  # images made at a time


def now() -> np.ndarray:
    """Seconds by the clock and of this process, which differ where others share the machine."""
    return np.array([time.perf_counter(), time.process_time()])


def with_times(name: str, seconds: np.ndarray) -> dict[str, float]:
    return {name: float(seconds[0]), f"{name}_cpu": float(seconds[1])}


def real_tiles(folder: Path) -> list[Image.Image]:
    """Every image below a folder, by name."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*")) if is_image_file(path)]


def drawn_scenes(count: int) -> list[Image.Image]:
    rows = (scene_row(7, "train", index, 96) for index in range(count))
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cut(image: Image.Image, share: float, left: float, top: float) -> Image.Image:
    """A share of each side, at a place given as shares of what is left."""
    wide, high = round(image.width * share), round(image.height * share)
    x, y = round(left * (image.width - wide)), round(top * (image.height - high))
    return image.crop((x, y, x + wide, y + high))


def watermark(image: Image.Image) -> Image.Image:
    """Three lines of white capitals, a seventh of the width high, across the image."""
    image = image.copy()
    for line in range(3):
        corner = image.width * 0.05, image.height * (0.15 + 0.3 * line)
        ImageDraw.Draw(image).text(corner, "PREVIEW COPY", fill="white", font_size=max(10, image.width // 7))
    return image


def noisy(image: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 20, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def brightened(image: Image.Image) -> Image.Image:
    return image.point([int(255 * (value / 255) ** 0.6) for value in range(256)] * 3)


def turned_and_cut(image: Image.Image) -> Image.Image:
    margin = int(np.ceil(np.tan(np.radians(3)) * max(image.size) / 2)) + 1
    box = margin, margin, image.width - margin, image.height - margin
    return image.rotate(3, Image.Resampling.BICUBIC).crop(box)


def placed(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, 2)


KINDS = {
    "JPEG, quality 30": lambda image, seed: jpeg(image, 30),
    "JPEG, quality 10": lambda image, seed: jpeg(image, 10),
    "half as large": lambda image, seed: image.resize((image.width // 2, image.height // 2)),
    "turned by 90, JPEG": lambda image, seed: jpeg(image.rotate(90), 60),
    "mirrored, JPEG": lambda image, seed: jpeg(ImageOps.mirror(image), 60),
    "blur, radius 2": lambda image, seed: image.filter(ImageFilter.GaussianBlur(2)),
    "blur, radius 4": lambda image, seed: image.filter(ImageFilter.GaussianBlur(4)),
    "watermark": lambda image, seed: watermark(image),
    "turned by 3 degrees": lambda image, seed: image.rotate(3, Image.Resampling.BICUBIC),
    "turned by 3 and cut": lambda image, seed: turned_and_cut(image),
    "equalised": lambda image, seed: ImageOps.equalize(image),
    "gamma 0.6": lambda image, seed: brightened(image),
    "grey": lambda image, seed: image.convert("L").convert("RGB"),
    "noise of 20 levels": lambda image, seed: noisy(image, seed),
    "crop, side 90 %, JPEG": lambda image, seed: jpeg(cut(image, 0.9, *placed(seed)), 70),
    "crop, side 80 %, JPEG": lambda image, seed: jpeg(cut(image, 0.8, *placed(seed)), 70),
    "crop, 80 %, mirrored, JPEG": lambda image, seed: jpeg(ImageOps.mirror(cut(image, 0.8, *placed(seed))), 70),
    "white frame of 12 %": lambda image, seed: ImageOps.expand(image, round(image.width * 0.12), "white"),
    "black frame, JPEG": lambda image, seed: jpeg(ImageOps.expand(image, round(image.width * 0.12), "black"), 80),
}


def quarters(image: Image.Image) -> list[Image.Image]:
    """Four parts of an image that share no pixel."""
    wide, high = image.width // 2, image.height // 2
    return [image.crop((x, y, x + wide, y + high)) for x in (0, wide) for y in (0, high)]


def kinds(folder: Path) -> dict[str, Any]:
    """Copies found by the guard and by `imagehash`, and images that are taken for copies though they are none."""
    tiles = real_tiles(folder)
    measured: dict[str, Any] = {"tiles": len(tiles)}
    tile_hashes = np.stack([imagehash.phash(tile).hash.ravel() for tile in tiles])
    with tempfile.TemporaryDirectory() as work:
        for index, tile in enumerate(tiles):
            tile.save(Path(work) / f"{index:04d}.png")
        finder = DuplicateFinder([work], inside=False)
    for kind, alter in KINDS.items():
        copies = [alter(tile, index) for index, tile in enumerate(tiles)]
        began = now()
        matches = [finder.check(f"{kind}-{index}", copy) for index, copy in enumerate(copies)]
        milliseconds = 1e3 * (now() - began)[1] / len(tiles)
        right = sum(match is not None and match.match == f"{index:04d}.png" for index, match in enumerate(matches))
        bits = (np.stack([imagehash.phash(copy).hash.ravel() for copy in copies]) != tile_hashes).sum(axis=1)
        measured[kind] = {
            "guard": right,
            "another_tile": sum(map(bool, matches)) - right,
            "imagehash_8": int((bits <= 8).sum()),
            "imagehash_10": int((bits <= 10).sum()),
            "ms_cpu": round(milliseconds, 1),
        }
    return measured | {"unrelated": unrelated(tiles)}


def unrelated(tiles: list[Image.Image]) -> dict[str, Any]:
    """Matches among images of which no two show the same ground."""
    shown = {
        "tiles": list(enumerate(tiles)),
        "quarters": [(index, part) for index, tile in enumerate(tiles) for part in quarters(tile)],
        "scenes": list(enumerate(drawn_scenes(300))),
    }
    counted = {}
    for name, images in shown.items():
        finder = DuplicateFinder()
        matches = [finder.check(f"{number}/{index}", image) for number, (index, image) in enumerate(images)]
        pairs = [(match.id.split("/")[1], match.match.split("/")[1]) for match in matches if match]
        counted[name] = {"shown": len(images), "matches": sum(one != other for one, other in pairs)}
        counted[name] |= {"matches_in_one_photograph": sum(one == other for one, other in pairs)}
    return counted


def sift_overlap(one: np.ndarray, other: np.ndarray) -> int:
    """Corresponding SIFT points of two grey images that agree on one shift, turn and scale."""
    sift = cv2.SIFT_create(300, contrastThreshold=0.02)
    (points, described), (other_points, other_described) = (
        sift.detectAndCompute(image, None) for image in (one, other)
    )
    if described is None or other_described is None or min(len(points), len(other_points)) < 4:
        return 0
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(described, other_described, k=2)
    kept = [pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < 0.8 * pair[1].distance]
    if len(kept) < 4:
        return 0
    start = np.float32([points[match.queryIdx].pt for match in kept])
    end = np.float32([other_points[match.trainIdx].pt for match in kept])
    _, inside = cv2.estimateAffinePartial2D(start, end, ransacReprojThreshold=3.0)
    return 0 if inside is None else int(inside.sum())


def overlap(folder: Path) -> dict[str, Any]:
    """Neighbouring windows of one photograph that share a part, and windows of different ones."""
    tiles = [tile.resize((256, 256), Image.Resampling.BICUBIC) for tile in real_tiles(folder)]
    side, measured = 146, {}
    stored = [np.asarray(tile.crop((0, 55, side, 55 + side)).convert("L")) for tile in tiles]
    for share in (0.75, 0.5, 0.25):
        shift = round(side * (1 - share))
        finder, hits, points = DuplicateFinder(), 0, []
        began = now()
        for index, tile in enumerate(tiles):
            shown = tile.crop((shift, 55, shift + side, 55 + side))
            points.append(sift_overlap(stored[index], np.asarray(shown.convert("L"))))
        sift_ms = 1e3 * (now() - began)[1] / len(tiles)
        for index, one in enumerate(stored):
            finder.check(f"{index}", Image.fromarray(one))
        for index, tile in enumerate(tiles):
            match = finder.check(f"shown-{index}", tile.crop((shift, 55, shift + side, 55 + side)))
            hits += match is not None and match.match == f"{index}"
        wrong = [sift_overlap(stored[index], stored[index - 1]) for index in range(len(tiles))]
        measured[f"{share:.0%} shared"] = {
            "guard": hits,
            "sift_8_points": sum(count >= 8 for count in points),
            "sift_8_points_unrelated": sum(count >= 8 for count in wrong),
            "sift_ms_cpu_a_pair": round(sift_ms, 1),
        }
    return {"tiles": len(tiles)} | measured


def mixtures(pool: np.ndarray, seed: int, count: int) -> np.ndarray:
    """(count, S, S) uint8: thumbnails mixed of two of a pool (n, S, S), the second shifted."""
    rng = np.random.default_rng(seed)
    one, other = (pool[rng.integers(len(pool), size=count)] for _ in range(2))
    rows, columns = (np.arange(SIDE) + rng.integers(0, 2 * SIDE, (2, count, 1))) % (2 * SIDE)
    rows, columns = (np.minimum(places, 2 * SIDE - 1 - places) for places in (rows, columns))  # mirrored at the edge
    other = np.take_along_axis(other, rows[:, :, None], axis=1)
    other = np.take_along_axis(other, columns[:, None, :], axis=2)
    weight = rng.uniform(0.3, 0.7, (count, 1, 1)).astype(np.float32)
    return (weight * one + (1 - weight) * other).astype(np.uint8)


def cuts(images: list[Image.Image]) -> np.ndarray:
    """(n, S, S) float32: thumbnails of twelve random cuts of each image, in all turns."""
    rng = np.random.default_rng(0)
    parts = (cut(image, rng.uniform(0.45, 1), *rng.uniform(0, 1, 2)) for image in images for _ in range(12))
    return np.concatenate([turned(thumbnail(part)) for part in parts]).astype(np.float32)


def fill(store: Path, pool: np.ndarray, start: int, end: int) -> None:
    """Stores mixtures with these numbers, as `check` would."""
    with closing(ImageStore(store)) as images:
        for first in range(start, end, PIECE):
            thumbs = mixtures(pool, first, min(PIECE, end - first))
            for offset, (code, thumb) in enumerate(zip(hashes(coefficients(thumbs)), thumbs)):
                images.add(first + offset, INSIDE, f"row-{first + offset}", code, thumb)


def duplicates(sizes: list[int], crops: bool, folder: Path, tiles: Path | None) -> dict[str, Any]:
    """
    Every second tile is stored and shown again in altered copies. The rest of the store is mixtures of cuts of the other
    tiles and of drawn scenes, by the number of images stored.
    """
    faiss.omp_set_num_threads(1)
    cv2.setNumThreads(1)
    real = real_tiles(tiles) if tiles else drawn_scenes(125)
    scenes = drawn_scenes(325)[125:]
    originals, pool = real[1::2], cuts([*real[::2], *scenes[:63]])
    store, measured = folder / "prints.sqlite", {"tiles": len(originals)}
    finder = DuplicateFinder(store=store, crops=crops)
    for index, tile in enumerate(originals):
        finder.check(f"tile-{index}", tile)
    stored = len(originals)
    for size in sorted(sizes):
        finder.close()
        fill(store, pool, stored, size)
        began, stored = now(), size
        finder = DuplicateFinder(store=store, crops=crops)
        measured[f"{size:,}"] = with_times("load_seconds", now() - began) | ask(finder, originals, scenes[63:])
    finder.close()
    del finder
    measured["ms_an_image_by_workers"] = {count: shown(count, crops, store, pool) for count in (1, 2)}
    return measured | {"store_MB": sum(file.stat().st_size for file in folder.iterdir()) / 1e6}


def shown(workers: int, crops: bool, store: Path, pool: np.ndarray) -> float:
    """Milliseconds by the clock for each of 1,024 new mixtures, which are remembered."""
    guard = Guard(workers, crops=crops, store=store)
    thumbs = mixtures(pool, 10**9 + workers, 1056)
    queries = [Query(f"{workers}-{index}", thumb) for index, thumb in enumerate(thumbs)]
    guard.check_all(queries[:32])  # waits for the processes
    began = now()
    for first in range(32, len(queries), 32):
        guard.check_all(queries[first : first + 32])
    seconds = (now() - began)[0]
    guard.close()
    return 1e3 * float(seconds) / 1024


def ask(finder: DuplicateFinder, originals: list[Image.Image], new: list[Image.Image]) -> dict[str, Any]:
    """Copies found by kind, matches of new images, and the time of either; nothing is remembered."""
    finder._remember = lambda *_: None
    measured: dict[str, Any] = {}
    for kind, alter in KINDS.items():
        copies = [alter(tile, index) for index, tile in enumerate(originals)]
        began = now()
        matches = [finder.check(f"{kind}-{index}", copy) for index, copy in enumerate(copies)]
        milliseconds = with_times("ms_an_image", 1e3 * (now() - began) / len(copies))
        right = sum(match is not None and match.match == f"tile-{index}" for index, match in enumerate(matches))
        measured[kind] = {"guard": right, "another": sum(map(bool, matches)) - right} | milliseconds
    began = now()
    matches = [finder.check(f"new-{index}", image) for index, image in enumerate(new)]
    milliseconds = with_times("ms_an_image", 1e3 * (now() - began) / len(new))
    return measured | {"new": {"shown": len(new), "matched": sum(map(bool, matches))} | milliseconds}


def statistics(rows: int, folder: Path) -> dict[str, float]:
    """Writes rows of some ten thousand different captions in shards of 100,000, and reads them."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnop"), 6)) for _ in range(20_000)])
    longs = [" ".join(rng.choice(words, 90)) for _ in range(10_000)]
    shorts = [" ".join(rng.choice(words, 12)) for _ in range(10_000)]
    files, shard = [], 100_000
    (folder / "data").mkdir()
    for number in range(0, rows, shard):
        count = min(shard, rows - number)
        drawn = rng.integers(0, 10_000, count)
        columns = {name: [None] * count for name in schema().names} | {
            "id": [f"row-{number + offset}" for offset in range(count)],
            "long_text": [longs[index] for index in drawn],
            "short_text": [shorts[index] for index in drawn],
            "source": ["MillionAID" if index % 2 else "fMoW" for index in range(count)],
            "licence": ["CC0-1.0"] * count,
            "route": ["merge"] * count,
            "long_captioner": ["given"] * count,
            "short_captioner": ["given"] * count,
            "long_tokens": rng.integers(60, 260, count).tolist(),
            "short_tokens": rng.integers(10, 40, count).tolist(),
            "short_words": [12] * count,
            "image_sha256": [one.tobytes().hex() for one in rng.integers(0, 256, (count, 32), dtype=np.uint8)],
            "longitude": rng.uniform(-180, 180, count).tolist(),
            "latitude": rng.uniform(-60, 75, count).tolist(),
        }
        path = folder / "data" / f"train-{number // shard:05d}.parquet"
        parquet.write_table(pyarrow.table(columns, schema=schema()), path, row_group_size=PIECE)
        files.append({"path": f"data/{path.name}", "rows": count, "sha256": str(number)})
    manifest = {"name": "synthetic", "images": "omit", "format": "parquet", "recipe": {"sources": []}, "totals": {}}
    manifest["splits"] = {"train": {"rows": rows, "files": files}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    began, before = now(), peak_mb()
    summary = write(folder)
    return {"rows": summary["rows"], "before_MB": before} | with_times("seconds", now() - began)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kinds", "overlap", "duplicates", "statistics"])
    parser.add_argument("--images", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--tiles", type=Path, help="folder with real tiles in and below it")
    parser.add_argument("--no-crops", action="store_true", help="of duplicates: whole images only")
    parser.add_argument("--folder", help="where to keep what is made meanwhile; default the system's")
    options = parser.parse_args()
    if options.what in ("kinds", "overlap"):
        print(json.dumps({"kinds": kinds, "overlap": overlap}[options.what](options.tiles), indent=2))
        return
    with tempfile.TemporaryDirectory(prefix="lrs2m-quality-", dir=options.folder) as work:
        if options.what == "duplicates":
            measured = duplicates(options.images, not options.no_crops, Path(work), options.tiles)
        else:
            measured = statistics(options.images[0], Path(work))
    print(json.dumps(rounded(measured | {"peak_MB": peak_mb()}), indent=2))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
