"""
A retrieval benchmark from a built data set: RSITMD-L and RSICD-L as `evaluation.run` loads them (paper, V-B 1).

    python -m training.lrs2m.retrieval_export DIR --output RSITMD-L

writes `test.parquet` with an image, its long text and all its short texts a row. The folder's name tells the evaluation
which benchmark it is. Where the data set is without pixels, `dataset_<name>.json` in Karpathy's format is written, to be
laid beside the images.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from evaluation.benchmarks.retrieval_data import PUBLISHED_SPLITS
from evaluation.benchmarks.tables import plain
from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.atomic import replacing

from .shards import read_manifest, read_rows


COLUMNS = ["id", "source", "image", "image_key", "image_sha256", "long_text", "short_text", "short_texts"]
_GROUP = 256  # rows held at a time


def export(folder: Path, target: Path, source: str | None = None) -> tuple[int, int]:
    """
    Writes the benchmark.

    Args:
        folder: a finished data set.
        target: the folder to make; named after the benchmark.
        source: of the data set's sources, the one to take; needed where it has several.

    Returns:
        Numbers of images and of short texts.

    Raises:
        `ValueError`: for an unfinished data set, a source that is not there, or an image with two long texts.
    """
    manifest = read_manifest(folder)
    names = [one["name"] for one in manifest["recipe"]["sources"]]
    if source not in names and (source or len(names) > 1):
        raise ValueError(f"--source {source} is none of {', '.join(names)}; name the one to take.")
    rows = _rows(folder, manifest, source or names[0])
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{folder} has no rows of {source or names[0]}; see failed.jsonl and skipped.jsonl there.")
    target.mkdir(parents=True, exist_ok=True)
    kept = [target / "test.parquet", target / f"dataset_{target.name}.json"]
    if existing := [path for path in kept if path.exists()]:
        raise ValueError(f"{existing[0]} exists; remove it, or give another --output.")
    write = _write_parquet if first["image"] else _write_json
    return write(kept[0] if first["image"] else kept[1], chain([first], rows))


def _rows(folder: Path, manifest: dict[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """Rows of all splits in the order of the splits; an image that comes twice is an error."""
    ids: dict[str, str] = {}  # by image
    for _, row in read_rows(folder, manifest, COLUMNS):
        if row["source"] != source:
            continue
        if row["image_sha256"] in ids:
            raise ValueError(
                f"rows {ids[row['image_sha256']]} and {row['id']} share an image; a benchmark has one long text an image: "
                "build it with captions: together."
            )
        ids[row["image_sha256"]] = row["id"]
        texts = {"long_text": row["long_text"], "short_text": row.get("short_texts") or [row["short_text"]]}
        yield {"image": row["image"], "filename": row["image_key"]} | texts


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> tuple[int, int]:
    from datasets import Features, Image, List, Value  # a second, which --help does without

    text = Value("string")
    columns = Features({"image": Image(), "filename": text, "long_text": text, "short_text": List(text)})
    schema, images, texts = columns.arrow_schema, 0, 0
    with replacing(path) as growing, parquet.ParquetWriter(growing, schema) as writer:
        while group := list(islice(rows, _GROUP)):
            images, texts = images + len(group), texts + sum(len(row["short_text"]) for row in group)
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return images, texts


def _write_json(path: Path, rows: Iterator[dict[str, Any]]) -> tuple[int, int]:
    entries = []
    for row in rows:
        texts = {"sentences": [{"raw": text} for text in row["short_text"]], "long_text": row["long_text"]}
        entries.append({"filename": row["filename"], "split": "test"} | texts)
    path.write_text(json.dumps({"images": entries}, ensure_ascii=False, indent=1), encoding="utf-8")
    return len(entries), sum(len(entry["sentences"]) for entry in entries)


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m training.lrs2m.retrieval_export", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a finished data set")
    add("--output", type=Path, required=True, help="folder named after the benchmark, such as RSITMD-L")
    add("--source", help="of the data set's sources, where it has several")
    options = parser.parse_args(arguments)
    images, texts = export(options.folder, options.output, options.source)
    print(f"{options.output}: {images:,} images with a long text each, {texts:,} short texts")
    name = plain(options.output.name)
    splits = [split for (key, column), split in PUBLISHED_SPLITS.items() if column == "long_text" and key in name]
    expected = next(iter(splits), None)
    if expected and images != expected.images:
        print(
            f"note: the test split of {expected.name} has {expected.images:,} images; figures on this one do not compare "
            "with published ones"
        )


if __name__ == "__main__":
    sys.exit(main())
