"""
Image files of every kind and state: what can be used is read, what cannot says why.

Images of 8 bits a channel in grey or RGB are Pillow's, as they lie in their file. Rasters of other depths or bands (16
bits, floating point, 4 to 12 bands) are rendered as 8-bit RGB by [`.rasters`], which needs rasterio.
"""

import contextlib
import io
import logging
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from ..files.documents import first_line
from ..files.hashing import bytes_sha256, file_sha256
from .image_error import ImageError


MAX_PIXELS = 178_956_970  # twice Pillow's warning threshold, where Pillow too takes a file for a decompression bomb
MIN_SIDE = 4  # pixels of the short side; less is no picture
MAX_ASPECT = 50  # long side / short side; resized by its short side, a longer strip would fill the memory
IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RASTER_FORMATS = ("TIFF", "PNG", "JPEG2000")  # Pillow's names of those that may have more than 8 bits a channel
TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SURVEYED = 32  # images of a data set that are looked at before it is used
DARK, FLAT = 4, 2  # levels of 255: a mean below the one or a standard deviation below the other shows next to nothing
StoredImage = str | Path | bytes | dict[str, Any] | None  # a path, the bytes of a file, or {"bytes", "path"}
Augmentation = Literal["none", "flips", "rotations", "dihedral"]

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS decides
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # odd tags
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # more bands than Pillow reads: rasterio does
_FLIPS = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180]
_ROTATIONS = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
VIEWS: dict[str, list[Image.Transpose | None]] = {
    "none": [None],
    "flips": [None, *_FLIPS],
    "rotations": [None, *_ROTATIONS],
    "dihedral": [None, *Image.Transpose],  # all eight symmetries of the square
}


def read_image(stored: StoredImage, shortest_edge: int | None = None) -> Image.Image:
    """
    Reads an image and turns it upright by its EXIF tag; its PIL mode may be any of 8 bits.

    Modes of 8 bits stay as they are (grey, palette, CMYK): the processor makes RGB of them, for training as for
    evaluation. Images of more bits or bands become RGB here, as [`rasters.Raster`] chooses bands and stretches their
    values. An EXIF block that cannot be read is ignored; of an animation, the first frame is taken.

    Args:
        stored: a path, the bytes of a file, or `{"bytes", "path"}`.
        shortest_edge: pixels that the short side must keep. A JPEG of twice that or more is decoded at a half, a
            quarter or an eighth of its size, many times faster; None decodes all of it.

    Returns:
        The image, decoded.

    Raises:
        [`ImageError`]: naming the file, for one that is missing, empty, no image, truncated or corrupt, of more than
            `MAX_PIXELS` pixels, narrower than `MIN_SIDE` or longer than `MAX_ASPECT` times its width, and for one that
            needs rasterio where that is not installed.
    """
    with _opened(stored) as image:
        if shortest_edge is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            smaller = shortest_edge / min(image.size)
            image.draft(None, tuple(max(1, int(side * smaller)) for side in image.size))
        image.load()
        return upright(image)


def open_image(stored: StoredImage, rendered: bool = True) -> Image.Image:
    """
    Reads an image as it lies in its file, not turned, with its `format`.

    Args:
        stored: as in [`read_image`], and so are the errors.
        rendered: whether more than 8 bits or 4 bands become 8-bit RGB; a mask of class numbers must not.

    Returns:
        The image, decoded.
    """
    with _opened(stored, rendered) as image:
        image.load()
        return image


def image_size(stored: StoredImage) -> tuple[int, int]:
    """Height and width in pixels of an image as it is shown, without decoding it; arguments and errors as [`read_image`]."""
    with _opened(stored, decoded=False) as image:
        width, height = image.size
        return (width, height) if orientation(image) in (5, 6, 7, 8) else (height, width)


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8, for how an image is to be turned; 1, upright, where nothing readable says so."""
    with contextlib.suppress(Exception):  # a broken EXIF block; the pixels are there
        return image.getexif().get(0x0112, 1)
    return 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def image_name(stored: StoredImage) -> str | None:
    """The file that an image was stored in, where that is known."""
    if isinstance(stored, dict):
        return stored.get("path")
    return str(stored) if isinstance(stored, str | Path) else None


def is_image_file(path: Path) -> bool:
    """Whether a file is one of images by its name, and not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def survey(images: Iterable[Image.Image]) -> dict[str, Any]:
    """
    Count of what images are made of, for records and for a warning before they are used.

    Args:
        images: as [`read_image`] returns them.

    Returns:
        `sampled`, their number; `dark`, how many of them show next to nothing, black or of one colour; `kinds`, a list of
            `bits` a channel, `bands` of the file, `stretch` ("as stored", "percentiles 2-98", …) and `images`, how many
            are so.
    """
    from ..image_processing_lrsclip import to_rgb  # transformers, which those who only open images do without

    kinds, dark = Counter(), 0
    for image in images:
        bits, bands, stretch = image.info.get("rendering", (8, len(image.getbands()), "as stored"))
        kinds[bits, bands, stretch] += 1
        levels = np.asarray(to_rgb(image).resize((32, 32), Image.Resampling.BOX).convert("L"), dtype=np.float32)
        dark += bool(levels.mean() < DARK or levels.std() < FLAT)
    listed = [dict(zip(("bits", "bands", "stretch", "images"), (*kind, n))) for kind, n in kinds.most_common()]
    return {"sampled": kinds.total(), "dark": dark, "kinds": listed}


def survey_lines(surveyed: dict[str, Any], where: str) -> list[str]:
    """
    Lines on what a user should know of a [`survey`] before the images are used.

    Args:
        surveyed: of the images.
        where: the data set's name.

    Returns:
        A line on rasters that are stretched, and a warning where half of the images or more show next to nothing.
    """
    stretched = [kind for kind in surveyed["kinds"] if kind["bits"] > 8 or kind["stretch"] != "as stored"]
    lines = [
        f"{where}: {kind['images']} of {surveyed['sampled']} images looked at have {kind['bits']} bits and "
        f"{kind['bands']} bands; they are read as RGB ({kind['stretch']})"
        for kind in stretched
    ]
    if surveyed["dark"] and 2 * surveyed["dark"] >= surveyed["sampled"]:
        lines.append(
            f"warning: {surveyed['dark']} of {surveyed['sampled']} images of {where} looked at are nearly black or of one "
            "colour; look at the files before you trust a figure"
        )
    return lines


def spread(count: int, most: int = SURVEYED) -> list[int]:
    """Up to `most` indices, evenly spread over `count` items."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


@contextlib.contextmanager
def _opened(stored: StoredImage, rendered: bool = True, decoded: bool = True) -> Iterator[Image.Image]:
    """An image whose header was read and whose size is within the limits; what goes wrong is told as [`ImageError`]."""
    try:
        file = _file(stored)
        try:
            opened = Image.open(file)
        except UnidentifiedImageError:
            if not rendered or _beginning(file) not in TIFF_BEGINNINGS:
                raise
            opened = _rendered(file, "bands or values of a kind that Pillow does not know", decoded=decoded)
        with opened as image:
            _check_size(*image.size)
            bits = _bits(image) if image.format in RASTER_FORMATS else 8
            deep = rendered and bits > 8
            yield _rendered(file, f"{bits} bits a channel", orientation(image), decoded) if deep else image
        return
    except FileNotFoundError:
        reason = "the file does not exist"
    except UnidentifiedImageError:
        reason = "it is no image of a known format"
    except Image.DecompressionBombError:
        reason = f"it has more than the {MAX_PIXELS} pixels allowed"
    except Exception as error:  # a broken file lets Pillow's readers raise nearly anything
        reason = first_line(error)
    raise ImageError(image_name(stored) or "an embedded image", reason)


def _bits(image: Image.Image) -> int:
    """Bits a channel that the file holds, where Pillow would keep or show 8 of them only; 8 for fewer, too."""
    if image.format == "TIFF":
        return max(8, *image.tag_v2.get(258, (1,)))
    if image.format == "JPEG2000":
        header = _first_bytes(image.fp, 65536)
        sizes = header.find(b"\xff\x4f\xff\x51") + 2  # the code stream's SIZ segment
        return max(8, (header[sizes + 40] & 0x7F) + 1) if sizes >= 2 and len(header) > sizes + 40 else 8
    return 16 if image.mode[0] in "IF" or "16" in str(image.tile[0].args if image.tile else "") else 8


def _first_bytes(file: Any, count: int) -> bytes:
    position = file.tell()
    file.seek(0)
    content = file.read(count)
    file.seek(position)
    return content


def _beginning(file: str | Path | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return _first_bytes(file, 4)
    with open(file, "rb") as opened:
        return opened.read(4)


def _rendered(file: str | Path | io.BytesIO, has: str, turned: int = 1, decoded: bool = True) -> Image.Image:
    """
    A raster as 8-bit RGB by rasterio, with the EXIF number of its orientation and how it was rendered in `info`; not
    `decoded`, an empty image of its size.
    """
    try:
        from .rasters import NAMING, Raster, RasterError, fill_nothing  # only who has such files needs rasterio
    except ImportError as error:
        raise ValueError(f"it has {has}, which needs rasterio: pip install '.[geosearch]' in the clone") from error
    with contextlib.ExitStack() as stack:
        if isinstance(file, io.BytesIO):
            stored = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".raster"))
            stored.write(file.getvalue())
            stored.flush()
            file = stored.name
        try:
            raster = stack.enter_context(Raster(file))
            _check_size(raster.width, raster.height)
            if not decoded:
                image = Image.new("1", (raster.width, raster.height))
                image.getexif()[0x0112] = turned
                return image
            pixels, valid = raster.read(0, 0, raster.width, raster.height)
        except RasterError as error:
            raise ValueError(str(error).replace(f"{file} ", "it ").replace(NAMING, "").rstrip(".")) from error
        image = Image.fromarray(fill_nothing(pixels, valid))
        bits = 8 * np.dtype(raster.dataset.dtypes[raster.bands[0] - 1]).itemsize
        image.info["rendering"] = (bits, raster.dataset.count, raster.rendering.stretch)
    if turned != 1:
        image.getexif()[0x0112] = turned
    return image


def _file(stored: StoredImage) -> str | Path | io.BytesIO:
    if isinstance(stored, dict):
        stored = stored["path"] if stored.get("bytes") is None else stored["bytes"]
    if stored is None:
        raise ValueError("the row has none")
    if isinstance(stored, bytes):
        if not stored:
            raise ValueError("it has no bytes")
        return io.BytesIO(stored)
    if not Path(stored).exists():
        raise FileNotFoundError(stored)
    if not Path(stored).stat().st_size:
        raise ValueError("the file is empty")
    return stored


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short * long > MAX_PIXELS:
        raise Image.DecompressionBombError
    size = f"{width} x {height} pixels"
    if short < MIN_SIDE:
        raise ValueError(f"it has {size}, and the short side needs {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise ValueError(f"it has {size}, and the long side may be {MAX_ASPECT} times the short one")


def augment(image: Image.Image, kind: Augmentation, rng: random.Random) -> Image.Image:
    """
    Choose a view of an image from above that is as likely as itself: mirrored (`flips`), turned by quarters
    (`rotations`) or both (`dihedral`). Pixels move and do not change.

    A caption's left, right, north or south no longer holds for a view; for data that names them, leave it at `none`,
    as in the paper's recipe.

    Args:
        image: of any size and mode.
        kind: which views there are to choose from.
        rng: chooses.

    Returns:
        The view: the image itself, or a new one.
    """
    view = rng.choice(VIEWS[kind])
    return image if view is None else image.transpose(view)


# ---------------------------------------------------------------------------------------------------------- sequence


class ImageFiles(Sequence[Image.Image]):
    """
    A sequence of images that are opened when they are asked for, so that none is held in memory.

    Args:
        sources: per image a path or the bytes of an image file.
        names: per image what errors and figures call it.
    """

    def __init__(self, sources: Sequence[Path | bytes], names: Sequence[str]):
        self.sources, self.names = list(sources), list(names)

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "ImageFiles": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return ImageFiles(self.sources[index], self.names[index])
        return self._read(index, read_image)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int]) -> "ImageFiles":
        """Some of the images, in the order of the indices."""
        return ImageFiles([self.sources[index] for index in indices], [self.names[index] for index in indices])

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image as it is shown, in pixels; none is decoded."""
        return [self._read(index, image_size) for index in range(len(self))]

    @cached_property
    def imagery(self) -> dict[str, Any]:
        """Return a [`survey`] of some of the images: modes, bits, bands."""
        return survey(self._readable())

    def _readable(self) -> Iterator[Image.Image]:
        for index in spread(len(self)):
            with contextlib.suppress(ImageError):  # an error when its turn comes
                yield self[index]

    def _read(self, index: int, read: Callable[[Path | bytes], Any]) -> Any:
        try:
            return read(self.sources[index])
        except ImageError as error:
            raise ImageError(f"image {self.names[index]}", error.reason) from error

    @property
    def content_hash(self) -> str:
        """SHA-256 over the content of all files, in order; file names do not enter."""
        return bytes_sha256(bytes.fromhex("".join(self.digests)))

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each file's content, in order."""
        digests = []
        for name, source in zip(self.names, self.sources, strict=True):
            try:
                digests.append(bytes_sha256(source) if isinstance(source, bytes) else file_sha256(source))
            except OSError as error:
                raise ValueError(f"image {name} cannot be read: {error}") from error
        return digests
