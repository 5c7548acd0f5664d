"""
Places in a scene that a text describes: a map of similarity in the scene's own coordinates, and the places on it.

Shapes: H, W cells of the map, N windows of the scene, D width of the shared space, S scales.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import rasterio
import shapely.affinity
import shapely.geometry
from affine import Affine
from rasterio.features import rasterize, shapes
from rasterio.shutil import copy as copy_raster

from .exact_search import SearchProblem
from .footprints import cut_at_180, to_lon_lat
from .hits import writing
from .index_store import Index, vectors_of


CELLS = 8  # of the map along the smallest window
MOST_CELLS = 16_000_000  # of a map; larger cells are taken for more
PLACE_LEVEL = 0.7  # share of the way from the map's median to its peak; what lies above is a place
FLAT = 1e-6  # a peak no higher than this above the level is rounding, and no place


@dataclass(frozen=True)
class SimilarityMap:
    """
    Similarity of each cell of a scene to a text.

    Attributes:
        values: `(H, W)` float32 cosine similarities; NaN where no window is.
        transform: from a cell's column and row to the scene's coordinates (to pixels, without any).
        crs: of the scene; None: pixels.
        scene: path.
    """

    values: np.ndarray
    transform: Affine
    crs: str | None
    scene: str

    @property
    def coordinates(self) -> str:
        """`wgs84` or `pixels`: of the places made from it."""
        return "wgs84" if self.crs else "pixels"

    @property
    def level(self) -> float:
        """Similarity that the cells of a place exceed: seven tenths of the way from the map's median to its peak."""
        middle, peak = float(np.nanmedian(self.values)), float(np.nanmax(self.values))
        return middle + PLACE_LEVEL * (peak - middle)


# ------------------------------------------------------------------------------------------------------------------ map


def scene_windows(index: Index, scene: str | None = None) -> tuple[str, pa.Table, np.ndarray]:
    """
    The windows of one scene of an index.

    Args:
        index: of [`~geosearch.index_store.open_index`].
        scene: path, or the end of one; None: the only scene of the index.

    Returns:
        The scene's path, its rows (`pixel_box`, `scale`), and their vectors, `(N, D)` float16.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for none or several such scenes.
    """
    known = sorted(index.metadata["sources"])
    fitting = [path for path in known if scene in (None, path)]
    if not fitting and scene is not None:
        fitting = [path for path in known if Path(path).as_posix().endswith(f"/{Path(scene).as_posix()}")]
    if len(fitting) != 1:
        shown = ", ".join((fitting or known)[:5]) + (", …" if len(fitting or known) > 5 else "")
        asked = f"{len(fitting) or 'no'} scenes are named {scene}" if scene else f"it has {len(known)} scenes"
        raise SearchProblem(f"{index.folder}: {asked}; choose one with --scene: {shown}.")
    rows = index.rows(["scene", "pixel_box", "scale"])
    numbers = np.flatnonzero(np.asarray(pa.compute.equal(rows["scene"], fitting[0])))
    if not len(numbers):
        raise SearchProblem(f"{fitting[0]} has no window in {index.folder}: all of it is nodata or unreadable.")
    return fitting[0], rows.take(numbers), index.vectors()[numbers]


def similarity_map(index: Index, query: np.ndarray, scene: str | None = None) -> SimilarityMap:
    """
    The map of a scene for a question. No image is encoded: it costs one product with the scene's vectors.

    A cell's value is the mean over scales of the weighted mean over the scale's windows that cover the cell's middle; a
    window weighs most in its own middle and nothing at its edge.

    Args:
        index: that has the scene.
        query (`(D,)`): unit vector of [`~geosearch.exact_search.question_vector`].
        scene: path, or the end of one; None: the only scene.

    Returns:
        The map, with where it lies.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for none or several such scenes.
    """
    path, rows, vectors = scene_windows(index, scene)
    facts = index.metadata["sources"][path]
    scores = vectors.astype(np.float32) @ np.asarray(query, dtype=np.float32)  # (N,)
    boxes, scales = vectors_of(rows["pixel_box"]), rows["scale"].to_numpy()
    values = mean_over_windows(facts["width"], facts["height"], boxes, scores, scales)
    cell = facts["width"] / values.shape[1], facts["height"] / values.shape[0]
    transform = Affine(*facts["transform"]) if facts["crs"] else Affine.identity()
    return SimilarityMap(values, transform @ Affine.scale(*cell), facts["crs"], path)


def mean_over_windows(
    width: int, height: int, boxes: np.ndarray, scores: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """
    Scores of windows as a map of the scene.

    Args:
        width, height: of the scene in pixels.
        boxes (`(N, 4)` integers): left, top, width, height of the windows in pixels.
        scores (`(N,)`): of the windows.
        scales (`(N,)`): which windows belong to one scale.

    Returns:
        `(H, W)` float32; NaN where no window is. Cells are as wide as an eighth of the smallest window, or wider.
    """
    side = max(1.0, boxes[:, 2:].min() / CELLS, math.sqrt(width * height / MOST_CELLS))
    shape = max(1, math.ceil(height / side)), max(1, math.ceil(width / side))
    x, y = (np.arange(shape[1]) + 0.5) * width / shape[1], (np.arange(shape[0]) + 0.5) * height / shape[0]
    total, count = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    for scale in np.unique(scales):
        chosen = scales == scale
        # A scale's windows are a grid, and a weight is that of its row times that of its column: two products do.
        columns, column_of = np.unique(boxes[chosen][:, [0, 2]], axis=0, return_inverse=True)
        lines, line_of = np.unique(boxes[chosen][:, [1, 3]], axis=0, return_inverse=True)
        grid = np.zeros((2, len(lines), len(columns)))  # scores, and whether there is a window
        grid[:, line_of, column_of] = scores[chosen], np.ones(len(line_of))
        weighted, weights = _tents(y, lines) @ grid @ _tents(x, columns).T  # (H, W) each
        covered = weights > 0
        total[covered] += weighted[covered] / weights[covered]
        count += covered
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _tents(middles: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Weights of cells (`(H,)` middles) in windows (`(R, 2)` starts and lengths): 1 in a window's middle, 0 from its ends on."""
    starts, lengths = spans.T
    return np.maximum(0, 1 - np.abs(2 * (middles[:, None] - starts) / lengths - 1))  # (H, R)


def write_map(heat: SimilarityMap, path: str | Path) -> Path:
    """
    Writes a map as a Cloud Optimized GeoTIFF in the scene's coordinate reference system and extent.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for a name that does not end in .tif, or a place that takes no file.
    """
    path = Path(path)
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise SearchProblem(f"{path} is to be a GeoTIFF: let its name end in .tif.")
    height, width = heat.values.shape
    profile = {"driver": "GTiff", "dtype": "float32", "count": 1, "width": width, "height": height, "nodata": math.nan}
    with writing(path) as growing, rasterio.MemoryFile() as memory:
        with memory.open(**profile, crs=heat.crs, transform=heat.transform) as dataset:
            dataset.write(heat.values, 1)
            dataset.set_band_description(1, "cosine similarity")
        with memory.open() as dataset:
            copy_raster(dataset, growing, driver="COG", compress="deflate", predictor="yes")
    return path


# --------------------------------------------------------------------------------------------------------------- places


def places_of(heat: SimilarityMap) -> pa.Table:
    """
    Connected parts of a map that stand out: cells above the map's level.

    Returns:
        Table, best first: `rank`, `similarity` (highest in the place), `mean_similarity`, `level` (what all its cells
        exceed), `cells`, `scene`, and `geometry`: WKB polygons in WGS84, or in pixels of a scene without coordinates.
        Empty for a map that is the same everywhere.
    """
    inside = np.nan_to_num(heat.values, nan=-np.inf) > heat.level
    parts = []
    if float(np.nanmax(heat.values)) - heat.level > FLAT:
        outlines = [shapely.geometry.shape(outline) for outline, _ in shapes(inside.view(np.uint8), mask=inside)]
        labels = rasterize(zip(outlines, range(1, len(outlines) + 1)), inside.shape, dtype=np.int32)
        for label, outline in enumerate(outlines, 1):
            cells = heat.values[labels == label]
            parts.append((float(cells.max()), float(cells.mean()), len(cells), _to_wgs84(outline, heat)))
    parts.sort(key=lambda part: -part[0])
    columns = {
        "rank": (range(1, len(parts) + 1), pa.int32()),
        "similarity": ([round(best, 6) for best, *_ in parts], pa.float64()),
        "mean_similarity": ([round(mean, 6) for _, mean, *_ in parts], pa.float64()),
        "level": ([round(heat.level, 6)] * len(parts), pa.float64()),
        "cells": ([cells for _, _, cells, _ in parts], pa.int32()),
        "scene": ([heat.scene] * len(parts), pa.string()),
        "geometry": ([shapely.to_wkb(outline) for *_, outline in parts], pa.binary()),
    }
    return pa.table({name: pa.array(values, kind) for name, (values, kind) in columns.items()})


def _to_wgs84(outline: shapely.Polygon, heat: SimilarityMap) -> shapely.Geometry:
    """A polygon in columns and rows of the map as longitudes and latitudes; in pixels for a scene without coordinates."""
    matrix = heat.transform
    placed = shapely.affinity.affine_transform(outline, [matrix.a, matrix.b, matrix.d, matrix.e, matrix.c, matrix.f])
    if heat.crs is None:
        return shapely.orient_polygons(placed)
    project = to_lon_lat(heat.crs)

    def lon_lat(points: np.ndarray) -> np.ndarray:
        lon, lat = project(points[:, 0], points[:, 1])
        return np.stack([lon[0] + (lon - lon[0] + 180) % 360 - 180, lat], axis=-1)  # goes on beyond 180

    return cut_at_180(shapely.orient_polygons(shapely.transform(placed, lon_lat)))


def place_middles(places: pa.Table) -> np.ndarray:
    """`(K, 2)`: a point inside each place, as longitude and latitude or as pixels."""
    points = shapely.point_on_surface(shapely.from_wkb(places["geometry"].to_pylist()))
    return shapely.get_coordinates(points)
