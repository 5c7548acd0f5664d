"""Texts cut into groups of like length, at the fewest padded tokens, and identical ones told apart."""

import itertools

import numpy as np
import pytest
import torch

from training.text_groups import (
    as_they_come,
    group_by_length,
    group_cost,
    share_of_identical,
    text_hashes,
    token_lengths,
)


END = 99


def matrix(lengths, seed=0, padding=END):
    """Rows of random ids that end at `lengths`, padded."""
    rng = np.random.default_rng(seed)
    ids = torch.full((len(lengths), max(lengths)), padding)
    for row, length in zip(ids, lengths):
        row[: length - 1] = torch.from_numpy(rng.integers(0, 90, length - 1))
        row[length - 1] = END
    return ids


def restored(texts, matrices):
    """The rows in the order they came, each cut at its end of text."""
    rows = [row for group in texts.groups for row in group]
    rows = [rows[index] for index in texts.order.tolist()]
    lengths = torch.cat([token_lengths(ids, END) for ids in matrices]).tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("options", [{}, {"cost": 10}, {"cost": 10**6}, {"rows": 1}, {"rows": 4}, {"rows": 50}])
def test_nothing_is_lost(options):
    matrices = [matrix([9, 30, 12, 31, 30]), matrix([5, 2, 9, 9, 7], seed=1, padding=0)]
    texts = group_by_length(matrices, END, **options)
    expected = [row[:length] for ids in matrices for row, length in zip(ids, token_lengths(ids, END).tolist())]
    for row, other in zip(restored(texts, matrices), expected, strict=True):
        assert torch.equal(row, other)
    for group in texts.groups:
        assert group.shape[1] == token_lengths(group, END).max()
    sizes = [len(group) for group in texts.groups]
    if "rows" in options:
        assert set(sizes[:-1]) <= {options["rows"]} and sizes[-1] <= options["rows"] and sum(sizes) == 10
    if options == {}:
        assert [group.shape[1] for group in texts.groups] == [31, 30, 12, 9, 7, 5, 2], (
            "no padding where groups are free"
        )
    if options.get("cost") == 10**6:
        assert sizes == [10]


def test_cuts_are_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for cost in (0, 3, 15, 60):
        for _ in range(20):
            lengths = rng.integers(2, 40, 9).tolist()
            groups = group_by_length([matrix(lengths)], END, cost=cost).groups
            got = sum(group.numel() + cost for group in groups)
            ordered = sorted(lengths, reverse=True)
            best = min(
                sum((b - a) * ordered[a] + cost for a, b in itertools.pairwise((0, *cuts, 9)))
                for count in range(9)
                for cuts in itertools.combinations(range(1, 9), count)
            )
            assert got == best


def test_long_and_short_texts_share_a_group_where_lengths_meet():
    apart = group_by_length([matrix([40, 41]), matrix([5, 6])], END, cost=10)
    assert [tuple(group.shape) for group in apart.groups] == [(2, 41), (2, 6)]
    together = group_by_length([matrix([40, 12]), matrix([11, 12])], END, cost=10)
    assert [tuple(group.shape) for group in together.groups] == [(1, 40), (3, 12)]


def test_as_they_come():
    matrices = [matrix([4, 9]), matrix([3, 3])]
    texts = as_they_come(matrices)
    assert texts.groups == matrices and texts.order.tolist() == [0, 1, 2, 3]


def test_group_cost_falls_with_the_width():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert group_cost(cpu, 512) == 80 and group_cost(cpu, 1024) == 20 and group_cost(gpu, 512) > 80


def test_identical_captions():
    ids = matrix([4, 9, 4, 6])
    ids[2] = ids[0]
    numbers = text_hashes(ids, END)
    assert numbers[0] == numbers[2] and len(numbers.unique()) == 3
    padded = torch.nn.functional.pad(ids, (0, 5), value=7)
    assert torch.equal(text_hashes(padded, END), numbers), "padding is no part of a caption"
    assert share_of_identical(numbers) == 0.5
    assert share_of_identical(torch.tensor([3, 1, 2])) == 0 and share_of_identical(torch.tensor([1, 1])) == 1
    assert share_of_identical(torch.tensor([5])) == 0
