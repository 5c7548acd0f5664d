"""Sources of captioned images: files, folders, shards, tars and data sets on the Hub, each opened as [`Rows`]."""

import difflib
import glob
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets import Image as ImageFeature
from fsspec.core import url_to_fs
from tqdm import tqdm

from modeling_lrsclip.files.tables import TABLE_SUFFIXES, USUAL_COLUMNS, read_rows

from ..config import DataConfig, SourceConfig
from .rows import GroupCache, LineRows, ParquetRows, Rows, TableRows, caption_fault, filled
from .tars import TAR_IMAGES, TarRows


FORMATS = (*TABLE_SUFFIXES, ".tar")
# What a folder's caption file may be called, the first found is read; {split} is data.train_split.
_TABLES, _SHARDS = (".parquet", ".jsonl", ".json", ".csv"), (".parquet", ".tar")
FOLDER_FILES = [stem + suffix for stem in ("{split}", "captions", "metadata") for suffix in _TABLES]
# Else its shards, all that the first of these finds.
_STEMS = ("{split}-*", "data/{split}-*", "*-{split}-*", "*", "data/*")
FOLDER_SHARDS = [stem + suffix for stem in _STEMS for suffix in _SHARDS]
_LISTED = 3  # offenders named in an error


def open_source(
    source: SourceConfig, split: str, columns: Mapping[str, str], config: DataConfig, streaming: bool
) -> list[Rows]:
    """
    The rows of a source, a [`Rows`] for each of its files (in memory, tables together).

    Args:
        split: where the source does not name its own.
        columns: by kind, as `data.image_column`, `data.long_column`, `data.short_column` name them.
        streaming: read no more than what says how many rows there are, and look at the first row only.
        source: file, folder or Hub id.
        config: limits on what may be missing.

    Returns:
        [`Rows`], one or several.

    Raises:
        `ValueError`: for a source that is neither file, folder nor Hub id, a missing column; in memory also for more
            empty captions or missing image files than `data.max_skipped_fraction` (counted, the first few named).
    """
    split, columns = source.split or split, dict(columns) | {k: c for k, c in source.columns.items() if k in columns}
    files = find_files(source.path, split)
    if not files:
        return _open_hub(source.path, split, columns, config, streaming)
    suffix = files[0].suffix
    if suffix not in FORMATS:
        raise ValueError(f"{files[0]} is not a caption file; its name must end in one of {', '.join(FORMATS)}.")
    if others := [file for file in files if file.suffix != suffix]:
        raise ValueError(
            f"{source.path} names files of several kinds, {files[0]} and {others[0]}; name each kind apart."
        )
    if suffix == ".tar":
        # Beyond, the tables of contents may take a while.
        progress = tqdm(files, desc=f"{source.path}: index", unit="tar", disable=len(files) < 10)
        return _checked(
            source.path, [TarRows(file, columns) for file in progress], lambda rows: [*rows.suffixes, *rows.fields(0)]
        )
    if streaming and suffix == ".parquet":
        return _open_parquet(source.path, [(None, str(file)) for file in files], columns, config)
    if streaming and suffix != ".json":  # which is one value, and comes memory-mapped
        return _checked(source.path, [LineRows(file, columns) for file in files], lambda rows: list(rows.values(0)))
    if suffix == ".parquet":
        counts = [(file.name, sum(ParquetRows(str(file), {}, GroupCache()).chunks.tolist())) for file in files]
        names = [str(file) for file in files]
        tables = [(load_dataset("parquet", data_files=names, split="train", batch_size=256), counts, files[0])]
    else:
        tables = [(_read_table(file), None, file) for file in files]
    return [
        _open_table(str(file), table, columns, config, counts or [(file.name, len(table))], file.parent)
        for table, counts, file in tables
    ]


def find_files(source: str, split: str) -> list[Path]:
    """
    The files that `source` names: itself, what its pattern matches, or in a folder the first of `FOLDER_FILES`, else all
    of the first of `FOLDER_SHARDS` that is there. Empty for what looks like an id on the Hub.

    Raises:
        `ValueError`: for a path or pattern that names nothing, and a folder without such files.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        names = [name.format(split=split) for name in FOLDER_FILES]
        for name in names:
            if (path / name).exists():
                return [path / name]
        for pattern in FOLDER_SHARDS:
            if files := sorted(path.glob(pattern.format(split=split))):
                return files
        raise ValueError(
            f"The folder {source} holds no caption file; name it one of {', '.join(names)}, or put parquet or tar shards "
            "into it."
        )
    patterns = list(expand_braces(str(path)))
    files = [Path(name) for pattern in patterns for name in (sorted(glob.glob(pattern)) or [pattern])]
    absent = [str(name) for name in files if not name.is_file()]
    if len(patterns) == 1 and absent and not glob.has_magic(source):
        if path.suffix in FORMATS or source.startswith((".", "/", "~")):
            raise ValueError(
                f"{source} does not exist; give a caption file, a folder, a pattern of files, or the id of a data set on "
                "the Hub."
            )
        return []
    refuse(source, "files that do not exist", absent)
    return files


def expand_braces(pattern: str) -> Iterator[str]:
    """`{000..127}` counts with its leading zeros, `{a,b}` lists, as in a shell and in WebDataset."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, listed = match.groups()
    counted = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)) if first else ()
    for option in listed.split(",") if listed else counted:
        yield from expand_braces(pattern[: match.start()] + option + pattern[match.end() :])


def _open_hub(source: str, split: str, columns: Mapping[str, str], config: DataConfig, streaming: bool) -> list[Rows]:
    if not streaming:
        table = load_dataset(source, split=split)
        return [_open_table(source, table, columns, config, [(source, len(table))], None)]
    files = (load_dataset_builder(source).config.data_files or {}).get(split, [])
    if not files or any(not str(file).endswith(".parquet") for file in files):
        raise ValueError(
            f"{source} cannot be streamed: of its split {split}, not all files are parquet; set data.streaming to false."
        )
    return _open_parquet(source, [url_to_fs(str(file)) for file in files], columns, config)


def _open_parquet(
    source: str, files: list[tuple[Any, str]], columns: Mapping[str, str], config: DataConfig
) -> list[Rows]:
    """Parquet files, each with its `fsspec` file system or None for the local disk, of which row groups are read."""
    cache = GroupCache()
    progress = tqdm(files, desc=f"{source}: footers", unit="file", disable=len(files) < 100)
    parts = [ParquetRows(path, columns, cache, filesystem) for filesystem, path in progress]
    largest = max(int(rows.chunks.max(initial=0)) for rows in parts)
    cache.rows = math.ceil(config.shuffle_buffer / (1 - (config.share or 0))) + 2 * largest  # of it all, what is left
    if largest > config.shuffle_buffer:
        warnings.warn(
            f"{source} has row groups of {largest} rows, and data.shuffle_buffer={config.shuffle_buffer} mixes rows of one "
            "group only: write it anew with smaller groups, or raise data.shuffle_buffer.",
            stacklevel=2,
        )
    return _checked(source, parts, lambda rows: rows.file.schema_arrow.names)


def _read_table(path: Path) -> Dataset:
    """All rows of a text file, in memory; `data.streaming` is for files that are too large."""
    rows = list(read_rows(path))
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    try:
        return Dataset(pa.table({name: pa.array(values) for name, values in columns.items()}))
    except (pa.ArrowException, OverflowError) as error:
        for name, values in columns.items():
            kinds = {type(value): number for number, value in enumerate(values) if value is not None}
            if len(kinds) > 1:
                (one, first), (other, second) = list(kinds.items())[:2]
                raise ValueError(
                    f"{path}: {name} is {one.__name__} in row {first} and {other.__name__} in row {second}; write all of "
                    "its values alike."
                ) from None
        raise ValueError(f"{path} cannot be held as a table ({error}); mend it, or set data.streaming.") from None


def _open_table(
    source: str, table: Dataset, columns: Mapping[str, str], config: DataConfig, files: list, folder: Path | None
) -> TableRows:
    if not len(table):
        raise ValueError(f"{source} has no rows.")
    columns = usual_columns(columns, table.column_names)
    check_columns(source, columns, table.column_names)
    for kind, name in columns.items():
        if kind != "image":
            stored = table[:1][name] + table[-1:][name]
            if others := [value for value in stored if (caption_fault(value) or "").endswith("not text")]:
                raise ValueError(
                    f"{source}: {name} holds {others[0]!r}, which is {caption_fault(others[0])}; name the column of "
                    f"captions with data.{kind}_column, or write its values as texts."
                )
            empty = _empty_rows(table, name)
            if len(empty) > config.max_skipped_fraction * len(table):  # fewer are left out when their turn comes
                refuse(source, f"rows with an empty {name}", empty)
    image = columns["image"]
    stored_as = table.features.arrow_schema.field(image).type
    if isinstance(table.features[image], ImageFeature):
        table = table.cast_column(image, ImageFeature(decode=False))
    elif _is_text(table, image):
        names = table[image]
        refuse(source, "rows without an image path", [number for number, name in enumerate(names) if name is None])
        absent = [
            str(folder / name) if folder else name for name in names if not ((folder or Path()) / name).is_file()
        ]
        if len(absent) > config.max_skipped_fraction * len(table):
            refuse(source, "images that do not exist", absent)
    elif not (
        pa.types.is_binary(stored_as)
        or (pa.types.is_struct(stored_as) and {field.name for field in stored_as} == {"bytes", "path"})
    ):
        raise ValueError(f"Column {image!r} of {source} holds neither images nor their paths; set data.image_column.")
    return TableRows(table, columns, files, folder)


def _empty_rows(table: Dataset, name: str) -> list[int]:
    """Rows whose caption is missing or blank, or, where several are stored, has none or a blank one among them."""
    if len(table) and _is_text(table, name):
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(table.data.column(name)), ""), True)
        return np.flatnonzero(empty.to_numpy()).tolist()
    return [number for number, stored in enumerate(table[name]) if not filled(stored)]


def _is_text(table: Dataset, name: str) -> bool:
    kind = table.features.arrow_schema.field(name).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _checked(source: str, parts: list[Rows], names_of) -> list[Rows]:
    """The parts that have rows, their first one looked at."""
    parts = [rows for rows in parts if rows.chunks.sum()]
    if not parts:
        raise ValueError(f"{source} has no rows.")
    first = parts[0]
    try:
        names = names_of(first)
    except ValueError as error:
        raise ValueError(f"The first row of {first.name} cannot be read ({error}); mend or remove it.") from error
    holds_images = isinstance(first, TarRows) and set(first.suffixes) & set(TAR_IMAGES)
    columns = usual_columns(first.columns, ["image", *names] if holds_images else names)
    for part in parts:
        part.columns = columns
    there = holds_images and columns["image"] == "image"  # whatever suffix it has
    check_columns(source, {kind: name for kind, name in columns.items() if not (there and kind == "image")}, names)
    return parts


def usual_columns(columns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """
    Columns by kind, where one that is wanted by its own name is missing the first of its `USUAL_COLUMNS` that is there.

    Args:
        columns: wanted, by kind.
        names: of the columns that there are.

    Returns:
        Names by kind; what is nowhere stays as it was.
    """
    there = list(names)
    usual = {kind: [name] if name in there else USUAL_COLUMNS.get(name, ()) for kind, name in columns.items()}
    return {kind: next((name for name in usual[kind] if name in there), name) for kind, name in columns.items()}


def check_columns(source: str, columns: Mapping[str, str], names: Iterable[str]) -> None:
    """
    Raises `ValueError` for columns that are not among `names`, with the most similar ones.

    Args:
        source: for the error.
        columns: by kind, the names that are wanted.
        names: those that there are.
    """
    names = list(dict.fromkeys(names))
    missing = list(dict.fromkeys(name for name in columns.values() if name not in names))
    if not missing:
        return
    nearest = [difflib.get_close_matches(name, names, n=1, cutoff=0.4) for name in missing]
    hint = [f"{near[0]!r} for {name!r}" for name, near in zip(missing, nearest) if near]
    raise ValueError(
        f"{source} has no column {', '.join(map(repr, missing))}; it has {', '.join(names)}. "
        "Set data.image_column, data.long_column or data.short_column to the names used there"
        + (f" (did you mean {', '.join(hint)}?)." if hint else ".")
    )


def refuse(source: str, what: str, offenders: list) -> None:
    """
    Raises `ValueError` if there are offenders, with their number and the first few.

    Args:
        source: for the error.
        what: is wrong with them, such as `empty captions`.
        offenders: rows or files.
    """
    if offenders:
        first = ", ".join(map(str, itertools.islice(offenders, _LISTED)))
        raise ValueError(f"{source} has {len(offenders)} {what}, the first: {first}; mend or remove them.")
