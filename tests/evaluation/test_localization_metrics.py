"""Rsu, Ras, Rda and Rmi by hand, against a slow reference, and against figures of the published class."""

import math

import cv2
import numpy as np
import pytest
import torch

from evaluation.localization import localization_metrics
from evaluation.metrics.semantic_localization.measures import _highest_around, check_regions, peaks, region_circle


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def heat(height, width, *spots):
    """A map that is 255 in each box (left, top, right, bottom; its last pixels included) and 0 elsewhere."""
    values = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in spots:
        values[top : bottom + 1, left : right + 1] = 255
    return values


# ------------------------------------------------------------------------------------------------------------- by hand


def test_attention_in_the_region_and_nowhere_else():
    result = localization_metrics(heat(400, 500, (200, 150, 300, 250)), [box(200, 150, 300, 250)])
    assert result["Rsu"] == pytest.approx(1) and result["Rda"] == 1
    assert result["Ras"] < 0.01  # the smoothing moves the peak by a pixel or two
    assert result["Rmi"] == pytest.approx(0.4 * result["Rsu"] + 0.35 * (1 - result["Ras"]) + 0.25)


def test_even_attention_gets_the_share_of_the_area():
    result = localization_metrics(np.full((300, 400), 200, np.uint8), [box(10, 20, 110, 90)])
    assert result["Rsu"] == pytest.approx(1 - math.exp(-0.707))
    # The whole map is one peak; its middle (199, 149) lies outside the circle of the region.
    assert (result["Ras"], result["Rda"]) == (1, 0)


def test_no_attention_at_all():
    result = localization_metrics(np.zeros((300, 400), np.uint8), [box(10, 20, 110, 90)])
    assert result == {"Rsu": 0, "Ras": 1, "Rda": 0, "Rmi": 0}


def test_two_peaks_in_one_region():
    result = localization_metrics(
        heat(300, 1700, (240, 100, 360, 220), (1240, 100, 1360, 220)), [box(0, 0, 1700, 300)]
    )
    points = peaks(heat(300, 1700, (240, 100, 360, 220), (1240, 100, 1360, 220)))
    assert len(points) == 2 and abs(points[0][0] - points[1][0]) == 1000
    radius = int(1.5 * math.hypot(850, 150))
    offsets = [math.dist((850, 150), point) / radius for point in points]
    scaled = (math.exp(3 * sum(offsets) / 2) - 1) / (math.exp(3) - 1)
    assert result["Ras"] == pytest.approx(scaled)
    assert result["Rda"] == pytest.approx(0.5 * (1 - 500 / radius) + math.exp(-0.5 * 4))


def test_a_region_without_a_peak_counts_as_missed():
    alone = localization_metrics(heat(300, 1700, (240, 100, 360, 220)), [box(200, 60, 400, 260)])
    result = localization_metrics(
        heat(300, 1700, (240, 100, 360, 220)), [box(200, 60, 400, 260), box(1200, 60, 1400, 260)]
    )
    assert (alone["Rda"], result["Rda"]) == (1, 0.5)
    offset = math.log1p(alone["Ras"] * math.expm1(3)) / 3
    assert result["Ras"] == pytest.approx(math.expm1(3 * (offset + 1) / 2) / math.expm1(3))


def test_weak_peaks_are_no_attention():
    values = heat(300, 400, (150, 100, 250, 200))
    assert peaks(np.where(values > 0, 128, 0).astype(np.uint8)) and not peaks(
        np.where(values > 0, 127, 0).astype(np.uint8)
    )


def test_a_spot_that_smoothing_leaves_at_one_is_a_peak_and_what_it_leaves_at_nothing_is_none():
    assert peaks(heat(400, 400, (198, 198, 202, 202))) == [(202, 202)]
    frame = heat(1700, 1700, (800, 800, 899, 899))  # beyond 500 pixels the map is 0, and its middle is the spot's
    assert len(peaks(frame)) == 1


def test_the_smallest_region():
    values = heat(300, 400, (100, 100, 110, 110))
    assert region_circle(np.array([(100, 100), (102, 100), (101, 101)])).radius == 1
    assert localization_metrics(values, [[(100, 100), (102, 100), (101, 101)]])["Rsu"] > 0
    with pytest.raises(ValueError, match="region 0 has no extent"):
        localization_metrics(values, [[(100, 100), (100, 100), (100, 100)]])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_peak_is_the_highest_from_500_pixels_before_to_499_after(axis):
    values = np.zeros((1, 1300) if axis else (1300, 1), np.uint8)
    values.reshape(-1)[600] = 7
    highest = _highest_around(values, axis)
    assert highest.shape == values.shape
    assert np.flatnonzero(highest == 7).tolist() == list(range(600 - 499, 600 + 500 + 1))


# ------------------------------------------------------------------------------------------------------ slow reference


def slow_peaks(values):
    """Smoothing, maximum and connected areas written out; even sides reach one pixel further to the left and up."""
    height, width = values.shape
    smooth = values.astype(np.float64)
    for _ in range(5):
        rows = np.pad(smooth, ((25, 25), (25, 25)), mode="reflect")
        sums = np.cumsum(np.cumsum(np.pad(rows, ((1, 0), (1, 0))), axis=0), axis=1)
        smooth = sums[50:, 50:] - sums[:-50, 50:] - sums[50:, :-50] + sums[:-50, :-50]
        smooth = np.rint(smooth[:height, :width] / 2500)
    tops = np.zeros((height, width), bool)
    for row in range(height):
        for column in np.flatnonzero(smooth[row]):
            around = smooth[max(row - 500, 0) : row + 500, max(column - 500, 0) : column + 500]
            tops[row, column] = smooth[row, column] == around.max()
    points = []
    while tops.any():
        row, column = np.argwhere(tops)[0]
        area, edge = [], [(row, column)]
        tops[row, column] = False
        while edge:
            row, column = edge.pop()
            area.append((row, column))
            for other in np.argwhere(tops[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]):
                pixel = (max(row - 1, 0) + other[0], max(column - 1, 0) + other[1])
                tops[pixel] = False
                edge.append(pixel)
        y, x = (int(sum(places) / len(area)) for places in zip(*area, strict=True))
        if values[y, x] / 255 >= 0.5:
            points.append((x, y))
    return points


def slow_metrics(values, regions):
    mask = np.zeros(values.shape)
    cv2.fillPoly(mask, [np.array(region, np.int32) for region in regions], 1)
    prob = values / 255
    inside, area = (prob * mask).sum(), mask.sum()
    rsu = 1 - math.exp(-0.707 * inside / (prob.sum() - inside + 1e-7) * (mask.size - area) / area)
    points, offsets, focus = slow_peaks(values), [], []
    for region in regions:
        middle = [int(sum(corner[axis] for corner in region) / len(region)) for axis in (0, 1)]
        radius = int(1.5 * sum(math.dist(corner, middle) for corner in region) / len(region))
        inside = [point for point in points if math.dist(point, middle) <= radius]
        distances = [math.dist(point, middle) for point in inside]
        offsets.append(sum(distances) / len(inside) / radius if inside else 1)
        if len(inside) < 2:
            focus.append(len(inside))
        else:
            centre = [sum(point[axis] for point in inside) / len(inside) for axis in (0, 1)]
            spread = sum(math.dist(point, centre) for point in inside) / len(inside) / radius
            focus.append(0.5 * (1 - spread) + math.exp(-0.5 * (len(inside) + 2)))
    ras = (math.exp(3 * sum(offsets) / len(offsets)) - 1) / (math.exp(3) - 1)
    rda = sum(focus) / len(focus)
    return {"Rsu": rsu, "Ras": ras, "Rda": rda, "Rmi": 0.4 * rsu + 0.35 * (1 - ras) + 0.25 * rda}


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    height, width = (60, 620) if seed % 2 else (560, 70)
    cells = rng.integers(0, 256, (height // 60 + 1, width // 60 + 1), dtype=np.uint8)
    values = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST if seed < 2 else cv2.INTER_LINEAR)
    regions = []
    for _ in range(3):
        around = rng.uniform(0, 1, 2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        regions.append((around + rng.uniform(20, 200) * np.stack([np.cos(angles), np.sin(angles)], axis=1)).tolist())
    (x, y), reach = slow_peaks(values)[0], 40
    regions.append(box(x - reach, y - reach, x + reach, y + 2 * reach))
    result, expected = localization_metrics(values, regions), slow_metrics(values, regions)
    assert result == pytest.approx(expected, abs=1e-9)
    assert result["Rda"] > 0  # something was found


# -------------------------------------------------------------------------------------------- the published class itself

PUBLISHED_REGIONS = {
    "one": [[[200.5, 150.2], [900.7, 180.9], [850.1, 700.4], [220.3, 650.8]]],
    "two": [[[100, 100], [500, 120], [480, 500], [90, 450]], [[900, 600], [1300, 620], [1250, 900]]],
    "overlapping": [box(0, 0, 700, 500), box(300, 200, 1200, 800), box(-50, 850, 400, 1100)],
}


def published_map(number):
    """A fixed map of 1000 x 1400 pixels: two hills, blocks, or waves. Whole numbers only: the same everywhere."""
    y, x = np.mgrid[0:1000, 0:1400]
    if number == 0:
        first, second = (x - 480) ** 2 + (y - 390) ** 2, (x - 1150) ** 2 + (y - 700) ** 2
        values = np.maximum(np.maximum(255 - first // 700, 210 - second // 150), 0)
    elif number == 1:
        values = (7 * (x // 128) + 11 * (y // 128)) % 13 * 255 // 12
    else:
        values = np.abs(x % 660 - 330) * np.abs(y % 540 - 270) * 255 // (330 * 270)
    return values.astype(np.uint8)


@pytest.mark.parametrize(
    "number, name, rsu, ras, rda, rmi",
    [
        (0, "one", 0.991354696, 0.019457128, 1.000000000, 0.989731884),
        (0, "two", 0.916047129, 0.468740662, 0.500000000, 0.677359620),
        (0, "overlapping", 0.617811512, 0.222306495, 0.666666667, 0.685983998),
        (1, "one", 0.522437062, 0.185691619, 0.341645783, 0.579394204),
        (1, "two", 0.505668448, 0.277323917, 0.500000000, 0.580204008),
        (1, "overlapping", 0.470538162, 0.175077086, 0.554569186, 0.615580581),
        (2, "one", 0.513408947, 0.278182683, 0.269324154, 0.525330678),
        (2, "two", 0.281151469, 0.583527851, 1.000000000, 0.508225840),
        (2, "overlapping", 0.463720323, 0.482335474, 0.142527424, 0.402302569),
    ],
)
def test_equal_to_the_published_class(number, name, rsu, ras, rda, rmi):
    """Figures that `SLM.evaluate` gives (`xiaoyuan1996/SemanticLocalizationMetrics`, `evaluations/SLM.py`)."""
    result = localization_metrics(published_map(number), PUBLISHED_REGIONS[name])
    assert list(result.values()) == pytest.approx([rsu, ras, rda, rmi], abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_tensors_are_taken():
    values = heat(300, 400, (150, 100, 250, 200))
    assert localization_metrics(torch.from_numpy(values), [box(1, 2, 90, 80)]) == localization_metrics(
        values, [box(1, 2, 90, 80)]
    )


GOOD = np.ones((100, 200), np.uint8)


@pytest.mark.parametrize(
    "values, regions, problem",
    [
        (GOOD / 255, [box(1, 1, 50, 50)], r"shape \(100, 200\) and dtype float64; wanted \(H, W\) of uint8"),
        (GOOD[None], [box(1, 1, 50, 50)], r"shape \(1, 100, 200\)"),
        (GOOD, [], "no region is given"),
        (GOOD, [[[1, 1], [50, 50]]], "region 0 must be at least three corners"),
        (GOOD, [box(1, 1, 50, 50), [[1, 1, 1]] * 3], "region 1 must be at least three corners"),
        (GOOD, [[[1, 1], [math.nan, 5], [7, 8]]], "region 0 must be"),
        (GOOD, ["abc"], "region 0 must be .* got 'abc'"),
        (
            GOOD,
            [box(200, 10, 300, 50)],
            "from x 200, y 10 to x 300, y 50; it lies outside the scene of 200 x 100 pixels",
        ),
        (GOOD, [box(-50, -40, -1, -1)], "lies outside the scene"),
        (GOOD, [[[-10, 5], [5, -10], [-10, -10]]], r"the regions \(1\) cover no pixel of the scene of 200 x 100"),
        (GOOD, [[[5, 5]] * 4], "region 0 has no extent: all its corners are at x 5, y 5"),
    ],
)
def test_bad_input_is_one_clear_sentence(values, regions, problem):
    with pytest.raises(ValueError, match=problem):
        localization_metrics(values, regions)


def test_a_region_over_the_edge_is_cut_off():
    (polygon,) = check_regions([box(-50, 20, 50, 300)], 100, 200)
    assert polygon.tolist() == box(-50, 20, 50, 300)
    assert localization_metrics(heat(100, 200, (0, 20, 50, 99)), [polygon.tolist()])["Rsu"] == pytest.approx(1)
