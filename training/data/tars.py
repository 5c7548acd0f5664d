"""
WebDataset tars read at random: a table of where each sample's members lie, made once from the tar's headers.

A sample is what stands together under one name up to the first dot; what follows is the member's suffix
(`0017.jpg`, `0017.txt`, `0017.json`; in RS5M `0017.img_content`, `0017.img_name`, `0017.caption`).
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling_lrsclip.files.tables import LARGEST_MEMBER, parse_object, tar_members

from .line_index import kept_index
from .rows import FileRows, Row, Stored, even_chunks


# What "image" stands for in a tar, the first found: suffixes of common formats, om-ai-lab/RS5M dataloader.py and
# rating_app/rating_sys_webdataset/prepare_data.py.
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "img_content", "input.image")
JSON_SUFFIX = "json"
MOST_SUFFIXES = 64  # of a tar's members, each a column of its index
_BLOCK = 512  # bytes of a tar header, and what data are filled up to
_SPAN = np.dtype([("offset", "<u8"), ("size", "<u8")])  # of a member's data; size 0: the sample has none


def tar_index(path: Path) -> np.ndarray:
    """
    Index of a tar: a record a sample, in order, with a field a suffix of `offset` and `size` in bytes.

    Raises:
        `ValueError`: for a compressed tar, a file that is none, or one whose members no data set has.
    """
    return kept_index(path, "tar", _read_headers)


def _read_headers(path: Path) -> np.ndarray:
    samples: list[dict[str, tuple[int, int]]] = []
    suffixes, key = {}, None
    for member in tar_members(path):
        if member.key != key:
            key = member.key
            samples.append({})
        suffix = suffixes.setdefault(member.suffix, member.suffix)
        samples[-1][suffix] = (member.offset, member.size)
        if len(suffixes) > MOST_SUFFIXES:
            raise ValueError(
                f"{path} has members with more than {MOST_SUFFIXES} suffixes, such as {', '.join(list(suffixes)[:3])}; the "
                "samples of a WebDataset tar have the same few."
            )
    index = np.zeros(len(samples), dtype=[(suffix, _SPAN) for suffix in suffixes])
    for suffix in suffixes:
        index[suffix] = np.array([sample.get(suffix, (0, 0)) for sample in samples], dtype=_SPAN)
    return index


class TarRows(FileRows):
    """
    The samples of a tar.

    A column names a member by its suffix or a field of the `json` member; "image" is also the first of
    `TAR_IMAGES` that a sample has. Nothing is ever unpickled.
    """

    one_by_one = True

    def __init__(self, path: Path, columns: Mapping[str, str]):
        self.path, self.columns, self.name, self.location = path, columns, path.name, str(path)
        self.index = tar_index(path)  # (samples,)
        self.suffixes = self.index.dtype.names or ()
        self.chunks = even_chunks(len(self.index))

    def _member(self, number: int, suffix: str) -> bytes | None:
        offset, size = self.index[number][suffix].item()
        if size == 0:
            return None
        if size > LARGEST_MEMBER:
            raise ValueError(f"{suffix} has {size} bytes, and {LARGEST_MEMBER} bytes are allowed")
        self.file.seek(offset)
        return self.file.read(size)

    def fields(self, number: int) -> dict[str, Any]:
        """
        Content of the sample's `json` member; empty without one.

        Raises:
            `ValueError`: when it is not a JSON object in UTF-8.
        """
        stored = self._member(number, JSON_SUFFIX) if JSON_SUFFIX in self.suffixes else None
        return {} if stored is None else parse_object(stored)

    def read(self, numbers: list[int]) -> list[Row]:
        return [self._row(number, self.columns) for number in numbers]

    def _row(self, number: int, columns: Mapping[str, str]) -> Row:
        # The sample's name as its first member's header has it (its first 100 bytes).
        self.file.seek(min(offset for offset, _ in self.index[number].item() if offset) - _BLOCK)
        key = tarfile.nts(self.file.read(100), "utf-8", "replace").rpartition("/")[2].partition(".")[0]
        row, fields = Row(f"{self.name}:{key}"), None
        try:
            for kind, column in columns.items():
                if kind == "image":
                    row.image = self._image(number, column)
                elif column in self.suffixes:
                    text = self._member(number, column)
                    setattr(row, kind, None if text is None else text.decode("utf-8"))
                else:
                    fields = self.fields(number) if fields is None else fields
                    setattr(row, kind, fields.get(column))
        except (ValueError, OSError) as error:  # not UTF-8, not JSON, a file that went away
            row.fault = f"a member cannot be read ({error})"
        return row

    def _image(self, number: int, column: str) -> bytes | None:
        wanted = (column, *TAR_IMAGES) if column == "image" else (column,)
        members = (self._member(number, suffix) for suffix in wanted if suffix in self.suffixes)
        return next((member for member in members if member is not None), None)

    def texts(self, kind: str) -> Iterator[Stored]:
        for number in range(len(self.index)):
            yield getattr(self._row(number, {kind: self.columns[kind]}), kind)
