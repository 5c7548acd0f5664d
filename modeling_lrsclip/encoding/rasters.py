"""
Rasters of any depth and number of bands (GeoTIFF, COG, VRT, JPEG 2000, ...) to 8-bit RGB, window by window.

Shapes: H, W lines and columns read, B bands read.
"""

import contextlib
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .image_error import ImageError


os.environ.setdefault("GDAL_CACHEMAX", "256")  # megabytes; GDAL's own default is a twentieth of the memory
os.environ.setdefault("GDAL_VRT_ENABLE_PYTHON", "NO")  # a foreign file runs no code

import rasterio  # noqa: E402  reads the variables above
from rasterio._err import CPLE_BaseError  # noqa: E402  (some calls let GDAL's own errors through)
from rasterio.enums import ColorInterp, MaskFlags, Resampling  # noqa: E402
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError  # noqa: E402
from rasterio.io import DatasetReader  # noqa: E402
from rasterio.windows import Window  # noqa: E402


# Formats that describe a service on the network instead of pixels are not among them.
DRIVERS = ("GTiff", "VRT", "JP2OpenJPEG", "PNG", "JPEG", "HFA", "ENVI", "BMP", "WEBP", "GIF")
PERCENTILES = (2.0, 98.0)  # of a scene's values become black and white
SAMPLE_SIDE = 2048  # pixels of the picture that percentiles are taken from
SAMPLE_TILES, SAMPLE_TILE = 8, 256  # without overviews: so many pieces in each direction, of so many pixels a side
NAMING = "name three of them with bands (for example 4,3,2), or "  # for commands that have this option
COLOURS = ("red", "green", "blue")
SENTINEL2 = (("b04", "b4", "band 4"), ("b03", "b3", "band 3"), ("b02", "b2", "band 2"))
# Plain pictures are no mistake. `warnings.catch_warnings` would not do: several threads open rasters at a time.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module=__name__.replace(".", r"\."))
LOOKED_UP = ("uint8", "int8", "uint16", "int16")  # values few enough for a table


class RasterError(ImageError):
    """A raster, or a piece of one, that cannot be used, and why: one sentence that names it."""

    def __init__(self, sentence: str):
        super().__init__("", sentence)

    def __reduce__(self) -> tuple:  # it crosses processes
        return type(self), (self.reason,)

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class ValueRange:
    """Values that become black and white: as numbers, or as percentiles of each band of each scene."""

    low: float
    high: float
    percent: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"range {self}: two finite numbers are needed, the smaller one first.")
        if self.percent and not 0 <= self.low < self.high <= 100:
            raise ValueError(f"range {self}: percentiles lie between 0% and 100%.")

    @classmethod
    def parse(cls, text: str) -> "ValueRange":
        """`0,3000` or `2%,98%`."""
        parts = [part.strip() for part in text.split(",")]
        percent = all(part.endswith("%") for part in parts)
        try:
            low, high = (float(part.removesuffix("%") if percent else part) for part in parts)
        except ValueError as error:
            raise ValueError(f"range {text!r}: write two values (0,3000) or two percentiles (2%,98%).") from error
        return cls(low, high, percent)

    def __str__(self) -> str:
        mark = "%" if self.percent else ""
        return f"{self.low:g}{mark},{self.high:g}{mark}"


@dataclass(frozen=True)
class Rendering:
    """Record of how a raster became 8-bit RGB."""

    bands: tuple[int, ...]  # red, green, blue counted from 1; one for grey or a palette
    names: tuple[str, ...]  # as the file describes them
    chosen_by: str  # bands: "colour interpretation", "descriptions", "order" or "given"
    stretch: str  # "as stored", "palette", "percentiles 2-98" or "given"
    low: tuple[float, ...] | None = None  # value of each band that becomes 0; None: as stored
    high: tuple[float, ...] | None = None  # and 255
    nodata: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Raster:
    """
    An open raster, for one thread. Use as a context manager.

    Args:
        path: of a file that one of `DRIVERS` reads.
        bands: red, green and blue as numbers from 1 or names (descriptions or colours); one for grey; None: by colour
            interpretation, else by the bands' descriptions, else the first three of up to four bands.
        value_range: values that become black and white; None: 8 bits as stored, others by percentiles of the scene.
        nodata: value that stands for nothing; None: the one that the file declares.

    Raises:
        [`RasterError`]: one sentence for a file that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        bands: Sequence[int | str] | None = None,
        value_range: ValueRange | None = None,
        nodata: float | None = None,
    ):
        self.path, self.value_range = str(path), value_range
        self.dataset = _open(self.path)
        try:
            self._check()
            self.bands, self.chosen_by = self._choose_bands(bands)
        except BaseException:
            self.dataset.close()
            raise
        self.nodata = self.dataset.nodatavals[self.bands[0] - 1] if nodata is None else nodata
        interpretations = self.dataset.colorinterp
        self._alpha = interpretations.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in interpretations else None
        flags = self.dataset.mask_flag_enums[self.bands[0] - 1]
        self._has_mask = self._alpha is None and MaskFlags.per_dataset in flags

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self.dataset.close()

    @property
    def width(self) -> int:
        """Columns."""
        return self.dataset.width

    @property
    def height(self) -> int:
        """Lines."""
        return self.dataset.height

    @cached_property
    def rendering(self) -> Rendering:
        """Bands and stretch in use; the first look at it reads an overview where percentiles are needed."""
        low = high = None
        names = tuple(self.dataset.descriptions[band - 1] or self._colour(band) for band in self.bands)
        if self._palette is not None:
            stretch = "palette"
        elif self.value_range is None and self.dataset.dtypes[self.bands[0] - 1] == "uint8":
            stretch = "as stored"
        elif self.value_range is not None and not self.value_range.percent:
            stretch = "given"
            low, high = ((limit,) * len(self.bands) for limit in (self.value_range.low, self.value_range.high))
        else:
            limits = (self.value_range.low, self.value_range.high) if self.value_range else PERCENTILES
            stretch = f"percentiles {limits[0]:g}-{limits[1]:g}"
            low, high = self._percentiles(limits)
        nodata = None if self.nodata is None else float(self.nodata)
        return Rendering(self.bands, names, self.chosen_by, stretch, low, high, nodata)

    def read(
        self, left: int, top: int, width: int, height: int, shape: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        A window as 8-bit RGB.

        Args:
            left, top, width, height: pixels; within the raster.
            shape: lines and columns to return, averaged (from an overview where there is one); None: one for one.

        Returns:
            `(H, W, 3)` uint8, and `(H, W)` bool: where there is something (not nodata, transparent, masked, NaN or
            infinite).

        Raises:
            [`RasterError`]: for a piece of the file that is damaged or missing.
        """
        rendering = self.rendering
        with _named_errors(self.path):
            data, valid = self._read(Window(left, top, width, height), shape, Resampling.average)
        if self._palette is not None:
            colours = self._palette[data[0].astype(np.int64)]  # (H, W, 4)
            return np.ascontiguousarray(colours[..., :3]), valid & (colours[..., 3] > 0)
        rgb = np.empty((*valid.shape, 3), dtype=np.uint8)
        for band, values in enumerate(data):
            levels = values
            if rendering.low is not None and values.dtype.name in LOOKED_UP:
                levels = np.take(self._tables[band], values.view(f"uint{values.dtype.itemsize * 8}"))
            elif rendering.low is not None:
                levels = _to_levels(values, rendering.low[band], rendering.high[band])
            if len(data) == 3:
                rgb[..., band] = levels
            else:
                rgb[:] = levels[..., None]  # grey
        return rgb, valid

    def _read(
        self, window: Window | None, shape: tuple[int, int] | None, resampling: Resampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, H, W) as stored, and (H, W) bool where there is something."""
        bands = list(self.bands) + ([self._alpha] if self._alpha else [])
        if self._palette is not None:
            resampling = Resampling.nearest  # numbers of colours have no average
        out_shape = (len(bands), *shape) if shape else None
        data = self.dataset.read(bands, window=window, out_shape=out_shape, resampling=resampling)
        if self._alpha:
            data, valid = data[:-1], data[-1] > 0
        elif self._has_mask:
            valid = self.dataset.read_masks(self.bands[0], window=window, out_shape=shape) > 0
        else:
            valid = np.ones(data.shape[1:], dtype=bool)
        if data.dtype.kind == "f":
            valid &= np.isfinite(data).all(axis=0)
        if self.nodata is not None and not math.isnan(self.nodata):
            valid &= (data != self.nodata).any(axis=0)
        return data, valid

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        """Levels of every value that each band can have, by the value's bits read as an unsigned number."""
        dtype = np.dtype(self.dataset.dtypes[self.bands[0] - 1])
        values = np.arange(2 ** (8 * dtype.itemsize), dtype=f"uint{dtype.itemsize * 8}").view(dtype)
        return [_to_levels(values, low, high) for low, high in zip(self.rendering.low, self.rendering.high)]

    @cached_property
    def _palette(self) -> np.ndarray | None:
        """(values, 4) red, green, blue and alpha of each value."""
        if len(self.bands) != 1 or self.dataset.colorinterp[self.bands[0] - 1] != ColorInterp.palette:
            return None
        entries = self.dataset.colormap(self.bands[0])
        table = np.zeros((max(256, max(entries) + 1), 4), dtype=np.uint8)
        for value, colour in entries.items():
            table[value] = colour
        return table

    # ------------------------------------------------------------------------------------------------------ choices

    def _check(self) -> None:
        kinds = set(self.dataset.dtypes)
        if any(kind.startswith("complex") for kind in kinds):
            raise RasterError(
                f"{self.path} holds complex numbers ({', '.join(sorted(kinds))}): write their magnitude into a file first."
            )
        if not self.dataset.count:
            names = [name.rsplit(":", 1)[-1] for name in self.dataset.subdatasets[:3]]
            raise RasterError(f"{self.path} has no bands of its own; it may hold several images: {', '.join(names)}.")

    def _choose_bands(self, wanted: Sequence[int | str] | None) -> tuple[tuple[int, ...], str]:
        if wanted:
            if len(wanted) not in (1, 3):
                raise ValueError(f"bands {', '.join(map(str, wanted))}: name three (red, green, blue) or one (grey).")
            return tuple(self._find_band(band) for band in wanted), "given"
        colours = self.dataset.colorinterp
        by_colour = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        if all(colour in colours for colour in by_colour):
            return tuple(colours.index(colour) + 1 for colour in by_colour), "colour interpretation"
        described = [(text or "").lower() for text in self.dataset.descriptions]
        for names in ([(colour,) for colour in COLOURS], SENTINEL2):
            positions = [next((described.index(name) for name in each if name in described), None) for each in names]
            if None not in positions:
                return tuple(position + 1 for position in positions), "descriptions"
        usable = [index + 1 for index, colour in enumerate(colours) if colour != ColorInterp.alpha]
        if 1 <= len(usable) <= 4:
            return tuple(usable[:3] if len(usable) > 2 else usable[:1]), "order"
        raise RasterError(
            f"{self.path} has {self.dataset.count} bands, and none is marked as red, green or blue: "
            f"{NAMING}mark them in the file (rio edit-info FILE --colorinterp undefined,blue,green,red: a name a band)."
        )

    def _find_band(self, band: int | str) -> int:
        count = self.dataset.count
        if isinstance(band, int) or str(band).strip().isdecimal():
            if 1 <= int(band) <= count:
                return int(band)
            raise RasterError(f"{self.path} has no band {band}; its bands are 1 to {count}.")
        names = {self._colour(number).lower(): number for number in range(count, 0, -1)}
        names |= {text.lower(): index + 1 for index, text in enumerate(self.dataset.descriptions) if text}
        if band.strip().lower() in names:
            return names[band.strip().lower()]
        shown = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
        raise RasterError(f"{self.path} has no band named {band}; its {count} bands are named {shown}.")

    def _colour(self, band: int) -> str:
        with _named_errors(self.path):
            return self.dataset.colorinterp[band - 1].name

    # --------------------------------------------------------------------------------------------------- percentiles

    def _percentiles(self, limits: tuple[float, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        values = self._sample()  # (B, values)
        if not values.shape[1]:  # nothing in the sample: perhaps a thin strip between its pieces
            with _named_errors(self.path):
                data, valid = self._read(None, self._sample_shape(), Resampling.nearest)
            values = data[:, valid]
        if not values.shape[1]:
            return (0.0,) * len(self.bands), (1.0,) * len(self.bands)
        low, high = np.percentile(values.astype(np.float64), limits, axis=1)  # (B,), (B,)
        high = np.where(high > low, high, low + 1)  # one value only
        return tuple(float(value) for value in low), tuple(float(value) for value in high)

    def _sample(self) -> np.ndarray:
        """(B, values) of an overview, or of pieces spread over the raster; pieces that cannot be read are left out."""
        small = max(self.width, self.height) <= SAMPLE_SIDE
        if small or self.dataset.overviews(self.bands[0]):
            with contextlib.suppress(RasterioError):  # of overviews that are broken the pixels themselves may be whole
                data, valid = self._read(None, self._sample_shape(), Resampling.nearest)
                return data[:, valid]
        pieces, error = [], None
        for top in np.linspace(0, max(0, self.height - SAMPLE_TILE), SAMPLE_TILES).astype(int):
            for left in np.linspace(0, max(0, self.width - SAMPLE_TILE), SAMPLE_TILES).astype(int):
                width, height = min(SAMPLE_TILE, self.width), min(SAMPLE_TILE, self.height)
                try:
                    data, valid = self._read(Window(left, top, width, height), None, Resampling.nearest)
                    pieces.append(data[:, valid])
                except RasterioError as problem:
                    error = problem
        if not pieces:
            with _named_errors(self.path):
                raise error
        return np.concatenate(pieces, axis=1)

    def _sample_shape(self) -> tuple[int, int]:
        factor = max(1.0, max(self.width, self.height) / SAMPLE_SIDE)
        return max(1, round(self.height / factor)), max(1, round(self.width / factor))


def fill_nothing(rgb: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """
    The mean colour of what there is, where there is nothing: an edge of black would be seen as an object.

    Args:
        rgb (`(H, W, 3)` uint8).
        valid (`(H, W)` bool).

    Returns:
        `(H, W, 3)` uint8; `rgb` itself where nothing is missing.
    """
    if valid.all():
        return rgb
    filled = rgb.copy()
    mean = rgb[valid].mean(axis=0) if valid.any() else np.full(3, 127.0)
    filled[~valid] = np.floor(mean + 0.5).astype(np.uint8)
    return filled


def _to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Levels 0 to 255 of values between `low` and `high`; uint8."""
    kind = np.float64 if values.dtype.itemsize > 4 or values.dtype.kind in "iu" else np.float32
    scaled = (values.astype(kind) - kind(low)) * kind(255 / (high - low))
    scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.floor(np.clip(scaled, 0, 255) + kind(0.5)).astype(np.uint8)


def _open(path: str) -> Any:
    with _named_errors(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise RasterError(f"{path} is not a regular file.")
        with open(path, "rb") as file:
            magic = file.read(4)
        if not magic:
            raise RasterError(f"{path} is an empty file.")
        if magic == b"PK\3\4":
            raise RasterError(f"{path} is a zip archive: unpack it first.")
        with rasterio.Env():
            return DatasetReader(path, driver=list(DRIVERS))  # rasterio.open takes one driver only


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Turns what GDAL and the system say of a file into one sentence that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise RasterError(f"{path} does not exist.") from error
    except OSError as error:
        reason = None if isinstance(error, RasterioIOError) else error.strerror
        raise RasterError(f"{path} cannot be read ({reason or _reason(error, path)}).") from error
    except (RasterioError, CPLE_BaseError, ValueError, MemoryError) as error:
        if isinstance(error, RasterError):
            raise
        raise RasterError(f"{path} cannot be read ({_reason(error, path)}).") from error


def _reason(error: BaseException, path: str) -> str:
    """The innermost cause, which says most, on one line and without the path once more."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if "not recognized as being in a supported file format" in text:
        return f"it is no raster of a known format: {', '.join(DRIVERS)}"
    return text.replace(path, "the file").removesuffix(".")
