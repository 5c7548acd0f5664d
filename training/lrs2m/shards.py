"""A finished data set: its manifest, and its files, parquet with embedded images or WebDataset tars."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow
from pyarrow import parquet

from modeling_lrsclip.files.atomic import sync
from modeling_lrsclip.files.hashing import bytes_sha256

from .data_row import Row, schema


MANIFEST = "manifest.json"  # written last: where it stands, the data set is complete
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
GROUP_ROWS, GROUP_BYTES = 256, 32 * 2**20  # of a parquet row group, which is what a writer holds in memory


class ShardWriter(Protocol):
    rows: int
    size: int  # bytes of the rows so far, about

    def add(self, row: Row) -> None: ...

    def close(self) -> None:
        """Finishes the file and forces it to disk."""


class ParquetShard:
    def __init__(self, path: Path):
        self.path, self.rows, self.size = path, 0, 0
        self._pending: list[Row] = []
        self._pending_size = 0
        # A dictionary pays for the columns that repeat; texts and images are nearly all different.
        few = [
            name for name in schema().names if name not in ("id", "image", "image_key", "long_text", "image_sha256")
        ]
        self._writer = parquet.ParquetWriter(path, schema(), compression="snappy", use_dictionary=few)

    def add(self, row: Row) -> None:
        self._pending.append(row)
        size = row_size(row)
        self._pending_size += size
        self.size += size
        self.rows += 1
        if len(self._pending) >= GROUP_ROWS or self._pending_size >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        sync(self.path)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pyarrow.Table.from_pylist(self._pending, schema=schema()))
        self._pending, self._pending_size = [], 0


class TarShard:
    """
    A WebDataset tar: per row an image file, a JSON file of the other columns, and the short text as `.txt`, which
    open_clip and other readers of image-text pairs look for; named after the row's id.
    """

    def __init__(self, path: Path):
        self.path, self.rows, self.size = path, 0, 0
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def add(self, row: Row) -> None:
        fields = {name: value for name, value in row.items() if name != "image"}
        name = row["id"].replace(".", "_")  # a dot would end the sample's name
        if row["image"] is not None:
            suffix = Path(row["image"]["path"]).suffix
            self._member(f"{name}{suffix}", row["image"]["bytes"])
        self._member(f"{name}.txt", row["short_text"].encode())
        self._member(f"{name}.json", json.dumps(fields, ensure_ascii=False).encode())
        self.size += row_size(row)
        self.rows += 1

    def close(self) -> None:
        self._tar.close()
        sync(self.path)

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # without time and owner: equal rows make equal files
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def open_shard(path: Path, suffix: str | None = None) -> ShardWriter:
    """A writer of the kind that the suffix tells, by default the path's own."""
    return TarShard(path) if (suffix or path.suffix) == ".tar" else ParquetShard(path)


def read_shard(path: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """
    Rows of a finished file, one row group or tar member at a time.

    Args:
        columns: of a parquet file, only these; rows of a tar are always whole.
    """
    if path.suffix != ".tar":
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=columns):
                yield from batch.to_pylist()
        return
    image = None
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            if member.name.endswith(".txt"):  # in the JSON too
                continue
            content = tar.extractfile(member).read()
            if not member.name.endswith(".json"):
                image = {"bytes": content, "path": member.name}
                continue
            row = json.loads(content)
            yield row | {"image": image}  # whatever the JSON says of it
            image = None


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read the manifest of a finished data set.

    Raises:
        `ValueError`: for a folder without one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {MANIFEST}: it is no finished data set; run training.lrs2m.build to its end."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def data_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 over those of the shards, by which one data set is told from another."""
    files = [file["sha256"] for split in manifest["splits"].values() for file in split["files"]]
    return bytes_sha256("".join(files))


def count_rows(manifest: dict[str, Any]) -> int:
    """Count the rows of all splits."""
    return sum(split["rows"] for split in manifest["splits"].values())


def read_rows(folder: Path, manifest: dict[str, Any], columns: list[str] | None = None) -> Iterator[tuple[str, Row]]:
    """
    Splits and rows of a finished data set, in the order of its files.

    Args:
        folder: the data set's.
        manifest: its content.
        columns: see [`read_shard`].

    Returns:
        a split's name and a row, again and again.
    """
    for split, described in manifest["splits"].items():
        for file in described["files"]:
            yield from ((split, row) for row in read_shard(folder / file["path"], columns))


def row_size(row: Row) -> int:
    """Bytes of a row's image and texts."""
    image = len(row["image"]["bytes"]) if row["image"] else 0
    return image + len(row["long_text"]) + len(row["short_text"]) + 600
