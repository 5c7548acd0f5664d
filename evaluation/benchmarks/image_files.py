"""Images of a data set, opened when they are asked for, and which of them may be left out."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from PIL import Image
from tqdm import tqdm

from modeling_lrsclip.encoding.imagery import ImageError, image_size, read_image, spread, survey
from modeling_lrsclip.files.hashing import bytes_sha256, file_sha256


SHOWN = 3  # offenders an error names before it only counts


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
        """What the images are made of: a [`survey`] of some of them."""
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

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the content of all files, in order; file names do not enter."""
        digests = []
        for name, source in zip(self.names, self.sources, strict=True):
            try:
                digests.append(bytes_sha256(source) if isinstance(source, bytes) else file_sha256(source))
            except OSError as error:
                raise ValueError(f"image {name} cannot be read: {error}") from error
        return bytes_sha256(bytes.fromhex("".join(digests)))


def usable_images(
    images: ImageFiles, allow_missing: int, origin: str, beside: str = ""
) -> tuple[list[int], list[str]]:
    """
    Which images to keep. With `allow_missing`, all of them are opened once, to see which cannot be read; without it,
    an image that cannot be read is an error when its turn comes.

    Args:
        allow_missing: how many may be missing or unreadable.
        origin: the file or folder that names the images, for the error.
        beside: what the error says in brackets, for example where the paths start.

    Returns:
        Indices of the images that can be used, and `name (reason)` of the others.

    Raises:
        `ValueError`: one sentence with the number of missing or unreadable images and the first of them, when they
            are more than `allow_missing`, or all.
    """
    if allow_missing < 0:
        raise ValueError(f"allow_missing={allow_missing} must be 0 or more: the images that may be left out.")
    reasons = {
        index: "missing"
        for index, source in enumerate(images.sources)
        if isinstance(source, Path) and not source.is_file()
    }
    if len(reasons) <= allow_missing and allow_missing:
        reasons |= _unreadable(images, [index for index in range(len(images)) if index not in reasons])
    if len(reasons) > allow_missing or (reasons and len(reasons) == len(images)):
        only_missing = set(reasons.values()) == {"missing"}
        offenders = [
            images.names[index] + ("" if only_missing else f" ({reasons[index]})") for index in sorted(reasons)
        ]
        what = f"images of {origin} are missing" + ("" if only_missing else " or cannot be read")
        complain(offenders, len(images), what + beside, _advice(len(reasons), len(images), allow_missing))
    kept = [index for index in range(len(images)) if index not in reasons]
    return kept, [f"{images.names[index]} ({reasons[index]})" for index in sorted(reasons)]


def _advice(bad: int, total: int, allow_missing: int) -> str:
    if bad == total:
        return ""
    limit = f"--allow-missing {allow_missing} does not cover them; " if allow_missing else ""
    return f" ({limit}--allow-missing {bad} would leave them out)"


def _unreadable(images: ImageFiles, indices: list[int]) -> dict[int, str]:
    """Opens the images; PIL decodes outside Python's lock, so threads help."""

    def reason(index: int) -> str | None:
        try:
            images[index]
        except ImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(reason, indices), "checking images", len(indices), leave=False, disable=None)
        return {index: found for index, found in zip(indices, progress, strict=True) if found}


def complain(offenders: Sequence[str], total: int, what: str, advice: str = "") -> None:
    """Raises one sentence that counts the offenders and names the first few; says nothing where there are none."""
    if offenders:
        shown = ", ".join(offenders[:SHOWN])
        more = ", …" if len(offenders) > SHOWN else ""
        raise ValueError(f"{len(offenders)} of {total} {what}, first: {shown}{more}{advice}")


def plain(name: str) -> str:
    """A name without case and separators: `Baseball_Diamond`, `baseball diamond` and `BaseballDiamond` are one."""
    return re.sub(r"[\W_]", "", name).lower()
