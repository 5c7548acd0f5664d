"""
Time and memory of what `training.lrs2m` does with a whole data set, at the size of LRS2M.

    python -m tests.speed.lrs2m_quality duplicates [--images 2000000] [--no-crops] [--folder DIR]
    python -m tests.speed.lrs2m_quality statistics [--images 2000000] [--folder DIR]

`duplicates` fills a finder with images of smooth noise, which are unlike each other, and then shows it new ones and
turned and cropped copies of known ones. `statistics` reads as many rows without pixels.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from training.lrs2m.data_row import SCHEMA
from training.lrs2m.duplicates.finder import DuplicateFinder
from training.lrs2m.duplicates.fingerprints import SIDE, coefficients, hashes
from training.lrs2m.statistics import write


PIECE = 10_000  # images made at a time
ASKED = 200  # images shown at the full size, of each kind


def now() -> np.ndarray:
    """Seconds by the clock and of this process, which differ where others share the machine."""
    return np.array([time.perf_counter(), time.process_time()])


def told_as(name: str, seconds: np.ndarray) -> dict[str, float]:
    return {name: float(seconds[0]), f"{name}_cpu": float(seconds[1])}


def smooth_noise(seed: int, count: int) -> np.ndarray:
    """(count, S, S) uint8: thumbnails of some twelve waves a side."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
    return np.stack([cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for one in coarse])


def duplicates(images: int, crops: bool, folder: Path) -> dict[str, float]:
    """Fills the store as `check` would, loads it as a restart does, and asks."""
    store = folder / "prints.sqlite"
    finder = DuplicateFinder(store=store, crops=crops)
    began = now()
    for start in range(0, images, PIECE):
        thumbs = smooth_noise(start, min(PIECE, images - start))
        codes = hashes(coefficients(thumbs))
        rows = [
            (start + place, "", f"row-{start + place}", code.tobytes(), thumb.tobytes(), None)
            for place, (code, thumb) in enumerate(zip(codes, thumbs))
        ]
        with finder._store:
            finder._store.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", rows)
    finder.close()
    told = told_as("fill_seconds", now() - began) | {"store_MB": store.stat().st_size / 1e6}
    began = now()
    finder = DuplicateFinder(store=store, crops=crops)
    told |= told_as("load_seconds", now() - began)
    known = smooth_noise(0, ASKED)
    new = smooth_noise(10**9, ASKED)
    cut = np.stack([cv2.resize(one[2:30, 3:31], (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for one in known])
    for name, thumbs in {"new": new, "turned": np.rot90(known, axes=(1, 2)), "cropped": cut}.items():
        shown = [Image.fromarray(np.ascontiguousarray(one)) for one in thumbs]
        began = now()
        found = [finder.check(f"{name}-{place}", image) for place, image in enumerate(shown)]
        told |= told_as(f"{name}_ms_an_image", 1e3 * (now() - began) / ASKED)
        right = sum(match is not None and match.match == f"row-{place}" for place, match in enumerate(found))
        told[f"{name}_found"] = sum(map(bool, found)) if name == "new" else right
    return told


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
    return {"rows": told["rows"], "before_MB": before} | told_as("seconds", now() - began)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["duplicates", "statistics"])
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--no-crops", action="store_true", help="of duplicates: whole images only")
    parser.add_argument("--folder", help="where to keep what is made meanwhile; default the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrs2m-quality-", dir=options.folder) as work:
        if options.what == "duplicates":
            told = duplicates(options.images, not options.no_crops, Path(work))
        else:
            told = statistics(options.images, Path(work))
    print(
        json.dumps({name: round(value, 2) for name, value in told.items()} | {"peak_MB": round(peak_mb())}, indent=2)
    )


if __name__ == "__main__":
    main()
