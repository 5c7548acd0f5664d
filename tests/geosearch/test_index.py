"""Indexing real GeoTIFFs: places, pixels and embeddings against rasterio and the encoder by hand; adding, changing, resuming."""

import json
import os

import numpy as np
import pytest
import rasterio
import rasterio.warp
import shapely
from affine import Affine
from PIL import Image
from rasterio.shutil import copy as copy_raster
from rasterio.transform import from_origin
from rasterio.windows import Window

from geosearch.index_store import open_index
from modeling_lrsclip.encoding import embed_images, load_encoder
from tests.geosearch.small_scenes import noise, write_scene


TURNED = Affine.translation(400_000, 5_500_000) @ Affine.rotation(30) @ Affine.scale(10, -10)
PLACES = {
    "utm": ("EPSG:32633", None),
    "south of the equator": ("EPSG:32733", from_origin(400_000, 7_000_000, 0.5, 0.5)),
    "degrees": ("EPSG:4326", from_origin(13, 52, 1e-4, 1e-4)),
    "mercator": ("EPSG:3857", from_origin(1.5e6, 6e6, 3, 3)),
    "rotated": ("EPSG:32633", TURNED),
    "south-up": ("EPSG:32633", Affine(10, 0, 400_000, 0, 10, 5_400_000)),
    "mirrored": ("EPSG:32633", Affine(-10, 0, 400_000, 0, -10, 5_500_000)),
    "180th meridian": ("EPSG:32660", from_origin(706_000, 5_500_000, 100, 100)),
    "north pole": ("EPSG:3413", from_origin(-10_000, 10_000, 100, 100)),
    "near the south pole": ("EPSG:3031", from_origin(200_000, 10_000, 100, 100)),
}


@pytest.mark.parametrize("name", PLACES)
def test_footprints_agree_with_rasterios_own_arithmetic(make_index, tmp_path, name):
    crs, transform = PLACES[name]
    scene = write_scene(tmp_path / "scene.tif", noise(3, 150, 210), crs, transform)
    make_index(scene)
    rows = open_index(tmp_path / "index").rows()
    assert len(rows) == 4 * 6
    with rasterio.open(scene) as dataset:
        for row in rows.to_pylist():
            left, top, width, height = row["pixel_box"]
            window = dataset.window_transform(Window(left, top, width, height))
            corners = [window * corner for corner in ((0, 0), (width, 0), (width, height), (0, height))]
            lon, lat = rasterio.warp.transform(dataset.crs, "EPSG:4326", *zip(*corners))
            outline = shapely.from_wkb(row["geometry"])
            assert outline.is_valid
            vertices = shapely.get_coordinates(outline)
            for point in zip(lon, lat):
                turns = [
                    (abs(vertices[:, 0] - point[0] + turn) + abs(vertices[:, 1] - point[1])).min()
                    for turn in (-360, 0, 360)
                ]
                assert min(turns) < 1e-7, (name, point, outline)
            (x,), (y,) = rasterio.warp.transform(dataset.crs, "EPSG:4326", *zip(window * (width / 2, height / 2)))
            assert abs((row["centre_lon"] - x + 180) % 360 - 180) < 1e-4 or abs(y) > 89.9
            assert abs(row["centre_lat"] - y) < 1e-4 and row["crs"] == crs
            inside = outline.buffer(1e-6).contains(shapely.Point(row["centre_lon"], row["centre_lat"]))
            assert inside or abs(y) > 89
            assert row["bbox"]["xmin"] == outline.bounds[0] and row["bbox"]["ymax"] == outline.bounds[3]
    if name == "180th meridian":
        kinds = {shapely.from_wkb(row["geometry"]).geom_type for row in rows.to_pylist()}
        assert kinds == {"Polygon", "MultiPolygon"}
        assert all(shapely.from_wkb(row["geometry"]).area < 0.02 for row in rows.to_pylist())
    if name == "utm":
        assert rows["gsd"].to_pylist() == pytest.approx([10] * 24, rel=2e-3)


def chips_by_hand(scene, boxes) -> list[Image.Image]:
    """Windows of an 8-bit RGB scene, each read by itself."""
    with rasterio.open(scene) as dataset:
        return [Image.fromarray(np.moveaxis(dataset.read(window=Window(*box)), 0, -1)) for box in boxes]


def test_vectors_are_those_of_the_windows_read_by_hand(make_index, checkpoint, tmp_path):
    scene = write_scene(
        tmp_path / "scene.tif", noise(3, 333, 700), tiled=True, blockxsize=128, blockysize=128, compress="deflate"
    )
    content = make_index(scene, window="64,128")
    index = open_index(tmp_path / "index")
    rows = index.rows(["pixel_box", "scale", "unique_id"])
    assert content["encoded"] == len(index) == 10 * 21 + 5 * 10 and len(set(rows["unique_id"].to_pylist())) == len(
        index
    )
    assert set(zip(rows["scale"].to_pylist(), (box[2] for box in rows["pixel_box"].to_pylist()))) == {
        (64, 64),
        (128, 128),
    }
    encoder = load_encoder(checkpoint)
    expected = embed_images(
        encoder.model, encoder.processor, chips_by_hand(scene, rows["pixel_box"].to_pylist())
    ).numpy()
    assert np.abs(index.vectors().astype(np.float32) - expected).max() < 6e-4  # half a step of float16


@pytest.mark.parametrize("driver", ["COG", "VRT", "JP2OpenJPEG"])
def test_the_format_of_a_scene_changes_nothing(make_index, tmp_path, driver):
    scene = write_scene(tmp_path / "scene.tif", noise(3, 200, 300, "uint16"))
    other = tmp_path / "other" / {"COG": "scene.tif", "VRT": "scene.vrt", "JP2OpenJPEG": "scene.jp2"}[driver]
    other.parent.mkdir()
    lossless = {"QUALITY": 100, "REVERSIBLE": "YES", "YCBCR420": "NO"} if driver == "JP2OpenJPEG" else {}
    copy_raster(scene, other, driver=driver, **lossless)
    make_index(scene)
    make_index(other, output=tmp_path / "copied")
    ours, theirs = open_index(tmp_path / "index"), open_index(tmp_path / "copied")
    assert np.array_equal(ours.vectors(), theirs.vectors())
    assert ours.rows(["geometry", "pixel_box", "crs"]).equals(theirs.rows(["geometry", "pixel_box", "crs"]))


def test_several_readers_and_large_windows_change_nothing(make_index, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", noise(3, 400, 700))
    parts = [make_index(scene, output=tmp_path / str(readers), readers=readers)["parts"] for readers in (1, 3)]
    assert parts[0] == parts[1]
    large = write_scene(tmp_path / "large.tif", noise(3, 2500, 2600))
    content = make_index(large, output=tmp_path / "large", window="2400")
    assert content["rows"] == 4  # averaged while read, not one for one


def test_windows_of_nothing_are_left_out_and_edges_filled(make_index, tmp_path):
    pixels = noise(4, 256, 256, "uint16") + 1
    pixels[:, :, :128] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    content = make_index(scene)
    lefts = [box[0] for box in open_index(tmp_path / "index").rows(["pixel_box"])["pixel_box"].to_pylist()]
    assert min(lefts) == 96 and len(lefts) == 7 * 4  # those half empty stay
    facts = content["sources"][str(scene)]
    assert (facts["windows"], facts["empty"]) == (28, 21)
    assert facts["rendering"]["nodata"] == 0 and facts["rendering"]["stretch"] == "percentiles 2-98"
    with pytest.raises(ValueError, match="was made with max_empty 0.5 and not 0.1"):
        make_index(scene, max_empty=0.1)
    assert make_index(scene, output=tmp_path / "strict", max_empty=0.1)["rows"] == 21


def test_scenes_are_added_changed_and_missed(make_index, tmp_path, capsys):
    a = write_scene(tmp_path / "s" / "a.tif", noise(3, 150, 150))
    b = write_scene(
        tmp_path / "s" / "b.tif", noise(3, 150, 150, seed=1), transform=from_origin(410_000, 5_500_000, 10, 10)
    )
    assert make_index(a)["encoded"] == 16
    both = make_index(a, b, window=None)  # window, and model, are those of the index
    assert both["encoded"] == 16 and both["rows"] == 32
    assert make_index(tmp_path / "s", output=tmp_path / "at once")["parts"] == both["parts"]
    again = make_index(tmp_path / "s", model=None)
    assert again["encoded"] == 0 and again["updated"] == both["updated"]
    os.utime(a, ns=(1, 1))  # touched, and the same
    assert make_index(tmp_path / "s")["encoded"] == 0
    assert open_index(tmp_path / "index").metadata["sources"][str(a)]["files"][0][2] == 1
    write_scene(b, noise(3, 150, 150, seed=2), transform=from_origin(410_000, 5_500_000, 10, 10))
    changed = make_index(tmp_path / "s")
    assert changed["encoded"] == 16 and changed["rows"] == 32 and changed["parts"] != both["parts"]
    assert make_index(tmp_path / "s", output=tmp_path / "fresh")["parts"] == changed["parts"]
    capsys.readouterr()
    b.unlink()
    assert make_index(tmp_path / "s")["rows"] == 32
    assert "1 scenes of the index are no longer on disk and stay" in capsys.readouterr().err
    assert make_index(tmp_path / "s", drop_missing=True)["rows"] == 16
    assert set(open_index(tmp_path / "index").rows(["scene"])["scene"].to_pylist()) == {str(a)}


def test_what_cannot_be_read_is_named_and_the_rest_indexed(make_index, tmp_path, capsys):
    good = write_scene(tmp_path / "s" / "good.tif", noise(3, 150, 150))
    (tmp_path / "s" / "text.tif").write_text("no image at all")
    cut = write_scene(tmp_path / "s" / "truncated.tif", noise(3, 300, 300, seed=3))
    cut.write_bytes(cut.read_bytes()[:150_000])
    content = make_index(tmp_path / "s")
    skipped = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    assert [os.path.basename(entry["scene"]) for entry in skipped] == ["text.tif", "truncated.tif"]
    assert "no raster of a known format" in skipped[0]["reason"] and str(cut) in skipped[1]["reason"]
    # What is readable of the truncated scene is there.
    facts = content["sources"][str(cut)]
    assert (
        0 < facts["windows"] < 81
        and facts["windows"] + facts["unreadable"] == 81 == facts["windows"] + skipped[1]["windows"]
    )
    assert content["sources"][str(good)]["windows"] == 16
    with pytest.raises(ValueError, match=r"2 scenes cannot be read, more than --max-skipped 1 allows"):
        make_index(tmp_path / "s", output=tmp_path / "strict", max_skipped=1)
    assert len((tmp_path / "strict" / "skipped.jsonl").read_text().splitlines()) >= 1
