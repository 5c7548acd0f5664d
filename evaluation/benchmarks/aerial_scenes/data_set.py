"""Embedded data: drawn aerial scenes with a long and a short caption each, made in seconds and without network.

    python -m evaluation.benchmarks.aerial_scenes OUT --scenes 16000 --seed 0

writes into OUT

- `train.parquet`, `validation.parquet`, `test.parquet`: `image` (PNG), `class_name`, `short_text`, `long_text`, `objects` (kind, colour and
  box x0, y0, x1, y1 in pixels, x1 and y1 exclusive);
- `localization.parquet`: landscapes of 4 x 4 scenes with `class_names` (row by row) and `queries` (text, polygons as
  lists of [x, y] in pixels);
- `tokenizer/`: a BPE tokenizer of CLIP's kind trained on the captions of the training scenes;
- `scenes.json`: how all this was made. It is written last: where it stands, the rest is complete.

The same arguments give the same pixels and captions whatever the number of worker processes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .canvas import GRID, draw_canvas
from .captions import ShortText, short_text_ceiling, write_long_text, write_short_text
from .drawing import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, draw_scene, encode_png
from .layout import CLASS_NAMES, GENERATOR_VERSION, Scene, plan_scene, scene_random


if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

__all__ = ["CLASS_NAMES", "main", "scene_row", "write_dataset"]

CHUNK = 250  # scenes that a worker draws at a time
CANVAS_CHUNK = 2
TOKENIZER_CAPTIONS = 8000  # of the training scenes; more change nothing in the tokenizer
# The command's option for the number of each split's scenes (landscapes for localization).
SPLITS = {"train": "scenes", "validation": "validation-scenes", "test": "test-scenes", "localization": "canvases"}
FILES = (*(f"{split}.parquet" for split in SPLITS), "tokenizer", "scenes.json")

Row = dict[str, Any]


def plan_and_texts(seed: int, split: str, index: int) -> tuple[Scene, ShortText, str]:
    """
    The plan of a scene, its short and its long caption.

    Args:
        seed: of the data set.
        split: `train`, `validation` or `test`.
        index: number of the scene in its split.

    Returns:
        Plan, short caption, long caption.
    """
    scene = plan_scene(scene_random(seed, split, index, "plan"))
    words = scene_random(seed, split, index, "words")
    return scene, write_short_text(words, scene), write_long_text(words, scene)


def scene_row(seed: int, split: str, index: int, image_size: int) -> Row:
    """
    Draw one row of train.parquet, validation.parquet or test.parquet; the same arguments always give the same bytes.

    Args:
        seed: of the data set.
        split: `train`, `validation` or `test`.
        index: number of the scene in its split.
        image_size: pixels of a side.

    Returns:
        Values by column.
    """
    scene, short, long_text = plan_and_texts(seed, split, index)
    image, boxes = draw_scene(scene_random(seed, split, index, "pixels"), scene, image_size)
    return {
        "image": {"bytes": encode_png(image), "path": None},
        "class_name": scene.class_name,
        "short_text": short.text,
        "long_text": long_text,
        "objects": [
            {"kind": item.kind, "colour": item.colour, "x0": x0, "y0": y0, "x1": x1, "y1": y1}
            for item, (x0, y0, x1, y1) in zip(scene.objects, boxes, strict=True)
        ],
    }


def canvas_row(seed: int, split: str, index: int, image_size: int) -> Row:
    """
    Draw one row of localization.parquet.

    Args:
        seed: of the data set.
        split: `train` or `test`.
        index: number of the scene in its split.
        image_size: pixels of a side.

    Returns:
        Values by column.
    """
    image, scenes, queries = draw_canvas(scene_random(seed, split, index, "canvas"), image_size)
    return {
        "image": {"bytes": encode_png(image), "path": None},
        "class_names": [scene.class_name for scene in scenes],
        "queries": [{"text": query.text, "polygons": query.polygons} for query in queries],
    }


def _table(task: tuple[int, str, int, int, int, pyarrow.Schema]) -> pyarrow.Table:
    """Rows `start` to `stop` of a split as an Arrow table; what a worker process does."""
    import pyarrow

    seed, split, start, stop, image_size, schema = task
    make = canvas_row if split == "localization" else scene_row
    return pyarrow.Table.from_pylist([make(seed, split, row, image_size) for row in range(start, stop)], schema=schema)


def describe_texts(tokenizer: PreTrainedTokenizerBase, seed: int, split: str, count: int) -> dict[str, Any]:
    """
    Mean tokens of the captions of a split (start and end included), and how well its short texts can be found.

    Args:
        tokenizer: counts.
        seed, split: of the data set.
        count: of scenes.

    Returns:
        Figures by name for the long and the short captions.
    """
    plans = [plan_and_texts(seed, split, index) for index in range(count)]
    scenes, shorts, long_texts = zip(*plans, strict=True)
    texts = {"long_text": list(long_texts), "short_text": [short.text for short in shorts]}
    tokens = {name: sum(map(len, tokenizer(values)["input_ids"])) for name, values in texts.items()}
    mean_tokens = {name: round(total / count, 1) for name, total in tokens.items()}
    return {"mean_tokens": mean_tokens, "short_text_ceiling": short_text_ceiling(scenes, shorts)}


def _schema(split: str) -> pyarrow.Schema:
    """Arrow schema of a file, with the mark by which `datasets` decodes the image."""
    from datasets import Features, Image, Value  # slow to import; the workers do without

    text, number = Value("string"), Value("int32")
    if split == "localization":
        columns = {"class_names": [text], "queries": [{"text": text, "polygons": [[[number]]]}]}
    else:
        box = dict.fromkeys(("x0", "y0", "x1", "y1"), number)
        columns = {"class_name": text, "short_text": text, "long_text": text}
        columns["objects"] = [{"kind": text, "colour": text, **box}]
    return Features({"image": Image(), **columns}).arrow_schema


def _write_parquet(path: Path, schema: pyarrow.Schema, tables: Iterator[pyarrow.Table], progress: tqdm) -> list[str]:
    """Write the tables to a parquet file; returns the first captions."""
    import pyarrow.parquet

    captions: list[str] = []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table)
            progress.update(len(table))
            if "long_text" in table.column_names and len(captions) < TOKENIZER_CAPTIONS:
                captions += table["long_text"].to_pylist() + table["short_text"].to_pylist()
    return captions


def _check(counts: dict[str, int], image_size: int, workers: int | None) -> None:
    if counts["train"] < 1:
        raise ValueError(f"--scenes is {counts['train']}; at least 1 training scene is needed.")
    for split, option in SPLITS.items():
        if counts[split] < 0:
            raise ValueError(f"--{option} is {counts[split]}; it must be 0 (no file) or more.")
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ValueError(
            f"--image-size is {image_size}; it must lie between {MIN_IMAGE_SIZE} "
            f"(below, objects cannot be told apart) and {MAX_IMAGE_SIZE} pixels."
        )
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; at least 1 process is needed, or leave it out for one per core.")


def _draw_all(folder: Path, counts: dict[str, int], seed: int, image_size: int, workers: int) -> list[str]:
    """Write the parquet files into a folder; returns the first captions of the training scenes."""
    captions: list[str] = []
    with tqdm(total=sum(counts.values()), unit="scene", desc="drawing", mininterval=0.3) as progress:
        # spawned, not forked: the caller may have threads (torch, tokenizers) that a fork would break
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 else None
        try:
            for split, count in counts.items():
                if not count:
                    continue
                schema = _schema(split)
                step = CANVAS_CHUNK if split == "localization" else CHUNK
                starts = range(0, count, step)
                tasks = [(seed, split, start, min(start + step, count), image_size, schema) for start in starts]
                tables = pool.map(_table, tasks) if pool else map(_table, tasks)
                written = _write_parquet(folder / f"{split}.parquet", schema, tables, progress)
                captions = written if split == "train" else captions
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return captions


def _move_into(folder: Path, out: Path) -> None:
    """Put the finished files in place, one rename each; scenes.json goes first and comes last."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scenes.json").unlink(missing_ok=True)
    for name in FILES:
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
        if (folder / name).exists():
            os.rename(folder / name, old)


def write_dataset(
    out: str | os.PathLike[str], counts: Mapping[str, int], seed: int, image_size: int = 64, workers: int | None = None
) -> dict[str, Any]:
    """Draw the data set into the folder `out` (earlier files of the same names are replaced).

    Args:
        out: folder, made if missing; nothing in it changes before everything is drawn.
        counts: number of scenes by split, `train`, `validation`, `test`, and of landscapes for `localization`; one
            that is left out is 0.
        seed: every scene is drawn from (seed, split, index) alone.
        image_size: side of a scene in pixels; a canvas is four times as wide.
        workers: processes; by default one per core. The result does not depend on it.

    Returns:
        What is written to scenes.json.

    Raises:
        ValueError: a count is negative, or the image size or the number of workers is impossible.
    """
    counts = {split: counts.get(split, 0) for split in SPLITS}
    _check(counts, image_size, workers)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; the data set needs a folder.")
    drawn = sum(counts.values()) + (GRID * GRID - 1) * counts["localization"]
    workers = min(workers or os.cpu_count() or 1, math.ceil(drawn / CHUNK))  # few scenes are drawn at once here

    from modeling_lrsclip.files.atomic import make_folder  # slow to import; the workers do without
    from modeling_lrsclip.train_tokenizer import train_tokenizer

    make_folder(out.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        captions = _draw_all(folder, counts, seed, image_size, workers)
        tokenizer = train_tokenizer(captions)
        tokenizer.save_pretrained(folder / "tokenizer")
        record = {
            "generator_version": GENERATOR_VERSION,
            "seed": seed,
            "scenes": counts["train"],
            "validation_scenes": counts["validation"],
            "test_scenes": counts["test"],
            "canvases": counts["localization"],
            "image_size": image_size,
            "class_names": list(CLASS_NAMES),
        }
        if counts["test"]:
            record |= describe_texts(tokenizer, seed, "test", counts["test"])
        (folder / "scenes.json").write_text(json.dumps(record, indent=2) + "\n")
        _move_into(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.benchmarks.aerial_scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--scenes", type=int, required=True, help="number of training scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation-scenes", type=int, default=512, help="scenes to choose settings by (512)")
    parser.add_argument("--test-scenes", type=int, default=2048, help="number of scenes to report on (2048)")
    parser.add_argument("--canvases", type=int, default=8, help="number of landscapes for localization")
    parser.add_argument("--image-size", type=int, default=64, help="side of a scene in pixels")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    counts = {split: getattr(arguments, option.replace("-", "_")) for split, option in SPLITS.items()}
    try:
        record = write_dataset(arguments.out, counts, arguments.seed, arguments.image_size, arguments.workers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(
        f"{record['scenes']:,} training, {record['validation_scenes']:,} validation and {record['test_scenes']:,} test "
        f"scenes of {len(CLASS_NAMES)} classes, {record['canvases']} canvases -> {arguments.out} in {seconds:.1f} s"
    )
    if arguments.test_scenes:
        tokens = record["mean_tokens"]
        print(f"mean tokens: long texts {tokens['long_text']:.0f}, short texts {tokens['short_text']:.0f}")
        best = ", ".join(f"{name} {value:.1f}" for name, value in record["short_text_ceiling"].items())
        print(f"short texts are ambiguous on purpose: a perfect model finds the test scene with {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
