"""Grids of windows: every pixel covered, nothing outside, and blocks that are a partition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geosearch import windows
from geosearch.windows import WindowSize, block_of, scene_grids, window_starts


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1))
def test_starts_cover_every_pixel_and_stay_inside(length, side, stride):
    side = min(side, length)
    starts = window_starts(length, side, max(1, round(side * stride)))
    covered = np.zeros(length, dtype=int)
    for start in starts:
        covered[start : start + side] += 1
    assert covered.min() >= 1 and starts[0] == 0 and starts[-1] == length - side
    assert (np.diff(starts) > 0).all() and (len(starts) < 2 or np.diff(starts).max() <= max(1, round(side * stride)))


@settings(deadline=None)
@given(st.integers(4, 900), st.integers(4, 900), st.sampled_from([(16,), (64, 32), (300, 700)]), st.floats(0.2, 1))
def test_blocks_are_a_partition_of_all_windows(width, height, sizes, stride):
    grids = scene_grids(width, height, [WindowSize(size) for size in sizes], stride)
    covered, seen = np.zeros((height, width), dtype=bool), set()
    for number in range(sum(grid.blocks for grid in grids)):
        grid, boxes = block_of(grids, number)
        assert boxes.shape[0] * boxes.shape[1] <= windows.BLOCK_WINDOWS and boxes.shape[1] <= windows.BLOCK_COLUMNS
        assert (boxes[:, 1:, 1] == boxes[:, :1, 1]).all()  # a line has one top
        for left, top, w, h in boxes.reshape(-1, 4).tolist():
            assert (left, top, w, h) not in seen
            assert left >= 0 and top >= 0 and left + w <= width and top + h <= height and w == h
            seen.add((left, top, w, h))
            covered[top : top + h, left : left + w] = True
    assert covered.all() and len(seen) == sum(map(len, grids))
    with pytest.raises(IndexError):
        block_of(grids, sum(grid.blocks for grid in grids))


def test_windows_stand_half_a_window_apart():
    (grid,) = scene_grids(250, 100, [WindowSize(100)])
    assert grid.lefts.tolist() == [0, 50, 100, 150] and grid.tops.tolist() == [0] and grid.scale == 100


def test_windows_in_metres_are_square_on_the_ground():
    (grid,) = scene_grids(1000, 1000, [WindowSize.parse("500m")], pixel_size=(5.0, 10.0))
    assert (grid.width, grid.height) == (100, 50) and grid.scale == pytest.approx(5000**0.5)


def test_a_scene_smaller_than_its_windows_has_the_largest_of_their_form():
    (grid,) = scene_grids(100, 30, [WindowSize(224), WindowSize(448)])
    assert (grid.width, grid.height, grid.scale) == (30, 30, 224) and grid.lefts.tolist() == [0, 15, 30, 45, 60, 70]


def test_lines_of_large_windows_stay_affordable():
    (grid,) = scene_grids(100_000, 100_000, [WindowSize(2000)])
    lines, columns = grid.block_shape
    assert (2000 + (columns - 1) * 1000) * 2000 <= windows.STRIP_PIXELS and lines * columns <= windows.BLOCK_WINDOWS


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((3, 100, [WindowSize(64)]), "3 x 100 pixels, and the short side needs 4"),
        ((100, 100, [WindowSize.parse("50m")]), "it has no coordinates"),
        ((100, 100, [WindowSize.parse("5m")], 0.5, (10.0, 10.0)), "windows of 5m would have 0 x 0 pixels"),
        ((2**31 - 1, 2**31 - 1, [WindowSize(64)]), "would make 4,503,599,"),
        ((100, 100, [WindowSize(64)], 0), "stride 0"),
    ],
)
def test_what_cannot_be_cut_is_said_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        scene_grids(*arguments)


@pytest.mark.parametrize("text", ["", "0", "-5", "3", "12.5", "0m", "nanm", "infm", "abc", "224px"])
def test_window_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="window"):
        WindowSize.parse(text)
    assert (str(WindowSize.parse("224")), str(WindowSize.parse(" 500m"))) == ("224", "500m")
