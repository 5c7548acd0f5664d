"""Vector files and where an image lies: GeoJSON, shapefiles, world files, GeoTIFF tags. Boxes only, no reprojection."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..recipe import LabelsConfig
from .anchors import Label
from .images import UNREADABLE


Bounds = tuple[float, float, float, float]  # min x, min y, max x, max y; in pixels, y swapped: 0, height, width, 0

_WORLD_FILES = {".png": ".pgw", ".jpg": ".jgw", ".jpeg": ".jgw", ".tif": ".tfw", ".tiff": ".tfw"}
_PIXEL_SCALE, _TIE_POINT = 33550, 33922  # GeoTIFF's tags ModelPixelScale and ModelTiepoint


@dataclass
class VectorFile:
    """Features of a vector file by the boxes around them."""

    names: list[str]
    boxes: np.ndarray  # (N, 4) min x, min y, max x, max y

    def within(self, bounds: Bounds) -> list[Label]:
        """Features whose box overlaps `bounds`, cut at its edges, as shares of its width and height, in file order."""
        x_min, x_max = bounds[0], bounds[2]
        y_min, y_max = min(bounds[1], bounds[3]), max(bounds[1], bounds[3])
        low_x, low_y, high_x, high_y = self.boxes.T
        inside = np.flatnonzero((low_x < x_max) & (high_x > x_min) & (low_y < y_max) & (high_y > y_min))
        # A point has no extent and belongs to the image whose lower or left edge it lies on.
        points = np.flatnonzero(
            (low_x == high_x)
            & (low_y == high_y)
            & (low_x >= x_min)
            & (low_x < x_max)
            & (low_y >= y_min)
            & (low_y < y_max)
        )
        labels = []
        for index in np.union1d(inside, points):
            x0, x1 = np.clip(self.boxes[index, [0, 2]], x_min, x_max)
            y0, y1 = np.clip(self.boxes[index, [1, 3]], y_min, y_max)
            left, right = ((x - x_min) / (x_max - x_min) for x in (x0, x1))
            if bounds[1] < bounds[3]:  # y upwards: the image's first line is the northern one
                top, bottom = (y_max - y1) / (y_max - y_min), (y_max - y0) / (y_max - y_min)
            else:
                top, bottom = (y0 - y_min) / (y_max - y_min), (y1 - y_min) / (y_max - y_min)
            labels.append(Label(self.names[index], (float(left), float(top), float(right), float(bottom))))
        return labels


class UnreadableVectors(ValueError):
    """A file that holds no vectors, or is damaged."""


def read_vectors(path: Path, config: LabelsConfig) -> VectorFile:
    """
    Labels and boxes of a GeoJSON file or a shapefile.

    Raises:
        [`UnreadableVectors`]: for a file that cannot be read.
        `ValueError`: for one whose features lack the label's property.
    """
    features = _geojson(path) if config.kind == "geojson" else _shapefile(path)
    names, boxes = [], []
    for number, (properties, box) in enumerate(features, start=1):
        if config.field is None or properties.get(config.field) is None:
            known = ", ".join(properties) or "none"
            raise ValueError(f"{path}, feature {number} has no property {config.field}; labels.field may be: {known}.")
        name = str(properties[config.field])
        if config.attribute and properties.get(config.attribute):
            name = f"{properties[config.attribute]} {name}"
        names.append(name)
        boxes.append(box)
    return VectorFile(names, np.array(boxes, dtype=float).reshape(-1, 4))


def image_bounds(image: Any) -> Bounds | None:
    """
    Where an image lies, from its GeoTIFF tags or the world file beside it, in their units; None without either.
    Rotated images are not supported and count as without.
    """
    if not isinstance(image, str | Path):
        return None
    path = Path(image)
    try:
        with Image.open(path) as opened:
            size, tags = opened.size, getattr(opened, "tag_v2", {})
    except UNREADABLE:
        return None
    if _PIXEL_SCALE in tags and _TIE_POINT in tags:
        (scale_x, scale_y), (column, row, _, x, y) = tags[_PIXEL_SCALE][:2], tags[_TIE_POINT][:5]
        left, top = x - column * scale_x, y + row * scale_y
        return left, top - size[1] * scale_y, left + size[0] * scale_x, top
    world = next((file for file in _world_files(path) if file.is_file()), None)
    if world is None:
        return None
    try:
        step_x, turn_y, turn_x, step_y, x, y = (float(line) for line in world.read_text().split()[:6])
    except ValueError as error:
        raise UnreadableVectors(f"{world} is not a world file of six numbers.") from error
    if turn_x or turn_y or step_x <= 0 or step_y >= 0:
        return None
    left, top = x - step_x / 2, y - step_y / 2  # the file tells the middle of the first pixel
    return left, top + size[1] * step_y, left + size[0] * step_x, top


def _world_files(path: Path) -> Iterator[Path]:
    yield path.with_suffix(_WORLD_FILES.get(path.suffix.lower(), ".wld"))
    yield path.with_suffix(".wld")


def _geojson(path: Path) -> Iterator[tuple[dict[str, Any], Bounds]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        features = document["features"] if document.get("type") == "FeatureCollection" else [document]
        for feature in features:
            points = np.array(list(_points(feature["geometry"])))  # (points, 2)
            if len(points):
                yield feature.get("properties") or {}, (*points.min(axis=0), *points.max(axis=0))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UnreadableVectors(f"{path} is not a GeoJSON file of features: {error!r}") from error


def _points(geometry: dict[str, Any] | None) -> Iterator[tuple[float, float]]:
    if geometry is None:
        return
    if geometry["type"] == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _points(part)
        return
    stack = [geometry["coordinates"]]
    while stack:
        value = stack.pop()
        if value and isinstance(value[0], int | float):
            yield float(value[0]), float(value[1])
        else:
            stack.extend(value)


def _shapefile(path: Path) -> Iterator[tuple[dict[str, Any], Bounds]]:
    import shapefile  # pyshp

    try:
        with shapefile.Reader(str(path)) as reader:
            for item in reader.iterShapeRecords():
                if item.shape.shapeType == shapefile.NULL:
                    continue
                box = getattr(item.shape, "bbox", None)
                if box is None:  # a point
                    (x, y), *_ = item.shape.points
                    box = (x, y, x, y)
                yield item.record.as_dict(), tuple(box)
    except (shapefile.ShapefileException, OSError, UnicodeDecodeError) as error:
        raise UnreadableVectors(f"{path} is not a readable shapefile: {error}") from error
