"""
Near-duplicates of images: re-encoded, resized, blurred, marked, framed, turned, mirrored or cropped copies, inside a set
and against evaluation images.

Candidates come from 64-bit perceptual hashes of whole images and of their parts, in all eight turns; the likeliest are
laid over the image, moved until they fit, and count when their details correlate.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.encoding.ties import best_first

from .evaluation_images import evaluation_images, signature
from .fingerprints import (
    LOW,
    PARTS,
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
from .store import INSIDE, ImageStore


REACH = 18  # bits by which the hash of a part may differ from that of a crop
LIKE = 0.35  # least cosine of low frequencies, before two thumbnails are laid over each other
SAME = 0.59  # least correlation of the two
# Of whole images that differ in so few bits, beside fewer others than make such pairs by chance, the third is enough, of
# those with such a cosine besides, the last.
CLOSE, MANY, SAME_IF_CLOSE, CLOSELY_LIKE, SAME_IF_LIKE = 10, 100_000, 0.44, 0.8, 0.39
CANDIDATES = 48, 6  # entries a query: of parts for the image in one turn, of whole images for one of its parts
# Indices of whole images and of their parts; the former have 24 times the queries, where crops are looked for.
OF_WHOLES, OF_PARTS = (
    {"looked_through": 8_000, "key_bits": 12, "most_lists": 32},
    {"looked_through": 60_000, "key_bits": 16, "most_lists": 512},
)
# Candidates of one image that are compared by low frequencies, before the current block and in it; those laid over it.
LOOKED_AT, LOOKED_AT_IN_BLOCK, LAID = 256, 64, 3
WHOLE = 0.95  # share of a side from which on a match is not a crop
BLOCK = 1024  # images that are searched apart from all before them


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


@dataclass
class Query:
    """
    An image that is asked about.

    Args:
        row_id: of the row.
        thumb (S, S): the image's thumbnail; None: of one without anything to compare.
        key: the image's own name, where rows may share an image: rows of one key get one answer. None: the row's id.
        against: which of the finder's evaluation sets count for this row; None: all.
    """

    row_id: str
    thumb: np.ndarray | None
    key: str | None = None
    against: Sequence[str] | None = None

    @property
    def name(self) -> str:
        return self.row_id if self.key is None else self.key

    @property
    def comparable(self) -> bool:
        return self.thumb is not None and not is_flat(self.thumb)

    @cached_property
    def views(self) -> np.ndarray:
        """(8, S, S): the thumbnail in all `TURNS`."""
        return turned(self.thumb)

    @cached_property
    def low(self) -> np.ndarray:
        """(8, P, K * K): [`coefficients`] of the views."""
        return coefficients(self.views)

    @cached_property
    def margins(self) -> np.ndarray:
        """(8, P, K * K): how sure the hashes' bits are."""
        return margins(self.low)


@dataclass(frozen=True)
class Candidate:
    """A stored image that may be the one asked about, as a whole or a part of it."""

    score: float  # cosine of low frequencies; more for whole images that differ in few bits
    number: int
    turn: int
    part: int
    distance: int  # bits of 64 that differ
    contains: bool  # the image asked about holds it
    least: float  # correlation that is enough
    correlation: float | None = None  # of the details, once one was laid over the other
    share: float = 1.0  # of a side of the larger one


@dataclass
class Seen:
    """The likeliest images for a query among those stored before the current block, laid over it."""

    evaluated: list[Candidate]
    earlier: list[Candidate]


class DuplicateFinder:
    """
    Remembers the images it was shown and says which are near-duplicates of an earlier one or of an evaluation image.
    The answers depend on the images and their order alone.

    Args:
        against: evaluation sets: whatever `evaluation.run` takes as data, a folder of images, or an image.
        inside: compare with the images shown before, too.
        distance: bits of 64 by which the hashes of two whole images may differ for the two to be copies.
        crops: look for crops, at 25 times the hashes.
        store: file of an [`ImageStore`] that keeps fingerprints and answers: a new finder on it goes on where the last
            one stopped, and evaluation images are read once. None: in memory.

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
        # Evaluation images by set, so that a set that does not count for a row hides nothing of one that does; images
        # shown, up to the last whole block; those after it, with their numbers and hashes.
        self._evaluated = {source: _Prints(crops) for source in self.against}
        self._earlier, self._recent = _Prints(crops), _Prints(crops)
        self._recent_codes: list[tuple[int, np.ndarray]] = []
        self.shown, self._next = 0, 0  # images shown; number of the next one in the store
        self.store = ImageStore(store)
        self._lock = threading.Lock()  # what is written by the thread that checks is committed by another
        for source in self.against:
            images = evaluation_images(source)
            self.store.set_evaluation(source, signature(images), _fingerprints(source, images))
        self._load()

    @property
    def stored(self) -> int:
        """Images that a new one is compared with."""
        return sum(map(len, (*self._evaluated.values(), self._earlier, self._recent)))

    @property
    def blocks(self) -> int:
        """Whole blocks of images that were shown: what [`look`] finds changes with these alone."""
        return self.shown // BLOCK

    def commit(self) -> None:
        """Force all answers so far to disk; may be called while another thread checks an image."""
        with self._lock:
            self.store.commit()

    def close(self) -> None:
        """Writes what is pending."""
        self.store.close()

    # ------------------------------------------------------------------------------------------------------ asking

    def check(
        self, row_id: str, image: Image.Image, key: str | None = None, against: Sequence[str] | None = None
    ) -> Match | None:
        """
        Tell whether an image is a near-duplicate; remember it if not.

        Args:
            row_id, key, against: as of [`Query`].
            image: the row's, upright.

        Returns:
            [`Match`] with the most correlated image, or None.
        """
        return self.check_all([Query(row_id, thumbnail(image), key, against)])[0]

    def check_all(
        self, queries: Sequence[Query], look: Callable[[list[Query]], Iterable[Seen]] | None = None
    ) -> list[Match | None]:
        """
        Tell the same of several images, one after another.

        Args:
            queries: in the order of the rows.
            look: [`look`] for several queries, in other processes, say; by default one after another.

        Returns:
            As [`check`], in the order of the queries.
        """
        with self._lock:
            found: list[Match | None] = []
            while len(found) < len(queries):
                rest = queries[len(found) :]
                new: dict[str, Query] = {}
                for query in rest:
                    if self.store.answer(query.name) is None:
                        new.setdefault(query.name, query)
                of_block = list(new.values())[: BLOCK - self.shown % BLOCK]
                asked = [query for query in of_block if query.comparable]
                seen = iter(look(asked)) if look else map(self.look, asked)
                left = {query.name for query in of_block}
                for query in rest:
                    if query.name in left:
                        left.remove(query.name)
                        found.append(self._decide(query, next(seen) if query.comparable else None))
                    elif known := self.store.answer(query.name):
                        found.append(known[0] and Match(**json.loads(known[0]) | {"id": query.row_id}))
                    else:
                        break  # of the next block
            return found

    def look(self, query: Query) -> Seen:
        """Search what was stored before the current block; changes nothing, so that any process may do it."""
        allowed = [source for source in self.against if query.against is None or source in query.against]
        sets = [self._evaluated[source] for source in allowed if len(self._evaluated[source])]
        # Evaluation images first and by themselves: whether an image is near one does not hang on the set.
        evaluated: list[Candidate] = []
        if sets:
            near = np.concatenate([prints.candidates(query.margins, self.distance) for prints in sets])
            evaluated = self._lay(query, self._likeliest(query, near, LOOKED_AT, sum(map(len, sets))))
        earlier: list[Candidate] = []
        if self.inside and len(self._earlier) and _best(evaluated) is None:
            near = self._earlier.candidates(query.margins, self.distance)
            earlier = self._lay(query, self._likeliest(query, near, LOOKED_AT, len(self._earlier)))
        return Seen(evaluated, earlier)

    def _decide(self, query: Query, seen: Seen | None) -> Match | None:
        """Answer a query, with what is in the current block besides, and remember it; None: nothing to compare."""
        if seen is None:
            self._remember(query.name, None, None)
            return None
        best = _best(seen.evaluated)
        if best is None and self.inside:
            likely = seen.earlier
            if len(self._recent):
                near = self._recent.candidates(query.margins, self.distance)
                both = [*likely, *self._likeliest(query, near, LOOKED_AT_IN_BLOCK, len(self._earlier))]
                order = best_first(np.array([candidate.score for candidate in both]))[:LAID]
                likely = self._lay(query, [both[index] for index in order])
            best = _best(likely)
        match = None
        if best is not None:
            holds = best.contains != (best.share > 1)
            kind = "copy" if WHOLE <= best.share <= 1 / WHOLE else "contains" if holds else "crop"
            owner, name = self.store.owner_of(best.number)
            match = Match(query.row_id, name, owner, kind, list(TURNS)[best.turn], best.distance, best.correlation)
        self._remember(query.name, pack(query.margins[0]), query.thumb, match)
        return match

    def _likeliest(self, query: Query, candidates: np.ndarray, looked_at: int, stored: int) -> list[Candidate]:
        """The few that are most like an image, of the nearest so many of its candidates, of so many images stored."""
        if not len(candidates):
            return []
        numbers, turn, part, bits, contains = candidates.T
        by_bits = np.argsort(bits << 44 | numbers << 9 | turn << 6 | part << 1 | contains, kind="stable")
        numbers, turn, part, bits, contains = candidates[by_bits[:looked_at]].T
        listed, places = np.unique(numbers, return_inverse=True)
        theirs = part_profiles(self.store.thumbs(listed.tolist())[places], np.where(contains, 0, part))
        alike = (theirs * profile(query.low[turn, np.where(contains, part, 0)])).sum(axis=-1)
        close = (part == 0) & (bits <= CLOSE)
        scores = alike + 0.1 * close  # of a pattern that repeats another part may be a little more alike
        likeliest: dict[tuple[int, bool], Candidate] = {}
        for row in best_first(scores):
            if alike[row] < LIKE or len(likeliest) == LAID:
                break
            least = SAME
            if close[row] and stored < MANY:
                least = SAME_IF_LIKE if alike[row] >= CLOSELY_LIKE else SAME_IF_CLOSE
            one = *(int(column[row]) for column in (numbers, turn, part, bits)), bool(contains[row])
            # Once as a whole, once by a part.
            likeliest.setdefault((one[0], one[2] == 0), Candidate(float(scores[row]), *one, least))
        return list(likeliest.values())

    def _lay(self, query: Query, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with their correlations."""
        return [one if one.correlation is not None else self._laid(query, one) for one in candidates]

    def _laid(self, query: Query, one: Candidate) -> Candidate:
        view, thumb = query.views[one.turn], self.store.thumbs([one.number])[0]
        correlation, share = align(*((view, thumb) if one.contains else (thumb, view)), one.part)
        return replace(one, correlation=round(correlation, 4), share=share)  # its last bits are the processor's

    # ------------------------------------------------------------------------------------------------- remembering

    def _remember(
        self, name: str, codes: np.ndarray | None, thumb: np.ndarray | None, match: Match | None = None
    ) -> None:
        """Keeps an answer, and the thumbnail and the (P,) hashes of an image that others may match."""
        codes = None if match else codes
        self.store.add(self._next, INSIDE, name, codes, thumb, match and json.dumps(asdict(match)))
        self._next += 1
        self._show(self._next - 1, codes)

    def _show(self, number: int, codes: np.ndarray | None) -> None:
        """Take an image into the search, or one that is not to be found (None)."""
        self.shown += 1
        if codes is not None and self.inside:
            self._recent.add(np.array([number]), codes[None])
            self._recent_codes.append((number, codes))
        if self.shown % BLOCK == 0 and self._recent_codes:
            numbers, blocked = zip(*self._recent_codes)
            self._earlier.add(np.array(numbers), np.stack(blocked))
            self._recent.clear()
            self._recent_codes = []

    def _load(self) -> None:
        """Builds the index from the store."""
        whole_blocks = self.store.count_shown() // BLOCK * BLOCK
        for piece in self.store.images():
            self._next = piece[-1][0] + 1
            kept: dict[str, list[tuple[int, bytes]]] = {}  # by owner
            for number, owner, blob in piece:
                if owner != INSIDE and blob and owner in self.against:
                    kept.setdefault(owner, []).append((number, blob))
                elif owner == INSIDE and self.shown < whole_blocks:
                    self.shown += 1
                    if blob and self.inside:
                        kept.setdefault(owner, []).append((number, blob))
                elif owner == INSIDE:
                    self._show(number, np.frombuffer(blob, np.uint64) if blob else None)
            for owner, some in kept.items():
                codes = np.frombuffer(b"".join(blob for _, blob in some), np.uint64).reshape(-1, len(PARTS))
                prints = self._earlier if owner == INSIDE else self._evaluated[owner]
                prints.add(np.array([number for number, _ in some]), codes)


def _best(candidates: list[Candidate]) -> Candidate | None:
    """The most correlated of those that are the same image; of equal ones the first."""
    same = [
        one
        for one in candidates
        # A lower correlation is enough for whole images alone.
        if one.correlation >= (one.least if WHOLE <= one.share <= 1 / WHOLE else SAME)
    ]
    return max(same, key=lambda one: one.correlation, default=None)


def _fingerprints(source: str, images: ImageFiles) -> Iterator[tuple[str, np.ndarray | None, np.ndarray]]:
    seen: set[str] = set()
    progress = tqdm(zip(images.names, images, strict=True), source, len(images), leave=False, disable=None)
    for index, (name, image) in enumerate(progress):
        name = name if name not in seen else f"{name} ({index})"
        seen.add(name)
        thumb = thumbnail(image)
        yield name, None if is_flat(thumb) else hashes(coefficients(thumb[None])[0]), thumb
