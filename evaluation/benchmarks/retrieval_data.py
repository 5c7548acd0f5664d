"""
Images and their captions for text-image retrieval, from a folder, a table file or the Hub.

M images, N texts; a text belongs to one image, an image has one text or several.
"""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from PIL import Image, ImageOps


IMAGE_COLUMN = "image"
FORMATS = (".parquet", ".jsonl", ".json", ".csv")
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
        source = self.sources[index]
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            image = ImageOps.exif_transpose(image)  # upright, as for training; also reads the pixels
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {self.names[index]} cannot be read: {error}") from error
        return image

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the content of all files, in order; file names do not enter."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class RetrievalData:
    """One retrieval benchmark: `text_to_image[j]` is the index of the image that text j describes."""

    name: str
    images: ImageFiles  # M
    texts: list[str]  # N
    text_to_image: list[int]  # N

    @property
    def texts_hash(self) -> str:
        """SHA-256 over the texts and the images they belong to."""
        return hashlib.sha256(json.dumps([self.texts, self.text_to_image]).encode()).hexdigest()


@dataclass(frozen=True)
class _Table:
    """Two columns as read: `origin` and `row_name` word the errors, `folder` is what image paths start from."""

    origin: str
    images: list[Any]
    captions: list[Any]
    folder: Path | None
    row_name: str = "row"

    def __len__(self) -> int:
        return len(self.images)


def load_retrieval(source: str | Path, text_column: str) -> RetrievalData:
    """
    Loads images and one kind of caption.

    Args:
        source: one of
            - a folder with `test.parquet` (as `evaluation.benchmarks.aerial_scenes` writes it), or shards of it;
            - a `.parquet`, `.jsonl`, `.json` (a list of objects) or `.csv` file;
            - the id of a Hub data set, whose `test` split is taken.
            It has the columns `image` (a path relative to the file, or the image itself) and `text_column`.
        text_column: `long_text` or `short_text`: a string, or a list of several captions of the image.

    Returns:
        [`RetrievalData`]: rows that name the same image become one image with several texts.

    Raises:
        `ValueError`: one sentence for a missing column, missing images, or empty captions, with their number and the
            first of them.
    """
    table = _read(source, text_column)
    if not len(table):
        raise ValueError(f"{table.origin} has no rows.")
    keys = _image_keys(table)
    captions = _captions(table, text_column)
    place: dict[Any, int] = {}
    sources, names, texts, text_to_image = [], [], [], []
    for row, ((key, opened, name), own) in enumerate(zip(keys, captions, strict=True)):
        if key not in place:
            place[key] = len(sources)
            sources.append(opened)
            names.append(name or f"{table.row_name} {row + 1} of {table.origin}")
        texts.extend(own)
        text_to_image.extend([place[key]] * len(own))
    return RetrievalData(_name(source), ImageFiles(sources, names), texts, text_to_image)


def _name(source: str | Path) -> str:
    """`runs/scenes/test.parquet` and `runs/scenes` are both the data set `scenes`."""
    path = Path(source)
    if path.suffix in FORMATS and path.stem in ("test", "captions", "data"):
        return path.absolute().parent.name
    return path.stem if path.suffix in FORMATS else path.absolute().name


# ------------------------------------------------------------------------------------------------------------ reading


def _read(source: str | Path, text_column: str) -> _Table:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(path.glob("test.parquet")) or sorted(path.glob("test-*.parquet"))
        if not found:
            near = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix in FORMATS)[:5])
            raise ValueError(
                f"{path} holds no test.parquet; name a {', '.join(FORMATS)} file"
                + (f", for example one of: {near}." if near else " with the columns image, long_text, short_text.")
            )
        return _read_parquet(found, text_column)
    if not path.is_file():
        if path.suffix in FORMATS or not _is_hub_id(str(source)):
            raise ValueError(f"{path} does not exist; give a folder, a {', '.join(FORMATS)} file or a Hub id.")
        return _read_hub(str(source), text_column)
    if path.suffix == ".parquet":
        return _read_parquet([path], text_column)
    if path.suffix == ".jsonl":
        return _from_records(path, _json_lines(path), text_column, row_name="line")
    if path.suffix == ".json":
        return _from_records(path, _json_list(path), text_column, row_name="entry")
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            return _from_records(path, list(csv.DictReader(file)), text_column)
    raise ValueError(f"{path}: {path.suffix or 'no suffix'} is not a supported format; use {', '.join(FORMATS)}.")


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "~", "/"))


def _read_parquet(paths: list[Path], text_column: str) -> _Table:
    import pyarrow
    from pyarrow import parquet

    origin, rows = str(paths[0]), []
    for path in paths:
        try:
            _check_columns(str(path), parquet.read_schema(path).names, text_column)
            rows += parquet.read_table(path, columns=[IMAGE_COLUMN, text_column]).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    return _Table(origin, [row[IMAGE_COLUMN] for row in rows], [row[text_column] for row in rows], paths[0].parent)


def _read_hub(name: str, text_column: str) -> _Table:
    import datasets

    try:
        data = datasets.load_dataset(name, split="test")
    except (OSError, ValueError) as error:  # datasets' and the Hub's errors are of these kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is neither a path nor a Hub data set that could be read ({reason})") from error
    _check_columns(name, data.column_names, text_column)
    if isinstance(data.features[IMAGE_COLUMN], datasets.Image):
        data = data.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
    return _Table(name, list(data[IMAGE_COLUMN]), list(data[text_column]), folder=None)


def _json_lines(path: Path) -> list[Any]:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line) if line.strip() else None)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
    while rows and rows[-1] is None:  # empty lines at the end
        rows.pop()
    return rows


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of objects, one an image; it holds a {type(rows).__name__}.")
    return rows


def _from_records(path: Path, rows: list[Any], text_column: str, row_name: str = "row") -> _Table:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {row_name} {number} is not an object with the fields image and {text_column}.")
        _check_columns(f"{path}, {row_name} {number}", row, text_column)
    images, captions = [row[IMAGE_COLUMN] for row in rows], [row[text_column] for row in rows]
    return _Table(str(path), images, captions, path.parent, row_name)


def _check_columns(origin: str, columns: Any, text_column: str) -> None:
    for wanted in (IMAGE_COLUMN, text_column):
        if wanted not in columns:
            near = difflib.get_close_matches(wanted, [str(name) for name in columns], n=1)
            raise ValueError(
                f"{origin} has no {wanted}; it has {', '.join(map(str, columns)) or 'nothing'}"
                + (f" (is {near[0]} what you mean?)" if near else ".")
            )


# ----------------------------------------------------------------------------------------------------------- checking


def _image_keys(table: _Table) -> list[tuple[Any, Path | bytes, str]]:
    """Per row (identity, file or bytes, name). The same file, or embedded bytes under the same path, is one image."""
    keys, missing, odd = [], [], []
    for row, value in enumerate(table.images):
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        if isinstance(path, bytes):
            path, content = None, path
        if content is not None:
            keys.append(((path, hashlib.sha256(content).digest()), content, path or ""))
        elif isinstance(path, str) and path:
            file = (table.folder or Path()) / Path(path).expanduser()
            if not file.is_file():
                missing.append(path)
            keys.append((file, file, path))
        else:
            odd.append(f"{table.row_name} {row + 1}")
    _complain(odd, len(table), f"{table.row_name}s of {table.origin} have neither an image path nor an image")
    beside = f" (paths are taken from {table.folder})" if table.folder else ""
    _complain(missing, len(table), f"images of {table.origin} are missing{beside}")
    return keys


def _captions(table: _Table, text_column: str) -> list[list[str]]:
    captions, empty = [], []
    for row, value in enumerate(table.captions):
        own = list(value) if isinstance(value, list | tuple) else [value]
        if not own or not all(isinstance(text, str) and text.strip() for text in own):
            empty.append(f"{table.row_name} {row + 1}")
        captions.append(own)
    _complain(empty, len(table), f"{table.row_name}s of {table.origin} have no {text_column}, or an empty one")
    return captions


def _complain(offenders: list[str], total: int, what: str) -> None:
    """Raises one sentence that counts the offenders and names the first few."""
    if offenders:
        shown = ", ".join(offenders[:SHOWN])
        more = ", …" if len(offenders) > SHOWN else ""
        raise ValueError(f"{len(offenders)} of {total} {what}, first: {shown}{more}")
