"""Scenes that arguments mean: from paths, folders, patterns, STAC documents and tables, and what each file says of itself."""

import csv
import datetime
import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
from affine import Affine

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES
from modeling_lrsclip.encoding.rasters import Raster, RasterError
from modeling_lrsclip.files.documents import first_line
from modeling_lrsclip.files.hashing import bytes_sha256, file_sha256
from modeling_lrsclip.files.tables import parquet_batches

from .footprints import to_lon_lat


SCENE_SUFFIXES = (*IMAGE_SUFFIXES, ".vrt")  # taken from folders
PATH_COLUMNS = ("path", "location", "file", "filepath", "file_name", "filename", "href", "scene", "image")
TIME_COLUMNS = ("timestamp", "datetime", "date", "acquired")
SIDECARS = (".aux.xml", ".ovr")  # statistics and overviews, which other programs write beside a scene; not its content
_NOT_DATA = {"thumbnail", "overview", "metadata", "cloud", "cloud-mask", "data-mask", "snow-ice"}  # roles of assets


@dataclass(frozen=True)
class Scene:
    """A file to index, and when it was taken where its list or STAC item says so."""

    path: str  # absolute
    timestamp: datetime.datetime | None = None


@dataclass
class SceneList:
    """Scenes in the order given, each file once, and what was named but cannot be a scene."""

    scenes: list[Scene] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # `scene` and `reason` of each
    repeated: int = 0  # files named more than once
    _seen: set[str] = field(default_factory=set, repr=False)

    def add(self, path: str | Path, timestamp: datetime.datetime | None = None) -> None:
        """Adds a file, unless it is there already under this or another name, or can be none."""
        path = os.path.abspath(path)
        try:
            real = os.path.realpath(path)
        except ValueError as error:  # a byte of value 0
            self.skip(path, f"{path!r} cannot be the name of a file ({error}).")
            return
        if real in self._seen:
            self.repeated += 1
            return
        self._seen.add(real)
        self.scenes.append(Scene(path, timestamp))

    def skip(self, scene: str | Path, reason: str) -> None:
        """Notes something that cannot be indexed."""
        self.skipped.append({"scene": str(scene), "reason": reason})


def find_scenes(arguments: Sequence[str | Path], asset: str | None = None) -> SceneList:
    """
    Scenes that arguments stand for.

    Args:
        arguments: files; folders, searched with all below for files of `SCENE_SUFFIXES`; patterns (`**` for any depth); STAC
            items, item collections, collections or catalogs (.json); tables with a column of paths (.csv, .parquet).
        asset: key of the asset to take from STAC items; None: `visual`, or the only image with data.

    Raises:
        `ValueError`: for an argument that stands for nothing.
    """
    scenes = SceneList()
    for argument in map(str, arguments):
        before = len(scenes.scenes) + len(scenes.skipped) + scenes.repeated
        if os.path.lexists(argument):
            _add_path(argument, scenes, asset)
        elif glob.has_magic(argument):
            for path in sorted(glob.glob(argument, recursive=True)):
                _add_path(path, scenes, asset)
        elif urlparse(argument).scheme in ("http", "https", "s3", "gs"):
            raise ValueError(f"{argument} is not on this machine: download it, or mount it as a folder.")
        else:
            advice = "give files, folders, patterns, STAC documents or tables of paths"
            raise ValueError(f"{argument} does not exist: {advice}.")
        if len(scenes.scenes) + len(scenes.skipped) + scenes.repeated == before:
            raise ValueError(f"{argument} holds no scenes: files ending in {', '.join(SCENE_SUFFIXES)} are taken.")
    return scenes


def _files_below(folder: str) -> Iterator[str]:
    """Scene files in and below a folder, through links, each folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SCENE_SUFFIXES):
                yield os.path.join(parent, name)


def _add_path(path: str | Path, scenes: SceneList, asset: str | None) -> None:
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        for file in _files_below(path):
            scenes.add(file)
    elif suffix in (".json", ".geojson"):
        _add_stac(Path(path), scenes, asset, set())
    elif suffix in (".csv", ".tsv", ".parquet", ".geoparquet"):
        _add_table(Path(path), scenes, asset)
    else:
        scenes.add(path)


# ------------------------------------------------------------------------------------------------------------- STAC


def _add_stac(path: Path, scenes: SceneList, asset: str | None, seen: set[str]) -> None:
    if os.path.realpath(path) in seen:
        return
    seen.add(os.path.realpath(path))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        kind = document.get("type")
        items, links = (list(document.get(name) or []) for name in ("features", "links"))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        scenes.skip(path, f"{path} is no STAC document ({error}).")
        return
    if kind == "Feature":
        _add_item(document, path, scenes, asset)
    elif kind == "FeatureCollection":
        for item in items:
            _add_item(item, path, scenes, asset)
    elif kind in ("Collection", "Catalog"):
        for link in links:
            if isinstance(link, dict) and link.get("rel") in ("item", "items", "child"):
                address = str(link.get("href", ""))
                target = _local(address, path.parent)
                if target is None:
                    scenes.skip(address, f"{path} links to {address}, which is not on this machine.")
                else:
                    _add_stac(target, scenes, asset, seen)
    else:
        scenes.skip(path, f"{path} is no STAC item, collection, catalog or item collection (its type is {kind!r}).")


def _add_item(item: dict[str, Any], source: Path, scenes: SceneList, asset: str | None) -> None:
    """The scene of a STAC item; what is no item is skipped by the name of the file that it stands in."""
    try:
        _add_asset(item, source, scenes, asset)
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        scenes.skip(source, f"{source} holds an item that is none of STAC ({type(error).__name__}: {error}).")


def _add_asset(item: dict[str, Any], source: Path, scenes: SceneList, asset: str | None) -> None:
    name = f"{source}: item {item.get('id')}"
    assets = {key: value for key, value in (item.get("assets") or {}).items() if value and value.get("href")}
    chosen = asset
    if asset is not None and asset not in assets:
        scenes.skip(name, f"{name} has no asset {asset}; it has {', '.join(assets) or 'none'}.")
        return
    if asset is None:
        images = [key for key, value in assets.items() if _is_image(value)]
        preferred = [key for key in images if key == "visual" or "visual" in (assets[key].get("roles") or [])]
        if not preferred and len(images) != 1:
            reason = f"{name} has several images ({', '.join(images)}): name one with --asset."
            scenes.skip(name, reason if images else f"{name} has no asset that is an image.")
            return
        chosen = (preferred or images)[0]
    path = _local(assets[chosen]["href"], source.parent)
    if path is None:
        scenes.skip(name, f"{name}: {assets[chosen]['href']} is not on this machine.")
        return
    properties = item.get("properties") or item
    scenes.add(path, _time(properties.get("datetime") or properties.get("start_datetime")))


def _is_image(asset: dict[str, Any]) -> bool:
    if _NOT_DATA & set(asset.get("roles") or []):
        return False
    kind = (asset.get("type") or "").lower()
    return kind.startswith("image/") or urlparse(asset["href"]).path.lower().endswith(SCENE_SUFFIXES)


def _local(href: str, folder: Path) -> Path | None:
    """File that a link leads to; None for one elsewhere."""
    address = urlparse(href)
    if address.scheme == "file":
        return Path(unquote(address.path))
    if len(address.scheme) > 1:  # a single letter is a drive
        return None
    return folder / href


# ------------------------------------------------------------------------------------------------------------ tables


def _add_table(path: Path, scenes: SceneList, asset: str | None) -> None:
    try:
        rows = list(_table_rows(path))
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as a table of scenes ({first_line(error)}).") from error
    if not rows:
        raise ValueError(f"{path} is a table without rows: one column must name the scenes' files.")
    if "assets" in rows[0]:  # stac-geoparquet
        for row in rows:
            _add_item(row, path, scenes, asset)
        return
    column = next((name for name in PATH_COLUMNS if name in rows[0]), None)
    if column is None:
        raise ValueError(f"{path} has no column of paths: name one of its columns {', '.join(PATH_COLUMNS)}.")
    times = next((name for name in TIME_COLUMNS if name in rows[0]), None)
    for number, row in enumerate(rows, start=1):
        target = _local(str(row[column] or ""), path.parent)
        if not row[column]:
            scenes.skip(f"{path}, row {number}", f"{path}, row {number} names no file.")
        elif target is None:
            scenes.skip(str(row[column]), f"{path}, row {number}: {row[column]} is not on this machine.")
        else:
            scenes.add(target, _time(row[times]) if times else None)


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return
    with pq.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        wanted = [name for name in (*PATH_COLUMNS, *TIME_COLUMNS, "id", "assets", "start_datetime") if name in names]
        for group in range(file.num_row_groups):
            for batch in parquet_batches(file, group, wanted or None):
                yield from batch.to_pylist()


def _time(value: Any) -> datetime.datetime | None:
    """Moment in UTC; without a zone it is taken for UTC, and what is no time for not known."""
    if isinstance(value, str):
        for parse in (
            lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
            lambda text: datetime.datetime.strptime(text[:19], "%Y:%m:%d %H:%M:%S"),  # TIFF and EXIF
        ):
            try:
                value = parse(value.strip())
                break
            except ValueError:
                continue
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime.datetime):
        return None
    utc = datetime.timezone.utc
    return (value if value.tzinfo else value.replace(tzinfo=utc)).astimezone(utc)


# ------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class SceneFacts:
    """Facts that a scene's file tells of itself, without its pixels."""

    path: str
    files: tuple[tuple[str, int, int], ...]  # path, bytes, time of change (ns) of everything that it consists of
    width: int
    height: int
    crs: str | None  # EPSG:… or WKT; None: no coordinates
    transform: tuple[float, ...]  # a, b, c, d, e, f
    pixel_size: tuple[float, float] | None  # metres of a pixel in the middle, to the right and downwards
    timestamp: str | None  # ISO 8601

    @property
    def gsd(self) -> float | None:
        """Metres a pixel."""
        return None if self.pixel_size is None else float(np.sqrt(self.pixel_size[0] * self.pixel_size[1]))

    @property
    def affine(self) -> Affine:
        """Transform from (column, row) to the scene's coordinates."""
        return Affine(*self.transform)


def describe_scene(scene: Scene, raster: Raster) -> SceneFacts:
    """
    Facts of a scene from its open file.

    Raises:
        [`~modeling_lrsclip.encoding.rasters.RasterError`]: for coordinates that cannot be used, or a file that a virtual
            raster points to and that is not there.
    """
    dataset = raster.dataset
    crs, transform = dataset.crs, dataset.transform
    if crs is None or transform == Affine.identity():
        crs, transform, pixel_size = None, Affine.identity(), None
    else:
        if transform.is_degenerate:
            raise RasterError(f"{scene.path} has a transform without area ({tuple(transform)[:6]}).")
        code = crs.to_epsg()
        crs = f"EPSG:{code}" if code and type(crs).from_epsg(code) == crs else crs.to_wkt()
        try:
            pixel_size = _pixel_size(crs, transform, raster.width, raster.height)
        except ValueError as error:
            raise RasterError(f"{scene.path} cannot be placed on the Earth: {error}.") from error
    time, files = scene.timestamp or _acquired(dataset), stat_files(scene.path, [scene.path, *dataset.files])
    numbers = tuple(float(value) for value in tuple(transform)[:6])
    moment = time.isoformat() if time else None
    return SceneFacts(scene.path, files, raster.width, raster.height, crs, numbers, pixel_size, moment)


def stat_files(scene: str, files: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """
    Size in bytes and time of change in nanoseconds of files, sidecars left out.

    Raises:
        [`~modeling_lrsclip.encoding.rasters.RasterError`]: for one that is not there.
    """
    facts = {}
    for file in map(os.path.abspath, files):
        if file.lower().endswith(SIDECARS):
            continue
        try:
            status = os.stat(file)
        except OSError as error:
            raise RasterError(f"{scene} cannot be read ({file}: {error.strerror}).") from error
        facts[file] = (file, status.st_size, status.st_mtime_ns)
    return tuple(facts.values())


def content_hash(files: Sequence[tuple[str, int, int]]) -> str:
    """SHA-256 over the content of a scene's files."""
    digests = [file_sha256(file) for file, *_ in files]
    return digests[0] if len(digests) == 1 else bytes_sha256("".join(digests))


def _pixel_size(crs: str, transform: Affine, width: int, height: int) -> tuple[float, float]:
    """Metres on the ellipsoid of a pixel in the middle, to the right and downwards."""
    columns, rows = np.array([0.0, 1.0, 0.0]) + width / 2, np.array([0.0, 0.0, 1.0]) + height / 2
    x = transform.a * columns + transform.b * rows + transform.c
    y = transform.d * columns + transform.e * rows + transform.f
    lon, lat = to_lon_lat(crs)(x, y)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise ValueError("its middle has no longitude and latitude")
    _, _, metres = pyproj.Geod(ellps="WGS84").inv(lon[[0, 0]], lat[[0, 0]], lon[1:], lat[1:])
    if not (metres > 0).all():
        raise ValueError("its pixels have no size on the ground")
    return float(metres[0]), float(metres[1])


def _acquired(dataset: Any) -> datetime.datetime | None:
    """Time at which a scene was taken, by its own tags."""
    tags = [dataset.tags(ns="IMAGERY").get("ACQUISITIONDATETIME")]
    general = dataset.tags()
    names = ("EXIF_DateTimeOriginal", "ACQUISITIONDATETIME", "datetime", "TIFFTAG_DATETIME")
    tags += [general.get(name) for name in names]
    return next((time for time in map(_time, tags) if time), None)
