"""Image files of every kind and state: what can be used is read, what cannot says why."""

import contextlib
import io
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError


MAX_PIXELS = 178_956_970  # twice Pillow's warning threshold, where Pillow too takes a file for a decompression bomb
MIN_SIDE = 4  # pixels of the short side; less is no picture
MAX_ASPECT = 50  # long side / short side; resized by its short side, a longer strip would fill the memory
IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
StoredImage = str | Path | bytes | dict[str, Any] | None  # a path, the bytes of a file, or {"bytes", "path"}
Augmentation = Literal["none", "flips", "rotations", "dihedral"]

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS decides
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # odd tags
_FLIPS = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180]
_ROTATIONS = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
VIEWS: dict[str, list[Image.Transpose | None]] = {
    "none": [None],
    "flips": [None, *_FLIPS],
    "rotations": [None, *_ROTATIONS],
    "dihedral": [None, *Image.Transpose],  # all eight symmetries of the square
}


class ImageError(ValueError):
    """An image that cannot be used: its name, and the reason in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image ({self.reason}); replace it or remove its row."


def read_image(stored: StoredImage, shortest_edge: int | None = None) -> Image.Image:
    """
    Reads an image and turns it upright by its EXIF tag; its PIL mode may be any.

    Modes stay as they are (grey, palette, CMYK, 16 bits): the processor makes RGB of them, for training as for
    evaluation, and scales more than 8 bits by the image's own smallest and largest value. An EXIF block that cannot be
    read is ignored; of an animation, the first frame is taken.

    Args:
        stored: a path, the bytes of a file, or `{"bytes", "path"}`.
        shortest_edge: pixels that the short side must keep. A JPEG of twice that or more is decoded at a half, a
            quarter or an eighth of its size, many times faster; None decodes all of it.

    Returns:
        The image, decoded.

    Raises:
        [`ImageError`]: naming the file, for one that is missing, empty, no image, truncated or corrupt, of more than
            `MAX_PIXELS` pixels, narrower than `MIN_SIDE` or longer than `MAX_ASPECT` times its width.
    """
    with _opened(stored) as image:
        if shortest_edge is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            smaller = shortest_edge / min(image.size)
            image.draft(None, tuple(max(1, int(side * smaller)) for side in image.size))
        image.load()
        return upright(image)


def open_image(stored: StoredImage) -> Image.Image:
    """Reads an image as it lies in its file, not turned, with its `format`; arguments and errors as [`read_image`]."""
    with _opened(stored) as image:
        image.load()
        return image


def image_size(stored: StoredImage) -> tuple[int, int]:
    """Height and width in pixels of an image as it is shown, without decoding it; arguments and errors as [`read_image`]."""
    with _opened(stored) as image:
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


@contextlib.contextmanager
def _opened(stored: StoredImage) -> Iterator[Image.Image]:
    """An image whose header was read and whose size is within the limits; what goes wrong is told as [`ImageError`]."""
    try:
        with Image.open(_file(stored)) as image:
            _check_size(image)
            yield image
        return
    except FileNotFoundError:
        reason = "the file does not exist"
    except UnidentifiedImageError:
        reason = "it is no image of a known format"
    except Image.DecompressionBombError:
        reason = f"it has more than the {MAX_PIXELS} pixels allowed"
    except Exception as error:  # a broken file lets Pillow's readers raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
    raise ImageError(image_name(stored) or "an embedded image", reason)


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


def _check_size(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS:
        raise Image.DecompressionBombError
    size = f"{image.size[0]} x {image.size[1]} pixels"
    if short < MIN_SIDE:
        raise ValueError(f"it has {size}, and the short side needs {MIN_SIDE}")
    if long > MAX_ASPECT * short:
        raise ValueError(f"it has {size}, and the long side may be {MAX_ASPECT} times the short one")


def augment(image: Image.Image, kind: Augmentation, rng: random.Random) -> Image.Image:
    """
    One of the views of an image from above that are as likely as itself: mirrored (`flips`), turned by quarters
    (`rotations`) or both (`dihedral`). Pixels move and do not change.

    A caption's left, right, north or south no longer holds for a view; for data that names them, leave it at `none`,
    as in the paper's recipe.
    """
    view = rng.choice(VIEWS[kind])
    return image if view is None else image.transpose(view)
