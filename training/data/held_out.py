"""
Rows held out of the training data by `data.validation: 0.1`: a share of the images, each with all of its captions.

Whether an image is held out depends on its content alone: not on captions, the order of rows, the run's seed, streaming,
processes or the other images, so that data may grow, and a resumed run holds out the same.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from modeling_lrsclip.files.atomic import replacing
from modeling_lrsclip.files.hashing import bytes_sha256

from .pairs import Pairs, check_row
from .rows import ChosenRows, Row, image_sha256, text_list


HELD_OUT = "held_out.parquet"  # below a run folder
_ROWS_AT_A_TIME = 256
_QUIET = 5000  # rows whose images are hashed without a progress bar


def hold_out(pairs: Pairs, share: float, keys: list[np.ndarray]) -> tuple[Pairs, Pairs]:
    """
    Divide pairs by their images.

    Args:
        pairs: of all sources; an image that several of them have falls on one side.
        share: of the images that are held out, above 0 and below 1; of few images, only nearly so many.
        keys: of the rows' images, as [`image_keys`] returns them.

    Returns:
        the pairs to train on and those held out.

    Raises:
        `ValueError`: for fewer than two different images.
    """
    images = np.unique(np.concatenate(keys))  # sorted by their hashes, which know nothing else of them
    if len(images) < 2:
        raise ValueError(
            f"data.validation={share} holds out a share of the images, and the data have only {len(images)} different; "
            "name held-out data, or leave it out."
        )
    count = int(np.searchsorted(images, np.uint64(share * 2**64)))  # that it leaves on this side, however data grow
    held = images[: min(max(1, count), len(images) - 1)]
    sides = []
    for side in (False, True):
        chosen = iter(np.flatnonzero(np.isin(part_keys, held) == side) for part_keys in keys)
        sources = [[ChosenRows(part, rows) for part in parts if len(rows := next(chosen))] for parts in pairs.sources]
        weights = [weight for weight, parts in zip(pairs.weights or [], sources) if parts] or None
        sides.append(Pairs([parts for parts in sources if parts], weights, None if side else pairs.buffer))
    if len(sides[0].sources) < len(pairs.sources):
        raise ValueError(f"data.validation={share} leaves nothing of a source to train on; give it more images.")
    return sides[0], sides[1]


def image_keys(pairs: Pairs) -> list[np.ndarray]:
    """Read all images; returns the first 64 bits of the hash of each row's image, of each part (rows,) uint64."""
    keys = []
    for part in pairs.parts:
        rows, known = int(part.chunks.sum()), {}
        keys.append(np.empty(rows, dtype=np.uint64))
        for number in tqdm(range(rows), desc=f"{part.name}: images", unit="row", disable=rows < _QUIET):
            stored = part.read([number])[0].image
            name = stored if isinstance(stored, str) else None
            if name is None or name not in known:
                # Of an image that cannot be read, which training names, the hash of what the row has instead.
                instead = f"{part.location} {number if stored is None else stored}".encode("utf-8", "replace")
                known[name] = int((image_sha256(stored) or bytes_sha256(instead))[:16], 16)
            keys[-1][number] = known[name]
    return keys


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
            rows = [_table_row(row, pairs.kinds) for row in pairs.read(list(numbers))]
            writer.write_table(pa.Table.from_pylist([row for row in rows if row is not None], schema=schema))


def _table_row(row: Row, kinds: Sequence[str]) -> dict[str, Any] | None:
    """The columns of a row; None for one that cannot be used, which validation names."""
    image = row.image
    if not isinstance(image, dict):
        image = {"bytes" if isinstance(image, bytes) else "path": image}
    content, path = image.get("bytes"), image.get("path")
    if not isinstance(path, str | None) or not isinstance(content, bytes | None) or (path is None and content is None):
        return None
    try:
        check_row(row, kinds)
        texts = {f"{kind}_text": text_list(getattr(row, kind)) for kind in kinds}
        "".join([path or "", *chain(*texts.values())]).encode()
    except ValueError:  # a caption is missing, or a character is half of one
        return None
    return {"image": {"bytes": content, "path": str(Path(path).absolute()) if content is None else path}} | texts
