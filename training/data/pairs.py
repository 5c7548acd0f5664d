"""Images with a long and a short caption: from their sources to batches that every run can repeat."""

import os
import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from torch.nn.utils.rnn import pad_sequence

from modeling_lrsclip import LRSCLIPProcessor
from modeling_lrsclip.encoding.imagery import Augmentation, augment, read_image
from modeling_lrsclip.encoding.pixels import PixelBatcher

from .rows import CHUNK_ROWS, Row, Rows, Stored, caption_list, even_chunks, filled
from .skipped import skipped_row
from .sources import KINDS, SourceConfig, open_source
from .visiting_order import EpochOrder, Mixture


MOST_WORKERS = 8  # processes that read images, unless data.workers says more
_CHUNKS_A_WINDOW = 10  # at least, where a source's chunks may be of any size
_ATTEMPTS = 100  # rows one after another that are tried in an unusable one's place


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class DataConfig:
    train: str | list[SourceConfig]  # file (jsonl, json, csv, parquet, tar), pattern, folder, Hub data set, or several
    train_split: str = "train"  # of a Hub data set or a folder
    validation: str | list[SourceConfig] | None = None  # likewise; recall on it picks the best model
    validation_split: str = "test"
    validation_pairs: int | None = Field(None, ge=1)  # only the first so many
    image_column: str = "image"  # a path (relative to the file) or the image itself
    long_column: str = "long_text"
    short_column: str = "short_text"
    streaming: bool = False  # read rows when they are due instead of preparing and checking all of them first
    shuffle_buffer: int = Field(10_000, ge=1)  # rows shuffled together when streaming
    shuffle_sentences: bool = False  # of the long text, anew at each visit
    augment: Augmentation = "none"  # random views; captions that name left, right or north then become wrong
    # JPEGs are decoded at 1/2, 1/4 or 1/8 down to so many times the model's size; None: all of them.
    jpeg_margin: float | None = Field(1.0, ge=1)
    max_skipped_fraction: float = Field(0.01, ge=0, le=1)  # of the rows visited, which could not be used
    # Processes that read images; None: on a GPU as many as there are cores, up to 8.
    workers: int | None = Field(None, ge=0)
    prefetch_factor: int = Field(2, ge=1)  # batches each of them prepares ahead

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        if not given:
            raise ValueError("a list of sources needs at least one, for example [{path: tiles/captions.jsonl}]")
        sources = [source if isinstance(source, (dict, SourceConfig)) else {"path": source} for source in given]
        try:
            sources = TypeAdapter(list[SourceConfig]).validate_python(sources)
        except ValidationError as error:
            raise ValueError("; ".join(_explain(mistake) for mistake in error.errors())) from None
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("either all sources have a weight or none has")
        return sources

    def columns(self, kinds: Sequence[str]) -> dict[str, str]:
        """Column names by kind ("image", "long", "short"), where a source does not name its own."""
        return {kind: getattr(self, f"{kind}_column") for kind in kinds}


def _explain(mistake: Any) -> str:
    number, *field = mistake["loc"]
    if mistake["type"] == "unexpected_keyword_argument":
        known = ", ".join(SourceConfig.__pydantic_fields__)
        return f"source {number} has an unknown field {field[0]}; it may have {known}"
    where = "".join(f" {name}" for name in field)
    return f"source {number}{where}: {mistake['msg'].removeprefix('Value error, ')}"


def count_workers(config: DataConfig, device: str) -> int:
    """
    Processes that read images for one training process: `data.workers`, else on a GPU the machine's cores shared among
    its training processes, one left for each, at most `MOST_WORKERS`; on a CPU none, since training needs the cores.
    """
    if config.workers is not None:
        return config.workers
    if device == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class Pairs:
    """
    The rows of all sources under one numbering.

    Args:
        sources: of each, its files' rows.
        weights: of each, or None: as many visits as it has rows.
        buffer: rows shuffled together; None: all.
    """

    def __init__(self, sources: list[list[Rows]], weights: list[float] | None = None, buffer: int | None = None):
        self.sources, self.weights, self.buffer = sources, weights, buffer
        self.parts = list(chain(*sources))
        self.ends = np.cumsum([int(part.chunks.sum()) for part in self.parts])  # (parts,)
        self.source_ends = np.cumsum([sum(int(part.chunks.sum()) for part in parts) for parts in sources])
        self.kinds = tuple(kind for kind in KINDS[1:] if kind in self.parts[0].columns)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, numbers: list[int]) -> list[Row]:
        """The rows of these numbers, in their order; each file is asked once."""
        numbers = np.asarray(numbers)
        owners, rows = np.searchsorted(self.ends, numbers, "right"), [None] * len(numbers)
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            begin = self.ends[owner] - self.parts[owner].chunks.sum()
            for place, row in zip(places, self.parts[owner].read((numbers[places] - begin).tolist())):
                rows[place] = row
        return rows

    def location(self, number: int) -> str:
        """The file or Hub data set that a row comes from."""
        return self.parts[int(np.searchsorted(self.ends, number, "right"))].location

    @property
    def locations(self) -> set[str]:
        """The files or Hub data sets that the rows come from."""
        return {part.location for part in self.parts}

    def following(self, number: int) -> int:
        """The next row of the same source; after the last one, its first."""
        source = int(np.searchsorted(self.source_ends, number, "right"))
        first = int(self.source_ends[source - 1]) if source else 0
        return first if number + 1 == self.source_ends[source] else number + 1

    def captions(self, kind: str, first: int | None = None) -> Iterator[Stored]:
        """The usable captions of a kind ("long", "short") as stored, without the images; of each source's `first` rows."""
        for parts in self.sources:
            stored = islice(chain.from_iterable(part.captions(kind) for part in parts), first)
            yield from (captions for captions in stored if filled(captions))

    def order(self, seed: int) -> Mixture:
        """The order of visits that a run of this seed makes."""
        share = [weight / sum(self.weights) for weight in self.weights] if self.weights else None
        orders = []
        for number, parts in enumerate(self.sources):
            rows = [int(part.chunks.sum()) for part in parts]
            chunks, buffer = [part.chunks for part in parts], None
            if self.buffer:
                buffer = max(1, round(self.buffer * (share[number] if share else sum(rows) / len(self))))
                most = max(1, min(CHUNK_ROWS, buffer // _CHUNKS_A_WINDOW))
                chunks = [even_chunks(n, most) if part.one_by_one else part.chunks for n, part in zip(rows, parts)]
            orders.append(EpochOrder(np.concatenate(chunks), buffer, seed, number))
        return Mixture(orders, self.weights)


def load_pairs(config: DataConfig, kinds: Sequence[str], held_out: bool = False) -> Pairs:
    """
    The pairs of `data.train`, or with `held_out` those of `data.validation`, which are never streamed.

    Args:
        kinds: of captions, "long" and "short", that are wanted.

    Raises:
        `ValueError`: for all sources that cannot be opened (see [`open_source`]), together.
    """
    given = config.validation if held_out else config.train
    split = config.validation_split if held_out else config.train_split
    sources = [SourceConfig(path=given)] if isinstance(given, str) else given
    streaming = config.streaming and not held_out
    opened, mistakes = [], []
    for source in sources:
        try:
            opened.append(open_source(source, split, config.columns(("image", *kinds)), config, streaming))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    weights = None if sources[0].weight is None else [source.weight for source in sources]
    return Pairs(opened, weights, config.shuffle_buffer if streaming else None)


def check_row(row: Row, kinds: Sequence[str]) -> None:
    """Raises `ValueError` for a row that could not be read or lacks a caption of the `kinds`."""
    if row.fault:
        raise ValueError(f"{row.fault[:1].upper()}{row.fault[1:]}.")
    for kind in kinds:
        if not filled(getattr(row, kind)):
            raise ValueError(f"The {kind} caption is missing or empty.")


class CaptionedImages(torch.utils.data.Dataset):
    """
    Pairs by (epoch, row), so that what is random about a visit depends on the two and the seed alone: not on the
    process, the worker, or where a run was resumed.

    A row that cannot be used is replaced by the next usable one of its source; the item lists what was skipped.

    Args:
        short_from_long: the short text is the long one's first sentence.
        size: short side of the model's images in pixels, for `data.jpeg_margin`; None decodes all of every image.
    """

    def __init__(
        self, pairs: Pairs, config: DataConfig, seed: int, short_from_long: bool = False, size: int | None = None
    ):
        self.pairs, self.config, self.seed, self.short_from_long = pairs, config, seed, short_from_long
        self.shortest_edge = None if size is None or config.jpeg_margin is None else round(size * config.jpeg_margin)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, visits: list[tuple[int, int]]) -> list[dict]:
        rows = self.pairs.read([number for _, number in visits])
        return [self._usable(epoch, number, row) for (epoch, number), row in zip(visits, rows)]

    def _usable(self, epoch: int, number: int, row: Row) -> dict:
        skipped = []
        for _ in range(_ATTEMPTS):
            try:
                return self._item(epoch, number, row) | {"skipped": skipped}
            except ValueError as error:
                skipped.append(skipped_row(row, self.pairs.location(number), error))
            number = self.pairs.following(number)
            row = self.pairs.read([number])[0]
        first = skipped[0]
        fault = f"None of {_ATTEMPTS} rows from {first['id']} on can be used; the first: {first['reason']}"
        return {"id": first["id"], "skipped": skipped, "fault": fault}

    def _item(self, epoch: int, number: int, row: Row) -> dict:
        check_row(row, self.pairs.kinds)
        rng, item = random.Random(f"{self.seed}/{epoch}/{number}"), {"id": row.id}
        if "long" in self.pairs.kinds:
            item["long_text"] = rng.choice(caption_list(row.long))
            if self.short_from_long:
                item["short_text"] = split_sentences(item["long_text"])[0]
            if self.config.shuffle_sentences:
                item["long_text"] = shuffle_sentences(item["long_text"], rng)
        if "short" in self.pairs.kinds and not self.short_from_long:
            item["short_text"] = rng.choice(caption_list(row.short))
        image = read_image(row.image, self.shortest_edge)
        view = random.Random(f"{self.seed}/{epoch}/{number}/view")  # texts are drawn alike with and without
        return item | {"image": augment(image, self.config.augment, view)}


def split_sentences(text: str) -> list[str]:
    """
    The sentences of `text`, each with its closing mark.

    DIFFERS: Long-CLIP (beichenzbc/Long-CLIP train/sharegpt4v.py) takes as the short text what stands before the first
    ". ": without the full stop, and going on past a question or exclamation mark or a line's end.
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """The sentences of `text` in another order."""
    sentences = split_sentences(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


class Collator:
    """
    Items to model inputs: `pixel_values` (B, 3, H, W), `input_ids` (B, L), `short_input_ids` (B, L_short); beside them
    `ids`, the rows' names, and `skipped`, the rows left out. Where no usable row was found, only these and `fault`.
    """

    def __init__(self, processor: LRSCLIPProcessor):
        self.processor, self.pixels = processor, PixelBatcher(processor.image_processor)

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        batch = {"ids": [item["id"] for item in items], "skipped": [row for item in items for row in item["skipped"]]}
        faults = [item["fault"] for item in items if "fault" in item]
        if faults:
            return batch | {"fault": faults[0]}
        batch["pixel_values"] = self.pixels([item["image"] for item in items])
        for column, name in (("long_text", "input_ids"), ("short_text", "short_input_ids")):
            if column in items[0]:
                # No attention mask: what stands after end-of-text cannot reach it in a causal tower.
                ids = self.processor.encode_text([item[column] for item in items])
                batch[name] = pad_sequence(
                    [torch.tensor(row) for row in ids],
                    batch_first=True,
                    padding_value=self.processor.tokenizer.pad_token_id,
                )
        return batch
