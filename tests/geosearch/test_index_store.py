"""The index on disk: schema, order, what other programs read of it, the flat vectors, and broken or foreign folders."""

import datetime
import json
import sys
from pathlib import Path

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from affine import Affine

from geosearch import index_writer
from geosearch.footprints import footprints, hilbert_order
from geosearch.index_store import IndexProblem, open_index, row_table
from geosearch.index_writer import publish
from tests import processes
from tests.geosearch.small_scenes import write_index


ROOT = Path(__file__).parents[2]
UTM = "EPSG:32633"
METADATA = {
    "model": {"id": "tiny", "weights_sha256": "ab" * 32, "dimensions": 8},
    "windows": {"sizes": ["64"], "stride": 0.5},
    "coordinates": "wgs84",
}


def rows_of(scene: str, count: int, seed: int = 0, crs=UTM, easting: float = 400_000.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    boxes = np.array([[32 * (index % 10), 32 * (index // 10), 64, 64] for index in range(count)])
    outlines, middles = footprints(boxes, Affine(10, 0, easting, 0, -10, 5_500_000), crs)
    time = datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc)
    facts = {"gsd": 10.0, "crs": crs, "timestamp": time} if crs else {}
    return row_table(scene, boxes, np.full(count, 64), outlines, middles, vectors, **facts)


@pytest.fixture
def index(tmp_path):
    return write_index(tmp_path / "index", [rows_of("a.tif", 130), rows_of("b.tif", 70, 1, easting=420_000)], METADATA)


def test_other_programs_read_the_parts_as_they_are(index):
    part = index.part_files[0]
    table = pq.read_table(part)
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    frame = geopandas.read_parquet(part)
    assert frame.crs == "OGC:CRS84" and len(frame) == 200 and frame.is_valid.all()
    assert frame.geometry.exterior.is_ccw.all()
    west = frame[frame.centre_lon < frame.centre_lon.median()]
    box = tuple(west.total_bounds)
    near = geopandas.read_parquet(part, bbox=box)  # through the bbox column's covering
    assert 0 < len(near) < 200 and set(west.unique_id) <= set(near.unique_id)
    count, scenes = (
        duckdb.sql(f"select count(*), list(distinct scene order by scene) from '{part}'").limit(1).fetchall()[0]
    )
    assert (count, scenes) == (200, ["a.tif", "b.tif"])
    first = duckdb.sql(f"select embedding from '{part}'").limit(1).fetchall()[0][0]
    assert np.allclose(np.array(first, dtype=np.float32), index.vectors()[0].astype(np.float32))


def test_metadata_of_geoparquet_and_of_the_embeddings_extension(index):
    metadata = pq.read_schema(index.part_files[0]).metadata
    geo, emb = json.loads(metadata[b"geo"]), json.loads(metadata[b"emb"])
    column = geo["columns"]["geometry"]
    assert geo["version"] == "1.1.0" and column["geometry_types"] == ["Polygon"]
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"] and "crs" not in column
    assert np.allclose(column["bbox"], geopandas.read_parquet(index.part_files[0]).total_bounds)
    fields = emb["properties"]
    assert (fields["emb:type"], fields["emb:dimensions"], fields["data_type"]) == ("chip", 8, "float16")
    assert fields["emb:chip_layout"] == {"layout_type": "regular_grid", "chip_size": [64, 64], "stride": [32, 32]}
    assert fields["gsd"] == 10 and fields["datetime"] == "2024-05-01T00:00:00+00:00"
    links = {(link["rel"], link["href"]) for link in emb["links"]}
    assert links == {("emb:model", "tiny"), ("emb:source-data", "a.tif"), ("emb:source-data", "b.tif")}


def test_rows_and_vectors_go_together_in_hilbert_order_over_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "ROWS_PER_PART", 60)
    tables = [rows_of("b.tif", 70, 1, easting=420_000), rows_of("a.tif", 130)]
    index = write_index(tmp_path / "index", tables, METADATA)
    assert [part["rows"] for part in index.metadata["parts"]] == [60, 60, 60, 20]
    rows = index.rows()
    assert "embedding" not in rows.column_names and len(rows) == len(index) == 200
    wanted = {}
    for table in tables:
        for name, vector in zip(table["unique_id"].to_pylist(), table["embedding"].to_pylist()):
            wanted[name] = vector
    assert len(wanted) == 200
    for name, vector in zip(rows["unique_id"].to_pylist(), index.vectors()):
        assert np.array_equal(np.array(wanted[name], dtype=np.float16), vector)
    middles = np.stack([rows["centre_lon"].to_numpy(), rows["centre_lat"].to_numpy()], axis=1).astype(float)
    keys = hilbert_order(middles, index_writer.WGS84_BOUNDS)
    assert (np.diff(keys.astype(object)) >= 0).all()
    # The same rows in other files, in another order, give the same bytes.
    again = write_index(
        tmp_path / "again", [table.take(list(range(len(table)))[::-1]) for table in tables[::-1]], METADATA
    )
    assert again.metadata["parts"] == index.metadata["parts"]


def test_hilbert_neighbours_touch():
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1).reshape(-1, 2) + 0.5
    curve = grid[np.argsort(hilbert_order(grid, (0, 0, 32, 32)))]
    assert (np.abs(np.diff(curve, axis=0)).sum(axis=1) == 1).all()


def test_vectors_are_made_again_when_missing_or_stale(index, tmp_path):
    expected = np.array(index.vectors())
    assert expected.dtype == np.float16 and isinstance(index.vectors(), np.memmap)
    assert np.allclose(np.linalg.norm(expected.astype(np.float32), axis=1), 1, atol=2e-3)
    (index.folder / "vectors.f16").write_bytes(b"\0" * 7)
    assert np.array_equal(open_index(index.folder).vectors(), expected)
    for damaged in ("{", "[" * 100_000):
        (index.folder / "vectors.json").write_text(damaged)
        assert np.array_equal(open_index(index.folder).vectors(), expected)
    # Another state with as many rows: sizes alone would not tell.
    other = write_index(index.folder, [rows_of("a.tif", 130, 7), rows_of("b.tif", 70, 8, easting=420_000)], METADATA)
    assert not np.array_equal(other.vectors(), expected)
    stored = np.concatenate([np.stack(pq.read_table(part)["embedding"].to_numpy()) for part in other.part_files])
    assert np.array_equal(other.vectors(), stored)


def test_rows_of_scenes_that_are_gone_are_left_out(index):
    metadata = {**METADATA, "sources": {"b.tif": {}}}
    publish(index.folder, index.part_files, metadata)
    index = open_index(index.folder)
    assert set(index.rows(["scene"])["scene"].to_pylist()) == {"b.tif"} and len(index.vectors()) == 70


def test_pixel_coordinates_have_no_crs(tmp_path):
    table = rows_of("photo.png", 40, crs=None)
    index = write_index(tmp_path / "index", [table], {**METADATA, "coordinates": "pixels"})
    assert geopandas.read_parquet(index.part_files[0]).crs is None
    assert index.rows(["crs", "gsd"]).to_pylist()[0] == {"crs": None, "gsd": None}


def test_other_weights_are_refused(index):
    index.check_model("ab" * 32)
    with pytest.raises(
        IndexProblem, match=r"made with the weights abababababab… of tiny, and the model given has the weights 0000"
    ):
        index.check_model("00" * 32)


def _spoil(index, kind: str) -> None:
    path = index.folder / "index.json"
    content = json.loads(path.read_text())
    part = index.part_files[0]
    if kind == "version":
        path.write_text(json.dumps({**content, "version": 99}))
    elif kind == "json":
        path.write_text("{")
    elif kind == "list":
        path.write_text("[]")
    elif kind == "missing":
        part.unlink()
    elif kind == "cut":
        part.write_bytes(part.read_bytes()[:-10])
    elif kind == "none":
        path.unlink()
    elif kind == "unfinished":
        path.unlink()
        (index.folder / "blocks").mkdir()
    elif kind == "empty":
        path.write_text(json.dumps({**content, "rows": 0, "parts": []}))


@pytest.mark.parametrize(
    "kind, sentence",
    [
        ("version", "index of version 99, and this program reads version 1"),
        ("json", r"index.json cannot be read"),
        ("list", r"index.json cannot be read"),
        ("missing", r"part-00000.parquet is missing where index.json says"),
        ("cut", r"part-00000.parquet has \d+ bytes where index.json says"),
        ("none", "is no index"),
        ("unfinished", "holds an unfinished index"),
        ("empty", "index without windows"),
    ],
)
def test_a_folder_that_is_no_usable_index_is_refused_with_one_sentence(index, kind, sentence):
    _spoil(index, kind)
    with pytest.raises(IndexProblem, match=sentence) as caught:
        open_index(index.folder)
    assert str(index.folder) in str(caught.value) and "\n" not in str(caught.value)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from geosearch import index_store, index_writer
from tests.geosearch.small_scenes import write_index
from tests.geosearch.test_index_store import METADATA, rows_of

def counted(function, step, calls=[]):
    def call(*args, **kwargs):
        calls.append(function)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for step in range(1, 60):
    folder = Path(sys.argv[1], f"{step:02d}")
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        if not status:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        continue
    write_index(folder, [rows_of("a.tif", 20)], METADATA)
    for module, name in [(index_writer.os, "replace"), (shutil, "rmtree"), (index_writer, "replace_text"), (index_writer, "sync")]:
        setattr(module, name, counted(getattr(module, name), step))
    write_index(folder, [rows_of("a.tif", 30, 5)], METADATA)
    os._exit(0)
"""


def test_a_kill_at_every_step_leaves_the_index_before_or_the_one_after(tmp_path):
    before = write_index(tmp_path / "before", [rows_of("a.tif", 20)], METADATA).metadata["parts"]
    after = write_index(tmp_path / "after", [rows_of("a.tif", 30, 5)], METADATA).metadata["parts"]
    (tmp_path / "killed").mkdir()
    processes.run([sys.executable, "-c", KILLED, tmp_path / "killed"], check=True, cwd=ROOT, project=True)
    sizes = []
    for folder in sorted((tmp_path / "killed").iterdir()):
        index_writer.finish_publishing(folder)
        index = open_index(folder)
        assert index.metadata["parts"] in (before, after)
        assert len(index.vectors()) == len(index)
        sizes.append(len(index))
    # Early kills leave the one before, late ones the one after, and the last run was not killed.
    assert sizes == sorted(sizes) and set(sizes) == {20, 30} and len(sizes) > 10


def test_windows_that_cross_the_180th_meridian_or_hold_a_pole(tmp_path):
    boxes = np.array([[0, 0, 64, 64]])
    transform = Affine(0.01, 0, 179.7, 0, -0.01, 10)
    outlines, middles = footprints(boxes, transform, "EPSG:4326")
    assert outlines[0].geom_type == "MultiPolygon" and outlines[0].is_valid
    assert outlines[0].contains(shapely.Point(179.9, 9.8)) and outlines[0].contains(shapely.Point(-179.9, 9.8))
    assert np.isclose(outlines[0].area, 0.64**2) and not outlines[0].contains(shapely.Point(0, 9.8))
    polar, _ = footprints(
        np.array([[0, 0, 100, 100], [60, 60, 20, 20]]), Affine(1e4, 0, -4e5, 0, -1e4, 4e5), "EPSG:3413"
    )
    assert (
        polar[0].is_valid
        and polar[0].contains(shapely.Point(123, 89.9))
        and not polar[1].contains(shapely.Point(0, 89))
    )
    table = row_table("p.tif", boxes, [64], outlines, middles, np.ones((1, 8)) / np.sqrt(8), crs="EPSG:4326")
    index = write_index(tmp_path / "index", [table], METADATA)
    assert geopandas.read_parquet(index.part_files[0]).geometry[0].equals(outlines[0])


def test_rows_by_number_and_their_kept_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writer, "ROWS_PER_PART", 60)
    index = write_index(tmp_path / "index", [rows_of("a.tif", 130), rows_of("b.tif", 70, 1)], METADATA)
    whole = pa.concat_tables([pq.read_table(part) for part in index.part_files]).drop_columns("embedding")
    assert index.rows().replace_schema_metadata(None) == whole.replace_schema_metadata(None)
    numbers = np.array([199, 0, 60, 59, 130, 60, 7])
    some = index.rows(["unique_id", "geometry", "pixel_box"], numbers)
    assert some.to_pylist() == whole.select(some.column_names).take(numbers).to_pylist()
    assert len(index.rows(["scene"], np.array([], dtype=np.int64))) == 0
    for content in (b"", b"something else", (index.folder / "rows.arrow").read_bytes()[:-100]):
        (index.folder / "rows.arrow").write_bytes(content)
        assert open_index(index.folder).rows().num_rows == 200
    # Another state with as many rows.
    other = write_index(index.folder, [rows_of("c.tif", 130, 7), rows_of("b.tif", 70, 8)], METADATA)
    assert set(other.rows(["scene"])["scene"].to_pylist()) == {"b.tif", "c.tif"}
