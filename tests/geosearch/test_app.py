"""The page of `geosearch serve` in a real browser: a text typed, the right place first, files downloaded, no network."""

import json
import time
from pathlib import Path

import geopandas
import pytest
import rasterio

from geosearch.exact_search import read_text, search
from geosearch.index_store import load_index_encoder
from tests.geosearch.test_page import requests_of


TEXT = (
    "Two white storage tanks stand in the upper left corner. A grey road runs from the left edge to the right edge, and "
    "three red cars are parked beside it. South of the road lies a dark green field with a small blue pond. Dense rows of "
    "houses with orange roofs fill the rest, and small gardens with round trees lie between them."
)
WAIT = 120  # seconds at most


@pytest.fixture(scope="module")
def page(archive_index):
    from geosearch.app import SearchPage  # only where these tests run: to import gradio takes seconds

    return SearchPage(archive_index.folder)


@pytest.fixture(scope="module")
def address(page, browser):
    from geosearch.app import STYLE, build_page

    blocks = build_page(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False, css=STYLE)
    assert address.startswith("http://127.0.0.1:")
    yield address
    blocks.close()


def until(browser, script: str, *arguments):
    """What a script returns as soon as that is true."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if value := browser.execute_script(script, *arguments):
            return value
        time.sleep(0.1)
    shown = browser.execute_script("return document.body.innerText")
    raise AssertionError(f"not within {WAIT} s: {script} {arguments}; the page says: {shown}")


def downloaded(browser, suffix: str):
    """The file that came with this suffix, when it is whole."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if files := list(browser.downloads.glob(f"*{suffix}")):
            return files[0]
        time.sleep(0.1)
    raise AssertionError(f"no {suffix} was downloaded within {WAIT} s")


def test_a_text_is_typed_and_its_place_found_and_downloaded(page, address, archive_index, browser):
    browser.get_log("performance")
    browser.get(address)
    until(browser, "return document.querySelector('#text textarea')")
    assert (
        until(browser, "return document.querySelectorAll('#map svg.map image').length") == 3
    )  # the scenes' overviews
    browser.find_element("css selector", "#text textarea").send_keys(TEXT)
    marked = until(browser, "return document.querySelector('#tokens .beyond')?.textContent")
    read = read_text(page.encoder, TEXT)
    assert TEXT.lower().endswith(marked) or marked in until(
        browser,
        "const e = document.querySelector('#tokens .beyond'); return e && e.textContent.endsWith('them.') && e.textContent",
    )
    until(
        browser,
        "return document.querySelector('#tokens').textContent.includes(arguments[0])",
        f"{read.tokens} tokens of 248",
    )

    browser.find_element("css selector", "#ask").click()
    count = until(browser, "return document.querySelectorAll('#map .hit').length")
    wanted = search(archive_index, TEXT, encoder=page.encoder, top=12)
    assert count == len(wanted)
    first = wanted.rows.slice(0, 1).to_pylist()[0]
    words = until(
        browser,
        "return document.querySelector('#words').innerText.includes('similarity') && document.querySelector('#words').innerText",
    )
    left, top, width, height = first["pixel_box"]
    assert f"{wanted.similarity[0]:.4f}" in words and f"{width} × {height} pixels at {left}, {top}" in words
    until(
        browser,
        "return document.querySelector('#hits').innerText.includes(arguments[0])",
        f"{wanted.similarity[0]:.4f}",
    )
    assert (
        until(browser, "const i = document.querySelector('#around img'); return i && i.complete && i.naturalWidth")
        >= 1024
    )

    # The heat map is a layer whose opacity the slider sets.
    until(browser, "return document.querySelector('#map .heat image')")
    browser.execute_script(
        "const slider = document.querySelector('#opacity input[type=range]'); slider.value = 0.25;"
        "slider.dispatchEvent(new Event('input', {bubbles: true}));"
    )
    until(browser, "return getComputedStyle(document.querySelector('#map .heat')).opacity == '0.25'")

    # A click on a footprint shows the scene around it.
    browser.execute_script(
        "document.querySelector('#map .hit[data-rank=\"3\"] circle').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    third = wanted.rows.slice(2, 1).to_pylist()[0]["pixel_box"]
    until(
        browser,
        "return document.querySelector('#words').innerText.includes(arguments[0])",
        f"at {third[0]}, {third[1]}",
    )

    for suffix, button in ((".geojson", "geojson"), (".gpkg", "geopackage"), (".tif", "geotiff")):
        browser.find_element("css selector", f"#download-{button}").click()
        file = downloaded(browser, suffix)
        if suffix == ".tif":
            with rasterio.open(file) as heat, rasterio.open(first["scene"]) as scene:
                assert heat.crs == scene.crs and heat.width < scene.width
        else:
            frame = geopandas.read_file(file)
            box = frame.pixel_box[0]
            assert list(json.loads(box) if isinstance(box, str) else box) == first["pixel_box"] and len(frame) == count
    asked = [request for request in requests_of(browser) if request.startswith(("http", "ws"))]
    assert asked and all(request.startswith(address.rstrip("/")) for request in asked)


def test_an_empty_question_says_so(address, browser):
    browser.get(address)
    until(browser, "return document.querySelector('#ask')").click()
    until(browser, "return document.body.innerText.includes('there is nothing to look for')")


def test_what_lies_beyond_77_and_beyond_the_model_is_marked(page):
    from geosearch.app import token_markup

    read = read_text(page.encoder, " ".join([TEXT] * 6) + " <b>")
    markup = token_markup(read)
    assert f"{read.tokens} tokens of 248" in markup and "nobody reads the end" in markup
    beyond = markup.split('<span class="beyond">')[1].split("</span>")[0]
    cut = markup.split('<span class="cut">')[1].split("</span>")[0]
    assert beyond == read.text[read.clip_cut_at : read.cut_at] and cut.endswith("&lt;b&gt;")
    assert "beyond" not in token_markup(read_text(page.encoder, "two tanks"))


def test_the_page_shows_what_search_finds(page, archive_index, tmp_path):
    encoder = load_index_encoder(archive_index)
    hits, drawing, _, table, scene, geojson, *_ = page.search("a road", None, "", 5)
    wanted = search(archive_index, "a road", encoder=encoder, top=5)
    assert hits.row_numbers.tolist() == wanted.row_numbers.tolist() and drawing.count('class="hit"') == 5
    assert [row[0] for row in table] == [1, 2, 3, 4, 5] and scene == wanted.rows["scene"][0].as_py()
    assert len(json.loads(Path(geojson).read_text())["features"]) == 5
    other = next(path for path in page.pictures.scenes if path != scene)
    drawing, file = page.heat(hits, other)
    assert other.rsplit("/", 1)[1].removesuffix(".tif") in file and '<g class="heat"><image' in drawing
