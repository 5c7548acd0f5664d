"""
An index of 64-bit hashes on `faiss`: a hash lies in the list that its bits of the lowest frequencies number, and a query
looks through its own list and those it would lie in if the bits it is least sure of were the other way. Few hashes are
looked through one by one, and those of altered copies among them, as an alteration turns the least sure bits first.

Nothing is trained, and what a query finds hangs on the hashes alone, not on the order or the steps in which they came. How
many lists are looked through falls with the number of hashes, so that the time stays flat until it is the least (beside 2 to
4 million images).
"""

import faiss
import numpy as np

from .fingerprints import FREQUENCIES, pack


class HashIndex:
    """
    Hashes with a number each (an entry), to be found by near hashes. Memory: 16 to 32 bytes a hash.

    Args:
        looked_through: hashes that a query is compared with, about; up to so many, with all.
        key_bits: of a hash, which number its list.
        most_lists: that a query looks through, a power of two; an eighth of them at least.
    """

    def __init__(self, looked_through: int, key_bits: int, most_lists: int):
        self.looked_through, self.most_lists = looked_through, most_lists
        self._key_bits = np.argsort(FREQUENCIES, kind="stable")[1 : key_bits + 1]  # the very first is always 1
        unsure = most_lists.bit_length()  # bits of which some are turned: twice as many lists to choose from
        subsets = np.arange(1 << unsure)[:, None] >> np.arange(unsure) & 1  # (subsets, unsure)
        self._turned = subsets.T.astype(np.float32)  # for a fast product
        self.clear()

    def __len__(self) -> int:
        return self._index.ntotal

    def clear(self) -> None:
        """Forget all hashes."""
        self._index = faiss.IndexBinaryFlat(64)
        self._entries: list[np.ndarray] = []  # of a flat index, which only counts

    def add(self, hashes: np.ndarray, entries: np.ndarray) -> None:
        """Takes (n,) uint64 hashes and their numbers."""
        entries = entries.astype(np.int64)
        if isinstance(self._index, faiss.IndexBinaryIVF):
            self._add_to_lists(hashes, entries)
            return
        self._index.add(_bytes(hashes))
        self._entries.append(entries)
        if len(self) > self.looked_through:
            stored = faiss.vector_to_array(self._index.xb).view(np.uint64)
            unused = faiss.IndexBinaryFlat(64)  # the lists are chosen here
            self._index = faiss.IndexBinaryIVF(unused, 64, 1 << len(self._key_bits))
            self._index.is_trained = True
            self._index.referenced_objects = [unused]  # faiss keeps a bare pointer
            self._add_to_lists(stored, np.concatenate(self._entries))
            self._entries = []

    def search(self, margins: np.ndarray, reach: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Entries near the queries.

        Args:
            margins (Q, 64): of the queries; a hash has a 1 where one is positive, and is the surer of it the larger it is.
            reach: bits that may differ.
            most: entries a query, the nearest.

        Returns:
            Three arrays of the same length: the query's index, the entry, the bits that differ.
        """
        if not len(self):
            return tuple(np.empty(0, np.int64) for _ in range(3))
        hashes = pack(margins)
        flat = isinstance(self._index, faiss.IndexBinaryFlat)
        if flat:
            bits, entries = self._index.search(_bytes(hashes), min(most, len(self)))
        else:
            lists = self._lists_of_queries(margins)
            self._index.nprobe = lists.shape[1]
            bits, entries = self._index.search_preassigned(_bytes(hashes), min(most, len(self)), lists, None)
        query, rank = np.nonzero((bits <= reach) & (entries >= 0))
        entries = entries[query, rank]
        if flat:
            if len(self._entries) > 1:
                self._entries = [np.concatenate(self._entries)]
            entries = self._entries[0][entries]
        return query, entries, bits[query, rank]

    def _add_to_lists(self, hashes: np.ndarray, entries: np.ndarray) -> None:
        codes, lists = _bytes(hashes), self._lists(hashes)
        self._index.add_core(len(codes), *map(faiss.swig_ptr, (codes, entries, lists)))

    def _lists(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64: the list that each hash lies in."""
        lists = np.zeros(hashes.shape, np.int64)
        for position, bit in enumerate(self._key_bits.tolist()):
            lists |= (hashes >> np.uint64(63 - bit) & np.uint64(1)).astype(np.int64) << position
        return lists

    def _lists_of_queries(self, margins: np.ndarray) -> np.ndarray:
        """(Q, n) int64: the lists to look through, those with the least sum of margins of turned bits."""
        margins = margins[:, self._key_bits]
        wanted = int(self.looked_through * (1 << len(self._key_bits)) / len(self))
        count = int(np.clip(wanted, self.most_lists // 8, self.most_lists))
        sure = np.abs(margins).round(2)  # the last bits of a margin are the processor's
        unsure = np.argsort(sure, axis=1, kind="stable")[:, : len(self._turned)]  # (Q, unsure)
        cost = np.take_along_axis(sure, unsure, axis=1) @ self._turned  # (Q, subsets)
        chosen = np.sort(np.argpartition(cost, count, axis=1)[:, :count], axis=1)
        weights = 2.0 ** np.arange(len(self._key_bits), dtype=np.float32)
        masks = weights[unsure] @ self._turned  # (Q, subsets), whole numbers
        lists = (margins > 0) @ weights
        return lists.astype(np.int64)[:, None] ^ np.take_along_axis(masks, chosen, axis=1).astype(np.int64)


def _bytes(hashes: np.ndarray) -> np.ndarray:
    """(n, 8) uint8, as faiss takes binary codes."""
    return np.ascontiguousarray(hashes, np.uint64).view(np.uint8).reshape(-1, 8)
