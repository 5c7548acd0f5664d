"""Tables of images with a column of texts or labels: parquet, JSON lines, JSON, CSV, or a data set of the Hub."""

import difflib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES, ImageError, ImageFiles
from modeling_lrsclip.files import tables as table_files
from modeling_lrsclip.files.hashing import bytes_sha256


IMAGE_COLUMNS = table_files.USUAL_COLUMNS["image"]  # the first that a table has is taken
FORMATS = (*table_files.TABLE_SUFFIXES, ".tar")
TAR_IMAGES = (*(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "img_content")
SHOWN = 3  # offenders an error names before it only counts
NOT_COMPARABLE = "figures do not compare with published ones"
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
    places: Sequence[str] = ()  # of the rows in the file, such as "line 3"; by default they are counted

    def __len__(self) -> int:
        return len(self.images)

    def position(self, row: int) -> str:
        """Name of a row's position in the file, for errors."""
        return self.places[row] if self.places else f"{self.row_name} {row + 1}"


def read_table(path: Path, columns: Sequence[str], image_columns: Sequence[str] = IMAGE_COLUMNS) -> Table:
    """
    Reads a table file.

    Args:
        path: a file of one of the `FORMATS`.
        columns: names that the column of texts or labels may have; the first found is taken.
        image_columns: the same of images; those of a tar are its members.

    Returns:
        [`Table`]: the column of images and that one, a row each.

    Raises:
        `ValueError`: one sentence for a format or encoding that cannot be read, or a missing column.
    """
    if path.suffix == ".parquet":
        return read_parquet([path], columns, image_columns)
    if path.suffix not in FORMATS:
        raise NotHere(f"{path}: {path.suffix or 'no suffix'} is not a supported format; use {', '.join(FORMATS)}.")
    if path.suffix == ".json" and table_files.json_list_name(path) != "":
        raise NotHere(f"{path} must hold a list of objects, one an image.")
    is_tar = path.suffix == ".tar"
    utf8 = table_files.ENCODINGS[0]
    encoding = utf8 if is_tar else table_files.text_encoding(path)
    image_columns = IMAGE_COLUMNS[:1] if is_tar else image_columns  # a tar holds its images: no paths of this machine
    images, values, places, image, column = [], [], [], image_columns[0], columns[0]
    samples = table_files.tar_samples(path, TAR_IMAGES) if is_tar else ()
    tar_rows = (table_files.TableRow(f"sample {values['__key__']}", values) for values in samples)
    for row in tar_rows if is_tar else table_files.iter_rows(path, encoding):
        origin = f"{path}, {row.where}"
        if row.fault:
            raise ValueError(f"{origin} {row.fault}.")
        try:
            image, column = (find_column(origin, list(row.values), names) for names in (image_columns, columns))
        except MissingColumn as error:
            if not places:
                raise
            raise ValueError(f"{error} The rows before it have them.") from error
        images.append(row.values[image])
        values.append(row.values[column])
        places.append(row.where)
    row_name = {".jsonl": "line", ".json": "entry"}.get(path.suffix, "row")
    how = f"columns {image} and {column}" + ("" if encoding == utf8 else f", {encoding}")
    return Table(str(path), images, values, path.parent, row_name, how, places=places)


def read_parquet(paths: Sequence[Path], columns: Sequence[str], image_columns: Sequence[str] = IMAGE_COLUMNS) -> Table:
    """
    Reads parquet files of the same columns as one table.

    Args:
        paths: of the files.
        columns, image_columns: as of [`read_table`].

    Returns:
        [`Table`]: a row each.
    """
    images, values, names = [], [], None
    for path in paths:
        known = table_files.parquet_columns(path)
        image = find_column(str(path), list(known), image_columns)
        column = find_column(str(path), list(known), columns)
        for row in table_files.read_rows(path, columns=[image, column]):
            images.append(row[image])
            values.append(row[column])
        names = known[column]
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    how = f"columns {image} and {column}"
    return Table(origin, images, values, paths[0].parent, how=how, label_names=names)


def read_hub(
    name: str,
    columns: Sequence[str],
    split: str | None = "test",
    image_columns: Sequence[str] = IMAGE_COLUMNS,
) -> Table:
    """
    Reads a data set of the Hub.

    Args:
        name: its id, `owner/name`.
        columns: as for [`read_table`].
        split: the one to take; None for all of them.
        image_columns: as for [`read_table`].

    Returns:
        [`Table`]: the column of images and that one, a row each.

    Raises:
        `NotHere`: for a data set that cannot be read, or lacks such a column.
    """
    try:
        data, splits = table_files.load_hub(name, split)
    except ValueError as error:
        raise NotHere(str(error)) from error
    image = find_column(name, data.column_names, image_columns)
    column = find_column(name, data.column_names, columns)
    names = getattr(data.features[column], "names", None)
    how = f"columns {image} and {column}, split {splits}"
    return Table(name, list(data[image]), list(data[column]), how=how, label_names=names)


def is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not source.endswith("/")


def find_column(origin: str, columns: Sequence[Any], wanted: Sequence[str]) -> str:
    """
    The first of the wanted names among the columns; one sentence where there is none.

    Args:
        origin: the file, for the error.
        columns: names that there are.
        wanted: names that will do, the best first.

    Returns:
        One of `wanted`.
    """
    for name in wanted:
        if name in columns:
            return name
    near = difflib.get_close_matches(wanted[0], [str(name) for name in columns], n=1)
    raise MissingColumn(
        f"{origin} has no {wanted[0]}; it has {', '.join(map(str, columns)) or 'nothing'}"
        + (f" (is {near[0]} what you mean?)" if near else ".")
    )


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
    index_of: dict[Any, int] = {}
    sources, names, owners, odd = [], [], [], []
    for row, value in enumerate(table.images):
        value = {"bytes": value} if isinstance(value, bytes) else value
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        where = table.position(row)
        if content is not None:
            key, source = (path, bytes_sha256(content)) if merge_embedded else row, content
        elif isinstance(path, str) and path:
            key = source = folder / Path(path).expanduser()
        else:
            odd.append(where)
            continue
        if key not in index_of:
            index_of[key] = len(sources)
            sources.append(source)
            names.append(path or f"{where} of {table.origin}")
        owners.append(index_of[key])
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
    if below and not any((best / path).is_file() for path in paths):
        return best, f" (neither in {folder} nor in a folder below)"
    return best, f" (paths are taken from {best})"


def usable_images(
    images: ImageFiles, allow_missing: int, origin: str, beside: str = ""
) -> tuple[list[int], list[str]]:
    """
    Choose the images to keep. With `allow_missing`, all of them are opened once, to see which cannot be read; without it,
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
    files = ((index, source) for index, source in enumerate(images.sources) if isinstance(source, Path))
    reasons = {index: "missing" for index, file in files if not file.is_file()}
    if len(reasons) <= allow_missing and allow_missing:
        reasons |= _unreadable(images, [index for index in range(len(images)) if index not in reasons])
    unusable = [f"{images.names[index]} ({reasons[index]})" for index in sorted(reasons)]
    if len(reasons) > allow_missing or (reasons and len(reasons) == len(images)):
        what = f"images of {origin} are missing"
        if set(reasons.values()) == {"missing"}:
            unusable = [images.names[index] for index in sorted(reasons)]
        else:
            what += " or cannot be read"
        limit = f"--allow-missing {allow_missing} does not cover them; " if allow_missing else ""
        advice = f" ({limit}--allow-missing {len(reasons)} would leave them out)" if len(reasons) < len(images) else ""
        complain(unusable, len(images), what + beside, advice)
    return [index for index in range(len(images)) if index not in reasons], unusable


def _unreadable(images: ImageFiles, indices: list[int]) -> dict[int, str]:
    """Opens the images; PIL decodes outside Python's lock, so threads help."""

    def reason(index: int) -> str | None:
        try:
            images[index]
        except ImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = tqdm(pool.map(reason, indices), "checking images", len(indices), leave=False, disable=None)
        return {index: fault for index, fault in zip(indices, faults, strict=True) if fault}


def complain(offenders: Sequence[str], total: int, what: str, advice: str = "") -> None:
    """
    Raises one sentence that counts the offenders and names the first few; says nothing where there are none.

    Args:
        offenders: names of what is wrong.
        total: number of all that were looked at.
        what: goes on after the numbers, for example `images are missing`.
        advice: ends the sentence.
    """
    if offenders:
        shown = ", ".join(offenders[:SHOWN])
        more = ", …" if len(offenders) > SHOWN else ""
        raise ValueError(f"{len(offenders)} of {total} {what}, first: {shown}{more}{advice}")


def describe_data(data: Any, benchmark: str | None, expected: dict[str, int] | None) -> dict[str, Any]:
    """
    Return what `results.json` says of a benchmark's data.

    Args:
        data: with `read_from`, `is_whole`, `skipped` and `summary`.
        benchmark: name of the published data that it is, or a part of; None: of none.
        expected: counts of the published data.

    Returns:
        `dict`, ready for JSON.
    """
    described = {"read_from": data.read_from, "benchmark": benchmark, "expected": expected, "whole": data.is_whole}
    return described | {"skipped": list(data.skipped), "summary": data.summary}


def left_out(skipped: Sequence[str]) -> str:
    """The part of a summary that tells of images left out; empty where none is."""
    return f"; {len(skipped)} images left out, first: {skipped[0]}" if skipped else ""


def plain(name: str) -> str:
    """A name without case and separators: `Baseball_Diamond`, `baseball diamond` and `BaseballDiamond` are one."""
    return re.sub(r"[\W_]", "", name).lower()
