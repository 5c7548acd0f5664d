"""Maps of similarity: against a slow reference, in the scene's coordinates; places on them; the command."""

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.warp import transform as warp

from geosearch.__main__ import main
from geosearch.exact_search import SearchProblem, question_vector
from geosearch.hits import write_features
from geosearch.index_store import load_index_encoder
from geosearch.locate import SimilarityMap, mean_over_windows, places_of, scene_windows, similarity_map, write_map


def slow_map(width: int, height: int, boxes, scores, scales, shape) -> np.ndarray:
    """Cell by cell: of each scale the mean of the windows over the cell's middle, by how near their own middle it is."""
    result = np.full(shape, np.nan)
    for line in range(shape[0]):
        for column in range(shape[1]):
            x, y = (column + 0.5) * width / shape[1], (line + 0.5) * height / shape[0]
            means = []
            for scale in sorted(set(scales)):
                total = weights = 0.0
                for (left, top, across, down), score, window_scale in zip(boxes, scores, scales):
                    if window_scale == scale and left <= x < left + across and top <= y < top + down:
                        weight = (
                            min(x - left, left + across - x) / (across / 2) * min(y - top, top + down - y) / (down / 2)
                        )
                        total, weights = total + weight * score, weights + weight
                if weights:
                    means.append(total / weights)
            if means:
                result[line, column] = np.mean(means)
    return result


def test_the_mean_over_windows_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    boxes = [[left, top, 32, 32] for top in (0, 16, 32, 41) for left in (0, 16, 32, 48, 50)]
    boxes += [[left, top, 48, 40] for top in (0, 20, 33) for left in (0, 24, 34)]
    boxes.remove([0, 0, 32, 32])
    boxes.remove([0, 16, 32, 32])
    boxes.remove([0, 0, 48, 40])  # the upper left corner is nodata
    scales = np.array([32.0] * 18 + [44.0] * 8)
    scores = rng.normal(size=len(boxes))
    values = mean_over_windows(82, 73, np.array(boxes), scores, scales)
    assert values.dtype == np.float32 and values.shape == (19, 21)  # cells of an eighth of 32 pixels, or less
    wanted = slow_map(82, 73, boxes, scores, scales, values.shape)
    assert np.isnan(wanted).sum() > 10 and np.allclose(values, wanted, atol=1e-6, equal_nan=True)
    # The same everywhere is the same on the map, also at the edge and where windows were moved inside.
    flat = mean_over_windows(82, 73, np.array(boxes), np.full(len(boxes), 0.25), scales)
    assert np.nanmin(flat) == np.nanmax(flat) == 0.25


@pytest.fixture(scope="module")
def query(archive_index):
    return question_vector(archive_index, load_index_encoder(archive_index), "two tanks beside a grey road")


def test_the_map_has_the_scene_s_system_and_extent(archive_index, query, tmp_path):
    for scene in archive_index.metadata["sources"]:
        heat = similarity_map(archive_index, query, scene)
        path = write_map(heat, tmp_path / "heat.tif")
        with rasterio.open(path) as written, rasterio.open(scene) as original:
            assert written.crs == original.crs and written.count == 1
            for corner in ((0, 0), (1, 0), (1, 1), (0, 1)):
                there = written.transform @ (corner[0] * written.width, corner[1] * written.height)
                assert np.allclose(there, original.transform @ (corner[0] * 1024, corner[1] * 1024), atol=1e-6)
            assert np.array_equal(written.read(1), heat.values, equal_nan=True)
            assert written.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_the_map_is_the_mean_of_the_index_s_similarities(archive_index, query):
    scene, rows, vectors = scene_windows(archive_index, "north-0.tif")
    boxes = np.array(rows["pixel_box"].to_pylist())
    heat = similarity_map(archive_index, query, "north-0.tif")
    scores = vectors.astype(np.float64) @ query
    wanted = slow_map(1024, 1024, boxes, scores, [256] * len(boxes), heat.values.shape)
    assert np.allclose(heat.values, wanted, atol=1e-5, equal_nan=True) and len(boxes) > 40
    assert heat.scene == scene and heat.crs == "EPSG:32633"


def test_which_scene(archive_index, query):
    with pytest.raises(SearchProblem, match=r"it has 3 scenes; choose one with --scene: .*north-0.tif"):
        similarity_map(archive_index, query)
    with pytest.raises(SearchProblem, match="no scenes are named elsewhere.tif"):
        similarity_map(archive_index, query, "elsewhere.tif")


def map_of(values, crs="EPSG:32755", transform=None) -> SimilarityMap:
    turned = Affine.translation(690_000, 6_100_000) @ Affine.rotation(17) @ Affine.scale(32, -32)
    return SimilarityMap(np.asarray(values, np.float32), transform or turned, crs, "a.tif")


def test_places_are_the_parts_that_stand_out(tmp_path):
    values = np.full((20, 30), 0.1)
    values[3:6, 4:9] = 0.8  # 15 cells, the best
    values[4, 5] = 0.9
    values[12:14, 20:22] = 0.75
    values[18, 1] = 0.5  # below seven tenths of the way
    values[0, 29] = np.nan
    heat = map_of(values)
    assert np.isclose(heat.level, 0.1 + 0.7 * 0.8)
    places = places_of(heat)
    assert places["cells"].to_pylist() == [15, 4] and places["rank"].to_pylist() == [1, 2]
    assert np.allclose(places["similarity"].to_pylist(), [0.9, 0.75])
    assert np.allclose(places["mean_similarity"].to_pylist(), [(14 * 0.8 + 0.9) / 15, 0.75])
    frame = geopandas.read_file(write_features(places, tmp_path / "places.geojson"))
    x, y = zip(*(heat.transform @ corner for corner in ((4, 3), (9, 3), (9, 6), (4, 6))))
    lon, lat = warp("EPSG:32755", "OGC:CRS84", x, y)
    wanted = {(round(one, 7), round(other, 7)) for one, other in zip(lon, lat)}
    assert {(round(one, 7), round(other, 7)) for one, other in frame.geometry[0].exterior.coords} == wanted
    assert len(places_of(map_of(np.full((5, 5), 0.3)))) == 0


def test_places_across_the_180th_meridian_and_in_pixels():
    values = np.zeros((4, 8))
    values[1:3, 2:6] = 1
    around = places_of(map_of(values, "EPSG:4326", Affine(0.01, 0, 179.96, 0, -0.01, 10)))
    (outline,) = shapely.from_wkb(around["geometry"].to_pylist())
    assert outline.geom_type == "MultiPolygon" and np.isclose(outline.area, 0.04 * 0.02)
    assert np.allclose(outline.bounds, (-180, 9.97, 180, 9.99))
    pixels = places_of(map_of(values, None, Affine.scale(16, 16)))
    (outline,) = shapely.from_wkb(pixels["geometry"].to_pylist())
    assert outline.bounds == (32, 16, 96, 48)


def test_locate_encodes_no_image_of_an_indexed_scene(archive_index, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was encoded")

    monkeypatch.setattr("modeling_lrsclip.LRSCLIPModel.get_image_features", refuse)
    monkeypatch.setattr("geosearch.exact_search.embed_images", refuse)
    heat, places = tmp_path / "heat.tif", tmp_path / "places.gpkg"
    command = ["locate", str(archive_index.folder), "a grey road", "--scene", "turned-2.tif"]
    assert main([*command, "--output", str(heat), "--places", str(places)]) == 0
    assert "The text has" in capsys.readouterr().out
    with rasterio.open(heat) as written:
        values = written.read(1)
    frame = geopandas.read_file(places).to_crs("EPSG:32755")
    best = frame[frame["rank"] == 1]
    assert np.isclose(best.similarity.item(), np.nanmax(values), atol=1e-5)
    line, column = np.unravel_index(np.nanargmax(values), values.shape)
    assert best.geometry.item().contains(shapely.Point(written.transform @ (column + 0.5, line + 0.5)))


def test_a_scene_s_file_gives_the_same_map_as_its_index(archive, archive_index, checkpoint, query, tmp_path, capsys):
    scene = str(archive / "scenes" / "south-1.tif")
    text, heat = "two tanks beside a grey road", tmp_path / "heat.tif"
    assert main(["locate", scene, text, "--model", checkpoint, "--window", "256", "--output", str(heat)]) == 0
    with rasterio.open(heat) as written:
        wanted = similarity_map(archive_index, query, "south-1.tif").values
        assert np.allclose(written.read(1), wanted, atol=1e-6, equal_nan=True)
    capsys.readouterr()
    assert main(["locate", scene, text]) == 2
    assert "name the --model" in capsys.readouterr().err
    assert main(["locate", str(archive_index.folder), text, "--window", "256"]) == 2
    assert "--window is for a scene's file" in capsys.readouterr().err


def test_a_map_is_a_geotiff(archive_index, query, tmp_path):
    heat = similarity_map(archive_index, query, "north-0.tif")
    with pytest.raises(SearchProblem, match="let its name end in .tif"):
        write_map(heat, tmp_path / "heat.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchProblem, match="cannot be written"):
        write_map(heat, tmp_path / "file" / "heat.tif")
