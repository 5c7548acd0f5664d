"""
Checks over a whole set, made when all of its rows are there: one answer for many images, and rows that are equal.

What is found hangs on the rows alone, not on their order, on restarts or on the parts that they were built in. Memory is some
forty bytes a row; the signatures of the texts are in a file.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_lrsclip.files.hashing import bytes_sha256

from ..data_row import GIVEN, Row
from ..output import WORK, Output
from ..recipe import ChecksConfig
from ..routes import TEMPLATE
from .candidate import words_of


MOST_IMAGES = 3  # that may have one answer, or nearly one
SHINGLE = 3  # words in a row, by whose sets texts are compared
PERMUTATIONS, BANDS = 64, 16
SAME = 0.8  # least estimated Jaccard similarity of two texts that count as one
COLUMNS = ["id", "source", "image_key", "image_sha256", "long_text", "short_text", "long_captioner"]
_CHUNK = 4096  # rows


@dataclass
class Repeats:
    """Rows by their place in the set: how many images share a row's answer, and which equal row comes before it."""

    images: np.ndarray  # (N,) int64; 0 where the long text is none of a captioner's
    equal_to: np.ndarray  # (N,) int64; its own place where there is none


def drop_repeats(output: Output, checks: ChecksConfig) -> None:
    """
    Take out of an output what the checks `repeated_answer` and `repeated_row` find, or mark it, once in a build.

    Args:
        output: with all rows in closed parts; changed.
        checks: `on` takes a row out and lists it, `warn` marks it in the column `warnings`.
    """
    if output.progress.compared or (checks.repeated_answer, checks.repeated_row) == ("off", "off"):
        return
    with tempfile.TemporaryDirectory(dir=output.folder / WORK) as work:
        repeats = find_repeats(output.written_rows(COLUMNS), output.rows_written, Path(work))
    answers = (repeats.images > MOST_IMAGES) & (checks.repeated_answer != "off")
    equal = (repeats.equal_to != np.arange(len(repeats.equal_to))) & (checks.repeated_row != "off")
    first_ids: dict[int, str] = {}  # of the rows that are equal to a later one
    firsts = set(repeats.equal_to[equal].tolist())

    def changed(index: int, row: Row) -> Row | None:
        if index in firsts:
            first_ids[index] = row["id"]
        faults = []
        if equal[index]:
            detail = f"image and texts of {first_ids[int(repeats.equal_to[index])]}"
            faults.append(("repeated_row", "duplicates", detail))
        if answers[index]:
            faults.append(("repeated_answer", "failed", f"one answer for {repeats.images[index]} images"))
        for name, listed, detail in faults:
            if getattr(checks, name) == "on":
                if listed == "failed":
                    output.refuse_row(row, name, detail)
                else:
                    entry = {"id": row["id"], "source": row["source"], "image_key": row["image_key"]}
                    output.leave_out(listed, entry | {"reason": name, "detail": detail})
                return None
            output.count(row["source"], f"warned: {name}")
            row = row | {"warnings": [*(row["warnings"] or []), name]}
        return row

    touched = answers | equal
    touched[list(firsts)] = True
    output.replace_rows(touched, changed)


def find_repeats(rows: Iterator[Row], count: int, work: Path) -> Repeats:
    """
    Rows that are equal to others or share their answer with other images.

    Args:
        rows: of the set, with `COLUMNS`.
        count: of them.
        work: folder for the signatures, 256 bytes a row.

    Returns:
        The repeats, by place.
    """
    from datasketch import MinHash  # a second with the part of scipy that it imports, which --help does without

    whole = np.zeros(count, [("first", "u8"), ("second", "u8")])  # of image and texts
    images, texts = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    written = np.zeros(count, bool)
    signatures = np.lib.format.open_memmap(work / "signatures.npy", "w+", np.uint32, (max(count, 1), PERMUTATIONS))
    for start in range(0, count, _CHUNK):
        chunk = [next(rows) for _ in range(min(_CHUNK, count - start))]
        places = slice(start, start + len(chunk))
        whole[places] = [tuple(_hash(row["image_sha256"], row["long_text"], row["short_text"])) for row in chunk]
        images[places] = [int(row["image_sha256"][:16], 16) for row in chunk]
        texts[places] = [_hash(" ".join(words_of(row["long_text"])))[0] for row in chunk]
        written[places] = [row["long_captioner"] not in (GIVEN, TEMPLATE) for row in chunk]
        sets = [_shingles(row["long_text"]) if new else {b""} for row, new in zip(chunk, written[places])]
        signatures[places] = [one.hashvalues for one in MinHash.bulk(sets, num_perm=PERMUTATIONS)]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    shared = np.zeros(count, np.int64)
    chosen = np.flatnonzero(written)
    if len(chosen):
        shared[chosen] = _images_of_answers(chosen, images, texts, signatures)
    return Repeats(shared, first[inverse])


def _images_of_answers(
    chosen: np.ndarray, images: np.ndarray, texts: np.ndarray, signatures: np.ndarray
) -> np.ndarray:
    """Distinct images, by row, of all rows whose answers are linked by likeness; (M,) for M chosen places."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = [(chosen[:0], chosen[:0])]
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        columns = signatures[:, band * width : (band + 1) * width]
        pairs = columns[chosen].astype(np.uint64).reshape(len(chosen), 2, 2)
        keys = (pairs[..., 0] << np.uint64(32) | pairs[..., 1]) * np.array([3, 0x9E3779B97F4A7C15], np.uint64)
        keys = keys[:, 0] ^ keys[:, 1]  # equal ones are candidates only
        order = np.lexsort((texts[chosen], keys))
        begins = np.r_[True, keys[order][1:] != keys[order][:-1]]
        leaders = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        others = ~begins
        edges.append(_alike(chosen, leaders[others], order[others], signatures))
    left, right = (np.concatenate(side) for side in zip(*edges))
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(chosen), len(chosen)))
    _, groups = connected_components(graph, directed=False)
    pairs = np.unique(np.stack([groups.astype(np.uint64), images[chosen]]), axis=1)
    return np.bincount(pairs[0].astype(np.int64), minlength=groups.max() + 1)[groups]


def _alike(
    chosen: np.ndarray, left: np.ndarray, right: np.ndarray, signatures: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose signatures agree in as many places as the texts of one answer do."""
    kept = np.zeros(len(left), bool)
    for start in range(0, len(left), _CHUNK):
        part = slice(start, start + _CHUNK)
        same = signatures[chosen[left[part]]] == signatures[chosen[right[part]]]  # (B, PERMUTATIONS)
        kept[part] = same.mean(axis=1) >= SAME
    return left[kept], right[kept]


def _shingles(text: str) -> set[bytes]:
    words = words_of(text)
    return {" ".join(words[start : start + SHINGLE]).encode() for start in range(max(1, len(words) - SHINGLE + 1))}


def _hash(*texts: str) -> tuple[int, int]:
    digest = bytes_sha256("\0".join(texts))
    return int(digest[:16], 16), int(digest[16:32], 16)
