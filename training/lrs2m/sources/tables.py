"""Rows of the tables, tars and Hub data sets that a recipe names."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES
from modeling_lrsclip.files.tables import TABLE_SUFFIXES, load_hub, read_rows, tar_samples


TAR_IMAGES = (*(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "img_content")

TableRow = dict[str, Any]


def find_files(pattern: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """
    The files that a path, a folder or a glob stands for, sorted by name.

    Raises:
        `ValueError`: where there is none.
    """
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        found = sorted(path for path in pattern.iterdir() if path.suffix in suffixes)
    else:
        found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not found:
        raise ValueError(f"{pattern} names no {', '.join(suffixes)} file; give a file, a folder or a pattern with *.")
    return found


def table_rows(pattern: Path, split: str, encoding: str) -> Iterator[TableRow]:
    """
    Rows of all files of a pattern.

    Args:
        pattern: path, folder or glob.
        split: of Karpathy's JSON, whose images are taken; "all": of every split.
        encoding: of text files; what is not of it becomes U+FFFD, so that its row is skipped and listed, not the file.

    Returns:
        Rows with the file and line that each stands in.

    Raises:
        `ValueError`: naming file and line, for a row that cannot be read.
    """
    for path in find_files(pattern, TABLE_SUFFIXES):
        for row in read_rows(path, encoding):
            if path.suffix != ".json" or "sentences" not in row or split in ("all", row.get("split")):
                yield row


def tar_rows(pattern: Path) -> Iterator[TableRow]:
    """
    Samples of WebDataset tars: members of the same name up to the first dot of the file name make one row. `image`
    holds the image's bytes, a JSON member its fields, other texts stand under their suffix; `__key__` is the name.
    """
    for path in find_files(pattern, (".tar",)):
        yield from tar_samples(path, TAR_IMAGES)


def hub_rows(name: str, split: str) -> Iterator[TableRow]:
    """Rows of a Hub data set, streamed; images stay bytes."""
    yield from load_hub(name, split, streaming=True)[0]
