"""
Near-duplicates of images: re-encoded, resized, blurred, marked, framed, turned, mirrored or cropped copies, inside a set
and against evaluation images.

Candidates come from 64-bit perceptual hashes of whole images and of their parts, in all eight turns; the likeliest are
laid over the image, moved until they fit, and count when their details correlate.
"""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation.benchmarks import classification_data, localization_data, retrieval_data
from evaluation.benchmarks.tables import NotHere
from modeling_lrsclip.encoding.imagery import ImageFiles, is_image_file
from modeling_lrsclip.encoding.ties import best_first
from modeling_lrsclip.files.hashing import bytes_sha256

from .fingerprints import (
    LOW,
    PARTS,
    SIDE,
    TURNS,
    align,
    coefficients,
    hashes,
    is_flat,
    margins,
    pack,
    part_profiles,
    profile,
    thumbnail,
    turned,
)
from .hash_index import HashIndex


REACH = 18  # bits by which the hash of a part may differ from that of a crop
LIKE = 0.35  # least cosine of low frequencies, before two thumbnails are laid over each other
SAME = 0.59  # least correlation of the two
# Of whole images that differ in so few bits, beside many others in fewer, as chance makes such pairs too, the third is
# enough, of those with such a cosine besides, the last.
CLOSE, CLOSE_OF_MANY, SAME_IF_CLOSE, CLOSELY_LIKE, SAME_IF_LIKE, MANY = 10, 8, 0.44, 0.8, 0.39, 100_000
CANDIDATES = 48, 6  # entries a query: of parts for the image in one turn, of whole images for one of its parts
# Indices of whole images and of their parts; the former have 24 times the queries, where crops are looked for.
OF_WHOLES, OF_PARTS = (
    {"looked_through": 8_000, "key_bits": 12, "most_lists": 32},
    {"looked_through": 100_000, "key_bits": 16, "most_lists": 512},
)
LOOKED_AT, LAID = 256, 3  # candidates of one image: compared by low frequencies, laid over each other
WHOLE = 0.95  # share of a side from which on a match is not a crop
BLOCK = 1024  # images that are searched apart from all before them
INSIDE = ""  # the owner of rows of the set itself
_TABLES = """
CREATE TABLE IF NOT EXISTS images (
    number INTEGER PRIMARY KEY, owner TEXT, id TEXT, hashes BLOB, thumb BLOB, match TEXT, UNIQUE (owner, id));
CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, signature TEXT);
"""


@dataclass(frozen=True)
class Match:
    """The match for which an image is left out: a line of `duplicates.jsonl`."""

    id: str  # of the row
    match: str  # id of the kept row, or name of the evaluation image
    against: str  # the evaluation set as given; empty: the set itself
    # copy; crop (the row's image is a part of the match); contains (the match is a part of it); same ground (footprints)
    kind: str
    turn: str  # what turns the row's image into the match, one of `TURNS`; empty: nothing
    distance: int  # bits of 64 that differ
    correlation: float  # of the thumbnails' details, -1 to 1


class _Prints:
    """Hashes of images, to be found as a whole or by a part."""

    def __init__(self, crops: bool):
        self.crops = crops
        self._wholes, self._parts = HashIndex(**(OF_WHOLES if crops else OF_PARTS)), HashIndex(**OF_PARTS)

    def __len__(self) -> int:
        return len(self._wholes)

    def add(self, numbers: np.ndarray, codes: np.ndarray) -> None:
        """Takes (n,) numbers and (n, P) hashes of images."""
        self._wholes.add(codes[:, 0], numbers)
        if self.crops:
            entries = numbers[:, None] * len(PARTS) + np.arange(len(PARTS))
            self._parts.add(codes.ravel(), entries.ravel())

    def clear(self) -> None:
        self._wholes.clear()
        self._parts.clear()

    def candidates(self, margins: np.ndarray, distance: int) -> np.ndarray:
        """
        The nearest images.

        Args:
            margins (8, P, K * K): of the query in all turns.
            distance: bits that may differ where crops are not looked for.

        Returns:
            (n, 5) int64 of number, turn of the query, part, bits that differ, and whether it is the query that holds the
            other; an image perhaps several times.
        """
        of_parts, of_wholes = CANDIDATES
        if self.crops:
            asked, entry, bits = self._parts.search(margins[:, 0], REACH, of_parts)
            matches = [(entry // len(PARTS), asked, entry % len(PARTS), bits, np.zeros(len(asked), bool))]
            asked, entry, bits = self._wholes.search(margins[:, 1:].reshape(-1, LOW * LOW), REACH, of_wholes)
            turn, part = np.divmod(asked, len(PARTS) - 1)
            matches.append((entry, turn, part + 1, bits, np.ones(len(asked), bool)))
        else:
            asked, entry, bits = self._wholes.search(margins[:, 0], distance, of_parts)
            matches = [(entry, asked, np.zeros_like(asked), bits, np.zeros(len(asked), bool))]
        number, turn, part, bits, contains = (np.concatenate(column) for column in zip(*matches))
        return np.stack([number, turn, part, bits, contains], axis=1).astype(np.int64)


class DuplicateFinder:
    """
    Remembers the images it was shown and says which are near-duplicates of an earlier one or of an evaluation image.
    The answers depend on the images and their order alone.

    Args:
        against: evaluation sets: whatever `evaluation.run` takes as data, a folder of images, or an image.
        inside: compare with the images shown before, too.
        distance: bits of 64 by which the hashes of two whole images may differ for the two to be copies.
        crops: look for crops, at 25 times the hashes.
        store: SQLite file that keeps fingerprints and answers: a new finder on it goes on where the last one stopped,
            and evaluation images are read once. None: in memory.

    Raises:
        `ValueError`: for evaluation data that cannot be found or read.
    """

    def __init__(
        self,
        against: Sequence[str | Path] = (),
        inside: bool = True,
        distance: int = 8,
        crops: bool = True,
        store: str | Path | None = None,
    ):
        if not 0 <= distance <= REACH:
            raise ValueError(f"distance={distance} must be 0 to {REACH}: the bits of 64 in which copies may differ.")
        self.against = tuple(dict.fromkeys(map(str, against)))
        self.inside, self.distance, self.crops = inside, distance, crops
        # Evaluation images; images shown, up to the last whole block; those after it, with their numbers and hashes.
        self._evaluated, self._earlier, self._recent = _Prints(crops), _Prints(crops), _Prints(crops)
        self._recent_codes: list[tuple[int, np.ndarray]] = []
        self._shown, self._next = 0, 0  # images shown; number of the next one in the store
        self._owner_of: dict[int, str] = {}  # of evaluation images, by number
        self._store = sqlite3.connect(store or ":memory:", check_same_thread=False)
        self._store.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
        self._lock = threading.Lock()  # what is written by the thread that checks is committed by another
        for source in self.against:
            self._read_evaluation(source)
        self._load()

    def commit(self) -> None:
        """Force all answers so far to disk; may be called while another thread checks an image."""
        with self._lock:
            self._store.commit()
            self._store.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Writes what is pending."""
        self._store.commit()
        self._store.close()

    # ------------------------------------------------------------------------------------------------------ asking

    def check(
        self, row_id: str, image: Image.Image, key: str | None = None, against: Sequence[str] | None = None
    ) -> Match | None:
        """
        Tell whether an image is a near-duplicate; remember it if not.

        Args:
            row_id: of the row.
            image: its image, upright.
            key: the image's own name, where rows may share an image: rows of one key get one answer. By default the
                row's id.
            against: which of the finder's evaluation sets count for this row; by default all.

        Returns:
            [`Match`] with the most correlated image, or None.
        """
        return self.check_thumbnail(row_id, thumbnail(image), key, against)

    def check_thumbnail(
        self, row_id: str, thumb: np.ndarray | None, key: str | None = None, against: Sequence[str] | None = None
    ) -> Match | None:
        """
        Tell the same from a thumbnail.

        Args:
            row_id, key, against: as of [`check`].
            thumb: the image's; None: of one without anything to compare.

        Returns:
            As [`check`].
        """
        with self._lock:
            name = row_id if key is None else key
            known = self._store.execute(
                "SELECT match FROM images WHERE owner = ? AND id = ?", (INSIDE, name)
            ).fetchone()
            if known:
                return known[0] and Match(**json.loads(known[0]) | {"id": row_id})
            if thumb is None or is_flat(thumb):
                self._remember(INSIDE, name, None, thumb)
                return None
            allowed = (
                self.against if against is None else tuple(source for source in self.against if source in against)
            )
            low = coefficients(turned(thumb))  # (8, P, 64)
            above = margins(low)
            # Evaluation images first and by themselves: whether an image is near one does not hang on the set.
            match = None
            if allowed and len(self._evaluated):
                near = self._evaluated.candidates(above, self.distance)
                if len(allowed) < len(self.against):
                    kept = [self._owner_of[number] in allowed for number in near[:, 0].tolist()]
                    near = near[np.array(kept, bool)]
                match = self._find(row_id, thumb, low, near, len(self._evaluated))
            if match is None and self.inside:
                both = [one.candidates(above, self.distance) for one in (self._earlier, self._recent) if len(one)]
                stored = len(self._earlier) + len(self._recent)
                match = self._find(row_id, thumb, low, np.concatenate(both), stored) if both else None
            self._remember(INSIDE, name, pack(above[0]), thumb, match)
            return match

    def _find(
        self, row_id: str, thumb: np.ndarray, low: np.ndarray, candidates: np.ndarray, stored: int
    ) -> Match | None:
        """The most correlated of an image's candidates, of so many images stored, that is the same."""
        if not len(candidates):
            return None
        by_bits = np.lexsort(candidates.T[[4, 2, 1, 0, 3]])
        candidates = candidates[by_bits[:LOOKED_AT]]
        numbers, turn, part, bits, contains = candidates.T
        thumbs = self._thumbs(numbers)
        theirs = part_profiles(thumbs, np.where(contains, 0, part))
        views, best, laid = turned(thumb), None, set()
        alike = (theirs * profile(low[turn, np.where(contains, part, 0)])).sum(axis=-1)
        close = (part == 0) & (bits <= (CLOSE if stored < MANY else CLOSE_OF_MANY))
        # Of a pattern that repeats another part may be a little more alike.
        for row in best_first(alike + 0.1 * close):
            if alike[row] < LIKE or len(laid) == LAID:
                break
            pair = numbers[row], part[row] == 0  # once as a whole, once by a part
            if pair in laid:
                continue
            laid.add(pair)
            view = views[turn[row]]
            whole, inner = (view, thumbs[row]) if contains[row] else (thumbs[row], view)
            correlation, share = align(whole, inner, int(part[row]))
            correlation = round(correlation, 4)  # its last bits are the processor's: of equal ones the first
            least = SAME
            if close[row]:
                least = SAME_IF_LIKE if alike[row] >= CLOSELY_LIKE else SAME_IF_CLOSE
            if correlation >= least and (best is None or correlation > best[0]):
                best = correlation, row, share
        if best is None:
            return None
        correlation, row, share = best
        holds = bool(contains[row]) != (share > 1)
        kind = "copy" if WHOLE <= share <= 1 / WHOLE else "contains" if holds else "crop"
        query = "SELECT owner, id FROM images WHERE number = ?"
        owner, name = self._store.execute(query, (int(numbers[row]),)).fetchone()
        return Match(row_id, name, owner, kind, list(TURNS)[turn[row]], int(bits[row]), correlation)

    def _thumbs(self, numbers: np.ndarray) -> np.ndarray:
        """(n, S, S): thumbnails by their images' numbers."""
        listed, places = np.unique(numbers, return_inverse=True)
        query = f"SELECT thumb FROM images WHERE number IN ({','.join(map(str, listed.tolist()))}) ORDER BY number"
        content = b"".join(row[0] for row in self._store.execute(query))
        return np.frombuffer(content, np.uint8).reshape(len(listed), SIDE, SIDE)[places]

    # ------------------------------------------------------------------------------------------------- remembering

    def _remember(
        self,
        owner: str,
        name: str,
        codes: np.ndarray | None,
        thumb: np.ndarray | None,
        match: Match | None = None,
    ) -> None:
        """Keeps an answer, and the thumbnail and the (P,) hashes of an image that others may match."""
        codes = None if match else codes
        number = self._next
        stored_match = match and json.dumps(asdict(match))
        content = thumb.tobytes() if codes is not None else None
        blob = codes.tobytes() if codes is not None else None
        self._store.execute(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", (number, owner, name, blob, content, stored_match)
        )
        self._next += 1
        self._show(number, codes)

    def _show(self, number: int, codes: np.ndarray | None) -> None:
        """Take an image into the search, or one that is not to be found (None)."""
        self._shown += 1
        if codes is not None and self.inside:
            self._recent.add(np.array([number]), codes[None])
            self._recent_codes.append((number, codes))
        if self._shown % BLOCK == 0 and self._recent_codes:
            numbers, blocked = zip(*self._recent_codes)
            self._earlier.add(np.array(numbers), np.stack(blocked))
            self._recent.clear()
            self._recent_codes = []

    def _load(self) -> None:
        """Builds the index from the store."""
        rows = self._store.execute("SELECT number, owner, hashes FROM images ORDER BY number")
        shown = self._store.execute("SELECT COUNT(*) FROM images WHERE owner = ?", (INSIDE,)).fetchone()[0]
        whole_blocks = shown // BLOCK * BLOCK
        while piece := rows.fetchmany(65536):
            self._next = piece[-1][0] + 1
            kept: dict[bool, list[tuple[int, bytes]]] = {True: [], False: []}  # of evaluation images, of others
            for number, owner, blob in piece:
                if owner != INSIDE and blob and owner in self.against:
                    self._owner_of[number] = owner
                    kept[True].append((number, blob))
                elif owner == INSIDE and self._shown < whole_blocks:
                    self._shown += 1
                    kept[False] += [(number, blob)] if blob and self.inside else []
                elif owner == INSIDE:
                    self._show(number, np.frombuffer(blob, np.uint64) if blob else None)
            for evaluated, some in kept.items():
                if some:
                    codes = np.frombuffer(b"".join(blob for _, blob in some), np.uint64).reshape(-1, len(PARTS))
                    prints = self._evaluated if evaluated else self._earlier
                    prints.add(np.array([number for number, _ in some]), codes)

    def _read_evaluation(self, source: str) -> None:
        """Fingerprints of an evaluation set, unless the store has them for these very files."""
        images = evaluation_images(source)
        signature = _signature(images)
        known = self._store.execute("SELECT signature FROM owners WHERE owner = ?", (source,)).fetchone()
        if known == (signature,):
            return
        with self._store:  # all of a set, or none of it
            self._store.execute("DELETE FROM images WHERE owner = ?", (source,))
            (last,) = self._store.execute("SELECT COALESCE(MAX(number), -1) FROM images").fetchone()
            rows = _fingerprints(source, images, last + 1)
            self._store.executemany("INSERT INTO images VALUES (?, ?, ?, ?, ?, NULL)", rows)
            self._store.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (source, signature))

    def counts(self) -> dict[str, Any]:
        """Images shown so far, matches by kind, evaluation images by set, images too flat to compare."""
        count = "SELECT COUNT(*) FROM images WHERE owner = ?"
        shown = self._store.execute(count, (INSIDE,)).fetchone()[0]
        matches = self._store.execute("SELECT match FROM images WHERE owner = ? AND match IS NOT NULL", (INSIDE,))
        kinds: dict[str, int] = {}
        for (match,) in matches:
            kind = json.loads(match)["kind"]
            kinds[kind] = kinds.get(kind, 0) + 1
        sets = {source: self._store.execute(count, (source,)).fetchone()[0] for source in self.against}
        flat = self._store.execute(
            "SELECT COUNT(*) FROM images WHERE owner = ? AND hashes IS NULL AND match IS NULL", (INSIDE,)
        ).fetchone()[0]
        return {"images": shown, "matches": kinds, "evaluation_images": sets, "flat": flat}


class StoredThumbnails:
    """Thumbnails of the images that a finder was shown, from its store."""

    def __init__(self, store: str | Path):
        self._store = sqlite3.connect(f"file:{Path(store).absolute()}?mode=ro", uri=True)

    def of(self, name: str) -> np.ndarray | None:
        """The thumbnail kept under an image's name; None of one without anything to compare."""
        row = self._store.execute("SELECT thumb FROM images WHERE owner = ? AND id = ?", (INSIDE, name)).fetchone()
        if row is None:
            raise ValueError(f"the store of a part knows no image {name}; build the part again.")
        return row[0] and np.frombuffer(row[0], np.uint8).reshape(SIDE, SIDE)

    def close(self) -> None:
        self._store.close()


def _fingerprints(source: str, images: ImageFiles, number: int) -> Iterator[tuple[Any, ...]]:
    seen: set[str] = set()
    progress = tqdm(zip(images.names, images, strict=True), source, len(images), leave=False, disable=None)
    for index, (name, image) in enumerate(progress):
        name = name if name not in seen else f"{name} ({index})"
        seen.add(name)
        thumb = thumbnail(image)
        codes = hashes(coefficients(thumb[None])[0])
        comparable = not is_flat(thumb)
        yield number + index, source, name, codes.tobytes() if comparable else None, thumb.tobytes()


def evaluation_images(source: str | Path) -> ImageFiles:
    """
    Every image that some task of `evaluation.run` would take from `source`; of a folder that none of them knows, every
    image in and below it; an image file is itself.

    Args:
        source: folder, caption file, image, Hub id, or name of a known data set.

    Raises:
        `ValueError`: one sentence where there is no image, or data that a task cannot read.
    """
    source, path = str(source), Path(source).expanduser()
    if path.is_file() and is_image_file(path):
        return ImageFiles([path], [path.name])
    names: dict[Any, str] = {}
    for sources, load in _LOADERS:
        try:
            for one in sources(source):
                images = load(one).images
                names |= dict(zip(images.sources, images.names, strict=True))
        except NotHere:
            continue
    if not names and path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image_file(file))
        names = {file: str(file.relative_to(path)) for file in files}
    if not names:
        what = "holds no evaluation images" if path.exists() else "does not exist here"
        raise ValueError(f"{source} {what}; give a folder of images, or what --data of evaluation.run takes.")
    return ImageFiles(list(names), list(names.values()))


def _captioned(column: str) -> tuple[Callable[[str], list[str]], Callable[[str], Any]]:
    return (
        lambda source: retrieval_data.find_sources(source, column),
        lambda source: retrieval_data.load_retrieval(source, column),
    )


_LOADERS = (
    _captioned("short_text"),
    _captioned("long_text"),
    (classification_data.find_sources, classification_data.load_classification),
    (localization_data.find_sources, localization_data.load_localization),
)


def _signature(images: ImageFiles) -> str:
    """SHA-256 of what tells whether files have changed: names, sizes and times, or the content of embedded ones."""

    def parts() -> Iterable[str]:
        for name, source in zip(images.names, images.sources, strict=True):
            if isinstance(source, bytes):
                yield f"{name} {bytes_sha256(source)}\n"
            else:
                stat = source.stat()
                yield f"{name} {stat.st_size} {stat.st_mtime_ns}\n"

    return bytes_sha256("".join(parts()))
