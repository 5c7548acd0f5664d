"""Records of a source of a recipe, one after another in a stable order, from tables, tars, folders and the Hub."""

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES, is_image_file
from modeling_lrsclip.files import tables
from modeling_lrsclip.files.tables import TABLE_SUFFIXES, load_hub, tar_samples

from ..data_row import Record
from ..recipe import KeyConfig, ReadConfig, SourceConfig, resolve


TableRow = dict[str, Any]
TAR_IMAGES = (*(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES), "img_content")
# What other people's files call a column; the first that a row has is taken where the recipe names none.
USUAL_COLUMNS = {
    "image": ("image", "img_content", "filename", "file_name", "filepath", "img_name"),
    "key": ("key", "img_name", "image_key", "__key__"),
    "long_text": ("long_text", "conversations"),
    "short_text": ("short_text", "short_texts", "caption", "captions", "sentences", "title", "text", "txt"),
    "class_name": ("class_name", "label", "class"),
    "longitude": ("longitude", "lon"),
    "latitude": ("latitude", "lat"),
    "gsd": ("gsd",),
    "date": ("date", "timestamp"),
    "labels": ("objects",),
    "bounds": ("bounds",),
}
Plan = list[tuple[str, tuple[str, ...]]]
NUMBERS = ("longitude", "latitude", "gsd")
SHOWN = 3  # keys and values that an error shows
_TEMPLATE = re.compile(r"\{([^{}]+)\}")


def read_source(source: SourceConfig, root: Path, stored: Iterable[TableRow] | None = None) -> Iterator[Record]:
    """
    Records of a source in a stable order; positions count them from 0. A row with several short captions becomes
    several records (`captions: each`), one with all of them (`together`) or one with the first.

    Args:
        source: of the recipe.
        root: where its relative paths start.
        stored: rows as [`stored_rows`] has them; by default all of them.

    Returns:
        Records, their images not yet opened.

    Raises:
        `ValueError`: for a path that is not there, a missing column, or a file that cannot be read.
    """
    position = 0
    for row in read_rows(source.read, root, stored):
        for record in _records(source, row, root):
            record.position = position
            position += 1
            yield record
            if source.read.limit is not None and position >= source.read.limit:
                return


def stored_rows(read: ReadConfig, root: Path) -> Iterator[TableRow]:
    """All rows of a place, with its own names of columns; images of tars and of the Hub stay bytes."""
    if read.kind == "hub":
        yield from load_hub(read.path, read.split, streaming=True)[0]
        return
    path = resolve(read.path, root)
    if read.kind == "table":
        yield from table_rows(path, read.split, read.encoding)
    elif read.kind == "webdataset":
        for tar in find_files(path, (".tar",)):
            yield from tar_samples(tar, TAR_IMAGES)
    else:
        yield from _image_files(path, read.kind == "class_folders")


def table_rows(pattern: Path, split: str, encoding: str) -> Iterator[TableRow]:
    """
    Rows of all table files of a pattern.

    Args:
        pattern: path, folder or glob.
        split: of Karpathy's JSON, whose images are taken; "all": of every split.
        encoding: of text files; what is not of it becomes U+FFFD, so that its row is skipped and listed, not the file.

    Returns:
        Rows as they are stored.

    Raises:
        `ValueError`: naming file and line, for a row that cannot be read.
    """
    for path in find_files(pattern, TABLE_SUFFIXES):
        for row in tables.read_rows(path, encoding):
            if path.suffix != ".json" or "sentences" not in row or split in ("all", row.get("split")):
                yield row


def find_files(pattern: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """
    The files that a path, a folder or a glob stands for, sorted by name.

    Raises:
        `ValueError`: where there is none.
    """
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        files = sorted(path for path in pattern.iterdir() if path.suffix in suffixes)
    else:
        files = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise ValueError(f"{pattern} names no {', '.join(suffixes)} file; give a file, a folder or a pattern with *.")
    return files


def read_rows(read: ReadConfig, root: Path, stored: Iterable[TableRow] | None = None) -> Iterator[TableRow]:
    """
    Rows that fit `where`, with the columns of `USUAL_COLUMNS` that are there and others as they are called.

    Args:
        read: the place they are read from.
        root: where its relative paths start.
        stored: rows as [`stored_rows`] has them; by default all of them.

    Returns:
        The rows, one after another.

    Raises:
        `ValueError`: for a column that is not there, and where no row fits.
    """
    rows = stored_rows(read, root) if stored is None else stored
    plans: dict[tuple[str, ...], Plan] = {}  # rows of a table mostly have the same columns
    number, taken, left_out = 0, 0, []
    for number, row in enumerate(rows, start=1):
        if number == 1:
            _check_columns(read, row)
        if all(wanted.fits(_get(row, column)) for column, wanted in read.where.items()):
            columns = tuple(row)
            if columns not in plans:
                plans[columns] = _plan(read, row)
            taken += 1
            yield _named(plans[columns], row)
        elif len(left_out) < SHOWN:
            left_out.append(", ".join(f"{column}={_get(row, column)!r:.80}" for column in read.where))
    if not number:
        hint = f" of split {read.split}; set read.split to one that it has, or to all"
        raise ValueError(f"{read.path} holds no rows{hint if read.path.endswith('.json') else ''}.")
    if not taken:
        wanted = ", ".join(f"{column}: {one}" for column, one in read.where.items())
        raise ValueError(
            f"none of the {number} rows of {read.path} fits where ({wanted}); its first rows have {'; '.join(left_out)}."
        )


def join_key(row: TableRow, read: ReadConfig) -> str | None:
    """The key a row is joined on: its [`key_source`] after the recipe's steps."""
    stored = key_source(row)
    return normalise_key(stored, read.key) if stored else None


def key_source(row: TableRow) -> str | None:
    """The name that a row's key is made of: its `key` column, or else the image's name."""
    stored = row.get("key") or row.get("image")
    if isinstance(stored, dict):
        stored = stored.get("path")
    return stored if isinstance(stored, str) and stored else None


def normalise_key(name: str, config: KeyConfig) -> str:
    """`config`'s steps on a name; folders are separated by a slash whatever the source wrote."""
    name = name.replace("\\", "/")
    if config.basename:
        name = name.rpartition("/")[2]
    if config.stem:
        folder, slash, file = name.rpartition("/")
        name = folder + slash + (file.rpartition(".")[0] or file)
    if config.lower:
        name = name.lower()
    for pattern, replacement in config.replace:
        name = re.sub(pattern, replacement, name)
    return name


def caption_of(stored: Any) -> list[str]:
    """
    The captions in a stored value: a string, a list of strings, Karpathy's sentences (`{"raw": …}`), or the answer in a
    conversation as LLaVA and VHM write it (`{"from": "gpt", "value": …}`). Other values count as one empty caption.
    """
    if isinstance(stored, str) or stored is None:
        return [stored or ""]
    if not isinstance(stored, list | tuple):
        return [""]
    if stored and isinstance(stored[0], dict) and ("from" in stored[0] or "role" in stored[0]):
        answers = [turn for turn in stored if turn.get("from", turn.get("role")) in ("gpt", "assistant")]
        return [answer.get("value") or answer.get("content") or "" for answer in answers[:1]] or [""]
    return [(entry.get("raw") or "") if isinstance(entry, dict) else str(entry or "") for entry in stored] or [""]


def _image_files(folder: Path, class_folders: bool) -> Iterator[TableRow]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; read.path of kind images or class_folders must be one.")
    empty = True
    for path in _sorted_files(folder):
        if is_image_file(path) and not (class_folders and path.parent == folder):
            row: TableRow = {"image": path, "key": path.relative_to(folder).as_posix()}
            yield row | ({"class_name": path.parent.name} if class_folders else {})
            empty = False
    if empty:
        raise ValueError(f"{folder} holds no images{' in class folders' if class_folders else ''}.")


def _sorted_files(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their names, folder by folder, so that only one is listed at a time."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _sorted_files(path)
        else:
            yield path


def _check_columns(read: ReadConfig, row: TableRow) -> None:
    asked = [(column, f"columns.{name}") for name, column in read.columns.items()]
    for column, option in asked + [(column, "where") for column in read.where]:
        for one in _TEMPLATE.findall(column) or [column]:
            if one not in row and one.split(".")[0] not in row:
                there = ", ".join(map(str, row))
                raise ValueError(f"{read.path} has no column {one}, which {option} names; it has {there}.")


def _plan(read: ReadConfig, row: TableRow) -> Plan:
    """Which columns of a row may fill which name, in order: the recipe's one, else the usual ones that are there."""
    plan = [(name, (column,)) for name, column in read.columns.items()]
    for name, usual in USUAL_COLUMNS.items():
        there = tuple(column for column in usual if column in row)
        if name not in read.columns and there and there != (name,):
            plan.append((name, there))
    return plan


def _named(plan: Plan, row: TableRow) -> TableRow:
    named = dict(row)
    for name, columns in plan:
        value = next((value for column in columns if (value := _get(row, column)) is not None), None)
        if value is not None or name not in USUAL_COLUMNS or name in row:
            named[name] = value
    return named


def _get(row: TableRow, column: str) -> Any:
    if column in row:
        return row[column]
    if "{" in column:
        parts = {one: _get(row, one) for one in _TEMPLATE.findall(column)}
        return None if None in parts.values() else _TEMPLATE.sub(lambda match: str(parts[match[1]]), column)
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _records(source: SourceConfig, row: TableRow, root: Path) -> Iterator[Record]:
    read = source.read
    image, key = row.get("image"), row.get("key")
    if key is None:
        key = image.get("path") if isinstance(image, dict) else image
    key = str(key) if isinstance(key, str | Path) else ""
    if read.kind == "webdataset":  # which holds its images: a path in it would be one of this machine
        image = image if isinstance(image, bytes) else None
    elif isinstance(image, str):
        image = _image_folder(read, root) / image
    elif isinstance(image, dict) and not image.get("bytes") and image.get("path"):
        image = _image_folder(read, root) / image["path"]
    constants = source.fields
    base = {
        "source": source.name,
        "position": 0,
        "image": image,
        "image_key": key,
        "class_name": row.get("class_name") if isinstance(row.get("class_name"), str) else None,
        "date": row.get("date") if isinstance(row.get("date"), str) else constants.get("date"),
        "labels": row.get("labels"),
        "bounds": _bounds(row.get("bounds")),
        "fields": {name: value for name, value in row.items() if isinstance(value, str | int | float)} | constants,
        **{name: _number(row.get(name, constants.get(name))) for name in NUMBERS},
    }
    long_texts = caption_of(row["long_text"]) if "long_text" in row else [None]
    shorts = caption_of(row["short_text"]) if "short_text" in row else [None]
    if read.captions == "together" and "short_text" in row:
        first = next((text for text in shorts if text.strip()), "")
        yield Record(**base, long_text=long_texts[0], short_text=first, short_texts=shorts)
        return
    # An image whose captions repeat becomes one record a distinct caption, as Table I counts UC Merced's.
    for short in shorts[:1] if read.captions == "first" else dict.fromkeys(shorts):
        yield Record(**base, long_text=long_texts[0], short_text=short)


def _image_folder(read: ReadConfig, root: Path) -> Path:
    if read.images:
        return resolve(read.images, root)
    path = resolve(read.path, root)
    return path if path.is_dir() else path.parent


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _bounds(value: Any) -> tuple[float, float, float, float] | None:
    if isinstance(value, str):
        value = re.split(r"[,\s]+", value.strip("[]() "))
    numbers = tuple(map(_number, value)) if isinstance(value, list | tuple) else ()
    return numbers if len(numbers) == 4 and None not in numbers else None
