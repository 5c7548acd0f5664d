"""Rows of tables of any size, one after another: JSON lines, JSON lists, CSV, parquet, WebDataset tars, the Hub."""

import csv
import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling_lrsclip.encoding.imagery import IMAGE_SUFFIXES


TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TAR_TEXTS = (".txt", ".caption", ".img_name", ".cls", ".text")  # RS5M's tars: img_content, img_name, caption
TAR_IMAGES = (*IMAGE_SUFFIXES, ".img_content")
_CHUNK = 1 << 20
_REPLACED = "replace"  # what is not of the encoding becomes U+FFFD: its row is skipped and listed, not the file

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
    """Rows of all files of a pattern; of Karpathy's JSON, the images of `split` ("all": of every split)."""
    for path in find_files(pattern, TABLES):
        if path.suffix == ".jsonl":
            yield from _json_lines(path, encoding)
        elif path.suffix == ".json":
            yield from (row for row in json_list(path, encoding) if _of_split(row, split))
        elif path.suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, encoding)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            raise ValueError(f"{path} is not a table; its name must end in one of {', '.join(TABLES)}.")


def _of_split(row: TableRow, split: str) -> bool:
    return "sentences" not in row or split == "all" or row.get("split") == split


def _json_lines(path: Path, encoding: str) -> Iterator[TableRow]:
    with path.open(encoding=encoding, errors=_REPLACED, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be an object; it is {type(row).__name__}.")
            yield row


def json_list(path: Path, encoding: str = "utf-8-sig") -> Iterator[TableRow]:
    """
    Objects of a JSON list, read piece by piece: of the file's own list, or of the list that its object holds under
    `images`, `data` or `annotations` (the first of them that holds objects with text, as in Karpathy's files).
    """
    decoder = json.JSONDecoder()
    with path.open(encoding=encoding, errors=_REPLACED) as stream:
        buffer = stream.read(_CHUNK)
        start = len(buffer) - len(buffer.lstrip())
        if buffer[start : start + 1] == "{":
            yield from _list_in_object(path, encoding)
            return
        if buffer[start : start + 1] != "[":
            raise ValueError(f"{path} must hold a list of objects.")
        at, count = start + 1, 0
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at < len(buffer) and buffer[at] == "]":
                return
            try:
                row, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = stream.read(max(_CHUNK, len(buffer)))
                if not more:
                    raise ValueError(f"{path}, entry {count + 1} is not valid JSON: {error}") from error
                buffer, at = buffer[at:] + more, 0
                continue
            at, count = end, count + 1
            if not isinstance(row, dict):
                raise ValueError(f"{path}, entry {count} must be an object; it is {type(row).__name__}.")
            yield row


def _list_in_object(path: Path, encoding: str) -> Iterator[TableRow]:
    try:
        document = json.loads(path.read_text(encoding=encoding, errors=_REPLACED))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for name in ("images", "data", "annotations"):
        if isinstance(document.get(name), list):
            yield from document[name]
            return
    raise ValueError(f"{path} must hold a list of objects, or an object with such a list under images or data.")


def _csv_rows(path: Path, encoding: str) -> Iterator[TableRow]:
    with path.open(encoding=encoding, errors=_REPLACED, newline="") as lines:
        first = lines.readline()
        lines.seek(0)
        yield from csv.DictReader(lines, delimiter="\t" if "\t" in first else ",")


def _parquet_rows(path: Path) -> Iterator[TableRow]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def tar_rows(pattern: Path) -> Iterator[TableRow]:
    """
    Samples of WebDataset tars: members of the same name up to the first dot of the file name make one row. `image`
    holds the image's bytes, a JSON member its fields, other texts stand under their suffix; `__key__` is the name.
    """
    for path in find_files(pattern, (".tar",)):
        sample: TableRow = {}
        try:
            with tarfile.open(path, "r|*") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, slash, name = member.name.rpartition("/")
                    stem, dot, suffix = name.partition(".")
                    key = folder + slash + stem
                    if sample and sample["__key__"] != key:
                        yield sample
                        sample = {}
                    sample.setdefault("__key__", key)
                    sample |= _tar_field(f".{suffix.lower()}", tar.extractfile(member).read())
        except tarfile.ReadError as error:
            raise ValueError(f"{path} is not a whole tar file: {error}") from error
        if sample:
            yield sample


def _tar_field(suffix: str, content: bytes) -> TableRow:
    if suffix in TAR_IMAGES:
        return {"image": content}
    if suffix == ".json":
        fields = json.loads(content.decode("utf-8", _REPLACED))
        return fields if isinstance(fields, dict) else {"json": fields}
    if suffix in TAR_TEXTS:
        return {suffix[1:]: content.decode("utf-8", _REPLACED).strip()}
    return {}


def hub_rows(name: str, split: str) -> Iterator[TableRow]:
    """Rows of a Hub data set, streamed; images stay bytes."""
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"Hub data set {name} cannot be read: {str(error).strip().splitlines()[0]}") from error
    features = data.features or {}
    for column, feature in features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    yield from data


def garbled(text: str) -> bool:
    """Whether a text holds the mark that stands where bytes were not of the encoding, here or in another program."""
    return "\ufffd" in text
