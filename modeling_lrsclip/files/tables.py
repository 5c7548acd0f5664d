"""
Rows of tables in files, one after another: JSON lines, JSON lists, CSV, TSV, parquet, WebDataset tars, the Hub.

A row that cannot be read is a row with a fault, so that its reader decides whether to leave it out or to stop; what
CSV files hold is what Python's `csv` module says.
"""

import codecs
import csv
import json
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from .documents import first_line


TABLE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
ENCODINGS = ("utf-8-sig", "gb18030")  # tried in this order; RS5M's rsicd_test.csv is in the second
JSON_LISTS = ("images", "data", "annotations")  # under which an object may hold the rows, as Karpathy's files do
REPLACED = "\ufffd"  # stands where bytes were not of the encoding that was asked for
BOM = codecs.BOM_UTF8
DEEPEST = 32  # lists and objects within each other, in a row's JSON; Arrow ends the process far beyond
LONGEST_HEADER = 1 << 20  # bytes of what a tar says of a member beside its 512; more is no name
LARGEST_MEMBER = 1 << 30  # bytes of a member that is read; more is no picture
MOST_MEMBERS = 50_000_000  # of a tar
MOST_ROWS = 500_000_000  # of a file whose rows are indexed
LONGEST_LOOK = 4 * 3600  # seconds that all headers of a tar, or all line ends of a file, may take
LONGEST_FIELD = 1 << 24  # characters of a CSV field; more is a quote that was never closed
LARGEST_GROUP = 2 << 30  # bytes of a parquet row group, all its columns, that is held in memory
_BLOCK = 1 << 20

csv.field_size_limit(LONGEST_FIELD)


# Names that files of others have for a column, in the order in which they are looked for.
USUAL_COLUMNS = {
    "image": ("image", "filename", "filepath", "file_name"),
    "long_text": ("long_text", "long_caption"),
    "short_text": ("short_text", "title", "caption", "captions", "sentences", "txt"),  # title: RS5M's *_test.csv
}
TAR_TEXTS = ("txt", "caption", "img_name", "cls", "text")  # RS5M's tars: img_content, img_name, caption


@dataclass(frozen=True)
class TableRow:
    """A row of a table, or why it cannot be read."""

    where: str  # in the file: "line 3", "entry 3", "row 3"
    values: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


def iter_rows(path: Path, encoding: str | None = None, columns: Sequence[str] | None = None) -> Iterator[TableRow]:
    """
    Rows of a table file in their order; blank lines are none.

    Args:
        path: a file with one of the `TABLE_SUFFIXES`.
        encoding: of text files, as Python names it; what is not of it becomes U+FFFD. None: the first of `ENCODINGS`
            that the whole file is in.
        columns: of a parquet file, those that are wanted; None: all.

    Returns:
        [`TableRow`]s, with what is wrong with those that cannot be read.

    Raises:
        `ValueError`: one sentence naming the file, for a format, an encoding or a damage that leaves no rows to read.
    """
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is not a table; its name must end in one of {', '.join(TABLE_SUFFIXES)}.")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    with path.open(encoding=encoding or text_encoding(path), errors="replace", newline="") as stream:
        if path.suffix == ".jsonl":
            yield from _json_lines(stream)
        elif path.suffix == ".json":
            yield from _json_entries(path, stream)
        else:
            yield from _csv_rows(path, stream)


def read_rows(
    path: Path, encoding: str | None = None, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """
    Values of the rows of [`iter_rows`], the first of which that has a fault is a `ValueError` naming file and line.

    Args:
        path, encoding, columns: as for [`iter_rows`].

    Returns:
        Values by column, a row each.
    """
    for row in iter_rows(path, encoding, columns):
        if row.fault:
            raise ValueError(f"{path}, {row.where} {row.fault}.")
        yield row.values


def text_encoding(path: Path) -> str:
    """
    The first of `ENCODINGS` that all of a file is in.

    Raises:
        `ValueError`: where it is in none of them.
    """
    for encoding in ENCODINGS:
        try:
            with path.open(encoding=encoding, newline="") as stream:
                while stream.read(_BLOCK):
                    pass
            return encoding
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{path} is neither UTF-8 nor GB18030 text; save it as UTF-8.")


def garbled(text: str) -> bool:
    """Whether a text holds the mark that stands where bytes were not of the encoding, here or in another program."""
    return REPLACED in text


# ----------------------------------------------------------------------------------------------------------------- JSON


def parse_object(text: str | bytes) -> dict[str, Any]:
    """
    A JSON object.

    Raises:
        `ValueError`: saying in words that follow a row's name why it is none.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"is not an object; it is {type(values).__name__}")
    if _too_deep(values):
        raise ValueError(_TOO_DEEP)
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds half a character, {error.object[error.start]!r}") from None
    return values


_TOO_DEEP = f"is nested more than {DEEPEST} levels deep"


def _too_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether a JSON value has more levels than these."""
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_too_deep(child, levels - 1) for child in children)


def json_list_name(path: Path, encoding: str | None = None) -> str | None:
    """
    Name of the list that a JSON file has its rows in: "" for a bare one, else which of `JSON_LISTS`; None for neither.

    Raises:
        `ValueError`: for a file that is no JSON.
    """
    import ijson

    with path.open(encoding=encoding or text_encoding(path), errors="replace") as stream:
        start = next((character for character in iter(lambda: stream.read(1), "") if not character.isspace()), "")
        try:
            for name in JSON_LISTS if start == "{" else ():
                stream.seek(0)
                if next(_json_items(stream, f"{name}.item"), None) is not None:
                    return name
        except ijson.JSONError as error:
            raise ValueError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not start:
        raise ValueError(f"{path} is empty; it must hold a list of objects.")
    return "" if start == "[" else None


def _json_lines(stream: TextIO) -> Iterator[TableRow]:
    for number, line in enumerate(_lines(stream), start=1):
        if line.strip():
            try:
                yield TableRow(f"line {number}", parse_object(line))
            except ValueError as error:
                yield TableRow(f"line {number}", fault=str(error))


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines that end at a line feed alone: a caption may hold U+2028 or a carriage return."""
    rest = ""
    for text in stream:
        rest += text
        if text.endswith("\n"):
            yield rest
            rest = ""
    if rest:
        yield rest


class _Utf8:
    """The bytes that a JSON reader wants, of a text in any encoding."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def read(self, size: int) -> bytes:
        return self.stream.read(size).encode("utf-8", "replace")


def _json_items(stream: TextIO, prefix: str) -> Iterator[Any]:
    """The values at a prefix of `ijson`, which takes a time that grows with the square of how deeply they are nested."""
    import ijson  # the file may be larger than memory

    def bounded() -> Iterator[tuple[str, Any]]:
        depth = 0
        for event, value in ijson.basic_parse(_Utf8(stream), use_float=True):
            depth += event.startswith("start_") - event.startswith("end_")
            if depth > DEEPEST + 2:  # the list of the rows, and an object around it
                raise ijson.JSONError(_TOO_DEEP.removeprefix("is ") + ", which this reader refuses")
            yield event, value

    yield from ijson.items(ijson.parse(bounded()), prefix)


def _json_entries(path: Path, stream: TextIO) -> Iterator[TableRow]:
    import ijson

    name, number = json_list_name(path, stream.encoding), 0
    if name is None:
        lists = ", ".join(JSON_LISTS)
        raise ValueError(f"{path} must hold a list of objects, or an object with such a list under {lists}.")
    try:
        for number, entry in enumerate(_json_items(stream, f"{name}.item".lstrip(".")), start=1):
            fault = None if isinstance(entry, dict) else f"is not an object; it is {type(entry).__name__}"
            yield TableRow(f"entry {number}", {} if fault else entry, fault)
    except ijson.JSONError as error:
        raise ValueError(f"{path}, entry {number + 1} is not valid JSON: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------------------------------ CSV


def csv_dialect(header: str) -> dict[str, str]:
    """Return what separates the columns of a CSV or TSV file, by its first line: tabs, commas, or else semicolons."""
    return {"delimiter": next((mark for mark in "\t,;" if mark in header), ",")}


def csv_values(header: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """
    A CSV row by its columns' names, as `csv.DictReader` makes it; columns that it does not reach are None.

    Raises:
        `ValueError`: for more fields than columns, by which a text would be cut at its first comma.
    """
    if any(fields[len(header) :]):
        raise ValueError(
            f"has {len(fields)} fields, and the header {len(header)}; put texts with separators in quotes"
        )
    return dict.fromkeys(header) | dict(zip(header, fields))


def _csv_rows(path: Path, stream: TextIO) -> Iterator[TableRow]:
    first = stream.readline()
    reader = csv.reader(chain([first], stream), **csv_dialect(first))
    try:
        header = next(reader, [])
        for number, fields in enumerate(filter(None, reader), start=1):
            try:
                yield TableRow(f"row {number}", csv_values(header, fields))
            except ValueError as error:
                yield TableRow(f"row {number}", fault=f"(line {reader.line_num}) {error}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} cannot be read as CSV: {error}") from error


# -------------------------------------------------------------------------------------------------------------- parquet


def parquet_columns(path: Path) -> dict[str, list[str] | None]:
    """
    Columns of a parquet file, each with the names of its classes where it is a `ClassLabel` of `datasets`.

    Raises:
        `ValueError`: one sentence naming the file, for one that cannot be read.
    """
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        schema = parquet.read_schema(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    features = datasets.Features.from_arrow_schema(schema)
    return {name: getattr(features[name], "names", None) for name in schema.names}


def parquet_batches(file: Any, group: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """
    Batches of a row group's rows, of so few that each is small although one long value may stand in all its rows.

    Args:
        file: a `pyarrow.parquet.ParquetFile`.
        group: number of the row group.
        columns: those that are wanted, `image.path` being a part of one; None: all.

    Returns:
        `pyarrow.RecordBatch`es of up to 256 rows.
    """
    footer = file.metadata.row_group(group)  # pyarrow ends the process where a damaged column of it is asked for
    size = footer.total_byte_size
    rows = min(256, max(1, LARGEST_GROUP // max(1, size)))  # no value is larger than all of them, uncompressed
    yield from file.iter_batches(rows, row_groups=[group], columns=columns and list(columns), use_threads=False)


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[TableRow]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_BLOCK) as file:
            groups = range(file.metadata.num_row_groups)
            for batch in chain.from_iterable(parquet_batches(file, group, columns) for group in groups):
                for index in range(len(batch)):
                    number += 1
                    try:
                        yield TableRow(f"row {number}", batch.slice(index, 1).to_pylist()[0])
                    except UnicodeDecodeError as error:
                        yield TableRow(f"row {number}", fault=f"a text is not UTF-8 ({error})")
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


# ----------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: `folder/stem.suffix`, where the stem ends at the first dot of the file's name."""

    key: str  # folder and stem, which the members of one WebDataset sample have in common
    suffix: str  # in lower case, without the dot
    offset: int  # of its first byte
    size: int  # bytes
    content: bytes | None = None


_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Header(tarfile.TarInfo):
    """A tar header whose extensions, names of any length among them, are read up to a size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size > LONGEST_HEADER and self.type in _EXTENSIONS:
            raise tarfile.ReadError(f"a header of {self.size} bytes, {LONGEST_HEADER} are read")
        return super()._proc_member(tar)


def limited(items: Iterable[Any], most: int) -> Iterator[Any]:
    """
    The items of a file's table of contents, as far as it is one that has a size that a data set has.

    Raises:
        `ValueError`: beyond `most` items, or [`LONGEST_LOOK`].
    """
    until = time.monotonic() + LONGEST_LOOK
    for number, item in enumerate(items):
        if number >= most or time.monotonic() > until:
            limit = f"{most:,} entries" if number >= most else f"{LONGEST_LOOK} s to look it through"
            raise ValueError(f"more than {limit}; split it into shards")
        yield item


def tar_members(path: Path, contents: bool = False) -> Iterator[TarMember]:
    """
    Files of a tar, in order, but those without a stem or a suffix.

    `tarfile` reads the headers; a damaged one, and an end in the middle, which it passes over in silence, are errors.

    Args:
        path: a tar; with `contents` also a compressed one.
        contents: whether to read the files too.

    Raises:
        `ValueError`: one sentence naming the file, for one that is no tar, or damaged.
    """
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:*" if contents else "r:", tarinfo=_Header) as tar:
            before = -1
            for member in limited(tar, MOST_MEMBERS):
                tar.members.clear()  # a tar of a million files is read in little memory
                if member.size < 0 or member.offset_data <= before or member.issparse():
                    raise tarfile.ReadError(f"no tar header at byte {member.offset}")
                before = member.offset_data
                if not contents and member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends in the middle of a member, after {length} bytes")
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if contents and member.size > LARGEST_MEMBER:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes, {LARGEST_MEMBER} are read")
                if member.isfile() and stem and dot:
                    content = tar.extractfile(member).read() if contents else None
                    yield TarMember(folder + slash + stem, suffix.lower(), member.offset_data, member.size, content)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no tar header at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError) as error:
        plain = "" if contents else "; only plain ones are, unpack .tar.gz"
        raise ValueError(f"{path} cannot be read as a tar ({error or type(error).__name__}){plain}.") from error


def tar_samples(path: Path, image_suffixes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """
    Samples of a WebDataset tar: members of the same name up to the first dot of the file name make one.

    Args:
        path: a tar, compressed or not.
        image_suffixes: of the members that are images, without the dot.

    Returns:
        Values by column: `image` holds the image's bytes, a JSON member its fields but for `image`, other texts stand
        under their suffix; `__key__` is the name.

    Raises:
        `ValueError`: one sentence naming the file, for a damaged tar and a member that is no JSON object.
    """
    sample: dict[str, Any] = {}
    for member in tar_members(path, contents=True):
        if sample and sample["__key__"] != member.key:
            yield sample
            sample = {}
        sample.setdefault("__key__", member.key)
        if member.suffix in image_suffixes:
            sample["image"] = member.content
        elif member.suffix == "json":
            try:
                fields = parse_object(member.content.decode("utf-8", "replace"))
            except ValueError as error:
                raise ValueError(f"{path}, {member.key}.{member.suffix} {error}.") from None
            # An image is a member: a path that a stranger wrote would be one of this machine.
            sample |= {name: value for name, value in fields.items() if name not in ("image", "__key__")}
        elif member.suffix in TAR_TEXTS:
            sample[member.suffix] = member.content.decode("utf-8", "replace").strip()
    if sample:
        yield sample


# -------------------------------------------------------------------------------------------------------------- the Hub


def load_hub(name: str, split: str | None, streaming: bool = False) -> tuple[Any, str]:
    """
    A data set of the Hub whose images stay bytes and paths.

    Args:
        name: its id, `owner/name`.
        split: the one to take; None for all of them, one after another.
        streaming: rows come as they are read, nothing is stored.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`, and the splits taken, as in "train + test".

    Raises:
        `ValueError`: in one sentence, where it cannot be read.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:  # datasets' and the Hub's errors are of these kinds
        raise ValueError(
            f"{name} is neither a path nor a Hub data set that could be read ({first_line(error)})"
        ) from error
    splits = " + ".join(data) if split is None else split
    if split is None:
        data = datasets.concatenate_datasets(list(data.values()))
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data, splits
