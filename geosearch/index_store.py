"""
The index on disk: a folder of GeoParquet parts, `index.json` that says what they hold, and a flat copy of the vectors.

    INDEX/parts/part-00000.parquet …   one row a window, over all parts in the order of a Hilbert curve
    INDEX/index.json                   version, model, windows, bands, sources, parts
    INDEX/skipped.jsonl                scenes and windows that could not be read, and why
    INDEX/vectors.f16, vectors.json    the vectors alone, row by row (a cache: made again when missing or stale)
    INDEX/rows.arrow                   the other columns, to be memory-mapped (likewise)

Shapes: N windows, D width of the shared space.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from modeling_lrsclip.files.atomic import replace_text, replacing
from modeling_lrsclip.files.documents import read_json, refuse_malformed


if TYPE_CHECKING:
    from modeling_lrsclip.encoding import Encoder

VERSION = 1  # of the layout; an index of another is refused
METADATA, NEXT_METADATA, PARTS = "index.json", "index.next.json", "parts"
VECTORS, VECTORS_STAMP, ROWS = "vectors.f16", "vectors.json", "rows.arrow"


class IndexProblem(ValueError):
    """An index that cannot be used, and why."""


# ------------------------------------------------------------------------------------------------------------- rows


def row_schema(dimensions: int) -> pa.Schema:
    """
    Columns of an index. `unique_id`, `embedding`, `timestamp`, `geometry`, `centre_lat` and `centre_lon` are named and
    mean as in Major TOM's embedding tables; `pixel_box` differs from its `pixel_bbox` (width and height, not the right
    and bottom edge).
    """
    corner = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
    return pa.schema(
        [
            ("unique_id", pa.string()),  # 16 hexadecimal digits
            ("scene", pa.string()),  # path
            ("pixel_box", pa.list_(pa.int32(), 4)),  # left, top, width, height
            ("scale", pa.float32()),  # side of a window of this scale in pixels of the scene
            ("gsd", pa.float32()),  # metres a pixel; null without coordinates
            ("timestamp", pa.timestamp("us", tz="UTC")),  # acquisition; null where not known
            ("crs", pa.string()),  # of the scene: EPSG:… or WKT; null: pixels
            ("centre_lat", pa.float32()),
            ("centre_lon", pa.float32()),
            ("bbox", corner),
            ("geometry", pa.binary()),  # WKB: the window's four corners in WGS84, or in pixels
            ("embedding", pa.list_(pa.float16(), dimensions)),  # unit length
        ]
    )


def _schema_without_vectors() -> pa.Schema:
    return pa.schema([field for field in row_schema(1) if field.name != "embedding"])


def row_names() -> list[str]:
    return _schema_without_vectors().names


def row_table(
    scene: str,
    pixel_boxes: np.ndarray,
    scales: np.ndarray,
    outlines: np.ndarray,
    middles: np.ndarray,
    embeddings: np.ndarray,
    **scene_facts: Any,
) -> pa.Table:
    """
    Rows of an index for windows of one scene.

    Args:
        scene: path.
        pixel_boxes (`(N, 4)` integers): left, top, width, height.
        scales (`(N,)`): side in pixels of the windows of each one's scale.
        outlines, middles: `(N,)` polygons and `(N, 2)` longitudes, latitudes of [`~geosearch.footprints.footprints`].
        embeddings (`(N, D)`): unit vectors, kept as float16.
        scene_facts: `gsd` (metres), `timestamp` (`datetime` with a time zone), `crs`; each may be None.

    Returns:
        Table with the columns of [`row_schema`].
    """
    count, dimensions = embeddings.shape
    schema = row_schema(dimensions)
    boxes = np.ascontiguousarray(pixel_boxes, dtype=np.int32).reshape(count, 4)
    identities = [unique_id(scene, box) for box in boxes.tolist()]
    sides = shapely.bounds(outlines).astype(np.float64).reshape(count, 4)
    flat = pa.array(np.ascontiguousarray(embeddings, dtype=np.float16).ravel())

    def same(name: str) -> pa.Array:
        return pa.array([scene_facts.get(name)] * count, schema.field(name).type)

    columns = {
        "unique_id": pa.array(identities, pa.string()),
        "scene": pa.array([scene] * count, pa.string()),
        "pixel_box": pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4),
        "scale": pa.array(np.asarray(scales, dtype=np.float32)),
        "gsd": same("gsd"),
        "timestamp": same("timestamp"),
        "crs": same("crs"),
        "centre_lat": pa.array(middles[:, 1].astype(np.float32)),
        "centre_lon": pa.array(middles[:, 0].astype(np.float32)),
        "bbox": pa.StructArray.from_arrays(
            [pa.array(np.ascontiguousarray(side)) for side in sides.T], fields=list(schema.field("bbox").type)
        ),
        "geometry": pa.array(shapely.to_wkb(outlines).tolist(), pa.binary()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, dimensions),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def unique_id(scene: str, pixel_box: Sequence[int]) -> str:
    """Name of a window: 16 hexadecimal digits that follow from its scene's path and its pixel box."""
    text = f"{scene}\n{','.join(str(int(value)) for value in pixel_box)}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- reading


class Index:
    """
    A finished index, opened by [`open_index`].

    Attributes:
        folder: where it lies.
        metadata: the content of its `index.json`: `model` (`id`, `weights_sha256`, `dimensions`), `windows`,
            `coordinates` (`wgs84` or `pixels`), `sources` (facts of each scene by its path), `parts`, `rows`.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.folder, self.metadata = folder, metadata

    def __len__(self) -> int:
        return self.metadata["rows"]

    @property
    def dimensions(self) -> int:
        """Width D of the vectors."""
        return self.metadata["model"]["dimensions"]

    @property
    def part_files(self) -> list[Path]:
        """GeoParquet files, in the order of the rows."""
        return [self.folder / PARTS / part["name"] for part in self.metadata["parts"]]

    def check_model(self, weights_sha256: str) -> None:
        """
        Refuses other weights than the index was made with.

        Raises:
            [`IndexProblem`]: naming both.
        """
        model = self.metadata["model"]
        if weights_sha256 != model["weights_sha256"]:
            raise IndexProblem(
                f"{self.folder} was made with the weights {model['weights_sha256'][:12]}… of {model['id']}, and the model "
                f"given has the weights {weights_sha256[:12]}…: name the model it was made with, or index again with this one."
            )

    def rows(self, columns: Sequence[str] | None = None, numbers: np.ndarray | None = None) -> pa.Table:
        """
        Columns other than the vectors, memory-mapped from `rows.arrow`, which is made first where it is missing or of
        another state of the index.

        Args:
            columns: names; default all.
            numbers (`(K,)` integers): which rows; default all.

        Returns:
            Table of K rows in the order asked for, or of all as in [`Index.vectors`].
        """
        names = row_names() if columns is None else list(columns)
        try:
            return self._rows(names, numbers)
        except pa.ArrowInvalid:  # rows.arrow is damaged: what the parts hold counts
            self._row_batches = list(self._parts_without_vectors())
            with contextlib.suppress(OSError):
                (self.folder / ROWS).unlink()
            return self._rows(names, numbers)

    def _rows(self, names: list[str], numbers: np.ndarray | None) -> pa.Table:
        """Rows whose bytes are looked at before they are used: Arrow follows the offsets in a file wherever they lead."""
        if numbers is None:
            table = pa.Table.from_batches(self._row_batches).select(names)
            table.validate(full=True)
            return table
        ends = np.cumsum([len(batch) for batch in self._row_batches])
        order = np.argsort(numbers, kind="stable")
        owners = np.searchsorted(ends, numbers[order], side="right")
        tables = [pa.Table.from_batches(self._row_batches[:1]).select(names).slice(0, 0)]
        for owner in np.unique(owners):
            batch = self._row_batches[owner]
            inside = numbers[order[owners == owner]] - (ends[owner] - len(batch))
            batch = batch.select(names)
            for row in inside.tolist():
                batch.slice(row, 1).validate(full=True)
            tables.append(pa.Table.from_batches([batch.take(pa.array(inside))]))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(np.argsort(order)))

    @cached_property
    def _row_batches(self) -> list[pa.RecordBatch]:
        """Batches of rows, one a part; neither read nor decoded before it is asked for."""
        if (kept := self._kept_row_batches()) is not None:
            return kept
        try:
            self._write_rows()
        except OSError:  # the folder takes no file
            return list(self._parts_without_vectors())
        return self._kept_row_batches()

    def _kept_row_batches(self) -> list[pa.RecordBatch] | None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.folder / ROWS)))
            if reader.schema.metadata[b"state"].decode() == json.dumps(self._vectors_stamp):
                return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, KeyError, TypeError):  # missing, cut off, or something else
            pass
        return None

    def _write_rows(self) -> None:
        schema = _schema_without_vectors().with_metadata({"state": json.dumps(self._vectors_stamp)})
        with (
            replacing(self.folder / ROWS) as growing,
            pa.OSFile(str(growing), "wb") as file,  # the writer does not close a file that it has opened
            pa.ipc.new_file(file, schema) as writer,
        ):
            for batch in self._parts_without_vectors():
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))

    def _parts_without_vectors(self) -> Iterator[pa.RecordBatch]:
        for path, part in zip(self.part_files, self.metadata["parts"]):
            with _readable(path):
                table = pq.read_table(path, columns=row_names(), partitioning=None).combine_chunks()
                if len(table) != part["rows"]:
                    raise ValueError(f"{len(table)} rows where {METADATA} says {part['rows']}")
                table = table.cast(_schema_without_vectors())
                table.validate(full=True)
            yield from table.to_batches()

    def vectors(self) -> np.ndarray:
        """
        All vectors, `(N, D)` float16, memory-mapped from `vectors.f16`, which is made first where it is missing or of
        another state of the index. Where the folder takes no file, they are read into memory.
        """
        if not self._vectors_are_current():
            try:
                self._write_vectors()
            except OSError:
                return np.concatenate(list(self._vector_blocks()))
        return np.memmap(self.folder / VECTORS, dtype=np.float16, mode="r", shape=(len(self), self.dimensions))

    def _vectors_are_current(self) -> bool:
        path = self.folder / VECTORS
        if not path.is_file() or path.stat().st_size != len(self) * self.dimensions * 2:
            return False
        try:
            stamp = json.loads((self.folder / VECTORS_STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return stamp == self._vectors_stamp

    @cached_property
    def _vectors_stamp(self) -> dict[str, Any]:
        return {"parts": self.metadata["parts"], "dimensions": self.dimensions}

    def _write_vectors(self) -> None:
        with replacing(self.folder / VECTORS) as growing:
            with growing.open("wb") as file:
                for block in self._vector_blocks():
                    block.tofile(file)
            (self.folder / VECTORS_STAMP).unlink(missing_ok=True)
        replace_text(self.folder / VECTORS_STAMP, json.dumps(self._vectors_stamp))

    def _vector_blocks(self) -> Iterator[np.ndarray]:
        for path, part in zip(self.part_files, self.metadata["parts"]):
            rows = 0
            with _readable(path):
                for batch in pq.ParquetFile(path).iter_batches(16_384, columns=["embedding"]):
                    vectors = vectors_of(batch.column("embedding"))
                    rows += len(vectors)
                    if vectors.shape[1:] != (self.dimensions,) or vectors.dtype != np.float16:
                        kind = f"{vectors.shape[1:]} {vectors.dtype}"
                        raise ValueError(f"vectors of {kind}, not of {self.dimensions} float16")
                    yield vectors
                if rows != part["rows"]:
                    raise ValueError(f"{rows} rows where {METADATA} says {part['rows']}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a damaged part into one sentence that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise IndexProblem(f"{path} is damaged ({reason:.300}): index the scenes again into a new folder.") from error


def vectors_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """`(N, D)` float16 of an `embedding` column."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def open_index(folder: str | Path) -> Index:
    """
    Opens an index that `geosearch index` has finished.

    Raises:
        [`IndexProblem`]: one sentence for a folder that is none, is unfinished, damaged, empty or of another version.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        if (folder / "blocks").is_dir() or (folder / "shards").is_dir() or (folder / NEXT_METADATA).is_file():
            raise IndexProblem(f"{folder} holds an unfinished index: run the same geosearch index (or merge) again.")
        advice = f"make one with geosearch index SCENES --output {folder}"
        raise IndexProblem(f"{folder} is no index (no {METADATA} in it); {advice}.")
    again = "index the scenes again into a new folder"
    try:
        metadata = read_json(path, again)
        if (version := metadata.get("version")) == VERSION:
            with refuse_malformed(path, again):
                _check_metadata(metadata)
    except ValueError as error:
        raise IndexProblem(str(error)) from error
    if version != VERSION:
        raise IndexProblem(
            f"{folder} is an index of version {str(version):.40}, and this program reads version {VERSION}: "
            f"index the scenes again, or use the version of lrsclip that made it."
        )
    index = Index(folder, metadata)
    for part, file in zip(metadata["parts"], index.part_files):
        size = file.stat().st_size if file.is_file() else None
        if size != part["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise IndexProblem(
                f"{file} {state} where {METADATA} says {part['bytes']} bytes: the index is being written, or was "
                f"interrupted or changed; run geosearch index with the same scenes again."
            )
    if not len(index):
        advice = f"add scenes with geosearch index SCENES --output {folder}"
        raise IndexProblem(f"{folder} is an index without windows: {advice}.")
    return index


def _check_metadata(metadata: dict[str, Any]) -> None:
    """Raise `LookupError` or `TypeError` where `index.json` lacks what an index is opened by, or has it otherwise."""
    model, parts = metadata["model"], metadata["parts"]
    kinds = [(model["id"], str), (model["weights_sha256"], str), (model["dimensions"], int), (metadata["rows"], int)]
    kinds += [(metadata["coordinates"], str), (metadata.get("sources", {}), dict), (parts, list)]
    kinds += [(part[name], kind) for part in parts for name, kind in (("name", str), ("rows", int), ("bytes", int))]
    for value, kind in kinds:
        if not isinstance(value, kind) or kind is int and value < 0:
            raise TypeError(f"{value!r:.80} stands where a {kind.__name__} is needed")
    if sum(part["rows"] for part in parts) != metadata["rows"] or model["dimensions"] < 1:
        raise LookupError("the rows of its parts do not add up to all rows")
    if any("/" in part["name"] or "\\" in part["name"] or "\0" in part["name"] for part in parts):
        raise LookupError("a part is named by a path")


def load_index_encoder(
    index: Index, model: str | None = None, device: str = "cpu", tokenizer: str | None = None
) -> "Encoder":
    """
    The model that an index was made with.

    Args:
        index: names the model and its weights.
        model: folder, Hub id, file or name where the model is now; None: where it was when the index was made.
        device: where it runs.
        tokenizer: for a checkpoint file; None: the one that the index was made with.

    Returns:
        The encoder, on `device`.

    Raises:
        [`~geosearch.index_store.IndexProblem`]: for other weights.
    """
    from transformers.utils import logging

    from modeling_lrsclip.encoding import load_encoder
    from modeling_lrsclip.published.registry import resolve

    logging.disable_progress_bar()
    tokenizer = tokenizer or index.metadata["model"].get("tokenizer")
    encoder = load_encoder(resolve(model or index.metadata["model"]["id"]), device, tokenizer=tokenizer)
    index.check_model(encoder.weights_sha256)
    return encoder
