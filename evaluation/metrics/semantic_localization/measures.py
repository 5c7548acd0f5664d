"""
Rsu, Ras, Rda and Rmi of semantic localization (Yuan et al., "Learning to Evaluate Performance of Multi-modal Semantic
Localization", 2022), equal to class `SLM` of `xiaoyuan1996/SemanticLocalizationMetrics`, `evaluations/SLM.py`.

Shapes: H, W pixels of the scene, R regions. It imports nothing of this project: `evaluate.load` copies it away.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np


Polygons = Sequence[Sequence[Sequence[float]]]  # regions x corners x (x, y) in pixels

# `SLM.__init__`; the weights of Rmi are equation (6) of the LRSCLIP paper as well
RSU_BETA, RSU_EPSILON = 0.707, 1e-7
RADIUS_FACTOR = 1.5  # of the mean distance of a region's corners from their middle
RAS_BETA = 3
RDA_ETA = 0.5
WEIGHT_RSU, WEIGHT_RAS, WEIGHT_RDA = 0.4, 0.35, 0.25

SMOOTHINGS, SMOOTHING_SIDE = 5, 50  # box filters over the map before its peaks are looked for, pixels
PEAK_SIDE = 1000  # a peak is the highest within a square of this side, pixels
PEAK_LEVEL = 128  # of 255: lower peaks are no attention (the published code: probability at least 0.5)


class Circle(NamedTuple):
    """The circle that stands for a region: whole pixels."""

    x: int
    y: int
    radius: int


def localization_metrics(probability_map: Any, regions: Polygons) -> dict[str, float]:
    """
    Agreement of a map of attention with the annotated regions of one query.

    Args:
        probability_map: (H, W) uint8 array or tensor, 255 the highest probability.
        regions: R polygons, each at least three corners (x, y) in pixels. Corners are cut to whole pixels; where
            polygons overlap an even number of times is outside, as in the published code. What lies beyond the edge
            is cut off.

    Returns:
        `dict`, each from 0 to 1: `Rsu`, share of the attention within the regions (higher is better); `Ras`, distance
        of the attention from their middles (lower is better); `Rda`, how concentrated it is there (higher is better);
        `Rmi`, 0.4 Rsu + 0.35 (1 - Ras) + 0.25 Rda.

    Raises:
        `ValueError`: for a map of another shape or dtype, no region, or a region that is no polygon, has no extent or
            lies outside the map.
    """
    prob = np.asarray(probability_map)
    if prob.ndim != 2 or prob.dtype != np.uint8 or not prob.size:
        raise ValueError(
            f"probability_map has shape {prob.shape} and dtype {prob.dtype}; wanted (H, W) of uint8, 255 the highest."
        )
    polygons = check_regions(regions, *prob.shape)
    circles = [region_circle(polygon) for polygon in polygons]
    attention_peaks = peaks(prob)
    rsu = _rsu(prob, region_mask(polygons, *prob.shape))
    ras, rda = _ras(circles, attention_peaks), _rda(circles, attention_peaks)
    return {"Rsu": rsu, "Ras": ras, "Rda": rda, "Rmi": WEIGHT_RSU * rsu + WEIGHT_RAS * (1 - ras) + WEIGHT_RDA * rda}


# -------------------------------------------------------------------------------------------------------------- regions


def check_regions(regions: Polygons, height: int, width: int) -> list[np.ndarray]:
    """
    Polygons as float64 arrays (corners, 2), if they can be measured on a scene of this size.

    Args:
        regions: polygons of corners (x, y) in pixels.
        height, width: of the scene in pixels.

    Returns:
        An array for each region.

    Raises:
        `ValueError`: as [`localization_metrics`].
    """
    polygons = []
    for index, region in enumerate(regions):
        try:
            polygon = np.array(region, dtype=np.float64)
        except (TypeError, ValueError):
            polygon = np.empty(0)
        if polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) < 3 or not np.isfinite(polygon).all():
            raise ValueError(f"region {index} must be at least three corners (x, y) in pixels, got {region!r:.80}.")
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        if low[0] >= width or low[1] >= height or high.min() < 0:
            raise ValueError(
                f"region {index} reaches from x {low[0]:.0f}, y {low[1]:.0f} to x {high[0]:.0f}, y {high[1]:.0f}; it "
                f"lies outside the scene of {width} x {height} pixels."
            )
        if region_circle(polygon).radius < 1:
            raise ValueError(f"region {index} has no extent: all its corners are at x {low[0]:g}, y {low[1]:g}.")
        polygons.append(polygon)
    if not polygons:
        raise ValueError("no region is given; wanted at least one polygon of corners (x, y) in pixels.")
    if not region_mask(polygons, height, width).any():
        raise ValueError(
            f"the regions ({len(polygons)}) cover no pixel of the scene of {width} x {height}; give some within it."
        )
    return polygons


def region_mask(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """
    (H, W) bool, True inside the regions, their outlines included. OpenCV 4.5, which the published code asks for, draws
    the regions of AIR-SLT pixel for pixel as 4.11 to 5.0 do; 4.10 differs along slanted edges, by 1e-5 of Rsu.

    Args:
        polygons: corners (x, y) in pixels.
        height, width: of the scene in pixels.

    Returns:
        (H, W) bool.
    """
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [polygon.astype(np.int32) for polygon in polygons], 1)
    return mask.view(bool)


def region_circle(polygon: np.ndarray) -> Circle:
    """Middle of the corners, and 1.5 times their mean distance from it."""
    x, y = (int(total / len(polygon)) for total in np.cumsum(polygon, axis=0)[-1])
    return Circle(x, y, int(np.linalg.norm(polygon - (x, y), axis=1).mean() * RADIUS_FACTOR))


# ---------------------------------------------------------------------------------------------------------------- peaks


def peaks(probability_map: np.ndarray) -> list[tuple[int, int]]:
    """
    Peaks of attention: (x, y) of the peaks of the smoothed map, the highest of the map itself first.

    Args:
        probability_map: (H, W) uint8.
    """
    smooth = probability_map
    for _ in range(SMOOTHINGS):
        smooth = cv2.boxFilter(smooth, ddepth=-1, ksize=(SMOOTHING_SIDE, SMOOTHING_SIDE))
    highest = _highest_around(_highest_around(smooth, axis=0), axis=1)
    tops = ((smooth == highest) & (smooth > 0)).view(np.uint8)  # (H, W)
    _, _, _, centres = cv2.connectedComponentsWithStats(tops, connectivity=8)
    points = [(int(x), int(y)) for x, y in centres[1:]]  # 0 is the background
    points = [(x, y) for x, y in points if probability_map[y, x] >= PEAK_LEVEL]
    return sorted(points, key=lambda point: probability_map[point[1], point[0]], reverse=True)


def _highest_around(values: np.ndarray, axis: int) -> np.ndarray:
    """
    Maximum over a window of 1000 pixels along an axis, 500 of them before the pixel: one axis of scipy's
    `maximum_filter(size=1000)`. Windows of double length are made of two, so ten steps do.
    """
    length, half = values.shape[axis], PEAK_SIDE // 2
    padding = [(0, 0), (0, 0)]
    padding[axis] = (half, half)
    running = np.moveaxis(np.pad(values, padding), axis, 0)
    reach = 1  # how many pixels each value of `running` is the highest of
    while 2 * reach <= PEAK_SIDE:
        running = np.maximum(running[:-reach], running[reach:])
        reach *= 2
    last = PEAK_SIDE - reach
    return np.moveaxis(np.maximum(running[:length], running[last : last + length]), 0, axis)


def _within(circle: Circle, points: Sequence[tuple[int, int]]) -> np.ndarray:
    """(n, 2) the peaks within a region's circle, from its middle."""
    offsets = np.array(points, dtype=np.float64).reshape(-1, 2) - (circle.x, circle.y)
    return offsets[np.linalg.norm(offsets, axis=1) <= circle.radius]


# ------------------------------------------------------------------------------------------------------------- measures


def _rsu(prob: np.ndarray, mask: np.ndarray) -> float:
    """Attention inside against outside, weighed by the areas; sums of whole numbers, so exact."""
    inside = int(prob.sum(where=mask, dtype=np.uint64)) / 255
    everywhere = int(prob.sum(dtype=np.uint64)) / 255
    area = int(np.count_nonzero(mask))
    ratio = inside / (everywhere - inside + RSU_EPSILON)
    return float(1 - np.exp(-RSU_BETA * ratio * (prob.size - area) / area))


def _ras(circles: Sequence[Circle], points: Sequence[tuple[int, int]]) -> float:
    """Mean distance of the peaks from a region's middle in radii (1 where none is within), exponentially scaled."""
    offsets = []
    for circle in circles:
        inside = _within(circle, points)  # (n, 2)
        offsets.append(np.linalg.norm(inside, axis=1).mean() / circle.radius if len(inside) else 1.0)
    return float(np.expm1(RAS_BETA * np.mean(offsets)) / np.expm1(RAS_BETA))


def _rda(circles: Sequence[Circle], points: Sequence[tuple[int, int]]) -> float:
    """1 where a region holds one peak, 0 where none; several count by how close together they are."""
    values = []
    for circle in circles:
        inside = _within(circle, points)  # (n, 2)
        if len(inside) < 2:
            values.append(float(len(inside)))
            continue
        spread = np.linalg.norm(inside - inside.mean(axis=0), axis=1).mean() / circle.radius
        values.append(0.5 * (1 - spread) + np.exp(-RDA_ETA * (len(inside) + 2)))
    return float(np.mean(values))
