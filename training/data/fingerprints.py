"""Number and content of the rows of each source, by which a resumed run knows whether it is given the data it began with."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_lrsclip.files.hashing import bytes_sha256, file_sha256, json_sha256
from modeling_lrsclip.files.tables import parquet_batches

from ..distributed import MistakeError
from .line_index import kept_index
from .pairs import Pairs
from .rows import ChosenRows, LineRows, ParquetRows, Rows, TableRows
from .tars import TarRows


_ROWS_AT_A_TIME = 10_000


def fingerprints(pairs: Pairs, names: list[str]) -> list[dict[str, Any]]:
    """
    Describe the sources of a run.

    Args:
        pairs: of these sources.
        names: of them, as the configuration has them.

    Returns:
        of each its `path`, `rows` and `sha256`: of texts and image paths in their order; of a tar, of its members' places
        and sizes. The pixels themselves are not read.
    """
    described = []
    for name, parts in zip(names, pairs.sources, strict=True):
        content = json_sha256([content_hash(part) for part in parts])
        described.append({"path": name, "rows": sum(int(part.chunks.sum()) for part in parts), "sha256": content})
    return described


def changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Say in words in what the data of [`fingerprints`] are others than `before`; empty where they are the same."""
    changed = []
    for old, new in zip(before, now, strict=True):
        if old["rows"] != new["rows"]:
            changed.append(f"{new['path']} had {old['rows']} rows and has {new['rows']}")
        elif old["sha256"] != new["sha256"]:
            changed.append(f"{new['path']} has its {new['rows']} rows in another order or with other texts")
    return changed


def refuse_changes(folder: Path, changed: list[str]) -> None:
    """Raise [`MistakeError`] where the data of the run in `folder` have changed, as [`changes`] says on all processes."""
    if changed:
        raise MistakeError(
            f"The training data of {folder} have changed since: {'; '.join(changed)}. Bring back what they were, set "
            "another output_dir, or go on with the new ones by --allow-changed-data."
        )


def content_hash(part: Rows) -> str:
    """Return the hash of a file's rows; of a local file that must be read for it, kept until the file changes."""
    if isinstance(part, ChosenRows):
        return json_sha256([content_hash(part.part), bytes_sha256(part.numbers.astype("<i8").tobytes())])
    if isinstance(part, TableRows):
        return _hash_texts(part.table.with_format("arrow").iter(_ROWS_AT_A_TIME))
    if isinstance(part, TarRows):
        return bytes_sha256(repr(part.index.dtype).encode() + part.index.tobytes())
    if isinstance(part, ParquetRows):
        if part.filesystem is None:
            columns = _text_leaves(part)
            return _kept_hash(Path(part.path), f"texts {columns}", lambda _: _hash_parquet(part, columns))
        # Of the version, as the remote file system knows it; at the least the size.
        info = part.filesystem.info(part.path)
        versions = [(info.get("lfs") or {}).get("sha256"), *(info.get(name) for name in ("blob_id", "ETag", "md5"))]
        return json_sha256(next(filter(None, versions), info.get("size")), default=str)
    assert isinstance(part, LineRows)
    return _kept_hash(part.path, "sha256", file_sha256)


def _kept_hash(path: Path, kind: str, build) -> str:
    return bytes(kept_index(path, kind, lambda file: np.frombuffer(bytes.fromhex(build(file)), dtype=np.uint8))).hex()


def _text_leaves(part: ParquetRows) -> list[str]:
    """The columns of a parquet file without the bytes of its images."""
    leaves = []
    for column in dict.fromkeys(part.columns.values()):
        kind = part.file.schema_arrow.field(column).type
        if pa.types.is_struct(kind):
            leaves += [f"{column}.{field.name}" for field in kind if not _is_binary(field.type)]
        elif not _is_binary(kind):
            leaves.append(column)
    part._close()
    return leaves


def _hash_parquet(part: ParquetRows, columns: list[str]) -> str:
    unreadable = []

    def groups() -> Iterator[pa.Table]:
        for group in range(len(part.chunks)):
            try:
                yield from (pa.table(batch) for batch in parquet_batches(part.file, group, columns))
            except (OSError, ValueError, pa.ArrowException):  # its rows are skipped and named when their turn comes
                unreadable.append([group, int(part.chunks[group])])

    digest = _hash_texts(groups())
    part._close()
    return json_sha256([digest, unreadable]) if unreadable else digest


def _hash_texts(tables: Iterable[pa.Table]) -> str:
    """Hash the texts of tables one after another, however they are cut; of bytes, the lengths."""
    digests: dict[str, Any] = {}
    for table in tables:
        for name, column in zip(table.column_names, table.columns):
            for chunk in column.chunks:
                _feed(digests, name, chunk)
    return json_sha256({name: digest.hexdigest() for name, digest in digests.items()}, sort_keys=True)


def _feed(digests: dict[str, Any], name: str, array: pa.Array) -> None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_struct(kind):
        for field in kind:
            _feed(digests, f"{name}.{field.name}", pc.struct_field(array, field.name))
        return
    digest = digests.setdefault(name, hashlib.sha256())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _feed_lengths(digest, pc.list_value_length(array))
        _feed(digests, f"{name}[]", array.flatten())
    elif _is_binary(kind):
        _feed_lengths(digest, pc.binary_length(array))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        _feed_lengths(digest, pc.binary_length(array))
        texts = digests.setdefault(f"{name} in UTF-8", hashlib.sha256())
        _, offsets, content = array.cast(pa.large_string()).buffers()
        if content is not None:
            places = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
            texts.update(memoryview(content)[places[0] : places[-1]])
    else:
        digest.update("".join(f"{value!r}\n" for value in array.to_pylist()).encode("utf-8", "surrogatepass"))


def _feed_lengths(digest: Any, lengths: pa.Array) -> None:
    digest.update(np.ascontiguousarray(pc.fill_null(lengths.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
