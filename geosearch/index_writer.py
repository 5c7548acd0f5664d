"""
Writing of an index: rows united into GeoParquet parts in the order of a Hilbert curve, put in place in one step.

Shapes: N windows, D width of the shared space.
"""

import datetime
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modeling_lrsclip.files.atomic import replace_text, sync
from modeling_lrsclip.files.hashing import file_sha256

from .footprints import hilbert_order
from .index_store import METADATA, NEXT_METADATA, PARTS, VECTORS, VERSION, row_names, row_schema, vectors_of


ROWS_PER_PART = 2**17  # 128 MB of vectors at 512 dimensions, one row group
NEXT_PARTS, REPLACED_PARTS = "parts.next", "parts.replaced"
WGS84_BOUNDS = (-180.0, -90.0, 180.0, 90.0)
STAC_EXTENSION = "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json"


def publish(folder: Path, files: Sequence[Path], metadata: dict[str, Any], replaced: Sequence[str] = ()) -> dict:
    """
    Unites parquet files into the parts of an index, in the order of a Hilbert curve, and puts them in the place of the
    parts before in one step: a kill at any moment leaves the index before or the one after ([`finish_publishing`]).
    The same rows give the same bytes, in whatever files and order they come.

    Args:
        folder: of the index.
        files: with the columns of [`row_schema`]; parts of the index itself may be among them.
        metadata: the content of `index.json`; `model` with `id`, `weights_sha256` and `dimensions`, and `coordinates`
            (`wgs84` or `pixels`) are needed. A row is left out when `sources` is there and lacks its scene.
            `format`, `version`, `rows` and `parts` are filled in.
        replaced: scenes whose rows in the index's own parts are left out: they were encoded again.

    Returns:
        The content of `index.json` as written.
    """
    finish_publishing(folder)
    following = folder / NEXT_PARTS
    shutil.rmtree(following, ignore_errors=True)
    following.mkdir(parents=True)
    order = _Order(files, metadata, {path: set(replaced) for path in (folder / PARTS).glob("*.parquet")})
    unsorted = folder / f".{VECTORS}.next"
    try:
        vectors = order.sorted_vectors(unsorted)
        parts = []
        for number, start in enumerate(range(0, len(order), ROWS_PER_PART)):
            rows = order.rows(start, start + ROWS_PER_PART)
            flat = pa.array(np.ascontiguousarray(vectors[start : start + len(rows)]).ravel())
            rows = rows.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
            path = following / f"part-{number:05d}.parquet"
            _write_part(path, rows.select(row_schema(1).names), metadata)
            written = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            parts.append({"name": path.name, "rows": len(rows), **written})
        sync(following)
        content = {"format": "geosearch index", "version": VERSION, **metadata, "rows": len(order), "parts": parts}
        del vectors
        replace_text(folder / NEXT_METADATA, json.dumps(content, indent=1, ensure_ascii=False, default=str))
    finally:
        unsorted.unlink(missing_ok=True)
    finish_publishing(folder)
    return content


def finish_publishing(folder: Path) -> None:
    """Puts new parts in their place where [`publish`] had written them all; does nothing otherwise."""
    if not (folder / NEXT_METADATA).is_file():
        return
    if (folder / NEXT_PARTS).is_dir():
        if (folder / PARTS).is_dir():
            shutil.rmtree(folder / REPLACED_PARTS, ignore_errors=True)
            os.replace(folder / PARTS, folder / REPLACED_PARTS)
        os.replace(folder / NEXT_PARTS, folder / PARTS)
    os.replace(folder / NEXT_METADATA, folder / METADATA)
    sync(folder)
    shutil.rmtree(folder / REPLACED_PARTS, ignore_errors=True)


class _Order:
    """Rows of several files in the order of a Hilbert curve, without their vectors until they are asked for."""

    def __init__(self, files: Sequence[Path], metadata: dict[str, Any], left_out: dict[Path, set[str]]):
        self.files, self.dimensions = list(files), metadata["model"]["dimensions"]
        names = row_names()
        tables, self.kept = [], []
        sources = pa.array(list(metadata["sources"]), pa.string()) if "sources" in metadata else None
        for path in self.files:
            table = pq.read_table(path, columns=names, partitioning=None)
            kept = np.ones(len(table), dtype=bool)
            if sources is not None:
                kept = np.asarray(pc.is_in(table["scene"], sources))
            if left_out.get(path):
                kept &= ~np.asarray(pc.is_in(table["scene"], pa.array(list(left_out[path]), pa.string())))
            self.kept.append(kept)
            tables.append(table.filter(pa.array(kept)))
        schema = pa.schema([row_schema(1).field(name) for name in names])
        self.table = pa.concat_tables(tables) if tables else schema.empty_table()
        self.order = self._sort(metadata["coordinates"])

    def __len__(self) -> int:
        return len(self.table)

    def _sort(self, coordinates: str) -> np.ndarray:
        middles = np.stack([self.table[name].to_numpy() for name in ("centre_lon", "centre_lat")], axis=1)
        boxes = vectors_of(self.table["pixel_box"])
        if coordinates == "wgs84":
            keys = hilbert_order(middles.astype(np.float64), WGS84_BOUNDS)
        else:  # pixels of one scene have nothing to do with those of another
            keys = np.zeros(len(self.table), dtype=np.uint64)
        scenes = self.table["scene"].combine_chunks().dictionary_encode()
        names = np.array(scenes.dictionary.to_pylist() or [""], dtype=object)
        ranks = np.empty(len(names), dtype=np.int64)
        ranks[np.argsort(names)] = np.arange(len(names))
        scene_ranks = ranks[scenes.indices.to_numpy()] if len(scenes) else np.zeros(0, dtype=np.int64)
        if coordinates != "wgs84" and len(boxes):
            inner = hilbert_order(middles.astype(np.float64), (0, 0, 2.0**31, 2.0**31))
            return np.lexsort((*boxes.T[::-1], inner, scene_ranks))
        return np.lexsort((*boxes.T[::-1], scene_ranks, keys))

    def rows(self, start: int, stop: int) -> pa.Table:
        return self.table.take(pa.array(self.order[start:stop])).combine_chunks()

    def sorted_vectors(self, path: Path) -> np.ndarray:
        """(N, D) float16 in the order of the curve, memory-mapped from a file made for it."""
        if not len(self):
            return np.zeros((0, self.dimensions), dtype=np.float16)
        vectors = np.memmap(path, dtype=np.float16, mode="w+", shape=(len(self), self.dimensions))
        places = np.empty(len(self), dtype=np.int64)
        places[self.order] = np.arange(len(self))
        done = 0
        for file, kept in zip(self.files, self.kept):
            row = 0
            for batch in pq.ParquetFile(file).iter_batches(16_384, columns=["embedding"]):
                block = vectors_of(batch.column("embedding"))[kept[row : row + len(batch)]]
                vectors[places[done : done + len(block)]] = block
                row, done = row + len(batch), done + len(block)
        return vectors


def _write_part(path: Path, rows: pa.Table, metadata: dict[str, Any]) -> None:
    described = {"geo": geo_metadata(rows, metadata["coordinates"]), "emb": _emb(rows, metadata)}
    described = {name: json.dumps(value) for name, value in described.items()}
    options = {"compression": "zstd", "compression_level": 3, "row_group_size": ROWS_PER_PART}
    options["use_dictionary"] = ["scene", "crs", "scale", "gsd", "timestamp"]
    options["write_statistics"] = [name for name in rows.column_names if name != "embedding"]
    pq.write_table(rows.replace_schema_metadata(described), path, **options)
    sync(path)


def geo_metadata(rows: pa.Table, coordinates: str) -> dict[str, Any]:
    """Metadata of GeoParquet 1.1 for a table with the columns `geometry` and `bbox`; `coordinates`: `wgs84` or `pixels`."""
    kinds = {wkb[1] for wkb in rows["geometry"].to_pylist()}  # of little-endian WKB
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({3: "Polygon", 6: "MultiPolygon"}[kind] for kind in kinds),
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {"bbox": {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}},
    }
    if coordinates != "wgs84":
        column["crs"] = None  # pixels; left out it would mean longitude and latitude
    if len(rows):
        box = rows["bbox"].combine_chunks()
        sides = [(pc.min, "xmin"), (pc.min, "ymin"), (pc.max, "xmax"), (pc.max, "ymax")]
        column["bbox"] = [function(box.field(side)).as_py() for function, side in sides]
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _emb(rows: pa.Table, metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the STAC embeddings extension, under the key that geoembeddings.org recommends for GeoParquet."""
    model, windows = metadata["model"], metadata.get("windows", {})
    scenes = pc.unique(rows["scene"]).to_pylist()
    gsd, times = rows["gsd"].drop_null(), rows["timestamp"].drop_null()
    span = [moment.isoformat() for moment in pc.min_max(times).as_py().values()] if len(times) else [None, None]
    scales = sorted(pc.unique(rows["scale"]).to_pylist())
    layout: dict[str, Any] = {"layout_type": "regular_grid" if len(scales) == 1 else "variable_grid"}
    if len(scales) == 1 and scales[0] == int(scales[0]):
        step = max(1, round(scales[0] * windows.get("stride", 0.5)))
        layout |= {"chip_size": [int(scales[0])] * 2, "stride": [step, step]}
    properties = {
        "datetime": span[0] if span[0] == span[1] else None,
        "start_datetime": span[0],
        "end_datetime": span[1],
        "emb:type": "chip",
        "emb:dimensions": model["dimensions"],
        "data_type": "float16",
        "emb:chip_layout": layout,
        "emb:quantization": {"method": "none", "original_dtype": "float32", "quantized_dtype": "float16"},
        "emb:runtime_parameters": {"windows": windows, "model": model},
        "emb:preprocessing": metadata.get("preprocessing", {}),
        "emb:postprocessing": {"format": "text", "expression": "scaled to unit length"},
    }
    if len(gsd):
        properties["gsd"] = round(pc.mean(gsd).as_py(), 4)
    links = [{"rel": "emb:model", "href": model["id"], "weights_sha256": model["weights_sha256"]}]
    links += [{"rel": "emb:source-data", "href": scene} for scene in sorted(scenes)]
    return {"stac_version": "1.1.0", "stac_extensions": [STAC_EXTENSION], "properties": properties, "links": links}


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
