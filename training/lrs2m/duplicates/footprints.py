"""Footprints of evaluation images: a row whose ground overlaps one has been seen by the evaluation, whatever its date."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyogrio
import shapely

from ..data_row import Record
from .finder import Match


METRES_A_DEGREE = 111_320.0  # of latitude, about


class Footprints:
    """
    The ground of evaluation images.

    Args:
        files: vector files (GeoJSON, GeoPackage, shapefile) of their outlines in WGS 84, longitude first.

    Raises:
        `ValueError`: for a file that cannot be read or has another coordinate system.
    """

    def __init__(self, files: Sequence[Path]):
        outlines, self._names = [], []
        for file in files:
            try:
                information, _, geometries, _ = pyogrio.raw.read(file, columns=[])
            except (OSError, ValueError, pyogrio.errors.DataSourceError) as error:
                raise ValueError(f"{file} cannot be read as outlines of evaluation images ({error}).") from error
            system = information["crs"]
            if system is not None and not system.endswith(("4326", "CRS84")):
                raise ValueError(f"{file} is in {system}; write its outlines in WGS 84 (EPSG:4326).")
            outlines += list(shapely.from_wkb(geometries))
            self._names += [f"{file.name}:{index}" for index in range(len(geometries))]
        self._tree = shapely.STRtree(outlines)

    def check(self, record: Record, size: tuple[int, int]) -> Match | None:
        """The match for which a record is left out whose image has `size` pixels; None where there is none."""
        name = self.overlapped(record.longitude, record.latitude, record.gsd, size)
        return name and Match(record.id, name, name.rpartition(":")[0], "same ground", "", 0, 0.0)

    def overlapped(
        self, longitude: float | None, latitude: float | None, gsd: float | None, size: tuple[int, int]
    ) -> str | None:
        """
        Tell which evaluation image shows some of the same ground.

        Args:
            longitude, latitude: degrees, of an image's centre; None where unknown.
            gsd: metres a pixel; None: only the centre counts.
            size: pixels, width and height.

        Returns:
            The file and the number of the first outline there that overlaps the image's, north up; else None.
        """
        if longitude is None or latitude is None:
            return None
        high = (gsd or 0.0) * size[1] / 2 / METRES_A_DEGREE
        wide = (gsd or 0.0) * size[0] / 2 / METRES_A_DEGREE / max(np.cos(np.radians(latitude)), 1e-3)
        ground = shapely.Point(longitude, latitude)
        if gsd:
            ground = shapely.box(longitude - wide, latitude - high, longitude + wide, latitude + high)
        hits = self._tree.query(ground, predicate="intersects")
        return self._names[hits.min()] if len(hits) else None
