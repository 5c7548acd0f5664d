"""`hits.html` in a real browser, from disk and without network; pictures of scenes; the image to search with."""

import json
import re
import time

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform as warp
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from geosearch.__main__ import main
from geosearch.exact_search import nearest_places, search
from geosearch.index_store import load_index_encoder
from geosearch.page import MapFrame, hits_page, map_svg
from geosearch.pictures import ScenePictures


@pytest.fixture(scope="module")
def encoder(archive_index):
    return load_index_encoder(archive_index)


@pytest.fixture
def pictures(archive_index):
    return ScenePictures(archive_index)


@pytest.fixture
def hits(archive_index):
    return nearest_places(archive_index, archive_index.vectors()[5].astype(np.float32), top=8)


def cut_chip(scene: str, box: tuple[int, int, int, int], path):
    """A part of a scene as a GeoTIFF of its own, cut by rasterio."""
    window = Window(*box)
    with rasterio.open(scene) as source:
        profile = source.profile | {"width": box[2], "height": box[3], "tiled": False}
        profile |= {"transform": window_transform(window, source.transform)}
        with rasterio.open(path, "w", **{key: profile[key] for key in profile if "block" not in key}) as chip:
            chip.colorinterp = source.colorinterp
            chip.write(source.read(window=window))
    return path


def test_a_chip_of_a_stretched_scene_is_found_at_its_exact_place(archive_index, pictures, encoder, tmp_path):
    """Three scenes of 16 bits in different zones, one rotated: a chip on the window grid comes back first."""
    for number, scene in enumerate(pictures.scenes):
        box = (128 * (number + 2), 384, 256, 256)
        chip = cut_chip(scene, box, tmp_path / "chip.tif")
        hits = search(archive_index, image=pictures.example(chip), encoder=encoder, top=3)
        assert hits.similarity[0] > 0.999
        (first,) = hits.rows.slice(0, 1).to_pylist()
        assert (first["scene"], tuple(first["pixel_box"])) == (scene, box)
        with rasterio.open(chip) as opened:
            corners = [opened.transform @ corner for corner in ((0, 0), (256, 0), (256, 256), (0, 256))]
            lon, lat = warp(opened.crs, "OGC:CRS84", *zip(*corners))
        wanted = {(round(x, 9), round(y, 9)) for x, y in zip(lon, lat)}
        assert {(round(x, 9), round(y, 9)) for x, y in hits.outlines[0].exterior.coords} == wanted
        assert np.allclose(pictures.corners(scene, box), np.stack([lon, lat], -1), atol=1e-9)
    # Stretched by its own few values it would be another picture.
    with pictures.options.open(str(chip)) as raster:
        alone, _ = raster.read(0, 0, 256, 256)
    assert np.abs(np.asarray(pictures.example(chip)).astype(int) - alone).mean() > 3


def test_pictures_show_what_was_indexed(pictures):
    scene = pictures.scenes[0]
    whole = pictures.picture(scene, None, 512)
    part = pictures.picture(scene, (512, 512, 256, 256), 64)
    assert whole.size == (512, 512) and part.size == (64, 64)
    again = np.asarray(whole.crop((256, 256, 384, 384)).resize((64, 64)), dtype=float)
    assert np.abs(again - np.asarray(part)).mean() < 12
    assert pictures.picture(scene, (900, 900, 256, 256)).size == (124, 124)  # cut at the edge, not enlarged


def test_a_scene_that_is_gone_leaves_its_hits(archive_index, pictures, hits, monkeypatch):
    monkeypatch.setattr(ScenePictures, "open", lambda self, scene: self.options.open(scene + ".gone"))
    page = hits_page(pictures, hits, "gone")
    assert page.count("cannot be read") == len(hits) and "data:image" not in page
    assert len(re.findall(r'data-rank="\d', page)) == 2 * len(hits)


def test_names_from_outside_are_escaped(pictures, hits):
    page = hits_page(pictures, hits, "<script>alert(1)</script> & {braces}")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {braces}" in page


def test_the_drawing_places_scenes_and_footprints(pictures, hits):
    frame = MapFrame(pictures, pictures.scenes)
    for scene in pictures.scenes:
        quarter = frame.ring(scene, (512, 512, 512, 512))
        whole = frame.ring(scene)
        assert np.allclose(quarter[2], whole[2]) and np.allclose(quarter[0], whole.mean(axis=0), atol=1e-4)
        assert whole[0, 1] < whole[3, 1]  # the first line of the picture lies above the last, also in the drawing
    svg = map_svg(pictures, hits, pictures.scenes)
    assert svg.count("<image") == 3 and svg.count('class="hit"') == len(hits) == 8


def requests_of(browser) -> list[str]:
    """Addresses that the browser asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def test_the_page_opens_from_disk_and_follows_clicks(archive_index, checkpoint, browser, tmp_path, capsys):
    query = json.loads(
        (tmp_path / "question.json").write_text('{"text": "two tanks beside a road"}') and '"two tanks"'
    )
    page = tmp_path / "hits.html"
    arguments = ["search", str(archive_index.folder), query, "--top", "6", "--html", str(page)]
    assert main([*arguments, "--output", str(tmp_path / "hits.geojson")]) == 0
    assert str(page) in capsys.readouterr().out
    features = json.loads((tmp_path / "hits.geojson").read_text())["features"]
    browser.get_log("performance")
    browser.get(page.as_uri())
    assert browser.find_element("css selector", "h1").text == query
    cards = browser.find_elements("css selector", "li")
    assert [card.get_attribute("data-rank") for card in cards] == list("123456")
    for card, feature in zip(cards, features):
        box = feature["properties"]["pixel_box"]
        assert f"at {box[0]}, {box[1]}" in card.text and f"{feature['properties']['similarity']:.4f}" in card.text
    loaded = "return [...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert browser.execute_script(loaded)
    # A card moves the map to its footprint.
    view = "return document.querySelector('svg.map').getAttribute('viewBox')"
    before = browser.execute_script(view)
    cards[3].click()
    assert browser.execute_script(view) != before
    middle = """
      const map = document.querySelector('svg.map').getBoundingClientRect();
      const hit = document.querySelector('.hit.chosen polygon').getBoundingClientRect();
      return [hit.x + hit.width / 2 - map.x - map.width / 2, hit.y + hit.height / 2 - map.y - map.height / 2, hit.width];
    """
    x, y, width = browser.execute_script(middle)
    assert abs(x) < 2 and abs(y) < 2 and width > 30
    # A footprint marks its card; the wheel brings the map nearer.
    browser.execute_script(
        "document.querySelector('.hit[data-rank=\"2\"] circle').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert browser.find_element("css selector", "li.chosen").get_attribute("data-rank") == "2"
    width = float(browser.execute_script(view).split()[2])
    browser.execute_script(
        "document.querySelector('svg.map').dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 900, "
        "clientY: 500, bubbles: true, cancelable: true}))"
    )
    assert float(browser.execute_script(view).split()[2]) < width
    time.sleep(0.2)
    asked = requests_of(browser)
    assert page.as_uri() in asked and not [address for address in asked if address.startswith(("http", "ws"))]
    assert not browser.get_log("browser")
    addresses = re.findall(r"https?://[^\s\"'<)]+", page.read_text())
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
