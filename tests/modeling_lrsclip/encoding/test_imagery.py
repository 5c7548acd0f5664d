"""Every kind of image that can be used is used, every other says why not; reduced decoding stays near the full one."""

import io
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image, ImageFilter

from modeling_lrsclip import LRSCLIPImageProcessor
from modeling_lrsclip.encoding.imagery import (
    MAX_PIXELS,
    VIEWS,
    augment,
    image_size,
    open_image,
    read_image,
    survey,
    survey_lines,
)
from modeling_lrsclip.encoding.model_inputs import PixelBatcher


def stored(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth fields with sharp edges, as seen from above."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8)
    fields = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    grain = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    return Image.blend(fields.filter(ImageFilter.GaussianBlur(1)), grain.filter(ImageFilter.GaussianBlur(2)), 0.3)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(Image.new("RGB", (20, 10), "red"), "jpeg", exif=exif)


GREY16 = np.linspace(0, 40_000, 12 * 16, dtype=np.uint16).reshape(12, 16)
USABLE = {
    "grey": stored(Image.new("L", (16, 12), 77)),
    "grey with transparency": stored(Image.new("LA", (16, 12), (77, 9))),
    "black and white": stored(Image.new("1", (16, 12), 1)),
    "16 bits": stored(Image.fromarray(GREY16)),
    "16 bits, TIFF": stored(Image.fromarray(GREY16), "tiff"),
    "floating point": stored(Image.fromarray(GREY16.astype(np.float32)), "tiff"),
    "palette": stored(Image.new("RGB", (16, 12), (77, 7, 7)).quantize(4)),
    "palette with transparency": stored(Image.new("P", (16, 12), 1), transparency=1),
    "transparency": stored(Image.new("RGBA", (16, 12), (77, 7, 7, 0))),
    "CMYK": stored(Image.new("CMYK", (16, 12), (10, 20, 30, 40)), "jpeg"),
    "YCbCr": stored(Image.new("YCbCr", (16, 12), (77, 7, 7)), "jpeg"),
    "WebP": stored(Image.new("RGB", (16, 12), (77, 7, 7)), "webp"),
    "first of several": stored(
        Image.new("RGB", (16, 12)), "gif", save_all=True, append_images=[Image.new("RGB", (16, 12))]
    ),
    "progressive": stored(Image.new("RGB", (16, 12)), "jpeg", progressive=True),
    "broken EXIF": stored(Image.new("RGB", (16, 12)), "jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken"),
}
JPEG = stored(scene(256, 256), "jpeg")
UNUSABLE = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated PNG": (stored(scene(64, 64))[:3000], "truncated|broken"),
    "corrupt PNG": (stored(scene(64, 64))[:200] + bytes(50) + stored(scene(64, 64))[250:], "broken|error|CRC|corrupt"),
    "JPEG header only": (JPEG[:30], "no image of a known format|Truncated"),
    "text": (b"<html>404 not found</html>", "no image of a known format"),
    "empty": (b"", "it has no bytes"),
    "decompression bomb": (bomb(20_000, 20_000), f"more than the {MAX_PIXELS} pixels allowed"),
    "lies about its size": (bomb(3000, 3000), "truncated"),
    "one pixel wide": (stored(Image.new("RGB", (1, 500))), "1 x 500 pixels, and the short side needs 4"),
    "a strip": (stored(Image.new("RGB", (2000, 10))), "2000 x 10 pixels, and the long side may be 50 times"),
}


@pytest.mark.parametrize("kind", USABLE)
def test_usable(kind):
    image = read_image({"bytes": USABLE[kind], "path": None})
    assert image.size == (16, 12)
    processor = LRSCLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8) and pixels.isfinite().all()
    if kind.startswith(("16", "floating")):
        assert pixels.max() - pixels.min() > 2, "scaled by the image's own range, not clipped to white"


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable(kind):
    content, reason = UNUSABLE[kind]
    with pytest.raises(ValueError, match=f"tile.png cannot be read as an image .*({reason}).*; replace it or remove"):
        read_image({"bytes": content, "path": "tile.png"})


def test_missing(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("no.png", "the file does not exist"), ("empty.png", "the file is empty")):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image \\({reason}\\)"):
            read_image(str(tmp_path / name))
    with pytest.raises(ValueError, match="an embedded image cannot be read as an image .the row has none"):
        read_image({"bytes": None, "path": None})


def test_exif_turns_images_upright():
    for orientation in (5, 6, 7, 8):
        assert read_image(turned(orientation)).size == (10, 20)
    assert read_image(turned(3)).size == (20, 10)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (1500, 1000), (3000, 2000)])
@pytest.mark.parametrize("margin, mean, most", [(2.0, 0.7, 12), (1.0, 2.5, 24)])
def test_reduced_decoding(size, margin, mean, most):
    """Tolerance against the full decode, both resized to 224: of 255 levels, `mean` on average and `most` at most."""
    target = round(224 * margin)
    content = stored(scene(*size), "jpeg", quality=90)
    full, reduced = read_image(content), read_image(content, target)
    assert min(reduced.size) >= target
    assert (reduced.size != full.size) == (min(size) >= 2 * target)
    a, b = (np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).astype(int) for image in (full, reduced))
    difference = np.abs(a - b)
    assert difference.mean() <= mean and difference.max() <= most, (difference.mean(), difference.max())


def test_small_images_and_other_formats_are_decoded_whole():
    assert read_image(stored(scene(300, 300), "jpeg"), 224).size == (300, 300)
    assert read_image(stored(scene(1024, 1024)), 224).size == (1024, 1024)


@pytest.mark.parametrize("edge, crop", [(32, 32), (40, 32), (33, 31)])
def test_pixels_are_those_of_the_processor(edge, crop):
    processor = LRSCLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})
    sizes = [(64, 64), (32, 32), (75, 100), (100, 75), (97, 400), (401, 33), (10, 12), (133, 134)]
    images = [scene(*size) for size in sizes] + [read_image(content) for content in USABLE.values()]
    batcher = PixelBatcher(processor)
    assert batcher.levels is not None
    assert torch.equal(batcher(images), processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "options", [{"do_normalize": False}, {"size": {"height": 32, "width": 32}}, {"do_center_crop": False}]
)
def test_other_processors_are_called(options):
    processor = LRSCLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | options
    )
    images = [scene(64, 64, seed) for seed in range(3)]
    assert PixelBatcher(processor).levels is None
    assert torch.equal(PixelBatcher(processor)(images), processor(images, return_tensors="pt")["pixel_values"])


def test_arrays_go_through_the_processor():
    processor = LRSCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [np.asarray(scene(64, 48)), scene(64, 48, 1)]
    assert torch.equal(PixelBatcher(processor)(images), processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("kind, views", [("none", 1), ("flips", 4), ("rotations", 4), ("dihedral", 8)])
def test_views_are_exact_and_equally_likely(kind, views):
    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6))
    counts = {}
    for seed in range(400):
        view = np.asarray(augment(image, kind, random.Random(seed)))
        assert sorted(view.ravel()) == list(range(36))
        counts[view.tobytes()] = counts.get(view.tobytes(), 0) + 1
    assert len(counts) == len(VIEWS[kind]) == views and image.tobytes() in counts
    assert min(counts.values()) > 400 / views / 2


def raster(path, pixels: np.ndarray, descriptions=None, **options) -> str:
    bands, height, width = pixels.shape
    shape = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": pixels.dtype}
    with rasterio.open(path, "w", **shape | {"transform": rasterio.Affine(1, 0, 0, 0, -1, 0)} | options) as file:
        file.write(pixels)
        if descriptions:
            file.descriptions = descriptions
    return str(path)


def satellite_forms(folder) -> dict[str, str]:
    """One scene of 8 bits as satellites deliver it: in files of more bits and bands."""
    levels = np.asarray(scene(96, 64)).transpose(2, 0, 1)  # (3, H, W)
    counts = levels.astype(np.uint16) * 12 + 300
    outlier = counts.copy()
    outlier[:, 5, 5] = 65535
    many = np.stack([counts[0] * 0 + 9, *counts[::-1], *[counts[0]] * 8])  # Sentinel-2's order: B02 is blue
    names = ["B01", "B02", "B03", "B04", *(f"B{band:02}" for band in range(5, 13))]
    return {
        "16 bits": raster(folder / "a.tif", counts),
        "one pixel of nodata": raster(folder / "b.tif", outlier, nodata=65535),
        "floating point": raster(folder / "c.tif", (levels / 255).astype(np.float32)),
        "4 bands": raster(folder / "d.tif", np.concatenate([counts, counts[:1]])),
        "12 bands": raster(folder / "e.tif", many, names),
    }


@pytest.mark.parametrize("embedded", [False, True])
def test_every_depth_and_number_of_bands_is_read_as_its_8_bits(tmp_path, embedded):
    levels = np.asarray(scene(96, 64)).astype(float)
    low, high = np.percentile(levels, (2, 98), axis=(0, 1))
    expected = np.clip((levels - low) / (high - low) * 255, 0, 255)
    for kind, path in satellite_forms(tmp_path).items():
        with open(path, "rb") as file:
            image = read_image({"bytes": file.read(), "path": None} if embedded else path)
        assert image.mode == "RGB" and image.size == (96, 64) and image_size(path) == (64, 96), kind
        difference = np.abs(np.asarray(image).astype(float) - expected)
        difference[5, 5] = 0
        assert difference.max() <= 1.5, (kind, difference.max())


def test_sizes_are_known_without_a_pixel(tmp_path, monkeypatch):
    from modeling_lrsclip.encoding.rasters import Raster

    monkeypatch.setattr(Raster, "read", lambda *_: pytest.fail("pixels were read"))
    assert {image_size(path) for path in satellite_forms(tmp_path).values()} == {(64, 96)}


def test_masks_are_not_stretched(tmp_path):
    mask = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 9)
    mask.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "mask.png", rendered=False)), np.asarray(mask))


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_lrsclip.encoding.rasters", None)
    for path in satellite_forms(tmp_path).values():
        with pytest.raises(
            ValueError, match=r"\.tif cannot be read .*needs rasterio: pip install '\.\[geosearch\]' in the clone"
        ):
            read_image(path)
    assert read_image(stored(scene(32, 32))).mode == "RGB"


def test_bands_nobody_named_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match="it has 6 bands, and none is marked as red.*: mark them in the file"):
        read_image(raster(tmp_path / "six.tif", np.ones((6, 8, 8), np.uint16)))


def test_turned_16_bits(tmp_path):
    image = Image.fromarray(GREY16)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(read_image(tmp_path / "turned.png"))[..., 0]
    image.save(tmp_path / "plain.png")
    assert np.array_equal(turned, np.rot90(np.asarray(read_image(tmp_path / "plain.png"))[..., 0], -1))


def test_survey_says_how_images_are_read_and_whether_they_show_anything(tmp_path):
    deep = read_image(raster(tmp_path / "a.tif", np.asarray(scene(32, 32)).transpose(2, 0, 1).astype(np.uint16) * 9))
    surveyed = survey([deep, scene(32, 32), scene(40, 40)])
    assert surveyed == {
        "sampled": 3,
        "dark": 0,
        "kinds": [
            {"bits": 8, "bands": 3, "stretch": "as stored", "images": 2},
            {"bits": 16, "bands": 3, "stretch": "percentiles 2-98", "images": 1},
        ],
    }
    assert survey_lines(surveyed, "tiles") == [
        "tiles: 1 of 3 images looked at have 16 bits and 3 bands; they are read as RGB (percentiles 2-98)"
    ]
    black, grey = Image.new("RGB", (9, 9), (2, 1, 3)), Image.new("L", (9, 9), 130)
    assert survey_lines(survey([black, grey, scene(32, 32)]), "tiles") == [
        "warning: 2 of 3 images of tiles looked at are nearly black or of one colour; look at the files before you trust "
        "a figure"
    ]
    assert survey_lines(survey([scene(32, 32), scene(33, 32), black]), "tiles") == []
