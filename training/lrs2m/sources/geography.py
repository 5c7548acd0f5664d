"""Vector files and where an image lies on the ground, by way of pyogrio and rasterio; features as the boxes around them."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.warp
import shapely
from rasterio.crs import CRS

from ..recipe import LabelsConfig
from .anchors import Label


Bounds = tuple[float, float, float, float]  # min x, min y, max x, max y; in pixels, y swapped: 0, height, width, 0

_DRIVERS = ["GTiff", "PNG", "JPEG", "WEBP", "BMP", "GIF", "JP2OpenJPEG"]  # no format that names other files


@dataclass
class VectorFile:
    """Features of a vector file: names, shapes and the reference system of their coordinates."""

    names: list[str]
    shapes: np.ndarray  # (N,) shapely geometries
    crs: CRS | None  # None: unknown, taken to be that of the images
    _boxes: dict[Any, np.ndarray] = field(default_factory=dict)  # by reference system

    def _boxes_in(self, crs: CRS | None) -> np.ndarray:
        """(N, 4) min x, min y, max x, max y of the features in a reference system."""
        target = None if None in (crs, self.crs) or crs == self.crs else crs
        if target not in self._boxes:
            shapes = self.shapes
            if target is not None:
                shapes = shapely.transform(
                    shapes, lambda points: np.array(rasterio.warp.transform(self.crs, target, *points.T)).T
                )
            self._boxes[target] = shapely.bounds(shapes).reshape(-1, 4)
        return self._boxes[target]

    def within(self, bounds: Bounds, crs: CRS | None = None) -> list[Label]:
        """
        Features whose box overlaps `bounds`, cut at its edges, as shares of its width and height, in file order.

        Args:
            bounds: min x, min y, max x, max y; y swapped where it points down.
            crs: of the bounds; None: in the file's own units.
        """
        boxes = self._boxes_in(crs)  # (N, 4)
        x_min, x_max = bounds[0], bounds[2]
        y_min, y_max = min(bounds[1], bounds[3]), max(bounds[1], bounds[3])
        low_x, low_y, high_x, high_y = boxes.T
        inside = (low_x < x_max) & (high_x > x_min) & (low_y < y_max) & (high_y > y_min)
        # A point has no extent and belongs to the image whose lower or left edge it lies on.
        points = (low_x == high_x) & (low_y == high_y)
        points &= (low_x >= x_min) & (low_x < x_max) & (low_y >= y_min) & (low_y < y_max)
        labels = []
        for index in np.flatnonzero(inside | points):
            x0, x1 = np.clip(boxes[index, [0, 2]], x_min, x_max)
            y0, y1 = np.clip(boxes[index, [1, 3]], y_min, y_max)
            left, right = ((x - x_min) / (x_max - x_min) for x in (x0, x1))
            upwards = bounds[1] < bounds[3]  # the image's first line is the northern one
            top, bottom = (
                y / (y_max - y_min) for y in ((y_max - y1, y_max - y0) if upwards else (y0 - y_min, y1 - y_min))
            )
            labels.append(Label(self.names[index], (float(left), float(top), float(right), float(bottom))))
        return labels


class UnreadableVectors(ValueError):
    """A file that holds no vectors, or is damaged."""


def read_vectors(path: Path, config: LabelsConfig) -> VectorFile:
    """
    Names and shapes of a vector file that GDAL reads: GeoJSON, a shapefile.

    Raises:
        [`UnreadableVectors`]: for a file that cannot be read.
        `ValueError`: for one whose features lack the label's property.
    """
    import pyogrio  # a second where geopandas is installed, which --help does without

    bad_file, bad_shape = pyogrio.errors.DataSourceError, pyogrio.errors.GeometryError
    try:
        meta, _, stored, columns = pyogrio.raw.read(path)
        shapes = shapely.force_2d(shapely.from_wkb(stored))
    except (bad_file, bad_shape, shapely.GEOSException, RuntimeError, UnicodeDecodeError) as error:
        raise UnreadableVectors(f"{path} cannot be read as {config.kind}: {error}") from error
    properties = dict(zip(meta["fields"], columns, strict=True))
    labels, attributes = (_words(properties.get(name), len(shapes)) for name in (config.field, config.attribute))
    names, kept = [], []
    for index, (label, attribute, shape) in enumerate(zip(labels, attributes, shapes, strict=True)):
        if shape is None or shape.is_empty:
            continue
        if not label:
            known = ", ".join(properties) or "none"
            raise ValueError(
                f"{path}, feature {index + 1} has no property {config.field}; labels.field may be: {known}."
            )
        names.append(f"{attribute} {label}" if attribute else label)
        kept.append(index)
    shapes = shapes[kept]
    return VectorFile(names, shapes, _reference(meta["crs"], shapes))


def _words(column: np.ndarray | None, count: int) -> list[str]:
    """A property of each feature as text, empty where it has none; whole numbers beside gaps come as floats."""
    if column is None:
        return [""] * count
    values = column.tolist()
    return [
        "" if v is None or v != v else str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values
    ]


def _reference(text: str | None, shapes: np.ndarray) -> CRS | None:
    """The reference system of shapes. GeoJSON without one means degrees; where the numbers are none, it is unknown."""
    crs = CRS.from_user_input(text) if text else None
    if crs is None or not crs.is_geographic or not len(shapes):
        return crs
    west, south, east, north = shapely.total_bounds(shapes)
    return crs if west >= -360 and east <= 360 and south >= -90 and north <= 90 else None


def image_bounds(image: Any) -> tuple[Bounds, CRS | None] | None:
    """
    Extent of an image and its reference system, from its GeoTIFF tags or the world file beside it, which names none;
    None without either. Rotated images are not supported and count as without.
    """
    if not isinstance(image, str | Path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.Env(), rasterio.io.DatasetReader(str(image), driver=_DRIVERS) as raster:
                step, bounds, crs = raster.transform, tuple(raster.bounds), raster.crs
    except rasterio.errors.RasterioIOError:
        return None
    if step.is_identity or step.b or step.d or step.a <= 0 or step.e >= 0:
        return None
    return bounds, crs
