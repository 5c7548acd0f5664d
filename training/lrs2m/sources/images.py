"""Images of a source: read, checked and hashed once; as they go into a shard and as a captioner sees them."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_lrsclip.encoding.imagery import ImageError, open_image, orientation, upright
from modeling_lrsclip.files.hashing import bytes_sha256


SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # other formats become PNG: few viewers know a TIFF


class Skip(ValueError):
    """A row that cannot be used; `reason` is one of a few words that are counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass
class Picture:
    content: bytes  # as it goes into a shard: the source's own file, or a PNG of it
    suffix: str
    sha256: str  # of the source's file
    image: Image.Image  # upright RGB
    unchanged_for_captioners: bool  # `content` is an upright RGB file that needs no other encoding

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    @property
    def memory(self) -> int:
        """Bytes, about: the file and three channels of pixels."""
        return len(self.content) + 3 * self.image.width * self.image.height


def read_content(stored: Any) -> bytes:
    """
    The bytes of an image file from a path, from themselves, or from `{"bytes", "path"}`.

    Raises:
        `Skip`: for a file that is not there, or nothing where an image should be.
    """
    if isinstance(stored, dict):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, bytes):
        return stored
    if not stored:
        raise Skip("image missing", "the row names no image")
    try:
        return Path(stored).read_bytes()
    except FileNotFoundError:
        raise Skip("image missing", f"{Path(stored).name} does not exist") from None
    except OSError as error:
        raise Skip("image unreadable", f"{Path(stored).name}: {error.strerror or error}") from error


def read_picture(stored: Any, min_side: int) -> Picture:
    """
    Reads, decodes and hashes an image.

    Args:
        stored: a path, the bytes of a file, or `{"bytes", "path"}`.
        min_side: pixels of the shorter side, at least.

    Raises:
        `Skip`: for a missing, corrupt, truncated or tiny image.
    """
    content = read_content(stored)
    try:
        image = open_image(content)
    except ImageError as error:
        raise Skip("image unreadable", error.reason) from error
    form, turned = image.format, orientation(image) != 1
    image = upright(image)
    if min(image.size) < min_side:
        raise Skip("image too small", f"{image.size[0]} x {image.size[1]} pixels")
    sha256 = bytes_sha256(content)
    rgb = image if image.mode == "RGB" else _flatten(image)
    unchanged = image.mode == "RGB"
    if form in SUFFIXES:
        unchanged = unchanged and not turned
    else:
        content, form = _encode(rgb, "PNG"), "PNG"
    return Picture(content, SUFFIXES[form], sha256, rgb, unchanged)


def data_url(picture: Picture, max_side: int) -> str:
    """The image for a chat endpoint: its own file where that is small enough, else a JPEG of at most `max_side` pixels."""
    if is_sent_as_it_is(picture, max_side):
        content, kind = picture.content, {".jpg": "jpeg", ".png": "png", ".webp": "webp"}[picture.suffix]
    else:
        content, kind = _encode(downscale(picture.image, max_side), "JPEG", quality=92), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def is_sent_as_it_is(picture: Picture, max_side: int) -> bool:
    return picture.unchanged_for_captioners and max(picture.size) <= max_side


def downscale(image: Image.Image, max_side: int) -> Image.Image:
    """The image with its longer side at most `max_side` pixels."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _flatten(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes black, as no-data is in most tiles."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
