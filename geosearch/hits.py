"""Places found, as a table on the terminal and as a file that a GIS opens."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import shapely
from rich.console import Console
from rich.table import Table

from modeling_lrsclip.files.atomic import replacing

from .exact_search import Hits, SearchProblem
from .index_writer import geo_metadata


DRIVERS = {".geojson": "GeoJSON", ".json": "GeoJSON", ".gpkg": "GPKG", ".parquet": "GeoParquet"}
WGS84 = "OGC:CRS84"


# ----------------------------------------------------------------------------------------------------------------- file


def feature_table(hits: Hits) -> pa.Table:
    """
    Hits as features.

    Returns:
        Table of H rows, best first: `rank` from 1, `similarity` (cosine), `z_score` (standard deviations above the mean of
        the index), the columns of `exact_search.HIT_COLUMNS`, `geometry` (WKB of the window's four corners) last.
    """
    columns = {"rank": np.arange(1, len(hits) + 1, dtype=np.int32), "similarity": np.round(hits.similarity, 6)}
    columns |= {"z_score": np.round(hits.z_score, 3)}
    columns |= {name: hits.rows[name] for name in hits.rows.column_names if name != "geometry"}
    return pa.table(columns | {"geometry": hits.rows["geometry"]})


def output_driver(path: str | Path) -> str:
    """
    Format of a file by its suffix.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for another than .geojson, .json, .gpkg or .parquet.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in DRIVERS:
        raise SearchProblem(f"{path} ends in {suffix or 'no suffix'}; write to {', '.join(DRIVERS)}.")
    return DRIVERS[suffix]


def write_features(table: pa.Table, path: str | Path, coordinates: str = "wgs84") -> Path:
    """
    Writes features to GeoJSON, GeoPackage or GeoParquet, whichever the suffix says, in the place of a file before.

    Args:
        table: with a column `geometry` of WKB polygons.
        path: ends in .geojson, .json, .gpkg or .parquet.
        coordinates: `wgs84`, or `pixels` of scenes without coordinates, which get no reference system.

    Returns:
        `path`.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for another suffix, or a place that takes no file.
    """
    path, driver = Path(path), output_driver(path)
    options: dict[str, Any] = {"driver": driver, "layer": path.stem, "crs": WGS84 if coordinates == "wgs84" else None}
    options |= {"geometry_name": "geometry", "geometry_type": "Unknown"}  # across the 180th meridian: of two parts
    options |= {"COORDINATE_PRECISION": "9"} if driver == "GeoJSON" else {}
    with writing(path) as growing, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*'crs' was not provided")  # pixels have none
        warnings.filterwarnings("ignore", ".*extension should be")  # the file gets its name when it is whole
        if driver == "GeoParquet":
            _write_parquet(table, growing, coordinates)
        else:
            pyogrio.write_arrow(table, growing, **options)
    return path


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """
    Make the folder of a file, and hand out a path to write to that takes the file's place when all is there.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for a place that takes no file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as growing:
            yield growing
    except OSError as error:
        raise SearchProblem(f"{path} cannot be written: {error.strerror or error}.") from error


def _write_parquet(table: pa.Table, path: Path, coordinates: str) -> None:
    sides = shapely.bounds(shapely.from_wkb(table["geometry"].to_pylist())).reshape(-1, 4)
    names = ("xmin", "ymin", "xmax", "ymax")
    boxes = pa.StructArray.from_arrays([pa.array(side) for side in np.ascontiguousarray(sides.T)], names)
    table = table.append_column("bbox", boxes)
    described = {"geo": json.dumps(geo_metadata(table, coordinates))}
    pq.write_table(table.replace_schema_metadata(described), path, compression="zstd")


# ---------------------------------------------------------------------------------------------------------------- table


def place_name(lon: float, lat: float, coordinates: str = "wgs84") -> str:
    """
    A point for people: `47.3712° N, 8.5423° E`, or its pixels.

    Args:
        lon, lat: degrees, or pixels from the left and from above.
        coordinates: `wgs84` or `pixels`.

    Returns:
        The text.
    """
    if coordinates != "wgs84":
        return f"pixel {lon:.0f}, {lat:.0f}"
    return f"{abs(lat):.4f}° {'N' if lat >= 0 else 'S'}, {abs(lon):.4f}° {'E' if lon >= 0 else 'W'}"


def hit_table(hits: Hits) -> Table:
    """Hits as a table of `rich`: rank, similarity, standard deviations above the mean of the index, place, scene, time."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("rank", "similarity", "above"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("place", no_wrap=True)
    table.add_column("scene", overflow="fold")
    table.add_column("time", no_wrap=True)
    for rank, row in enumerate(hits.rows.to_pylist()):
        figures = f"{hits.similarity[rank]:.4f}", f"{hits.z_score[rank]:.1f} σ"
        position = place_name(row["centre_lon"], row["centre_lat"], hits.coordinates)
        time = f"{row['timestamp']:%Y-%m-%d %H:%M}" if row["timestamp"] else ""
        table.add_row(str(rank + 1), *figures, position, Path(row["scene"]).name, time)
    return table


def summary(hits: Hits) -> list[str]:
    """Return the lines below the table: how the text was read, and what the similarities are measured against."""
    lines = [hits.text.sentence()] if hits.text else []
    lines.append(
        f"{hits.searched:,} windows compared. Of the whole index the mean is {hits.mean:.4f}, the standard deviation (σ) "
        f"{hits.deviation:.4f}: hits that lie few σ above the mean may be no more than the least unlike."
    )
    return lines


def print_hits(hits: Hits, console: Console | None = None) -> None:
    """Prints the table and what is to be said about it."""
    console = console or Console()
    console.print(hit_table(hits))
    for line in summary(hits):
        console.print(line, highlight=False)
