"""Exact search: the ranking against a slow reference, places, areas, questions; and what the hits are written to."""

import datetime
import io
import json
import sqlite3

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
import torch
from affine import Affine
from PIL import Image
from rasterio.transform import xy
from rasterio.warp import transform as warp
from rich.console import Console

from geosearch import exact_search as search_module
from geosearch.area import EARTH
from geosearch.exact_search import (
    Area,
    SearchProblem,
    distinct_places,
    nearest_places,
    question_vector,
    ranked_rows,
    read_text,
    search,
    similarities,
)
from geosearch.footprints import footprints
from geosearch.hits import feature_table, print_hits, write_features
from geosearch.index_store import IndexProblem, row_table
from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from tests.geosearch.small_scenes import write_index


WIDTH = 24  # of the tiny model's shared space
SCENES = {  # name -> CRS, transform of pixels, year; a rotated one, a south-up one, one across the 180th meridian
    "north.tif": ("EPSG:32633", Affine(10, 0, 400_000, 0, -10, 5_500_000), 2020),
    "rotated.tif": ("EPSG:32633", Affine(8.66, 5, 450_000, 5, -8.66, 5_500_000), 2021),
    "south-up.tif": ("EPSG:3857", Affine(10, 0, 1_900_000, 0, 10, 6_000_000), 2022),
    "fiji.tif": ("EPSG:32701", Affine(10, 0, 179_400, 0, -10, 8_100_000), None),
}


def unit_rows(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_index(folder, weights: str = "ab" * 32, coordinates: str = "wgs84"):
    """64 windows of 64 pixels, stride 32, of each scene."""
    boxes = np.array([[32 * column, 32 * row, 64, 64] for row in range(8) for column in range(8)])
    tables = []
    for seed, (name, (crs, transform, year)) in enumerate(SCENES.items()):
        crs, transform = (crs, transform) if coordinates == "wgs84" else (None, Affine.identity())
        outlines, middles = footprints(boxes, transform, crs)
        facts = {"crs": crs, "gsd": 10.0 if crs else None}
        if year:
            facts["timestamp"] = datetime.datetime(year, 6, 1, tzinfo=datetime.timezone.utc)
        vectors = unit_rows(64, seed=seed)
        tables.append(row_table(f"/scenes/{name}", boxes, np.full(64, 64), outlines, middles, vectors, **facts))
    model = {"id": "tiny", "weights_sha256": weights, "dimensions": WIDTH}
    metadata = {"model": model, "windows": {"sizes": ["64"], "stride": 0.5}, "coordinates": coordinates}
    return write_index(folder, tables, metadata)


@pytest.fixture
def index(tmp_path):
    return make_index(tmp_path / "index")


@pytest.fixture
def encoder(tiny_model, tiny_processor):
    return Encoder(tiny_model, tiny_processor)


@pytest.fixture
def own_index(encoder, tmp_path):
    """An index that the encoder's model may search."""
    return make_index(tmp_path / "own", encoder.weights_sha256)


# ----------------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("count", [1, 1023, 1024, 5000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_similarities_are_those_of_float64(count, threads):
    vectors, query = unit_rows(count, 40).astype(np.float16), unit_rows(1, 40, 9)[0]
    scores = similarities(vectors, query, threads)
    assert scores.dtype == np.float32 and scores.shape == (count,)
    assert np.abs(scores - vectors.astype(np.float64) @ query).max() < 1e-6
    assert torch.get_num_threads() == 1  # as the tests' conftest set it


def test_a_mapped_file_gives_its_pages_back_and_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "BLOCK", 64)
    monkeypatch.setattr(search_module, "RELEASE", 2)
    vectors, query = unit_rows(5000, 40).astype(np.float16), unit_rows(1, 40, 9)[0]
    vectors.tofile(tmp_path / "v")
    mapped = np.memmap(tmp_path / "v", np.float16, "r", shape=(5000, 40))
    given_back = []
    release = search_module._release
    monkeypatch.setattr(search_module, "_release", lambda *rows: (given_back.append(rows[1:]), release(*rows)))
    for _ in range(2):
        assert np.abs(similarities(mapped, query, 2) - vectors.astype(np.float64) @ query).max() < 1e-6
    assert len(given_back) > 50 and all(0 <= start < stop <= 5000 for start, stop in given_back)


def test_ranking_is_exact_and_equal_rows_come_in_their_order(monkeypatch):
    monkeypatch.setattr(search_module, "FIRST_RANKS", 4)
    vectors = unit_rows(300, 40).astype(np.float16)
    vectors[200:260] = vectors[7]  # sixty equal rows, in the middle of the ranking of others
    query = unit_rows(1, 40, 9)[0].astype(np.float32)
    exact = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    wanted = sorted(range(300), key=lambda row: (-round(exact[row], 9), row))
    # Scores as another processor might sum them: the last bits differ from row to row, even of equal rows.
    noise = np.random.default_rng(1).uniform(-5e-5, 5e-5, 300).astype(np.float32)
    parts = list(ranked_rows(vectors, query, exact.astype(np.float32) + noise))
    assert [len(rows) for rows, _ in parts] == [4, 12, 48, 192, 44]
    assert np.concatenate([rows for rows, _ in parts]).tolist() == wanted
    assert np.allclose(np.concatenate([values for _, values in parts]), exact[wanted], atol=1e-12)
    allowed = np.zeros(300, bool)
    allowed[[3, 7, 210, 299]] = True
    ((rows, _),) = ranked_rows(vectors, query, exact.astype(np.float32), allowed)
    assert rows.tolist() == [row for row in wanted if allowed[row]]


# --------------------------------------------------------------------------------------------------------------- places


def greedy_places(outlines, groups) -> list[int]:
    """The slow reference: every window against every one chosen before."""
    chosen: list[int] = []
    for row, outline in enumerate(outlines):
        smaller = [min(outline.area, outlines[other].area) for other in chosen]
        shared = [outline.intersection(outlines[other]).area for other in chosen]
        if not any(
            both >= 0.2 * area and groups[row] == groups[other] for both, area, other in zip(shared, smaller, chosen)
        ):
            chosen.append(row)
    return chosen


def test_overlapping_windows_are_one_place():
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 200, (150, 2))
    sides = rng.choice([32, 64], 150)
    outlines = shapely.box(*corners.T, *(corners + sides[:, None]).T)
    outlines = np.array([shapely.affinity.rotate(box, 20, (0, 0)) for box in outlines])
    groups = rng.integers(0, 2, 150)
    wanted = greedy_places(outlines, groups)
    assert 5 < len(wanted) < 100
    assert distinct_places(outlines, groups) == wanted
    # In steps: those chosen first, then the rest after them.
    first = distinct_places(outlines[:40], groups[:40])
    rest = [*first, *range(40, 150)]
    again = distinct_places(outlines[rest], groups[rest], range(len(first)))
    assert [rest[number] for number in again] == wanted


def test_hits_are_distinct_and_best_first(index, monkeypatch):
    query = unit_rows(1, seed=5)[0].astype(np.float32)
    hits = nearest_places(index, query, top=12)
    exact = index.vectors().astype(np.float64) @ query
    assert hits.row_numbers[0] == exact.argmax() and np.isclose(hits.similarity[0], exact.max())
    assert (np.diff(hits.similarity) <= 0).all() and len(hits) == 12 and hits.searched == 256
    assert np.allclose(hits.similarity, exact[hits.row_numbers])
    outlines = shapely.from_wkb(index.rows(["geometry"])["geometry"].to_pylist())
    order = np.lexsort((np.arange(256), -np.round(exact, 9)))
    wanted = order[greedy_places(outlines[order], np.zeros(256, int))][:12]
    assert hits.row_numbers.tolist() == wanted.tolist()
    assert np.isclose(hits.mean, exact.mean(), atol=1e-6) and np.isclose(hits.deviation, exact.std(), atol=1e-6)
    assert np.allclose(hits.z_score, (hits.similarity - exact.mean()) / exact.std(), atol=1e-3)
    monkeypatch.setattr(search_module, "FIRST_RANKS", 3)  # the same, found in many small steps
    assert nearest_places(index, query, top=12).row_numbers.tolist() == wanted.tolist()
    everything = nearest_places(index, query, top=10_000)
    assert len(everything) == len(greedy_places(outlines[order], np.zeros(256, int)))


def test_scenes_that_know_pixels_only_do_not_hide_each_other(tmp_path):
    index = make_index(tmp_path / "index", coordinates="pixels")
    query = unit_rows(1, seed=5)[0].astype(np.float32)
    hits = nearest_places(index, query, top=10_000)
    assert set(hits.rows["scene"].to_pylist()) == {f"/scenes/{name}" for name in SCENES}
    best = {(row["scene"], tuple(row["pixel_box"])) for row in hits.rows.to_pylist()}
    assert len(best) == len(hits) > 4 * 6
    with pytest.raises(SearchProblem, match="knows pixels only"):
        nearest_places(index, query, Area(bbox=(0, 0, 1, 1)))


# ----------------------------------------------------------------------------------------------------------------- area


def test_areas_keep_what_lies_inside(index):
    frame = geopandas.read_parquet(index.part_files[0])
    rows = index.rows(["scene", "timestamp", "centre_lon", "centre_lat"]).to_pylist()
    names = [row["scene"] for row in rows]

    def scenes(area) -> set[str]:
        kept = area.rows(index)
        return {names[row].rsplit("/", 1)[1] for row in np.flatnonzero(kept)}

    assert Area().rows(index) is None
    west, south, east, north = frame[frame.scene == "/scenes/north.tif"].total_bounds
    kept = Area(bbox=(west, south, (west + east) / 2, north)).rows(index)
    touching = frame.bounds.minx.le((west + east) / 2) & frame.scene.eq("/scenes/north.tif")
    assert kept.tolist() == touching.tolist() and 30 < kept.sum() < 64
    # Across the 180th meridian, from both sides, and a strip that only the part beyond it touches.
    fiji = frame[frame.scene == "/scenes/fiji.tif"]
    assert (fiji.geom_type == "MultiPolygon").any() and (fiji.geom_type == "Polygon").any()
    assert scenes(Area(bbox=(170, -30, -170, 0))) == {"fiji.tif"}
    beyond = Area(bbox=(-180, -30, -179.9, 0)).rows(index)
    assert beyond.tolist() == frame.intersects(shapely.box(-180, -30, -179.9, 0)).tolist() and beyond.any()
    assert scenes(Area(bbox=(-180, -30, 0, 0))) == {"fiji.tif"}
    with pytest.raises(SearchProblem, match=r"no window of .* lies within bbox 0,-30,170,0"):
        Area(bbox=(0, -30, 170, 0)).rows(index)

    lon, lat = rows[100]["centre_lon"], rows[100]["centre_lat"]
    near = Area(near=(lon, lat, 0.5)).rows(index)
    metres = [EARTH.inv(lon, lat, row["centre_lon"], row["centre_lat"])[2] for row in rows]
    assert near.tolist() == [metre <= 500 for metre in metres] and 1 < near.sum() < 30

    june = datetime.datetime(2021, 6, 1)
    assert scenes(Area(after=june)) == {"rotated.tif", "south-up.tif"}
    assert scenes(Area(before=june)) == {"north.tif"}
    assert scenes(Area(after=datetime.datetime(2020, 7, 1), before=datetime.datetime(2022, 1, 1))) == {"rotated.tif"}
    query = unit_rows(1, seed=5)[0].astype(np.float32)
    hits = nearest_places(index, query, Area(after=june), top=3)
    assert hits.searched == 128 and set(hits.rows["scene"].to_pylist()) <= {
        "/scenes/rotated.tif",
        "/scenes/south-up.tif",
    }
    whole = nearest_places(index, query, top=3)
    assert (hits.mean, hits.deviation) == (whole.mean, whole.deviation)  # of the index, not of the area


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"bbox": (0, 10, 5, -10)}, "is no area"),
        ({"bbox": (-200, 0, 5, 10)}, "is no area"),
        ({"bbox": (3, 0, 3, 10)}, "is no area"),
        ({"near": (0, 0, 0)}, "is no circle"),
        ({"near": (0, 91, 5)}, "is no circle"),
        ({"near": (0, 0, float("nan"))}, "is no circle"),
        ({"after": datetime.datetime(2022, 1, 1), "before": datetime.datetime(2022, 1, 1)}, "exchange them"),
    ],
)
def test_impossible_areas_are_refused(fields, sentence):
    with pytest.raises(SearchProblem, match=sentence):
        Area(**fields)


# ------------------------------------------------------------------------------------------------------------- question


def test_a_single_text_or_image_is_its_own_embedding(own_index, encoder, long_texts, images):
    text = question_vector(own_index, encoder, long_texts[0])
    assert np.array_equal(text, embed_texts(encoder.model, encoder.processor, [long_texts[0]])[0].numpy())
    image = question_vector(own_index, encoder, None, images[0])
    assert np.array_equal(image, embed_images(encoder.model, encoder.processor, [images[0]])[0].numpy())


def test_several_parts_count_alike_and_exclude_counts_against(own_index, encoder, long_texts, short_texts, images):
    vectors = own_index.vectors().astype(np.float64)
    text, other = embed_texts(encoder.model, encoder.processor, [long_texts[0], short_texts[1]]).double().numpy()
    image = embed_images(encoder.model, encoder.processor, [images[0]])[0].double().numpy()

    def z_scores(vector):
        values = vectors @ vector
        return (values - values.mean()) / values.std()

    asked = question_vector(own_index, encoder, long_texts[0], images[0], short_texts[1])
    assert np.isclose(np.linalg.norm(asked), 1, atol=1e-6)
    wanted = z_scores(text) + z_scores(image) - z_scores(other)
    assert np.allclose(z_scores(asked.astype(np.float64)), (wanted - wanted.mean()) / wanted.std(), atol=1e-4)


@pytest.mark.parametrize("question", [{}, {"text": " "}, {"text": "a tank", "exclude": ""}, {"exclude": "a tank"}])
def test_empty_questions_are_refused(own_index, encoder, question):
    with pytest.raises(SearchProblem, match="is empty|nothing to look for"):
        search(own_index, encoder=encoder, **question)


def test_the_model_and_top_are_checked(index, own_index, encoder):
    with pytest.raises(IndexProblem, match="was made with the weights"):
        search(index, "a tank", encoder=encoder)
    with pytest.raises(SearchProblem, match="top is 0"):
        search(own_index, "a tank", encoder=encoder, top=0)


def test_what_is_read_of_a_text(encoder, long_texts):
    tokenizer = encoder.processor.tokenizer
    short = read_text(encoder, "Two  tanks &amp; a “pier”")
    assert short.text == 'two tanks & a "pier"' and short.cut == "" and short.clip_cut_at == len(short.text)
    assert short.tokens == encoder.processor.count_tokens(["Two  tanks &amp; a “pier”"])[0]
    text = " ".join(long_texts * 4)
    read = read_text(encoder, text)
    assert read.tokens == encoder.processor.count_tokens([text])[0] > 248 == read.limit
    for end, positions in ((read.cut_at, 248), (read.clip_cut_at, 77)):
        ids = tokenizer(read.text)["input_ids"][
            1 : positions - 1
        ]  # as many as fit between the start and the end token
        assert tokenizer.decode(ids).replace(" ", "") == read.text[:end].replace(" ", "")
    assert read.text[read.cut_at :].strip() == read.cut and read.cut in read.sentence()
    assert "248" in read.sentence() and str(read.tokens) in read.sentence()


# ----------------------------------------------------------------------------------------------------------------- hits


@pytest.fixture
def hits(own_index, encoder, long_texts):
    return search(own_index, long_texts[0], encoder=encoder, top=40)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".parquet"])
def test_files_hold_the_four_corners_to_the_pixel(hits, tmp_path, suffix):
    path = write_features(feature_table(hits), tmp_path / "deeper" / f"hits{suffix}")
    frame = geopandas.read_parquet(path) if suffix == ".parquet" else geopandas.read_file(path)
    assert len(frame) == 40 and frame.crs.to_epsg() in (4326, None) and frame.crs.equals("OGC:CRS84", True)
    assert frame["rank"].tolist() == list(range(1, 41)) and frame.similarity.is_monotonic_decreasing
    assert frame.scene.nunique() == 4
    for row in frame.itertuples():
        box = json.loads(row.pixel_box) if isinstance(row.pixel_box, str) else list(row.pixel_box)
        crs, transform, year = SCENES[row.scene.rsplit("/", 1)[1]]
        assert (row.timestamp.year == year) if year else row.timestamp is None or row.timestamp != row.timestamp
        left, top, width, height = box
        x, y = xy(
            transform, [top, top, top + height, top + height], [left, left + width, left + width, left], offset="ul"
        )
        lon, lat = warp(crs, "OGC:CRS84", x, y)  # rasterio's own arithmetic
        if row.geometry.geom_type == "Polygon":
            corners = {tuple(np.round(corner, 6)) for corner in row.geometry.exterior.coords}
            assert corners == {(round(one, 6), round(other, 6)) for one, other in zip(lon, lat)}
        else:
            outline = shapely.Polygon([(one % 360, other) for one, other in zip(lon, lat)])
            assert np.isclose(row.geometry.area, outline.area, rtol=1e-6)
    turned = frame[frame.scene == "/scenes/rotated.tif"].geometry.iloc[0]
    assert turned.area < 0.8 * turned.envelope.area  # a quadrilateral, not its bounding box


def test_formats_keep_the_types(hits, tmp_path):
    table = feature_table(hits)
    feature = json.loads(write_features(table, tmp_path / "hits.geojson").read_text())["features"][0]
    wanted = {
        "rank", "similarity", "z_score", "scene", "pixel_box", "scale", "gsd", "timestamp", "crs",
        "centre_lat", "centre_lon", "unique_id",
    }  # fmt: skip
    assert set(feature["properties"]) == wanted
    assert isinstance(feature["properties"]["pixel_box"], list) and len(feature["properties"]["pixel_box"]) == 4
    path = write_features(table, tmp_path / "hits.gpkg")
    with sqlite3.connect(path) as base:
        assert base.execute("select count(*), min(rank), max(pixel_box) from hits").fetchone()[:2] == (40, 1)
    assert pyogrio.list_layers(path)[0][0] == "hits"
    write_features(table.slice(0, 3), path)  # in the place of the one before
    assert len(geopandas.read_file(path)) == 3
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["hits.geojson", "hits.gpkg"]


def test_pixels_have_no_reference_system(tmp_path):
    hits = nearest_places(make_index(tmp_path / "index", coordinates="pixels"), unit_rows(1)[0], top=3)
    for suffix in (".geojson", ".gpkg", ".parquet"):
        path = write_features(feature_table(hits), tmp_path / f"hits{suffix}", hits.coordinates)
        if suffix == ".parquet":
            assert geopandas.read_parquet(path).crs is None
        box = hits.rows["pixel_box"].to_pylist()[0]
        frame = geopandas.read_parquet(path) if suffix == ".parquet" else geopandas.read_file(path)
        assert frame.geometry[0].bounds == (box[0], box[1], box[0] + box[2], box[1] + box[3])


def test_a_file_of_another_kind_or_place_is_refused(hits, tmp_path):
    with pytest.raises(SearchProblem, match=r"hits.shp ends in .shp; write to .geojson, .json, .gpkg, .parquet"):
        write_features(feature_table(hits), tmp_path / "hits.shp")
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchProblem, match="cannot be written"):
        write_features(feature_table(hits), tmp_path / "file" / "hits.geojson")


def test_the_table_says_what_was_read_and_what_it_is_measured_against(hits, own_index, encoder, long_texts):
    console = Console(width=160, record=True, file=io.StringIO())
    print_hits(hits, console)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["rank", "similarity", "above", "place", "scene", "time"]
    assert f"{hits.similarity[0]:.4f}" in lines[1] and f"{hits.z_score[0]:.1f} σ" in lines[1] and "° N" in lines[1]
    text = "\n".join(lines)
    assert "256 windows compared" in text and hits.text.sentence() in text.replace("\n", " ")
    assert f"mean is {hits.mean:.4f}" in text
    too_long = search(own_index, " ".join(long_texts * 4), encoder=encoder)
    console = Console(width=10_000, record=True, file=io.StringIO())
    print_hits(too_long, console)
    assert f"not read: “{too_long.text.cut}”" in console.export_text()


def test_an_image_cut_on_the_window_grid_is_found_again(encoder, tmp_path):
    """A scene's own windows, encoded and searched: the first hit is the very window."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (12, 12, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    boxes = np.array([[32 * column, 32 * row, 64, 64] for row in range(5) for column in range(5)])
    chips = [Image.fromarray(pixels[top : top + 64, left : left + 64]) for left, top, _, _ in boxes]
    vectors = embed_images(encoder.model, encoder.processor, chips).numpy()
    outlines, middles = footprints(boxes, Affine(10, 0, 400_000, 0, -10, 5_500_000), "EPSG:32633")
    table = row_table("a.tif", boxes, np.full(25, 64), outlines, middles, vectors, crs="EPSG:32633")
    model = {"id": "tiny", "weights_sha256": encoder.weights_sha256, "dimensions": WIDTH}
    index = write_index(tmp_path / "index", [table], {"model": model, "windows": {}, "coordinates": "wgs84"})
    for number in (0, 7, 24):
        hits = search(index, image=chips[number], encoder=encoder, top=1)
        assert hits.rows["pixel_box"].to_pylist() == [boxes[number].tolist()]
        assert hits.similarity[0] > 0.999
