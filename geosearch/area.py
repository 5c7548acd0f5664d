"""Part of an index that a search is limited to: by longitude and latitude, and by time."""

import datetime
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyproj
import shapely

from .index_store import Index


EARTH = pyproj.Geod(ellps="WGS84")
DEGREE_KM = 110.0  # fewer kilometres than any degree of latitude has


class SearchProblem(ValueError):
    """A question that cannot be answered, and why."""


@dataclass(frozen=True)
class Area:
    """Windows that may be found, by area and time. The defaults leave none out."""

    bbox: tuple[float, float, float, float] | None = None  # west, south, east, north in degrees; w > e: across 180
    near: tuple[float, float, float] | None = None  # longitude, latitude in degrees, kilometres to a window's middle
    after: datetime.datetime | None = None  # acquired then or later; without a time zone: UTC
    before: datetime.datetime | None = None  # acquired earlier

    def __post_init__(self):
        if self.bbox is not None:
            west, south, east, north = self.bbox
            if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90) or west == east:
                raise SearchProblem(
                    f"bbox {self.bbox} is no area: give west,south,east,north in degrees, longitudes from -180 to 180, "
                    f"south below north; west greater than east reaches across the 180th meridian."
                )
        if self.near is not None:
            lon, lat, km = self.near
            if not (-180 <= lon <= 180 and -90 <= lat <= 90 and 0 < km < math.inf):
                circle = "longitude,latitude in degrees and kilometres above 0"
                raise SearchProblem(f"near {self.near} is no circle: give {circle}.")
        if self.after is not None and self.before is not None and _utc(self.after) >= _utc(self.before):
            raise SearchProblem(f"no time is after {self.after} and before {self.before}: exchange them.")

    def rows(self, index: Index) -> np.ndarray | None:
        """
        Row numbers of the windows of an index in the area and time.

        Returns:
            `(N,)` bool; None: all.

        Raises:
            [`SearchProblem`]: where none does, or places are asked for and the index knows pixels only.
        """
        if self == Area():
            return None
        if (self.bbox or self.near) and index.metadata["coordinates"] != "wgs84":
            raise SearchProblem(f"{index.folder} knows pixels only, no longitudes: leave out bbox and near.")
        kept = np.ones(len(index), dtype=bool)
        if self.bbox is not None:
            kept &= self._in_bbox(index)
        if self.near is not None:
            kept &= self._near(index)
        if self.after is not None or self.before is not None:
            kept &= self._in_time(index)
        if not kept.any():
            raise SearchProblem(f"no window of {index.folder} lies within {self._words()}.")
        return kept

    def _in_bbox(self, index: Index) -> np.ndarray:
        west, south, east, north = self.bbox
        sides = index.rows(["bbox"])["bbox"].combine_chunks()
        x0, y0, x1, y1 = (sides.field(side).to_numpy() for side in ("xmin", "ymin", "xmax", "ymax"))
        strips = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
        kept = np.zeros(len(index), dtype=bool)
        for low, high in strips:
            kept |= (x0 <= high) & (x1 >= low) & (y0 <= north) & (y1 >= south)
        # Windows cut in two at the 180th meridian: their box goes around the Earth.
        wide = np.flatnonzero(kept & (x1 - x0 > 180))
        if len(wide):
            outlines = shapely.from_wkb(index.rows(["geometry"])["geometry"].take(wide).to_pylist())
            area = shapely.union_all([shapely.box(low, south, high, north) for low, high in strips])
            kept[wide] = shapely.intersects(outlines, area)
        return kept

    def _near(self, index: Index) -> np.ndarray:
        lon, lat, km = self.near
        rows = index.rows(["centre_lon", "centre_lat"])
        middle_lon, middle_lat = (rows[name].to_numpy().astype(np.float64) for name in rows.column_names)
        close = np.flatnonzero(np.abs(middle_lat - lat) <= km / DEGREE_KM)  # the rest need not be measured
        point = np.full(len(close), lon), np.full(len(close), lat)
        _, _, metres = EARTH.inv(*point, middle_lon[close], middle_lat[close])
        kept = np.zeros(len(index), dtype=bool)
        kept[close] = np.asarray(metres) <= 1000 * km
        return kept

    def _in_time(self, index: Index) -> np.ndarray:
        times = index.rows(["timestamp"])["timestamp"]
        kept = pc.is_valid(times)
        if self.after is not None:
            kept = pc.and_kleene(kept, pc.greater_equal(times, pa.scalar(_utc(self.after), times.type)))
        if self.before is not None:
            kept = pc.and_kleene(kept, pc.less(times, pa.scalar(_utc(self.before), times.type)))
        return kept.to_numpy(zero_copy_only=False).astype(bool)

    def _words(self) -> str:
        words = []
        if self.bbox is not None:
            words.append("bbox {:g},{:g},{:g},{:g}".format(*self.bbox))
        if self.near is not None:
            words.append("{2:g} km of {0:g},{1:g} (of its middle)".format(*self.near))
        if self.after is not None:
            words.append(f"the time from {self.after.date()}")
        if self.before is not None:
            words.append(f"the time before {self.before.date()}")
        return " and ".join(words)


def _utc(time: datetime.datetime) -> datetime.datetime:
    return time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
