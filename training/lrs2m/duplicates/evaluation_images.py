"""The images that models are evaluated on, from whatever `evaluation.run` takes as data, or from a folder of images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.benchmarks import classification_data, localization_data, retrieval_data
from evaluation.benchmarks.image_files import ImageFiles
from evaluation.benchmarks.tables import NotHere
from modeling_lrsclip.encoding.imagery import is_image_file


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
    found: dict[Any, str] = {}
    for sources, load in _LOADERS:
        try:
            for one in sources(source):
                images = load(one).images
                found |= dict(zip(images.sources, images.names, strict=True))
        except NotHere:
            continue
    if not found and path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_image_file(file))
        found = {file: str(file.relative_to(path)) for file in files}
    if not found:
        raise ValueError(
            f"{source} holds no evaluation images; give a folder of images, or what --data of evaluation.run takes."
        )
    return ImageFiles(list(found), list(found.values()))


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
