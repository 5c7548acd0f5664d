"""
The order in which rows are visited: a pure function of the seed, the step and the number of rows.

Neither rank, world size, number of workers nor the point where a run was resumed has a say in it, so a checkpoint needs
to know nothing about data but the step.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch


class EpochOrder:
    """
    The order of one source's rows in each of its epochs.

    An epoch puts the chunks (row groups, slices of a tar, blocks of lines) in a random order, cuts their sequence into
    windows of `buffer` rows and shuffles each. A window that holds all rows is one permutation of them, whatever the
    chunks.

    Args:
        chunks: rows of each chunk.
        buffer: rows of a window; None: all.
        seed: of the run.
        source: number of the source, so that sources of one size have different orders.
    """

    def __init__(self, chunks: Sequence[int], buffer: int | None, seed: int, source: int = 0):
        self.chunks = np.asarray(chunks, dtype=np.int64)  # (chunks,)
        self.starts = np.cumsum(self.chunks) - self.chunks  # (chunks,) first row of each
        self.rows = int(self.chunks.sum())
        self.buffer = min(buffer or self.rows, self.rows)
        self.seed, self.source = seed, source
        self._chunk_order = lru_cache(2)(self._shuffle_chunks)
        self._window = lru_cache(2)(self._shuffle_window)

    def __getstate__(self):  # caches do not travel to another process
        return (self.chunks, self.buffer, self.seed, self.source)

    def __setstate__(self, state):
        self.__init__(*state)

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers at `positions` of an epoch, both (n,)."""
        rows = np.empty_like(positions)
        windows = positions // self.buffer
        for window in np.unique(windows):
            inside = windows == window
            rows[inside] = self._window(epoch, int(window))[positions[inside] - window * self.buffer]
        return rows

    def _shuffle_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks in this epoch's order, and where in the epoch each ends; both (chunks,)."""
        order = np.random.default_rng([self.seed, epoch, self.source]).permutation(len(self.chunks))
        return order, np.cumsum(self.chunks[order])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        first, last = window * self.buffer, min((window + 1) * self.buffer, self.rows)
        if self.buffer == self.rows:
            rows = np.arange(self.rows)
        else:
            order, ends = self._chunk_order(epoch)
            touched = range(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1)
            parts = []
            for number in touched:
                chunk, begin = order[number], ends[number] - self.chunks[order[number]]
                within = np.arange(max(first, begin), min(last, ends[number])) - begin
                parts.append(self.starts[chunk] + within)
            rows = np.concatenate(parts)
        seed = self.seed * 1_000_003 + epoch
        if self.source or window:
            seed = int(np.random.SeedSequence([self.seed, epoch, self.source, window]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return rows[torch.randperm(len(rows), generator=generator).numpy()]


class Mixture:
    """
    The order of visits to all sources: which row of which source stands at each place of a global batch.

    Sources alternate as evenly as their shares allow, so that every batch has them in proportion. With `weights`, a
    source goes through its rows again and again at its own pace; without, each epoch visits each row once at most, and
    what does not fill a batch at its end is left out.

    Args:
        sources: at least one.
        weights: of each, of any sum; None: as many as it has rows.
    """

    def __init__(self, sources: Sequence[EpochOrder], weights: Sequence[float] | None = None):
        self.sources, self.weighted = list(sources), weights is not None
        self.offsets = np.cumsum([0, *(source.rows for source in sources)])  # of row numbers
        self.rows = int(self.offsets[-1])
        weights = np.asarray(weights if self.weighted else [source.rows for source in sources], dtype=np.float64)
        left = np.cumsum(weights[::-1])[::-1]  # (sources,) weight of each and all after it
        self.shares = weights / left  # of what the ones before leave; the last one's is 1

    def counts(self, visits: np.ndarray) -> np.ndarray:
        """Count how many of the first `visits` (n,) of an epoch fall to each source, (sources, n); adds up to `visits`."""
        left, counts = visits, []
        for share in self.shares[:-1]:
            counts.append(np.floor(left * share + 0.5).astype(np.int64))
            left = left - counts[-1]
        return np.stack([*counts, left])

    def batch(self, step: int, size: int) -> list[tuple[int, int]]:
        """List (epoch, row) for each of the `size` places of a step's global batch; rows count through all sources."""
        per_epoch = self.rows // size * size
        epoch, first = divmod(step * size, per_epoch)
        counts = self.counts(first + np.arange(size + 1))  # (sources, B + 1)
        whole = self.counts(np.array([per_epoch]))[:, 0]  # (sources,) visits an epoch
        epochs, rows = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(np.diff(counts[number]))
            length = source.rows if self.weighted else int(whole[number])  # 0 for a source without a place
            rounds, positions = np.divmod(epoch * int(whole[number]) + counts[number, places], length)
            for turn in np.unique(rounds):
                now = rounds == turn
                rows[places[now]] = source.at(int(turn), positions[now]) + self.offsets[number]
            epochs[places] = rounds
        return list(zip(epochs.tolist(), rows.tolist()))


class VisitSampler(torch.utils.data.Sampler):
    """
    Visits of one process: for each step from `start` to `steps`, its share of the global batch as (epoch, row).

    Args:
        order: of the visits of all processes.
        batch_size: pairs a step, of all processes together.
        steps: of the run.
        start: steps done before.
        share: rank r and number W of the processes: each takes its r-th W-th part of a batch.
    """

    def __init__(self, order: Mixture, batch_size: int, steps: int, start: int = 0, share: tuple[int, int] = (0, 1)):
        rank, world = share
        if batch_size > order.rows:
            raise ValueError(
                f"loop.batch_size={batch_size} is more than the {order.rows} training pairs; set it to {order.rows} "
                "or less."
            )
        if batch_size % world:
            raise ValueError(
                f"loop.batch_size={batch_size} is the batch of all processes together and must be a multiple of their "
                f"number, {world}."
            )
        self.order, self.batch_size, self.steps, self.start = order, batch_size, steps, start
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield self.order.batch(step, self.batch_size)[self.share]
