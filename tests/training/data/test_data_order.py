"""The order of visits: permutations in windows, sources in proportion, nothing but seed and step in it."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from training.data.visiting_order import EpochOrder, Mixture, VisitSampler


def visits(mixture, size, steps):
    return [mixture.batch(step, size) for step in range(steps)]


class TestEpochs:
    def test_windows_cover_an_epoch_once(self):
        chunks = [7, 1, 12, 5, 5, 9, 30, 2]
        for buffer in (1, 4, 10, 25, 70, 71, 500, None):
            order = EpochOrder(chunks, buffer, seed=1)
            for epoch in (0, 1):
                assert sorted(order.at(epoch, np.arange(71))) == list(range(71)), buffer

    def test_a_window_holds_whole_chunks_but_at_its_edges(self):
        order = EpochOrder([10] * 20, 30, seed=5)
        for window in range(6):
            chunks = Counter((order.at(0, np.arange(30 * window, 30 * window + 30)) // 10).tolist())
            assert set(chunks.values()) == {10}, "three chunks, each of them whole"
        uneven = EpochOrder([7] * 20, 30, seed=5)
        assert len(set((uneven.at(0, np.arange(30, 60)) // 7).tolist())) <= 6

    def test_chunks_do_not_matter_in_one_window(self):
        positions = np.arange(40)
        orders = [EpochOrder(chunks, 40, seed=2).at(3, positions) for chunks in ([40], [10] * 4, [1, 39])]
        assert all((order == orders[0]).all() for order in orders)

    def test_epochs_seeds_and_sources_differ(self):
        positions = np.arange(100)
        orders = [
            tuple(EpochOrder([10] * 10, buffer, seed, source).at(epoch, positions))
            for buffer in (20, None)
            for seed in (0, 1)
            for source in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(orders)) == 16

    def test_the_first_window_of_the_first_source_is_as_runs_of_before_had_it(self):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + 2)  # seed and epoch
        rows = EpochOrder([12], None, seed=3).at(2, np.arange(12))
        assert rows.tolist() == torch.randperm(12, generator=generator).tolist()

    def test_another_process_has_the_same_order(self):
        order = EpochOrder([10] * 10, 20, seed=3, source=2)
        there = pickle.loads(pickle.dumps(order))
        assert there.at(1, np.arange(100)).tolist() == order.at(1, np.arange(100)).tolist()

    def test_a_batch_of_all_rows_is_the_largest(self):
        order = Mixture([EpochOrder([12], None, seed=3)])
        assert len(next(iter(VisitSampler(order, 12, 1)))) == 12
        with pytest.raises(ValueError, match="loop.batch_size=13 is more than the 12 training pairs"):
            VisitSampler(order, 13, 1)
        with pytest.raises(ValueError, match="loop.batch_size=10 .* must be a multiple of their number, 3"):
            VisitSampler(order, 10, 1, share=(0, 3))
        assert len(VisitSampler(order, 12, steps=5, start=2)) == 3

    def test_rows_are_spread_well(self):
        """With windows of a fifth, a batch is no more alike than chance makes it: few neighbours share one."""
        order = EpochOrder([100] * 100, 2000, seed=0)
        batch = np.sort(order.at(0, np.arange(64)))
        assert np.diff(batch).min() >= 1 and (np.diff(batch) < 3).mean() < 0.3
        assert len(np.unique(batch // 100)) > 12


class TestMixtures:
    def orders(self, *rows, buffer=None):
        return [EpochOrder([count], buffer, 0, number) for number, count in enumerate(rows)]

    def test_one_source_leaves_out_what_fills_no_batch(self):
        batches = visits(Mixture(self.orders(10)), 3, 6)
        assert [batch[0][0] for batch in batches] == [0, 0, 0, 1, 1, 1]
        assert len({row for batch in batches[:3] for _, row in batch}) == 9

    def test_without_weights_each_row_once_an_epoch(self):
        batches = visits(Mixture(self.orders(30, 7, 23)), 6, 20)
        for epoch in (batches[:10], batches[10:]):
            assert sorted(row for batch in epoch for _, row in batch) == list(range(60))
        shares = [sum(row < 30 for _, row in batch) for batch in batches]
        assert set(shares) <= {2, 3, 4}, "every batch has the sources in proportion"

    @pytest.mark.parametrize("weights", [[1, 1], [8, 2], [1, 2, 7], [0.001, 1], [5, 1e-3, 5]])
    def test_weights_are_kept_to_in_every_prefix(self, weights):
        mixture = Mixture(self.orders(*[20 + 10 * number for number in range(len(weights))]), weights)
        ends = np.cumsum([20 + 10 * number for number in range(len(weights))])
        rows = [row for batch in visits(mixture, 8, 60) for _, row in batch]
        shares = np.array(weights) / sum(weights)
        for length in (8, 100, 480):
            counts = np.bincount(np.searchsorted(ends, rows[:length], "right"), minlength=len(weights))
            # Rounding restarts with each epoch; within one it is less than a row a source.
            epochs = 1 + length // (ends[-1] // 8 * 8)
            assert np.abs(counts - shares * length).max() <= epochs * len(weights)

    def test_a_weighted_source_goes_through_all_of_its_rows_again_and_again(self):
        batches = visits(Mixture(self.orders(5, 95), [1, 1]), 10, 40)
        small = [(epoch, row) for batch in batches for epoch, row in batch if row < 5]
        assert len(small) == 200 and len(set(small)) == 200, "40 rounds of 5"
        for turn in range(40):
            assert sorted(row for _, row in small[5 * turn : 5 * turn + 5]) == list(range(5))
        large = [row - 5 for batch in batches for _, row in batch if row >= 5]
        assert sorted(large[:95]) == list(range(95)) and sorted(large[95:190]) == list(range(95))

    def test_batches_do_not_depend_on_those_before(self):
        whole = visits(Mixture(self.orders(33, 50, buffer=16), [2, 1]), 8, 40)
        for step in (39, 0, 17, 5):
            assert Mixture(self.orders(33, 50, buffer=16), [2, 1]).batch(step, 8) == whole[step]
