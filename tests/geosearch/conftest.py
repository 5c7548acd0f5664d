"""A tiny model, functions and fixtures that index scenes with it, and a browser."""

import shutil

import pytest

from evaluation.benchmarks.scene_archive import write_archive
from geosearch.index import IndexJob, build_index
from geosearch.index_store import open_index
from geosearch.windows import WindowSize
from tests.geosearch.small_scenes import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A tiny model's folder."""
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def make_index(checkpoint, tmp_path):
    """Function that indexes scenes with windows of 64 pixels."""

    def make(*scenes, output=None, window="64", **options):
        fields = {name: options.pop(name) for name in list(options) if name in IndexJob.__dataclass_fields__}
        job = IndexJob(
            [str(scene) for scene in scenes],
            output or tmp_path / "index",
            fields.pop("model", checkpoint),
            {"sizes": window and tuple(map(WindowSize.parse, window.split(","))), **options},
            device="cpu",
            **fields,
        )
        return build_index(job)

    return make


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Three small GeoTIFFs of 16 bits in different UTM zones, one of them rotated, and `places.jsonl`."""
    folder = tmp_path_factory.mktemp("archive")
    write_archive(folder, 3, side=1024, workers=1)
    return folder


@pytest.fixture(scope="session")
def archive_index(archive, checkpoint, tmp_path_factory):
    """An index of the archive with windows of 256 pixels."""
    folder = tmp_path_factory.mktemp("archive-index") / "index"
    sizes = {"sizes": (WindowSize.parse("256"),)}
    build_index(IndexJob([str(archive / "scenes")], folder, checkpoint, sizes, device="cpu"))
    return open_index(folder)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium that selenium drives; what it downloads comes into `browser.downloads`."""
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("pages are driven in a real browser: install chromium and chromium-driver (apt) to run this test")
    from selenium import webdriver

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1400,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.downloads = downloads
    yield browser
    browser.quit()
