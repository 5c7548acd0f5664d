"""
Rows of captioned images in files, read by number.

Every kind of file is one class with the same four members: `chunks`, the rows that are cheap to read together;
`read(numbers)`, a [`Row`] for each number; `texts(kind)`, the stored texts without the images; `columns`.
"""

import contextlib
import csv
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from modeling_lrsclip.files.hashing import bytes_sha256, file_sha256
from modeling_lrsclip.files.tables import (
    BOM,
    LARGEST_GROUP,
    MOST_ROWS,
    csv_dialect,
    csv_values,
    parquet_batches,
    parse_object,
)

from .line_index import line_index


CHUNK_ROWS = 1000  # of files whose rows can be read one by one
LARGEST_ROW = 1 << 28  # bytes of a line that is read
Stored = str | list[str] | None  # a row's texts of a kind: one, several, or none


def text_list(stored: Stored) -> list[str]:
    """Return a row's texts of a kind: a string is one, a list several."""
    return stored if isinstance(stored, list) else [stored]


def filled(stored: Any) -> bool:
    """Whether a row's texts are there and none is blank."""
    return caption_fault(stored) is None


def caption_fault(stored: Any) -> str | None:
    """Say in words that follow "the caption is" why a row's texts cannot be used; None where they can."""
    texts = text_list(stored)
    other = [text for text in texts if text is not None and not isinstance(text, str)]
    if other:
        return f"{type(other[0]).__name__}, not text"
    return None if texts and all(text is not None and text.strip() for text in texts) else "missing or empty"


@dataclass
class Row:
    """Content of one pair as its source stores it; nothing in it is checked yet."""

    id: str  # file and row, for example "train-00003.parquet:17" or "tiles-000.tar:0017"
    image: str | bytes | dict | None = None  # path, the bytes of a file, or {"bytes", "path"}
    long: Stored = None
    short: Stored = None
    fault: str | None = None  # why the row cannot be read at all


class Rows(Protocol):
    name: str  # of the file, or the id on the Hub; begins the rows' ids
    location: str  # the file with its folder, or the id on the Hub
    columns: Mapping[str, str]  # column by kind: "image", "long", "short", as far as they are read
    chunks: np.ndarray  # rows of each chunk
    one_by_one: bool  # rows can be read singly, and chunks be of any size

    def read(self, numbers: list[int]) -> list[Row]: ...

    def texts(self, kind: str) -> Iterator[Stored]: ...


def even_chunks(rows: int, most: int = CHUNK_ROWS) -> np.ndarray:
    """Chunks of `most` rows, the last one of what is left."""
    return np.diff(np.append(np.arange(0, rows, most), rows))


def located_row(identifier: str, stored: Mapping[str, Any], folder: Path | None) -> Row:
    """
    A row whose image's path, if it is one, counts from a folder.

    Args:
        identifier: of the row.
        stored: its values by kind, "image" among them.
        folder: None: paths stay as they are.

    Returns:
        the row.
    """
    image = stored["image"]
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    located = str(folder / path) if folder is not None and isinstance(path, str) and (path or path is image) else image
    return Row(identifier, **{**stored, "image": located})


def image_sha256(stored: Any) -> str | None:
    """Hash of an image file's content; None for one that is missing, which training names when its turn comes."""
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if not isinstance(stored, str | Path | bytes):  # a number would be opened as a file descriptor
        return None
    with contextlib.suppress(OSError, ValueError):
        return bytes_sha256(stored) if isinstance(stored, bytes) else file_sha256(stored)
    return None


class TableRows:
    """
    A data set in Arrow's form, memory-mapped.

    Args:
        files: (name, rows) of the files that the table was made of, in order; ids are made of them.
        folder: that stored paths count from.
    """

    one_by_one = True

    def __init__(self, table: Dataset, columns: Mapping[str, str], files: list[tuple[str, int]], folder: Path | None):
        self.table, self.columns = table.select_columns(list(dict.fromkeys(columns.values()))), columns
        self.files, self.folder, self.chunks = files, folder, even_chunks(len(table))
        self.name = files[0][0] if len(files) == 1 else f"{files[0][0]} and {len(files) - 1} more"
        self.location = files[0][0] if folder is None else str(folder / self.name)
        self.ends = np.cumsum([rows for _, rows in files])

    def read(self, numbers: list[int]) -> list[Row]:
        values, rows = self.table[numbers], []
        for index, number in enumerate(numbers):
            file = int(np.searchsorted(self.ends, number, "right"))
            name, count = self.files[file]
            stored = {kind: values[column][index] for kind, column in self.columns.items()}
            rows.append(located_row(f"{name}:{number - (self.ends[file] - count)}", stored, self.folder))
        return rows

    def texts(self, kind: str) -> Iterator[Stored]:
        yield from self.table[self.columns[kind]]


class ChosenRows:
    """
    Some rows of a file; they keep their ids.

    Args:
        part: rows of a file.
        numbers: of those that are chosen, ascending.
    """

    def __init__(self, part: Rows, numbers: np.ndarray):
        self.part, self.numbers, self.columns, self.one_by_one = part, numbers, part.columns, part.one_by_one
        self.name, self.location = part.name, part.location
        chunks = np.searchsorted(numbers, np.append(0, np.cumsum(part.chunks)))
        self.chunks = np.diff(chunks)[np.diff(chunks) > 0]  # of the file's own, what is left of them

    def read(self, numbers: list[int]) -> list[Row]:
        return self.part.read(self.numbers[numbers].tolist())

    def texts(self, kind: str) -> Iterator[Stored]:
        chosen = set(self.numbers.tolist())
        yield from (texts for number, texts in enumerate(self.part.texts(kind)) if number in chosen)


class GroupCache:
    """
    The row groups read last, at most `rows` rows of them (and always one), shared by the files of a run.

    Sized to a window of the order and the groups on its edges, it lets each group be read once a window.
    """

    def __init__(self, rows: int = 0):
        self.rows, self.groups = rows, OrderedDict()

    def __getstate__(self):
        return self.rows

    def __setstate__(self, rows):
        self.__init__(rows)

    def get(self, key: Any, read) -> pa.Table:
        if key in self.groups:
            self.groups.move_to_end(key)
        else:
            self.groups[key] = read()
            while len(self.groups) > 1 and sum(group.num_rows for group in self.groups.values()) > self.rows:
                self.groups.popitem(last=False)
        return self.groups[key]


class FileRows:
    """Rows of a file that each process opens for itself, since handles do not survive a fork."""

    path: str | Path
    _file, _owner = None, None  # the file, and the process that opened it

    def __getstate__(self):
        return self.__dict__ | {"_file": None, "_owner": None}

    @property
    def file(self) -> Any:
        """The open file."""
        if self._owner != os.getpid():
            self._file, self._owner = self._open(), os.getpid()
        return self._file

    def _open(self) -> Any:
        return open(self.path, "rb", buffering=0)

    def _close(self) -> None:
        self._file, self._owner = None, None


class ParquetRows(FileRows):
    """
    A parquet file whose row groups are read when they are needed; at the start only its footer.

    Args:
        filesystem: an `fsspec` file system, None for the local disk.
    """

    one_by_one = False

    def __init__(self, path: str, columns: Mapping[str, str], cache: GroupCache, filesystem: Any = None):
        self.path, self.columns, self.cache, self.filesystem = path, columns, cache, filesystem
        self.name, self.location = path.rsplit("/", 1)[-1], path
        self.folder = Path(path).parent if filesystem is None else None
        footer = self.file.metadata
        self.chunks = np.array([footer.row_group(number).num_rows for number in range(footer.num_row_groups)])
        self.starts = np.cumsum(self.chunks) - self.chunks
        self.too_large: set[int] = set()  # groups that are not read again for each of their rows
        if footer.num_rows > MOST_ROWS or self.chunks.min(initial=0) < 0:
            raise ValueError(f"{path} says that it has {footer.num_rows:,} rows; up to {MOST_ROWS:,} are read.")
        self._close()

    def _open(self) -> pq.ParquetFile:
        source = self.path if self.filesystem is None else self.filesystem.open(self.path, "rb")
        try:
            return pq.ParquetFile(source, memory_map=self.filesystem is None)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{self.path} is not a readable parquet file: {error}") from error

    def read(self, numbers: list[int]) -> list[Row]:
        rows = []
        groups = np.searchsorted(self.starts, numbers, "right") - 1
        for number, group in zip(numbers, groups.tolist()):
            try:
                table, index = self._group(group), number - int(self.starts[group])
                values = {kind: table.column(name)[index].as_py() for kind, name in self.columns.items()}
            except (OSError, ValueError, pa.ArrowException) as error:  # a text that is no UTF-8 is a ValueError
                rows.append(Row(f"{self.name}:{number}", fault=f"row group {group} cannot be read ({error})"))
                continue
            rows.append(located_row(f"{self.name}:{number}", values, self.folder))
        return rows

    def _group(self, group: int) -> pa.Table:
        return self.cache.get((self.path, group), lambda: self._read_group(group))

    def _read_group(self, group: int) -> pa.Table:
        too_large = ValueError(f"up to {LARGEST_GROUP:,} bytes are held; write {self.name} with smaller row groups")
        if group in self.too_large:
            raise too_large
        batches, size = [], 0
        for batch in parquet_batches(self.file, group, list(dict.fromkeys(self.columns.values()))):
            size += batch.nbytes
            if size > LARGEST_GROUP:
                self.too_large.add(group)
                raise too_large
            batches.append(batch)
        rows = sum(map(len, batches))
        if rows < self.chunks[group]:
            raise ValueError(f"it has {rows} rows, and says {self.chunks[group]}")
        return pa.Table.from_batches(batches)

    def texts(self, kind: str) -> Iterator[Stored]:
        for group, count in enumerate(self.chunks.tolist()):
            read = 0
            with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # `read` says of each row why
                for batch in parquet_batches(self.file, group, [self.columns[kind]]):
                    yield from batch.column(0).to_pylist()
                    read += len(batch)
            yield from [None] * (count - read)
        self._close()


class LineRows(FileRows):
    """A JSONL, CSV or TSV file, of which only the wanted lines are read; where each begins is looked up once."""

    one_by_one = True

    def __init__(self, path: Path, columns: Mapping[str, str]):
        self.path, self.columns, self.name, self.location = path, columns, path.name, str(path)
        is_csv = path.suffix in (".csv", ".tsv")
        self.spans, self.header, self.dialect = line_index(path, quoted=is_csv), [], {}  # (rows, 2) first byte, end
        if is_csv and len(self.spans):
            try:
                header = self._line(0).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: its first line, the columns' names, is not UTF-8 ({error}); save it as UTF-8."
                ) from error
            self.dialect = csv_dialect(header.splitlines()[0])
            self.header, self.spans = self._fields(header), self.spans[1:]
        self.chunks = even_chunks(len(self.spans))

    def _line(self, number: int) -> bytes:
        first, end = self.spans[number].tolist()
        if end - first > LARGEST_ROW:
            raise ValueError(f"it has {end - first} bytes, and {LARGEST_ROW} bytes are allowed")
        self.file.seek(first)
        return self.file.read(end - first)

    def values(self, number: int) -> dict[str, Any]:
        """
        All fields of a row.

        Raises:
            `ValueError`: for a line that is not valid UTF-8 or JSON.
        """
        line = self._line(number)
        if not self.header:
            return parse_object(line.removeprefix(BOM))
        try:
            return csv_values(self.header, self._fields(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: {error}; save the file as UTF-8") from error

    def _fields(self, row: str) -> list[str]:
        return next(csv.reader(io.StringIO(row, newline=""), **self.dialect))

    def read(self, numbers: list[int]) -> list[Row]:
        rows = []
        for number in numbers:
            identifier = f"{self.name}:{number}"
            try:
                values = self.values(number)
            except (ValueError, OSError, csv.Error) as error:
                rows.append(Row(identifier, fault=f"the line cannot be read ({error})"))
                continue
            stored = {kind: values.get(name) for kind, name in self.columns.items()}
            rows.append(located_row(identifier, stored, self.path.parent))
        return rows

    def texts(self, kind: str) -> Iterator[Stored]:
        for number in range(len(self.spans)):
            yield getattr(self.read([number])[0], kind)
