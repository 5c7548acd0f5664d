"""
WebDataset tars read at random: a table of where each sample's members lie, made once from the tar's headers.

A sample is what stands together under one name up to the first dot; what follows is the member's suffix
(`0017.jpg`, `0017.txt`, `0017.json`; in RS5M `0017.img_content`, `0017.img_name`, `0017.caption`).
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .line_index import kept_index
from .rows import Row, Stored, even_chunks


# What "image" stands for in a tar, the first found: suffixes of common formats, om-ai-lab/RS5M dataloader.py and
# rating_app/rating_sys_webdataset/prepare_data.py.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "img_content", "input.image")
JSON_SUFFIX = "json"
_BLOCK = 512  # bytes of a tar header, and what data are filled up to
_SPAN = np.dtype([("offset", "<u8"), ("size", "<u4")])  # of a member's data; size 0: the sample has none


def tar_index(path: Path) -> np.ndarray:
    """
    One record a sample, in order, with a field a suffix of `offset` and `size` in bytes.

    Raises:
        `ValueError`: for a compressed tar or a file that is none.
    """
    return kept_index(path, "tar", _read_headers)


def _read_headers(path: Path) -> np.ndarray:
    samples: list[dict[str, tuple[int, int]]] = []
    suffixes, key = {}, None
    try:
        for name, offset, size in _members(path):
            folder, _, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not dot or not stem:
                continue
            if (folder, stem) != key:
                key = (folder, stem)
                samples.append({})
            suffix = suffixes.setdefault(suffix.lower(), suffix.lower())
            samples[-1][suffix] = (offset, size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar ({error}); only plain ones are, unpack .tar.gz.") from error
    index = np.zeros(len(samples), dtype=[(suffix, _SPAN) for suffix in suffixes])
    for suffix in suffixes:
        index[suffix] = np.array([sample.get(suffix, (0, 0)) for sample in samples], dtype=_SPAN)
    return index


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of each file in a tar; what `tarfile` would tell, in a third of its time."""
    with path.open("rb", buffering=0) as file:
        length, position, long_name = os.fstat(file.fileno()).st_size, 0, None
        while position + _BLOCK <= length:
            file.seek(position)
            header = file.read(_BLOCK)
            if not header.rstrip(b"\0"):
                return
            kind, size = header[156:157], tarfile.nti(header[124:136])
            checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            if header[257:262] != b"ustar" or kind == b"S" or tarfile.nti(header[148:156]) != checksum:
                raise tarfile.ReadError(f"no tar header at byte {position}")
            data = position + _BLOCK
            position = data + -(-size // _BLOCK) * _BLOCK
            if position - (-size % _BLOCK) > length:
                raise tarfile.ReadError(f"it ends in the middle of a member, after {length} bytes")
            if kind in b"xL":  # a long name for what follows, as pax or GNU writes it
                text = file.read(size)
                if kind == b"L":
                    long_name = text.rstrip(b"\0").decode("utf-8", "replace")
                else:
                    found = _pax_fields(text)
                    long_name = found.get("path", long_name)
                    if "size" in found:
                        raise tarfile.ReadError("a member has more than 8 GiB")
            elif kind in (b"0", b"\0"):
                prefix = tarfile.nts(header[345:500], "utf-8", "replace") if header[257:263] == b"ustar\0" else ""
                plain = tarfile.nts(header[0:100], "utf-8", "replace")
                yield long_name or (f"{prefix}/{plain}" if prefix else plain), data, size
                long_name = None
        if position < length:
            raise tarfile.ReadError(f"it ends in the middle of a header, after {length} bytes")


def _pax_fields(text: bytes) -> dict[str, str]:
    """Records of the form "length key=value\\n" (POSIX.1-2001 pax)."""
    fields = {}
    while text:
        length = int(text.partition(b" ")[0])
        key, _, value = text[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        fields[key.decode()], text = value.decode("utf-8", "replace"), text[length:]
    return fields


class TarRows:
    """
    The samples of a tar.

    A column names a member by its suffix or a field of the `json` member; "image" is also the first of
    `IMAGE_SUFFIXES` that a sample has. Nothing is ever unpickled.
    """

    one_by_one = True

    def __init__(self, path: Path, columns: Mapping[str, str]):
        self.path, self.columns, self.name, self.location = path, columns, path.name, str(path)
        self.index = tar_index(path)  # (samples,)
        self.suffixes = self.index.dtype.names or ()
        self.chunks = even_chunks(len(self.index))
        self._file, self._owner = None, None

    def __getstate__(self):
        return self.__dict__ | {"_file": None, "_owner": None}

    def _member(self, number: int, suffix: str) -> bytes | None:
        if self._owner != os.getpid():
            self._file, self._owner = open(self.path, "rb", buffering=0), os.getpid()  # noqa: SIM115
        offset, size = self.index[number][suffix].item()
        if size == 0:
            return None
        self._file.seek(offset)
        return self._file.read(size)

    def fields(self, number: int) -> dict[str, Any]:
        """
        What the sample's `json` member holds; empty without one.

        Raises:
            `ValueError`: when it is not a JSON object in UTF-8.
        """
        stored = self._member(number, JSON_SUFFIX) if JSON_SUFFIX in self.suffixes else None
        values = {} if stored is None else json.loads(stored.decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("its json member is no object")
        return values

    def read(self, numbers: list[int]) -> list[Row]:
        return [self._row(number, self.columns) for number in numbers]

    def _row(self, number: int, columns: Mapping[str, str]) -> Row:
        row = Row(f"{self.name}:{self._key(number)}")
        fields = None
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
        for suffix in (column, *(IMAGE_SUFFIXES if column == "image" else ())):
            if suffix in self.suffixes:
                stored = self._member(number, suffix)
                if stored is not None:
                    return stored
        return None

    def _key(self, number: int) -> str:
        """The sample's name as its first member's header has it (its first 100 bytes)."""
        first = min(offset for offset, size in self.index[number].item() if size)
        self._member(number, self.suffixes[0])  # opens the file
        self._file.seek(first - _BLOCK)
        name = tarfile.nts(self._file.read(100), "utf-8", "replace")
        return name.rpartition("/")[2].partition(".")[0]

    def texts(self, kind: str) -> Iterator[Stored]:
        for number in range(len(self.index)):
            yield getattr(self._row(number, {kind: self.columns[kind]}), kind)
