"""Tables of images with a column of texts or labels: parquet, JSON lines, JSON, CSV, or a data set of the Hub."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .image_files import ImageFiles, complain


IMAGE_COLUMNS = ("image", "filename", "filepath", "file_name")  # the first that a table has is taken
FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
ENCODINGS = ("utf-8-sig", "gb18030")  # RS5M's rsicd_test.csv is in the second
SPLITS = ("train", "training", "validation", "valid", "val", "test", "testing")


class NotHere(ValueError):
    """A source holds no data of the kind that was asked for; it may well hold that of another task."""


class Unusable(NotHere):
    """The data is of this task and whole, but cannot be measured; where it is left out, that is always said."""


class MissingColumn(NotHere):
    """The data is there, but not the kind of text or label that was asked for."""


@dataclass(frozen=True)
class Table:
    """Two columns as read."""

    origin: str  # file, folder or Hub id, for errors
    images: list[Any]  # paths, bytes, or {"path": …, "bytes": …}
    values: list[Any]  # texts or labels
    folder: Path | None = None  # where image paths start
    row_name: str = "row"
    how: str = ""  # what was taken: columns, encoding, splits
    label_names: list[str] | None = None  # of labels that are numbers

    def __len__(self) -> int:
        return len(self.images)


def read_table(path: Path, columns: Sequence[str]) -> Table:
    """
    Reads a table file.

    Args:
        path: a file of one of the `FORMATS`.
        columns: names that the column of texts or labels may have; the first found is taken.

    Raises:
        `ValueError`: one sentence for a format or encoding that cannot be read, or a missing column.
    """
    if path.suffix == ".parquet":
        return read_parquet([path], columns)
    if path.suffix not in FORMATS:
        raise NotHere(f"{path}: {path.suffix or 'no suffix'} is not a supported format; use {', '.join(FORMATS)}.")
    text, encoding = read_text(path)
    if path.suffix == ".jsonl":
        rows, row_name = _json_lines(path, text), "line"
    elif path.suffix == ".json":
        rows, row_name = parse_json(path, text), "entry"
        if not isinstance(rows, list):
            raise NotHere(f"{path} must hold a list of objects, one an image; it holds a {type(rows).__name__}.")
    else:
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        rows, row_name = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)), "row"
    return _from_records(path, rows, columns, row_name, encoding)


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file and its encoding, one of the `ENCODINGS`."""
    content = path.read_bytes()
    for encoding in ENCODINGS:
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is neither UTF-8 nor GB18030 text.")


def parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_parquet(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """Reads parquet files of the same columns as one table."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows, names = [], None
    for path in paths:
        try:
            schema = parquet.read_schema(path)
            image = find_column(str(path), schema.names, IMAGE_COLUMNS)
            column = find_column(str(path), schema.names, columns)
            rows += [
                (row[image], row[column]) for row in parquet.read_table(path, columns=[image, column]).to_pylist()
            ]
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
        names = getattr(datasets.Features.from_arrow_schema(schema)[column], "names", None)
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    images, values = [row[0] for row in rows], [row[1] for row in rows]
    return Table(origin, images, values, paths[0].parent, how=_took(image, column), label_names=names)


def read_hub(name: str, columns: Sequence[str], split: str | None = "test") -> Table:
    """
    Reads a data set of the Hub.

    Args:
        name: its id, `owner/name`.
        columns: as for [`read_table`].
        split: the one to take; None for all of them.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # datasets' and the Hub's errors are of these kinds
        reason = str(error).strip().split("\n")[0]
        raise NotHere(f"{name} is neither a path nor a Hub data set that could be read ({reason})") from error
    splits = data if split is None else {split: data}
    data = datasets.concatenate_datasets(list(splits.values()))
    image = find_column(name, data.column_names, IMAGE_COLUMNS)
    column = find_column(name, data.column_names, columns)
    if isinstance(data.features[image], datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    names = getattr(data.features[column], "names", None)
    how = f"{_took(image, column)}, split {' + '.join(splits)}"
    return Table(name, list(data[image]), list(data[column]), how=how, label_names=names)


def is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not source.endswith("/")


def find_column(origin: str, columns: Sequence[Any], wanted: Sequence[str]) -> str:
    """The first of the wanted names among the columns; one sentence where there is none."""
    for name in wanted:
        if name in columns:
            return name
    near = difflib.get_close_matches(wanted[0], [str(name) for name in columns], n=1)
    raise MissingColumn(
        f"{origin} has no {wanted[0]}; it has {', '.join(map(str, columns)) or 'nothing'}"
        + (f" (is {near[0]} what you mean?)" if near else ".")
    )


def _took(image: str, column: str) -> str:
    return f"columns {image} and {column}"


def _json_lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028 within a caption
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
    while rows and rows[-1] is None:  # empty lines at the end
        rows.pop()
    return rows


def _from_records(path: Path, rows: list[Any], columns: Sequence[str], row_name: str, encoding: str) -> Table:
    images, values, image, column = [], [], IMAGE_COLUMNS[0], columns[0]
    for number, row in enumerate(rows, start=1):
        origin = f"{path}, {row_name} {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{origin} is not an object with the fields {image} and {column}.")
        try:
            image, column = find_column(origin, list(row), IMAGE_COLUMNS), find_column(origin, list(row), columns)
        except MissingColumn as error:
            if number == 1:
                raise
            raise ValueError(f"{error} The {row_name}s before it have them.") from error
        images.append(row[image])
        values.append(row[column])
    how = _took(image, column) + ("" if encoding == ENCODINGS[0] else f", {encoding}")
    return Table(str(path), images, values, path.parent, row_name, how)


# -------------------------------------------------------------------------------------------------------------- images


def table_images(table: Table, merge_embedded: bool = True) -> tuple[ImageFiles, list[int], str]:
    """
    The images of a table, each once: rows that name the same file share an image.

    Args:
        merge_embedded: rows that hold the same bytes under the same path share an image too.

    Returns:
        M images (whether they exist is not looked at), the image index of every row, and where paths start, for
        errors.

    Raises:
        `ValueError`: for rows that have neither a path nor an image.
    """
    folder, beside = _image_folder(table)
    place: dict[Any, int] = {}
    sources, names, owners, odd = [], [], [], []
    for row, value in enumerate(table.images):
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        if isinstance(path, bytes):
            path, content = None, path
        where = f"{table.row_name} {row + 1}"
        if content is not None:
            key, source = (path, hashlib.sha256(content).digest()) if merge_embedded else row, content
        elif isinstance(path, str) and path:
            key = source = folder / Path(path).expanduser()
        else:
            odd.append(where)
            continue
        if key not in place:
            place[key] = len(sources)
            sources.append(source)
            names.append(path or f"{where} of {table.origin}")
        owners.append(place[key])
    complain(odd, len(table), f"{table.row_name}s of {table.origin} have neither an image path nor an image")
    return ImageFiles(sources, names), owners, beside


def _image_folder(table: Table) -> tuple[Path, str]:
    """Image paths start at the table's folder, or at the folder below it that holds most of them (`images/`)."""
    folder = table.folder or Path()
    paths = list(dict.fromkeys(value for value in table.images if isinstance(value, str)))[:200]
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if table.folder and paths else []
    # max takes the first of equals: the table's own folder, where none below holds more
    best = max([folder, *below], key=lambda candidate: sum((candidate / path).is_file() for path in paths))
    if not table.folder:
        return best, ""
    found = any((best / path).is_file() for path in paths)
    return (
        best,
        f" (paths are taken from {best})" if found or not below else f" (neither in {folder} nor in a folder below)",
    )
