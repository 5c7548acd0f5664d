"""
Rate, peak memory and disk of the data set builder.

    python -m tests.speed.lrs2m merge [--rows 2000000] [--work DIR]
    python -m tests.speed.lrs2m client [--rows 2000] [--concurrency 32]
    python -m tests.speed.lrs2m join [--rows 40000]

`merge` joins long captions (JSON lines, in another order) with images and short captions (parquet, 32 x 32 pixels) on the
image's name; one key in a thousand is missing on either side. The build runs in a process of its own; run it with two
numbers of rows to see that memory does not grow. `client` asks a server on loopback that takes 50 ms for every answer,
in a process of its own, and reports the share of the time that the capped number of requests was at work. `join` builds two
parts of rows with both captions, none of whose images is like another, and joins them with the search for near-duplicates.
"""

import argparse
import io
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import yaml
from PIL import Image
from pyarrow import parquet

from modeling_lrsclip.train_tokenizer import train_tokenizer


MISSING = 1000  # one key in so many has no partner, on either side
PICTURES = 4096  # different ones
PIECE = 50_000  # rows of an input file
LONG = (
    "Seen from above, the tile with number {0} shows a grey road that runs from the left edge to the right edge, with {1} "
    "parked cars beside it. South of the road lies a dark green field with a small blue pond, and {2} white storage tanks "
    "stand in the upper left corner. Dense rows of houses with orange roofs fill the lower part of the picture, small "
    "gardens with round trees lie between them, and a straight street divides the quarter into two halves."
)


def tiny_pictures(side: int = 32, count: int = PICTURES, shades: int = 4) -> list[bytes]:
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (shades, shades, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
        contents.append(buffer.getvalue())
    return contents


def write_inputs(folder: Path, rows: int) -> None:
    """`images/*.parquet` (image, key, short_text) and `long/*.jsonl` (image, long_text), the latter shuffled by pieces."""
    pictures = tiny_pictures()
    for name in ("images", "long"):
        (folder / name).mkdir()
    order = random.Random(0)
    for number, start in enumerate(range(0, rows, PIECE)):
        numbers = [index for index in range(start, min(start + PIECE, rows)) if index % MISSING != 1]
        table = {
            "image": [{"bytes": pictures[index % PICTURES], "path": f"tile_{index:08d}.jpg"} for index in numbers],
            "short_text": [f"A road with {index % 40} cars and tile number {index}." for index in numbers],
        }
        parquet.write_table(pyarrow.table(table), folder / "images" / f"{number:05d}.parquet")
        last = rows - start  # the long captions come in the opposite order of pieces
        numbers = [index for index in range(max(0, last - PIECE), last) if index % MISSING != 2]
        order.shuffle(numbers)
        with (folder / "long" / f"{number:05d}.jsonl").open("w") as lines:
            for index in numbers:
                text = LONG.format(index, index % 40, index % 7)
                lines.write(json.dumps({"image": f"set/TILE_{index:08d}.png", "long_text": text}) + "\n")


def recipe(folder: Path, sources: list[dict[str, Any]], **fields: Any) -> Path:
    train_tokenizer([LONG], 1000).save_pretrained(folder / "tokenizer")
    values = {
        "name": "benchmark",
        "tokenizer": str(folder / "tokenizer"),
        "sources": sources,
        "duplicates": {"inside": False},  # measured apart
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | fields))
    return path


def run_build(path: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a build in a process of its own."""
    command = [sys.executable, "-m", "training.lrs2m.build", "--config", str(path), "--output", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def size_of(folder: Path) -> float:
    """GiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def merge(rows: int, work: Path) -> dict[str, Any]:
    write_inputs(work, rows)
    key = {"basename": True, "stem": True, "lower": True}
    source = {
        "name": "synthetic",
        "route": "merge",
        "licence": "CC0-1.0",
        "read": {"kind": "table", "path": str(work / "images"), "key": key},
        "join": {"kind": "table", "path": str(work / "long"), "key": key},
    }
    seconds, memory = run_build(recipe(work, [source]), work / "set")
    manifest = json.loads((work / "set" / "manifest.json").read_text())
    counts = manifest["counts"]["synthetic"]
    expected = sum(1 for index in range(rows) if index % MISSING not in (1, 2))
    assert counts["train"] + counts["validation"] == expected, counts
    assert counts["unmatched images"] == sum(1 for index in range(rows) if index % MISSING == 2)
    assert counts["unmatched captions"] == sum(1 for index in range(rows) if index % MISSING == 1)
    return {
        "rows": rows,
        "seconds": round(seconds),
        "rows_per_second": round(rows / seconds),
        "peak_memory_MiB": round(memory),
        "input_GiB": round(size_of(work / "images") + size_of(work / "long"), 2),
        "output_GiB": round(size_of(work / "set"), 2),
    }


def client(rows: int, concurrency: int, work: Path) -> dict[str, Any]:
    (work / "tiles").mkdir()
    contents = tiny_pictures(256)
    with (work / "tiles" / "captions.jsonl").open("w") as lines:
        for index in range(rows):
            name = f"{index % PICTURES:05d}.jpg"
            (work / "tiles" / name).write_bytes(contents[index % PICTURES])
            lines.write(json.dumps({"image": name, "short_text": f"A road with {index} cars."}) + "\n")
    command = [sys.executable, "-m", "tests.training.lrs2m.chat_server", "--delay", "0.05", "--cap", str(concurrency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        engine = {"kind": "openai", "model": "loopback", "base_url": url, "concurrency": concurrency}
        source = {
            "name": "synthetic",
            "route": "expand",
            "licence": "CC0-1.0",
            "read": {"kind": "table", "path": str(work / "tiles" / "captions.jsonl")},
            "long": {"captioner": "mllm", "prompt": "expand@1"},
        }
        checks = {"repeated_answer": "off"}  # the server has one answer
        path = recipe(work, [source], captioners={"mllm": engine}, checks=checks)
        seconds, memory = run_build(path, work / "set")
        with urllib.request.urlopen(url.removesuffix("/v1") + "/busy") as answer:
            report = json.load(answer)
    finally:
        server.terminate()
        server.wait()
    return report | {"concurrency": concurrency, "build_seconds": round(seconds, 1), "peak_memory_MiB": round(memory)}


def join(rows: int, work: Path) -> dict[str, Any]:
    table = {
        "image": [
            {"bytes": content, "path": f"tile_{index:08d}.jpg"}
            for index, content in enumerate(tiny_pictures(128, rows, shades=16))
        ],
        "long_text": [LONG.format(index, index % 40, index % 7) for index in range(rows)],
        "short_text": [f"A road with {index % 40} cars and tile number {index}." for index in range(rows)],
    }
    parquet.write_table(pyarrow.table(table), work / "rows.parquet")
    read = {"kind": "table", "path": str(work / "rows.parquet")}
    source = {"name": "synthetic", "route": "merge", "licence": "CC0-1.0", "read": read}
    path = recipe(work, [source], duplicates={"inside": True})
    command = [sys.executable, "-m", "training.lrs2m.build", "--config", path, "--output", work / "parts", "--part"]
    start = time.perf_counter()
    for part in [subprocess.Popen([*command, f"{number}/2"]) for number in (1, 2)]:
        assert part.wait() == 0
    built = time.perf_counter()
    command = [sys.executable, "-m", "training.lrs2m.join", work / "parts", "--output", work / "set"]
    subprocess.run(command, check=True)
    seconds, totals = time.perf_counter() - built, json.loads((work / "set" / "manifest.json").read_text())["totals"]
    return {
        "rows": rows,
        "duplicates": totals.get("duplicates", 0),
        "two_parts_rows_per_second": round(rows / (built - start)),
        "join_rows_per_second": round(rows / seconds),
        "peak_memory_MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("merge", "client", "join"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument(
        "--work", type=Path, help="where inputs and data set lie until the end; by default a temporary folder"
    )
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lrs2m-", dir=arguments.work))
    try:
        if arguments.what == "merge":
            result = merge(arguments.rows or 2_000_000, work)
        elif arguments.what == "join":
            result = join(arguments.rows or 40_000, work)
        else:
            result = client(arguments.rows or 2000, arguments.concurrency, work)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
