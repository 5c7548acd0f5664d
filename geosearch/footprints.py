"""
Positions of a scene's windows on the Earth: their corners in longitude and latitude, and the order of a Hilbert curve.

Shapes: N windows; a pixel box is (left, top, width, height).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyproj
import shapely
from affine import Affine


WGS84 = "OGC:CRS84"  # longitude first
HILBERT_BITS = 31  # a side of the curve's grid has 2**31 cells, of 2 cm on the equator
Project = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def pixel_corners(pixel_boxes: np.ndarray, transform: Affine) -> np.ndarray:
    """
    Corners of windows in the coordinates of their scene.

    Args:
        pixel_boxes (`(N, 4)` integers): left, top, width, height.
        transform: of the scene, from (column, row) to its coordinates; rotated and south-up ones too.

    Returns:
        `(N, 4, 2)` float64: upper left, upper right, lower right and lower left corner of the picture as x, y.
    """
    left, top, width, height = np.asarray(pixel_boxes, dtype=np.float64).reshape(-1, 4).T
    columns = np.stack([left, left + width, left + width, left], axis=1)  # (N, 4)
    rows = np.stack([top, top, top + height, top + height], axis=1)
    x = transform.a * columns + transform.b * rows + transform.c
    y = transform.d * columns + transform.e * rows + transform.f
    return np.stack([x, y], axis=-1)


def to_lon_lat(crs: Any) -> Project:
    """
    Function that turns x, y of a coordinate reference system into longitude, latitude (degrees, WGS84),
    infinite where there is none.

    Raises:
        `ValueError`: for a system that has no way to WGS84.
    """
    try:
        transformer = pyproj.Transformer.from_crs(pyproj.CRS.from_user_input(crs), WGS84, always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise ValueError(f"its coordinate reference system cannot be turned into WGS84 ({error})") from error

    def project(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lon, lat = transformer.transform(x, y)
        beyond = np.abs(lat) > 90 + 1e-6  # degrees are passed on as they are
        return lon, np.where(beyond, np.inf, np.clip(lat, -90, 90))

    return project


def footprints(pixel_boxes: np.ndarray, transform: Affine, crs: Any) -> tuple[np.ndarray, np.ndarray]:
    """
    Outlines of windows and their middles.

    Args:
        pixel_boxes (`(N, 4)` integers): left, top, width, height.
        transform: of the scene.
        crs: whatever pyproj understands; None: outlines stay in the scene's own coordinates.

    Returns:
        `(N,)` array of shapely polygons through the four corners, counter-clockwise, in WGS84; cut in two at the 180th
        meridian, and reaching around the pole where the pole lies inside. And `(N, 2)` float64, the windows' middles as
        longitude and latitude.

    Raises:
        `ValueError`: where a corner has no longitude and latitude.
    """
    boxes = np.asarray(pixel_boxes, dtype=np.float64).reshape(-1, 4)
    corners = pixel_corners(boxes, transform)  # (N, 4, 2)
    middles = pixel_corners(boxes, transform).mean(axis=1)  # (N, 2)
    if crs is None:
        return shapely.orient_polygons(shapely.polygons(corners)), middles
    project = to_lon_lat(crs)
    lon, lat = project(corners[..., 0].ravel(), corners[..., 1].ravel())
    middle_lon, middle_lat = project(middles[:, 0], middles[:, 1])
    if not (np.isfinite(lon).all() and np.isfinite(lat).all() and np.isfinite(middle_lon).all()):
        raise ValueError("some of its pixels lie where its coordinate reference system has no longitude and latitude")
    rings = np.stack([lon, lat], axis=-1).reshape(corners.shape)  # (N, 4, 2)
    middles = np.stack([_wrap(middle_lon), middle_lat], axis=-1)
    # Longitudes go on past 180 where two corners lie on different sides of it.
    rings[..., 0] = middles[:, :1] + _wrap(rings[..., 0] - middles[:, :1])
    outlines = shapely.orient_polygons(shapely.polygons(rings))
    # A scene given in degrees has no pole inside a window, at most on its edge.
    poles = {} if pyproj.CRS.from_user_input(crs).is_geographic else _windows_around_poles(boxes, transform, crs)
    for index, pole in poles.items():
        outlines[index] = _around_pole(rings[index], pole)
    beyond = np.flatnonzero((np.abs(shapely.bounds(outlines)[:, [0, 2]]) > 180).any(axis=1))
    for index in beyond:
        outlines[index] = cut_at_180(outlines[index])
    return outlines, middles


def _wrap(lon: np.ndarray) -> np.ndarray:
    """Longitudes in [-180, 180); those within already stay to the bit."""
    return np.where((lon >= -180) & (lon <= 180), lon, (lon + 180) % 360 - 180)


def _windows_around_poles(boxes: np.ndarray, transform: Affine, crs: Any) -> dict[int, float]:
    """Latitude of the pole that lies inside a window, by the window's index."""
    back = pyproj.Transformer.from_crs(WGS84, pyproj.CRS.from_user_input(crs), always_xy=True)
    around = {}
    for latitude in (90.0, -90.0):
        x, y = back.transform(0.0, latitude)
        if not (np.isfinite(x) and np.isfinite(y)):
            continue
        # In cylindrical systems the pole is a line and different longitudes lead to different points.
        if not np.allclose(back.transform(90.0, latitude), (x, y), atol=1e-3):
            continue
        inverse = ~transform
        column, row = inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f
        left, top, width, height = boxes.T
        inside = (left < column) & (column < left + width) & (top < row) & (row < top + height)
        around |= {int(index): latitude for index in np.flatnonzero(inside)}
    return around


def _around_pole(ring: np.ndarray, pole: float) -> shapely.Polygon:
    """Everything between the corners (4, 2) and the pole that they surround."""
    lon = (ring[:, 0] + 180) % 360 - 180
    order = np.argsort(lon)
    points = np.stack([lon[order], ring[order, 1]], axis=-1)
    first, last = points[0], points[-1]
    share = (180 - last[0]) / max(first[0] + 360 - last[0], 1e-12)
    latitude = last[1] + share * (first[1] - last[1])  # where the outline crosses the 180th meridian
    line = [(-180.0, latitude), *points, (180.0, latitude), (180.0, pole), (-180.0, pole)]
    return shapely.orient_polygons(shapely.Polygon(line))


def cut_at_180(outline: shapely.Polygon) -> shapely.MultiPolygon | shapely.Polygon:
    """A polygon whose longitudes may go beyond 180 degrees, as parts that lie within."""
    if np.abs(shapely.bounds(outline)[[0, 2]]).max() <= 180:
        return outline
    parts = []
    for turn in (-360.0, 0.0, 360.0):
        strip = shapely.box(-180.0 - turn, -90.0, 180.0 - turn, 90.0)
        part = shapely.intersection(outline, strip)
        if part.area > 0:
            parts.append(shapely.transform(part, lambda points, turn=turn: points + [turn, 0.0]))
    union = shapely.union_all(parts)
    return shapely.orient_polygons(union)


def hilbert_order(points: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    """
    Place of points along a Hilbert curve through a box: points near each other on the curve are near each other.

    Args:
        points (`(N, 2)` float64).
        bounds: min x, min y, max x, max y of the box.

    Returns:
        `(N,)` uint64 distances along the curve.
    """
    side = 2**HILBERT_BITS
    low, high = np.array(bounds[:2]), np.array(bounds[2:])
    cells = np.clip((points - low) / np.maximum(high - low, 1e-300) * side, 0, side - 1).astype(np.int64)
    x, y = cells[:, 0].copy(), cells[:, 1].copy()
    distance = np.zeros(len(points), dtype=np.uint64)
    step = side // 2
    while step:
        right, up = (x & step) > 0, (y & step) > 0
        distance += np.uint64(step) * np.uint64(step) * ((3 * right) ^ up).astype(np.uint64)
        # The quarter's own curve is turned so that it meets its neighbours'.
        flip = ~up & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(~up, y, x), np.where(~up, x, y)
        step //= 2
    return distance
