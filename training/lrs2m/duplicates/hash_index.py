"""
An index of 64-bit hashes on `faiss`: each hash lies in the list of the nearest of `LISTS` fixed codes, and a query looks
through the lists of the codes nearest to it. Few hashes are looked through one by one.

The codes are drawn once and for all, so nothing is trained, and what a query finds hangs on the hashes alone, not on the
order or the steps in which they came. How many lists are looked through falls with the number of hashes, so that the time
stays flat.
"""

import faiss
import numpy as np


LISTS = 1024
FEWEST_LISTS, MOST_LISTS = 8, 64  # that a query looks through


def _draw_codes() -> np.ndarray:
    """(LISTS, 8) uint8: of random bits, as those of hashes are."""
    return np.random.default_rng(0).integers(0, 256, (LISTS, 8), dtype=np.uint8)


class HashIndex:
    """
    Hashes with a number each (an entry), to be found by near hashes. Memory: 16 to 32 bytes a hash.

    Args:
        looked_through: hashes that a query is compared with, about; up to so many, with all.
    """

    def __init__(self, looked_through: int):
        self.looked_through = looked_through
        self.clear()

    def __len__(self) -> int:
        return self._index.ntotal

    def clear(self) -> None:
        """Forget all hashes."""
        self._index = faiss.IndexBinaryFlat(64)
        self._entries: list[np.ndarray] = []  # of a flat index, which only counts

    def add(self, hashes: np.ndarray, entries: np.ndarray) -> None:
        """Takes (n,) uint64 hashes and their numbers."""
        if isinstance(self._index, faiss.IndexBinaryIVF):
            self._index.add_with_ids(_bytes(hashes), entries.astype(np.int64))
            return
        self._index.add(_bytes(hashes))
        self._entries.append(entries.astype(np.int64))
        if len(self) > self.looked_through:
            stored = faiss.vector_to_array(self._index.xb).reshape(-1, 8)
            codes = faiss.IndexBinaryFlat(64)
            codes.add(_draw_codes())
            self._index = faiss.IndexBinaryIVF(codes, 64, LISTS)
            self._index.is_trained = True
            self._index.referenced_objects = [codes]  # faiss keeps a bare pointer
            self._index.add_with_ids(stored, np.concatenate(self._entries))
            self._entries = []

    def search(self, hashes: np.ndarray, reach: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Entries near the queries.

        Args:
            hashes (Q,): of the queries.
            reach: bits that may differ.
            most: entries a query, the nearest.

        Returns:
            Three arrays of the same length: the query's index, the entry, the bits that differ.
        """
        if not len(self):
            return tuple(np.empty(0, np.int64) for _ in range(3))
        flat = isinstance(self._index, faiss.IndexBinaryFlat)
        if not flat:
            share = self.looked_through / len(self)
            self._index.nprobe = int(np.clip(np.ceil(LISTS * share), FEWEST_LISTS, MOST_LISTS))
        bits, entries = self._index.search(_bytes(hashes), min(most, len(self)))
        query, place = np.nonzero((bits <= reach) & (entries >= 0))
        entries = entries[query, place]
        if flat:
            if len(self._entries) > 1:
                self._entries = [np.concatenate(self._entries)]
            entries = self._entries[0][entries]
        return query, entries, bits[query, place]


def _bytes(hashes: np.ndarray) -> np.ndarray:
    """(n, 8) uint8, as faiss takes binary codes."""
    return np.ascontiguousarray(hashes, np.uint64).view(np.uint8).reshape(-1, 8)
