"""
An index of 64-bit hashes that finds near ones without looking at all: multi-probe locality-sensitive hashing.

Each of `TABLES` looks at 20 of the 44 lowest frequencies, which JPEG and small shifts change least. A query asks each
table for the key it has and for those that the `WEAK` bits nearest to their threshold would give (Lv et al., 2007,
"Multi-Probe LSH"), then counts the bits that differ over all 64.
"""

import random
from dataclasses import dataclass

import numpy as np

from .fingerprints import LOW, margins


TABLES, KEY_BITS, LOWEST, WEAK = 4, 20, 44, 6
_FANOUT = 4  # sorted pieces are put together once the older is at most so many times as large
_CHUNK = 2**20


def _choose_bits() -> np.ndarray:
    """(TABLES, KEY_BITS) places in a hash, 0 the first frequency; drawn once and for all."""
    order = sorted((u * u + v * v, u, v) for u in range(LOW) for v in range(LOW) if u + v)
    lowest = [u * LOW + v for _, u, v in order][:LOWEST]
    return np.array([sorted(random.Random(table).sample(lowest, KEY_BITS)) for table in range(TABLES)])


_BITS = _choose_bits()
_WEIGHTS = 1 << np.arange(KEY_BITS)
_MASKS = np.array([[bool(mask >> bit & 1) for bit in range(WEAK)] for mask in range(2**WEAK)])  # (probes, WEAK)


def probe_keys(coefficients: np.ndarray) -> np.ndarray:
    """
    The keys to ask for.

    Args:
        coefficients (Q, 64): low frequencies of the queries.

    Returns:
        (TABLES, Q, 2 ** WEAK) int64.
    """
    distances = margins(coefficients)[:, _BITS].transpose(1, 0, 2)  # (TABLES, Q, KEY_BITS)
    keys = (distances > 0) @ _WEIGHTS  # (TABLES, Q)
    weak = np.argpartition(np.abs(distances), WEAK, axis=-1)[..., :WEAK]
    flips = (1 << weak) @ _MASKS.T.astype(np.int64)  # (TABLES, Q, probes)
    return keys[..., None] ^ flips


def stored_keys(hashes: np.ndarray, table: int) -> np.ndarray:
    """(N,) int32: the keys under which one table keeps hashes."""
    keys = np.empty(len(hashes), np.int32)
    for start in range(0, len(hashes), _CHUNK):
        piece = hashes[start : start + _CHUNK]
        key = np.zeros(len(piece), np.int32)
        for position, bit in enumerate(_BITS[table]):
            key |= ((piece >> np.uint64(63 - bit)) & np.uint64(1)).astype(np.int32) << position
        keys[start : start + len(piece)] = key
    return keys


@dataclass
class _Piece:
    hashes: np.ndarray  # (n,) uint64
    entries: np.ndarray  # (n,) int32
    order: np.ndarray  # (TABLES, n) int32, by key
    starts: np.ndarray  # (TABLES, 2 ** KEY_BITS + 1) int32

    @classmethod
    def sort(cls, hashes: np.ndarray, entries: np.ndarray) -> "_Piece":
        order = np.empty((TABLES, len(hashes)), np.int32)
        starts = np.zeros((TABLES, 2**KEY_BITS + 1), np.int32)
        for table in range(TABLES):
            keys = stored_keys(hashes, table)
            order[table] = np.argsort(keys, kind="stable")
            np.cumsum(np.bincount(keys, minlength=2**KEY_BITS), out=starts[table, 1:])
        return cls(hashes, entries, order, starts)


class HashIndex:
    """
    Hashes with a number each (an entry), to be found by near hashes. Memory: 28 bytes a hash.

    Args:
        buffer: hashes that are looked at one by one before they are sorted into tables.
    """

    def __init__(self, buffer: int = 1024):
        self._pieces: list[_Piece] = []
        self._hashes = np.empty(buffer, np.uint64)
        self._entries = np.empty(buffer, np.int32)
        self._filled = 0

    def __len__(self) -> int:
        return self._filled + sum(len(piece.hashes) for piece in self._pieces)

    def add(self, hashes: np.ndarray, entries: np.ndarray) -> None:
        """Takes (n,) uint64 hashes and their numbers, below 2 ** 31."""
        if self._filled + len(hashes) > len(self._hashes):
            held = slice(0, self._filled)
            hashes = np.concatenate([self._hashes[held], hashes])
            entries = np.concatenate([self._entries[held], entries]).astype(np.int32)
            self._filled = 0
            self._push(_Piece.sort(hashes, entries))
            return
        free = slice(self._filled, self._filled + len(hashes))
        self._hashes[free], self._entries[free] = hashes, entries
        self._filled += len(hashes)

    def _push(self, piece: _Piece) -> None:
        while self._pieces and len(self._pieces[-1].hashes) <= _FANOUT * len(piece.hashes):
            older = self._pieces.pop()
            hashes = np.concatenate([older.hashes, piece.hashes])
            entries = np.concatenate([older.entries, piece.entries])
            del older  # its tables go before the new ones are made
            piece = _Piece.sort(hashes, entries)
        self._pieces.append(piece)

    def search(self, hashes: np.ndarray, keys: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Entries near the queries.

        Args:
            hashes (Q,): of the queries.
            keys: of the queries, from [`probe_keys`].
            reach: bits that may differ.

        Returns:
            Three arrays of the same length: the query's index, the entry, the bits that differ. A pair may recur.
        """
        near = np.bitwise_count(hashes[:, None] ^ self._hashes[None, : self._filled])  # (Q, filled)
        query, row = np.nonzero(near <= reach)
        matches = [(query, self._entries[row], near[query, row])]
        asked = np.repeat(np.arange(len(hashes)), keys.shape[2])  # (Q * probes,)
        for piece in self._pieces:
            for table in range(TABLES):
                flat = keys[table].ravel()
                starts = piece.starts[table][flat]
                lengths = piece.starts[table][flat + 1] - starts
                hit = np.flatnonzero(lengths)
                if not len(hit):
                    continue
                starts, lengths = starts[hit], lengths[hit]
                ends = np.cumsum(lengths)
                spread = np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])
                row = piece.order[table][spread]
                query = np.repeat(asked[hit], lengths)
                bits = np.bitwise_count(piece.hashes[row] ^ hashes[query])
                kept = bits <= reach
                matches.append((query[kept], piece.entries[row[kept]], bits[kept]))
        return tuple(np.concatenate(column) for column in zip(*matches))
