"""The images of evaluation sets, as `evaluation.run` would take them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evaluation.benchmarks import classification_data, localization_data, retrieval_data
from evaluation.benchmarks.tables import NotHere
from modeling_lrsclip.encoding.imagery import ImageFiles, is_image_file
from modeling_lrsclip.files.hashing import bytes_sha256


def evaluation_images(source: str | Path) -> ImageFiles:
    """
    Every image that some task of `evaluation.run` would take from `source`; of a folder that none of them knows, every
    image in and below it; an image file is itself.

    Args:
        source: folder, caption file, image, Hub id, or name of a known data set.

    Raises:
        `ValueError`: one sentence where there is no image, or data that a task cannot read.
    """
    source, path = str(source), Path(source).expanduser()
    if path.is_file() and is_image_file(path):
        return ImageFiles([path], [path.name])
    names: dict[Any, str] = {}
    for sources, load in _LOADERS:
        try:
            for one in sources(source):
                images = load(one).images
                names |= dict(zip(images.sources, images.names, strict=True))
        except NotHere:
            continue
    if not names and path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image_file(file))
        names = {file: str(file.relative_to(path)) for file in files}
    if not names:
        what = "holds no evaluation images" if path.exists() else "does not exist here"
        raise ValueError(f"{source} {what}; give a folder of images, or what --data of evaluation.run takes.")
    return ImageFiles(list(names), list(names.values()))


def _captioned(column: str) -> tuple[Callable[[str], list[str]], Callable[[str], Any]]:
    return (
        lambda source: retrieval_data.find_sources(source, column),
        lambda source: retrieval_data.load_retrieval(source, column),
    )


_LOADERS = (
    _captioned("short_text"),
    _captioned("long_text"),
    (classification_data.find_sources, classification_data.load_classification),
    (localization_data.find_sources, localization_data.load_localization),
)


def signature(images: ImageFiles) -> str:
    """SHA-256 of what tells whether files have changed: names, sizes and times, or the content of embedded ones."""

    def parts() -> Iterable[str]:
        for name, source in zip(images.names, images.sources, strict=True):
            if isinstance(source, bytes):
                yield f"{name} {bytes_sha256(source)}\n"
            else:
                stat = source.stat()
                yield f"{name} {stat.st_size} {stat.st_mtime_ns}\n"

    return bytes_sha256("".join(parts()))
