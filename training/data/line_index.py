"""Where the rows of files begin that have no table of contents, found once and kept beside the user's caches."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modeling_lrsclip.files.atomic import replacing
from modeling_lrsclip.files.cache_folder import cache_folder


BLOCK = 1 << 26  # bytes read at a time
VERSION = "1"  # of what the indices look like


def kept_index(path: Path, kind: str, build: Callable[[Path], np.ndarray]) -> np.ndarray:
    """
    `build(path)`, kept in `$LRSCLIP_CACHE/indices` (else `~/.cache/lrsclip/indices`) under the file's path, size and
    time of change, and memory-mapped; where nothing can be written, it is held in memory.
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
    except OSError:
        return index
    return np.load(kept, mmap_mode="r")


def line_index(path: Path, quoted: bool) -> np.ndarray:
    """
    First byte and end of every line that is not blank, (rows, 2) int64; lines in an open double quote belong together
    where `quoted`, as in CSV.
    """
    return kept_index(path, "quoted lines" if quoted else "lines", lambda file: _find_lines(file, quoted))


def _find_lines(path: Path, quoted: bool) -> np.ndarray:
    ends, quotes_before, first = [np.empty(0, dtype=np.int64)], 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            values = np.frombuffer(block, dtype=np.uint8)
            breaks = np.flatnonzero(values == ord("\n"))
            if quoted:
                quotes = np.flatnonzero(values == ord('"'))
                outside = (quotes_before + np.searchsorted(quotes, breaks)) % 2 == 0
                breaks, quotes_before = breaks[outside], quotes_before + len(quotes)
            ends.append(breaks + first + 1)
            first += len(block)
    ends = np.concatenate(ends)
    if first and (not len(ends) or ends[-1] != first):  # the last line is not closed
        ends = np.append(ends, first)
    spans = np.stack([np.append(0, ends)[:-1], ends], axis=1).astype(np.int64)
    full = np.ones(len(spans), dtype=bool)
    with path.open("rb") as file:
        for number in np.flatnonzero(np.diff(spans)[:, 0] <= 2):
            file.seek(spans[number, 0])
            full[number] = bool(file.read(int(spans[number, 1] - spans[number, 0])).strip())
    return spans[full]
