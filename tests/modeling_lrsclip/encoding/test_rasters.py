"""Rasters of every kind to 8-bit RGB: bands, stretch, nothing, palettes, masks, and what cannot be read."""

import contextlib
import os
import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from modeling_lrsclip.encoding import rasters
from modeling_lrsclip.encoding.rasters import Raster, RasterError, ValueRange, fill_nothing


warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)


def write(path, pixels, colours=None, descriptions=None, tags=None, mask=None, overviews=(), **profile):
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": pixels.dtype} | profile
    with rasterio.open(path, "w", **profile) as file:
        if colours:
            file.colorinterp = colours
        if descriptions:
            file.descriptions = descriptions
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
    if overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(overviews, Resampling.average)
    return path


def read_rgb(path, **options):
    """A whole raster as an image, filled where there is nothing, and how it was rendered."""
    with Raster(path, **options) as raster:
        rgb, valid = raster.read(0, 0, raster.width, raster.height)
        return Image.fromarray(fill_nothing(rgb, valid)), raster.rendering


def values(bands, dtype="uint16", top=3000, height=40, width=60):
    return (np.random.default_rng(0).random((bands, height, width)) * top).astype(dtype)


def test_8_bit_rgb_is_as_stored(tmp_path):
    pixels = values(3, "uint8", 256)
    image, rendering = read_rgb(write(tmp_path / "a.tif", pixels, photometric="RGB"))
    assert np.array_equal(np.asarray(image), np.moveaxis(pixels, 0, -1))
    assert (rendering.bands, rendering.chosen_by, rendering.stretch) == (
        (1, 2, 3),
        "colour interpretation",
        "as stored",
    )


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "float32", "float64"])
def test_other_depths_are_stretched_by_percentiles_of_what_there_is(tmp_path, dtype):
    pixels = values(3, dtype)
    if dtype == "int16":
        pixels -= 1000
    pixels[:, :5] = -9999 if dtype in ("int16", "float32", "float64") else 65000
    nodata = float(pixels[0, 0, 0])
    image, rendering = read_rgb(write(tmp_path / "a.tif", pixels, nodata=nodata))
    for band in range(3):
        there = pixels[band, 5:].astype(float)
        low, high = np.percentile(there, [2, 98])
        expected = np.floor(np.clip((there - low) / (high - low) * 255, 0, 255) + 0.5)
        got = np.asarray(image)[5:, :, band].astype(float)
        assert np.abs(got - expected).max() <= (1 if dtype.startswith("float32") else 0)
    assert rendering.stretch == "percentiles 2-98" and rendering.nodata == nodata
    assert len(np.unique(np.asarray(image)[:5].reshape(-1, 3), axis=0)) == 1  # filled with one colour


def test_a_given_range_and_given_percentiles(tmp_path):
    pixels = values(3, "uint16")
    path = write(tmp_path / "a.tif", pixels)
    image, rendering = read_rgb(path, value_range=ValueRange.parse("0,3000"))
    assert np.array_equal(np.asarray(image), np.floor(np.clip(np.moveaxis(pixels, 0, -1) / 3000 * 255, 0, 255) + 0.5))
    assert rendering.low == (0, 0, 0) and rendering.high == (3000, 3000, 3000) and rendering.stretch == "given"
    rendering = read_rgb(path, value_range=ValueRange.parse("10%, 90%"))[1]
    assert rendering.low[0] == pytest.approx(np.percentile(pixels[0], 10))
    for text in ("3", "a,b", "3000,0", "5,5", "10%,90", "-1%,50%", "nan,3", "0,inf"):
        with pytest.raises(ValueError, match="range"):
            ValueRange.parse(text)


def test_bands_by_colour_description_order_and_name(tmp_path):
    pixels = values(4, "uint8", 256)
    order = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    with Raster(write(tmp_path / "a.tif", pixels, colours=order)) as raster:
        assert (raster.bands, raster.chosen_by) == ((3, 2, 1), "colour interpretation")
    names = ["B02", "B03", "B04", "B08"]
    path = write(tmp_path / "b.tif", values(4), descriptions=names)
    with Raster(path) as raster:
        assert (raster.bands, raster.chosen_by) == ((3, 2, 1), "descriptions")
        assert raster.rendering.names == ("B04", "B03", "B02")
    for bands, expected in ([("b08", "B04", "3"), (4, 3, 3)], [(4, 3, 2), (4, 3, 2)], [("B08",), (4,)]):
        with Raster(path, bands) as raster:
            assert (raster.bands, raster.chosen_by) == (expected, "given")
    with Raster(write(tmp_path / "c.tif", values(4))) as raster:
        assert (raster.bands, raster.chosen_by) == ((1, 2, 3), "order")
    for bands, sentence in [
        ((1, 2, 9), "has no band 9; its bands are 1 to 4"),
        (("nir",) * 3, "has no band named nir; its 4 bands are named"),
    ]:
        with pytest.raises(RasterError, match=sentence):
            Raster(path, bands)
    with pytest.raises(ValueError, match="name three"):
        Raster(path, (1, 2))


def test_grey_palette_alpha_and_mask(tmp_path):
    grey = values(1, "uint8", 256)
    image, rendering = read_rgb(write(tmp_path / "grey.tif", grey))
    assert np.array_equal(np.asarray(image), np.repeat(grey[0][..., None], 3, axis=-1)) and rendering.bands == (1,)
    picture = Image.fromarray(grey[0] % 4, "P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 1, 2, 3])
    picture.save(tmp_path / "p.png", transparency=0)
    with Raster(tmp_path / "p.png") as raster:
        rgb, valid = raster.read(0, 0, 60, 40)
        assert raster.rendering.stretch == "palette" and np.array_equal(valid, grey[0] % 4 > 0)
        assert (rgb[grey[0] % 4 == 3] == (1, 2, 3)).all()
    rgba = values(4, "uint8", 256)
    rgba[3] = np.where(np.arange(60) < 20, 0, 255)
    with Raster(write(tmp_path / "a.tif", rgba, photometric="RGB", alpha="YES")) as raster:
        valid = raster.read(10, 0, 20, 40)[1]
        assert not valid[:, :10].any() and valid[:, 10:].all()
    inside = np.zeros((40, 60), dtype=bool)
    inside[5:30, 7:50] = True
    with Raster(write(tmp_path / "m.tif", rgba[:3], mask=inside, photometric="RGB")) as raster:
        assert np.array_equal(raster.read(0, 0, 60, 40)[1], inside)


def test_nothing_is_where_all_bands_are_nodata_or_one_is_no_number(tmp_path):
    pixels = values(3, "float32", 1) + 1
    pixels[:, 0, 0], pixels[0, 0, 1], pixels[1, 0, 2], pixels[2, 0, 3] = -1, -1, np.nan, np.inf
    with Raster(write(tmp_path / "a.tif", pixels, nodata=-1)) as raster:
        rgb, valid = raster.read(0, 0, 60, 40)
        assert valid[0, :5].tolist() == [False, True, False, False, True] and valid[1:].all()
    with Raster(write(tmp_path / "b.tif", pixels, nodata=np.nan)) as raster:
        assert raster.read(0, 0, 60, 40)[1][0, :5].tolist() == [True, True, False, False, True]
    with Raster(tmp_path / "b.tif", nodata=float(pixels[0, 3, 3])) as raster:
        assert raster.nodata == float(pixels[0, 3, 3])
    filled = fill_nothing(rgb, valid)
    assert np.array_equal(filled[valid], rgb[valid])
    assert (filled[0, 0] == np.floor(rgb[valid].mean(axis=0) + 0.5)).all()
    everything = np.ones((2, 2), dtype=bool)
    assert fill_nothing(rgb[:2, :2], everything).base is rgb and (fill_nothing(rgb[:2, :2], ~everything) == 127).all()


@pytest.mark.parametrize("overviews", [(), (2, 4, 8)])
def test_windows_of_a_large_raster_agree_with_rasterio(tmp_path, overviews):
    pixels = values(3, "uint16", 3000, 3000, 2600)
    pixels[0, :1500] //= 3
    path = write(tmp_path / "a.tif", pixels, tiled=True, blockxsize=256, blockysize=256, overviews=overviews)
    with Raster(path) as raster, rasterio.open(path) as dataset:
        rendering = raster.rendering
        low, high = np.percentile(pixels.reshape(3, -1), [2, 98], axis=1)
        # The average of an overview takes noise away: its percentiles lie nearer to each other.
        assert np.abs(np.array(rendering.low) - low).max() < (300 if overviews else 60)
        for box in [(0, 0, 64, 64), (2500, 2900, 100, 100), (255, 1490, 300, 17)]:
            data = dataset.read(window=Window(*box)).astype(float)
            scaled = [(band - a) * (255 / (b - a)) for band, a, b in zip(data, rendering.low, rendering.high)]
            expected = np.floor(np.clip(np.stack(scaled, axis=-1), 0, 255) + 0.5)
            assert np.array_equal(raster.read(*box)[0], expected)
        assert raster.read(0, 0, 2600, 3000, (30, 26))[0].shape == (30, 26, 3)


def test_broken_overviews_fall_back_to_the_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "SAMPLE_SIDE", 1000)  # so that the overview is what is looked at
    pixels = values(3, "uint16", 3000, 2500, 2500)
    path = write(tmp_path / "a.tif", pixels, tiled=True, compress="deflate", overviews=())
    whole = read_rgb(path)[1]
    start = os.path.getsize(path)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2], Resampling.nearest)
    content = bytearray(path.read_bytes())
    content[start + 2000 : len(content) - 20_000] = b"\xff" * (len(content) - 22_000 - start)
    path.write_bytes(content)
    with Raster(path) as raster, pytest.raises(RasterioError):
        raster._read(None, (1000, 1000), Resampling.nearest)
    with Raster(path) as raster:
        assert raster.dataset.overviews(1) == [2] and raster.rendering.low == whole.low
        assert raster.read(0, 0, 100, 100)[1].all()


def test_a_tag_of_no_known_type_is_refused_by_name(tmp_path):
    """Found by fuzzing: where colours are asked for, an error of GDAL's own comes through rasterio."""
    path = write(tmp_path / "a.tif", values(3))
    whole = path.read_bytes()
    start = int.from_bytes(whole[4:8], "little") + 2
    for entry in range(start, start + 12 * int.from_bytes(whole[start - 2 : start], "little"), 12):
        path.write_bytes(whole[:entry] + bytes.fromhex("96f24850da770000") + whole[entry + 8 :])
        with contextlib.suppress(RasterError), Raster(path) as raster:
            raster.read(0, 0, 10, 10)


def test_a_thin_strip_of_data_between_the_sampled_pieces_is_found(tmp_path):
    pixels = np.zeros((1, 5000, 5000), dtype="uint16")
    pixels[0, 300:340] = np.arange(5000) % 1000 + 1
    with Raster(write(tmp_path / "a.tif", pixels, nodata=0, compress="deflate", tiled=True)) as raster:
        assert 0 < raster.rendering.low[0] < 100 and 900 < raster.rendering.high[0] <= 1000


def test_constant_and_empty_rasters_have_a_stretch(tmp_path):
    assert np.asarray(read_rgb(write(tmp_path / "a.tif", np.full((1, 9, 9), 7, "uint16")))[0]).max() == 0
    image, _ = read_rgb(write(tmp_path / "b.tif", np.zeros((3, 9, 9), "uint16"), nodata=0))
    assert (np.asarray(image) == 127).all()


def _fifo(path):
    os.mkfifo(path)


BAD = {
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "is an empty file"),
    "text": (lambda path: path.write_text("hello, this is no image"), "no raster of a known format: GTiff, VRT"),
    "zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "is a zip archive: unpack it first"),
    "folder": (lambda path: path.mkdir(), "is not a regular file"),
    "pipe": (_fifo, "is not a regular file"),  # nobody waits for it
    "symlink loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "header only": (lambda path: path.write_bytes(b"II*\0" + bytes(4)), "cannot be read"),
    "complex": (lambda path: write(path, values(1).astype("complex64")), r"complex numbers \(complex64\)"),
    "200 bands": (lambda path: write(path, values(200)), "has 200 bands, and none is marked as red"),
    "service": (
        lambda path: path.write_text(
            '<GDAL_WMS><Service name="TMS"><ServerUrl>http://127.0.0.1:9/</ServerUrl></Service></GDAL_WMS>'
        ),
        "no raster of a known format",
    ),
    "virtual raster of nothing": (
        lambda path: path.write_text(
            '<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1">'
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, kind):
    path = tmp_path / "scene.tif"
    make, sentence = BAD[kind]
    make(path)
    with pytest.raises(RasterError, match=sentence) as caught:
        read_rgb(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_damage_is_told_where_it_is_read(tmp_path):
    path = write(tmp_path / "a.tif", values(3, "uint16", 3000, 600, 600))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with Raster(path) as raster:
        assert raster.read(0, 0, 600, 10)[0].shape == (10, 600, 3)
        with pytest.raises(RasterError, match="cannot be read"):
            raster.read(0, 500, 600, 100)


def test_png_and_jpeg_are_rasters_too(tmp_path):
    image = Image.fromarray(np.moveaxis(values(3, "uint8", 256), 0, -1))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")[0]), np.asarray(image))
    assert read_rgb(tmp_path / "a.jpg")[0].size == image.size
