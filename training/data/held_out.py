"""
Rows held out of the training data by `data.validation: 0.1`: a share of the images, each with all of its captions.

Which images these are depends on their contents alone: not on captions, the order of rows, the run's seed, streaming or
processes, and a resumed run holds out the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from modeling_lrsclip.files.atomic import replacing
from modeling_lrsclip.files.hashing import bytes_sha256, file_sha256

from .line_index import kept_index
from .pairs import Pairs, check_row
from .rows import ChosenRows, Row, Rows, TableRows, text_list


HELD_OUT = "held_out.parquet"  # below a run folder
_ROWS_AT_A_TIME = 256
_QUIET = 5000  # rows whose images are hashed without a progress bar


def hold_out(pairs: Pairs, share: float) -> tuple[Pairs, Pairs]:
    """
    Divide pairs by their images.

    Args:
        pairs: of all sources; an image that several of them have falls on one side.
        share: of the images that are held out, above 0 and below 1.

    Returns:
        the pairs to train on and those held out.

    Raises:
        `ValueError`: for fewer than two different images.
    """
    keys = [_image_keys(part) for part in pairs.parts]
    images = np.unique(np.concatenate(keys))  # sorted by their hashes, which know nothing else of them
    if len(images) < 2:
        raise ValueError(
            f"data.validation={share} holds out a share of the images, and there are {len(images)} different ones; name "
            "held-out data, or leave it out."
        )
    held = images[: min(max(1, round(share * len(images))), len(images) - 1)]
    sides = []
    for side in (False, True):
        chosen = iter(np.flatnonzero(np.isin(own, held) == side) for own in keys)
        sources = [[ChosenRows(part, rows) for part in parts if len(rows := next(chosen))] for parts in pairs.sources]
        weights = [weight for weight, parts in zip(pairs.weights or [], sources) if parts] or None
        sides.append(Pairs([parts for parts in sources if parts], weights, None if side else pairs.buffer))
    if len(sides[0].sources) < len(pairs.sources):
        raise ValueError(f"data.validation={share} leaves nothing of a source to train on; give it more images.")
    return sides[0], sides[1]


def _image_keys(part: Rows) -> np.ndarray:
    """First 64 bits of the hash of each row's image, (rows,) uint64; of a local file kept until it changes."""
    path = getattr(part, "path", None)
    if isinstance(part, TableRows) and part.folder is not None and len(part.files) == 1:
        path = part.folder / part.name
    if path is None or not Path(path).is_file():
        return _hash_images(part)
    return np.asarray(kept_index(Path(path), f"images {part.columns['image']}", lambda _: _hash_images(part)))


def _hash_images(part: Rows) -> np.ndarray:
    rows, known = int(part.chunks.sum()), {}
    keys = np.empty(rows, dtype=np.uint64)
    for number in tqdm(range(rows), desc=f"{part.name}: images", unit="row", disable=rows < _QUIET):
        stored = part.read([number])[0].image
        name = stored if isinstance(stored, str) else None
        if name is None or name not in known:
            known[name] = int(_image_sha256(stored, part, number)[:16], 16)
        keys[number] = known[name]
    return keys


def _image_sha256(stored: Any, part: Rows, number: int) -> str:
    """Hash of an image's file; of one that cannot be read, which training names, of what the row has instead."""
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if isinstance(stored, bytes):
        return bytes_sha256(stored)
    try:
        return file_sha256(stored)
    except (OSError, TypeError, ValueError):
        return bytes_sha256(f"{part.location} {number if stored is None else stored}".encode("utf-8", "replace"))


def write_held_out(pairs: Pairs, path: Path) -> None:
    """
    Write held-out rows as a table that `evaluation.run` takes: images by their paths, or as they are stored.

    Args:
        pairs: held out.
        path: parquet file; another one there is replaced.
    """
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image} | {f"{kind}_text": pa.list_(pa.string()) for kind in pairs.kinds})
    with replacing(path) as growing, pq.ParquetWriter(growing, schema) as writer:
        for first in range(0, len(pairs), _ROWS_AT_A_TIME):
            numbers = range(first, min(first + _ROWS_AT_A_TIME, len(pairs)))
            usable = [
                _table_row(row, pairs.kinds) for row in pairs.read(list(numbers)) if _is_usable(row, pairs.kinds)
            ]
            writer.write_table(pa.Table.from_pylist(usable, schema=schema))


def _is_usable(row: Row, kinds: Sequence[str]) -> bool:
    try:
        check_row(row, kinds)
    except ValueError:  # validation names it
        return False
    return row.image is not None


def _table_row(row: Row, kinds: Sequence[str]) -> dict[str, Any]:
    image = row.image
    if isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    elif isinstance(image, str):
        image = {"bytes": None, "path": str(Path(image).absolute())}
    return {"image": image} | {f"{kind}_text": text_list(getattr(row, kind)) for kind in kinds}
