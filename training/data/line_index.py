"""Positions of the rows of files that have no table of contents, found once and kept beside the user's caches."""

import contextlib
import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from modeling_lrsclip.files.atomic import replacing
from modeling_lrsclip.files.cache_folder import cache_folder
from modeling_lrsclip.files.tables import BOM, MOST_ROWS, csv_dialect, limited


BLOCK = 1 << 26  # bytes read at a time
VERSION = "3"  # of what the indices look like


def kept_index(path: Path, kind: str, build: Callable[[Path], np.ndarray]) -> np.ndarray:
    """
    `build(path)`, kept in `$LRSCLIP_CACHE/indices` (else `~/.cache/lrsclip/indices`) under the file's path, size and
    time of change, and memory-mapped; where nothing can be written, it is held in memory.

    Args:
        path: of the file.
        kind: of index, part of its name.
        build: makes the index.

    Returns:
        What `build` made, read only.
    """
    state = path.stat()
    identity = f"{VERSION}\0{kind}\0{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    kept = cache_folder("indices") / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent, or damaged
        return np.load(kept, mmap_mode="r")
    index = build(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as growing, growing.open("wb") as file:
            np.save(file, index)
        return np.load(kept, mmap_mode="r")
    except (OSError, ValueError):  # no room; columns of longer names than numpy reads again
        return index


def line_index(path: Path, quoted: bool) -> np.ndarray:
    """
    First byte and end of every row of a text file, (rows, 2) int64.

    Args:
        path: a UTF-8 file; a mark of the byte order at its start belongs to no row.
        quoted: whether the file is CSV, whose rows, with its header, are those of Python's `csv`; else rows are the lines
            that are not blank.

    Raises:
        `ValueError`: for CSV that Python's `csv` cannot read, and for more rows than a file of captions has.
    """
    return kept_index(path, "csv" if quoted else "lines", _find_csv_rows if quoted else _find_lines)


def _find_csv_rows(path: Path) -> np.ndarray:
    """`csv` itself says where rows end: in Latin-1, a character is a byte, and UTF-8 has no other quotes or line ends."""
    spans, position = [], 0

    def counted(lines: Iterable[str]) -> Iterator[str]:
        nonlocal position
        for line in lines:
            position += len(line)
            yield line

    with path.open(encoding="latin-1", newline="") as stream:
        mark = BOM.decode("latin-1")
        position = len(BOM) if stream.read(len(mark)) == mark else 0
        stream.seek(position)
        dialect = csv_dialect(stream.readline(BLOCK))
        stream.seek(position)
        reader = csv.reader(counted(stream), **dialect)
        start = position
        try:
            for fields in limited(reader, MOST_ROWS):
                if fields:
                    spans.append((start, position))
                start = position
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num} cannot be read as CSV: {error}") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _find_lines(path: Path) -> np.ndarray:
    ends, first = [np.empty(0, dtype=np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + first + 1)
            first += len(block)
            if sum(map(len, ends)) > MOST_ROWS:
                raise ValueError(f"{path} has more than {MOST_ROWS:,} lines; split it into shards.")
    ends = np.concatenate(ends)
    if first and (not len(ends) or ends[-1] != first):  # the last line is not closed
        ends = np.append(ends, first)
    spans = np.stack([np.append(0, ends)[:-1], ends], axis=1).astype(np.int64)
    full = np.ones(len(spans), dtype=bool)
    content = np.memmap(path, dtype=np.uint8, mode="r") if first else np.empty(0, dtype=np.uint8)
    initials = content[spans[:, 0]]  # of a row in JSON, a brace
    for number in limited(np.flatnonzero((initials <= ord(" ")) | (initials > ord("~"))), MOST_ROWS):
        start, end = spans[number].tolist()
        line = content[start : min(end, start + BLOCK)].tobytes()
        full[number] = bool(line.removeprefix(BOM if number == 0 else b"").decode("utf-8", "replace").strip())
    return spans[full]
