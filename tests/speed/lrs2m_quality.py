"""
What the guard against near-duplicates finds, beside `imagehash`, and time and memory of what `training.lrs2m` does with a
whole data set, at the size of LRS2M.

    python -m tests.speed.lrs2m_quality kinds --tiles FOLDER
    python -m tests.speed.lrs2m_quality overlap --tiles FOLDER
    python -m tests.speed.lrs2m_quality duplicates [--images 2000000] [--no-crops] [--folder DIR] [--tiles FOLDER]
    python -m tests.speed.lrs2m_quality statistics [--images 2000000] [--folder DIR]

`kinds` stores every image below a folder of real tiles and shows altered copies of them, then unrelated images: each
tile's quarters, which share no pixel, and drawn scenes. `imagehash` has each tile's own hash beside it, at 8 bits and at 10.
`overlap` shows tiles that share 25 to 75 % with a stored one, to the guard and to SIFT with a geometric check. `duplicates`
fills a finder with mixtures of the real tiles' cuts (or, without a folder, of drawn scenes'), which are unlike each other
but have the frequencies of aerial images (beyond 200,000 with other bits of their hashes turned at random), and then shows it new ones and turned and cropped copies of known ones.
`statistics` reads as many rows without pixels.
"""

import argparse
import io
import json
import resource
import tempfile
import time
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
from training.lrs2m.data_row import SCHEMA
from training.lrs2m.duplicates.finder import DuplicateFinder
from training.lrs2m.duplicates.fingerprints import SIDE, coefficients, hashes, thumbnail
from training.lrs2m.statistics import write


PIECE = 10_000  # images made at a time
DIFFERENT, FLIPPED = 200_000, 0.15  # images of their own; others are these with so many of their hashes' bits turned
ASKED = 200  # images shown at the full size, of each kind


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
        place = image.width * 0.05, image.height * (0.15 + 0.3 * line)
        ImageDraw.Draw(image).text(place, "PREVIEW COPY", fill="white", font_size=max(10, image.width // 7))
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
    own = np.stack([imagehash.phash(tile).hash.ravel() for tile in tiles])
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
        bits = (np.stack([imagehash.phash(copy).hash.ravel() for copy in copies]) != own).sum(axis=1)
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
        matches = [finder.check(f"{place}/{index}", image) for place, (index, image) in enumerate(images)]
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
        finder, found, points = DuplicateFinder(), 0, []
        began = now()
        for index, tile in enumerate(tiles):
            shown = tile.crop((shift, 55, shift + side, 55 + side))
            points.append(sift_overlap(stored[index], np.asarray(shown.convert("L"))))
        sift_ms = 1e3 * (now() - began)[1] / len(tiles)
        for index, one in enumerate(stored):
            finder.check(f"{index}", Image.fromarray(one))
        for index, tile in enumerate(tiles):
            match = finder.check(f"shown-{index}", tile.crop((shift, 55, shift + side, 55 + side)))
            found += match is not None and match.match == f"{index}"
        wrong = [sift_overlap(stored[index], stored[index - 1]) for index in range(len(tiles))]
        measured[f"{share:.0%} shared"] = {
            "guard": found,
            "sift_8_points": sum(count >= 8 for count in points),
            "sift_8_points_unrelated": sum(count >= 8 for count in wrong),
            "sift_ms_cpu_a_pair": round(sift_ms, 1),
        }
    return {"tiles": len(tiles)} | measured


def mixtures(pool: np.ndarray, seed: int, count: int) -> np.ndarray:
    """(count, S, S) uint8: thumbnails mixed of two of a pool (n, S, S), the second shifted."""
    rng = np.random.default_rng(seed)
    one, other = (pool[rng.integers(len(pool), size=count)] for _ in range(2))
    places = (np.arange(SIDE) + rng.integers(0, SIDE, (count, 2, 1))) % (2 * SIDE)
    places = np.minimum(places, 2 * SIDE - 1 - places)  # mirrored beyond the edge
    other = other[np.arange(count)[:, None, None], places[:, 0, :, None], places[:, 1, None, :]]
    weight = rng.uniform(0.3, 0.7, (count, 1, 1)).astype(np.float32)
    return np.clip(weight * one + (1 - weight) * other, 0, 255).astype(np.uint8)


def cuts(images: list[Image.Image]) -> np.ndarray:
    """(n, S, S) float32: thumbnails of eight random cuts of each image, in random turns."""
    rng = np.random.default_rng(0)
    parts = (cut(image, rng.uniform(0.45, 1), *rng.uniform(0, 1, 2)) for image in images for _ in range(8))
    return np.stack([np.rot90(thumbnail(part), rng.integers(4)) for part in parts]).astype(np.float32)


def duplicates(images: int, crops: bool, folder: Path, tiles: Path | None) -> dict[str, float]:
    """Fills the store as `check` would, loads it as a restart does, and asks."""
    faiss.omp_set_num_threads(1)
    cv2.setNumThreads(1)
    store = folder / "prints.sqlite"
    pool = cuts(real_tiles(tiles) if tiles else drawn_scenes(125))
    finder = DuplicateFinder(store=store, crops=crops)
    began = now()
    rng, base = np.random.default_rng(1), min(images, DIFFERENT)
    thumbs = np.concatenate([mixtures(pool, start, PIECE) for start in range(0, base, PIECE)])[:base]
    codes = np.concatenate([hashes(coefficients(thumbs[start : start + PIECE])) for start in range(0, base, PIECE)])
    for start in range(0, images, PIECE):
        places = np.arange(start, min(start + PIECE, images))
        flips = np.packbits(rng.random((len(places), codes.shape[1], 64)) < FLIPPED, axis=-1).view(np.uint64)[..., 0]
        shown = codes[places % base] ^ (flips if start >= base else np.uint64(0))
        rows = [
            (place, "", f"row-{place}", code.tobytes(), thumbs[place % base].tobytes(), None)
            for place, code in zip(places.tolist(), shown)
        ]
        with finder._store:
            finder._store.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", rows)
    finder.close()
    measured = with_times("fill_seconds", now() - began) | {"store_MB": store.stat().st_size / 1e6}
    began = now()
    finder = DuplicateFinder(store=store, crops=crops)
    measured |= with_times("load_seconds", now() - began)
    known = mixtures(pool, 0, min(PIECE, images))[:ASKED]
    new = mixtures(pool, 10**9, ASKED)
    half = [Image.fromarray(one).resize((96, 96), Image.Resampling.BICUBIC) for one in known]
    cropped = [jpeg(cut(one, 0.85, 0.3, 0.8), 80) for one in half]
    turned = [jpeg(one.rotate(90), 60) for one in half]
    for name, shown in {"new": map(Image.fromarray, new), "turned": turned, "cropped": cropped}.items():
        shown = list(shown)
        began = now()
        matches = [finder.check(f"{name}-{place}", image) for place, image in enumerate(shown)]
        measured |= with_times(f"{name}_ms_an_image", 1e3 * (now() - began) / ASKED)
        same = (
            match is not None and match.match[:4] == "row-" and int(match.match[4:]) % base == place
            for place, match in enumerate(matches)
        )
        right = sum(same)
        measured[f"{name}_matched"] = sum(map(bool, matches)) if name == "new" else right
    return measured


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
        columns = {name: [None] * count for name in SCHEMA.names} | {
            "id": [f"row-{number + place}" for place in range(count)],
            "long_text": [longs[place] for place in drawn],
            "short_text": [shorts[place] for place in drawn],
            "source": ["MillionAID" if place % 2 else "fMoW" for place in range(count)],
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
        parquet.write_table(pyarrow.table(columns, schema=SCHEMA), path, row_group_size=PIECE)
        files.append({"path": f"data/{path.name}", "rows": count, "sha256": str(number)})
    manifest = {"name": "synthetic", "images": "omit", "format": "parquet", "recipe": {"sources": []}, "totals": {}}
    manifest["splits"] = {"train": {"rows": rows, "files": files}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    began, before = now(), peak_mb()
    told = write(folder)
    return {"rows": told["rows"], "before_MB": before} | with_times("seconds", now() - began)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kinds", "overlap", "duplicates", "statistics"])
    parser.add_argument("--images", type=int, default=2_000_000)
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
            measured = statistics(options.images, Path(work))
    rounded = {name: round(value, 2) for name, value in measured.items()}
    print(json.dumps(rounded | {"peak_MB": round(peak_mb())}, indent=2))


if __name__ == "__main__":
    main()
