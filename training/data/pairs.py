"""Images with a long and a short caption: from their sources to visits that every run can repeat."""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
from torch.utils.data import Dataset

from modeling_lrsclip import LRSCLIPProcessor
from modeling_lrsclip.encoding.imagery import augment, read_image

from ..distributed import USER_ERRORS
from .rows import CHUNK_ROWS, Row, Rows, Stored, caption_fault, even_chunks, filled, text_list
from .skipped import skipped_row
from .sources import DataConfig, SourceConfig, find_files, open_source
from .visiting_order import EpochOrder, Mixture, VisitSampler


# A batch's token ids by the kind of text, in the order in which a step reads them.
INPUT_IDS = {"long": "input_ids", "short": "short_input_ids"}
_CHUNKS_A_WINDOW = 10  # at least, where a source's chunks may be of any size
_ATTEMPTS = 100  # rows one after another that are tried in an unusable one's place


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
        self.kinds = tuple(kind for kind in INPUT_IDS if kind in self.parts[0].columns)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, numbers: list[int]) -> list[Row]:
        """Read the rows of these numbers, in their order; each file is asked once."""
        numbers = np.asarray(numbers)
        owners, rows = np.searchsorted(self.ends, numbers, "right"), [None] * len(numbers)
        for owner in np.unique(owners).tolist():
            wanted = np.flatnonzero(owners == owner)
            begin = self.ends[owner] - self.parts[owner].chunks.sum()
            for index, row in zip(wanted, self.parts[owner].read((numbers[wanted] - begin).tolist())):
                rows[index] = row
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

    def all_texts(self) -> Iterator[str]:
        """All usable texts, long and short, without the images."""
        return (text for kind in self.kinds for stored in self.texts(kind) for text in text_list(stored))

    def texts(self, kind: str, first: int | None = None) -> Iterator[Stored]:
        """The usable texts of a kind, "long" or "short", as stored, without the images; of each source's `first` rows."""
        for parts in self.sources:
            stored = islice(chain.from_iterable(part.texts(kind) for part in parts), first)
            yield from (texts for texts in stored if filled(texts))

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
    Open the pairs of `data.train`, or with `held_out` those of `data.validation`, which are never streamed.

    Args:
        config: the `data` section.
        kinds: texts that are wanted, "long" and "short".
        held_out: which of the two to open.

    Returns:
        the rows of all their sources; nothing but their number is read yet when streaming.

    Raises:
        `ValueError`: for all sources that cannot be opened (see [`open_source`]), together.
    """
    sources, split = _sources(config, held_out)
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


def _sources(config: DataConfig, held_out: bool) -> tuple[list[SourceConfig], str]:
    """The training or the held-out sources, and the split of those that do not name their own."""
    sources = config.train if not held_out else None if config.share else config.validation
    split = config.validation_split if held_out else config.train_split
    return [SourceConfig(path=sources)] if isinstance(sources, str) else sources or [], split


def open_data(
    config: DataConfig, kinds: Sequence[str], *, batch_size: int, seed: int, processes: int
) -> tuple[Pairs, Pairs | None]:
    """
    Open the training pairs and the held-out ones.

    Args:
        config: the `data` section.
        kinds: texts that the loss weighs, "long" and "short".
        batch_size: pairs a step, of all processes together.
        seed: of the run.
        processes: among which each batch is shared out.

    Returns:
        both; None for held-out pairs where none are named.

    Raises:
        `ValueError`: with all that is wrong with both, and with the batch size for them.
    """
    (train, held_out), mistakes = try_to_open(config, kinds)
    if train is not None:
        try:
            VisitSampler(train.order(seed), batch_size, steps=1, share=(0, processes))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return train, held_out


def try_to_open(
    config: DataConfig, kinds: Sequence[str], only_local: bool = False
) -> tuple[list[Pairs | None], list[str]]:
    """
    Open the training and the held-out pairs as far as that is possible.

    Args:
        config: the `data` section.
        kinds: texts that are wanted, "long" and "short".
        only_local: leave out sources that are on the Hub, which is not asked.

    Returns:
        both, None for what is not named or cannot be opened, and all that is wrong.
    """
    opened, mistakes = [], []
    for held_out in (False, True):
        sources, split = _sources(config, held_out)
        pairs = None
        try:
            if sources and not (only_local and not all(find_files(one.path, one.split or split) for one in sources)):
                pairs = load_pairs(config, kinds, held_out)
        except USER_ERRORS as error:
            mistakes.extend(str(error).splitlines())
        opened.append(pairs)
    return opened, mistakes


def check_row(row: Row, kinds: Sequence[str]) -> None:
    """Raise `ValueError` for a row that could not be read or lacks a caption of the `kinds`."""
    if row.fault:
        raise ValueError(f"{row.fault[:1].upper()}{row.fault[1:]}.")
    for kind in kinds:
        if fault := caption_fault(getattr(row, kind)):
            raise ValueError(f"The {kind} caption is {fault}.")


class CaptionedImages(Dataset):
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
            item["long_text"] = rng.choice(text_list(row.long))
            if self.short_from_long:
                item["short_text"] = split_sentences(item["long_text"])[0]
            if self.config.shuffle_sentences:
                item["long_text"] = shuffle_sentences(item["long_text"], rng)
        if "short" in self.pairs.kinds and not self.short_from_long:
            item["short_text"] = rng.choice(text_list(row.short))
        image = read_image(row.image, self.shortest_edge)
        view = random.Random(f"{self.seed}/{epoch}/{number}/view")  # texts are drawn alike with and without
        return item | {"image": augment(image, self.config.augment, view)}


def resized_side(processor: LRSCLIPProcessor) -> int:
    """Return the pixels of the short side that the image processor resizes to."""
    size = dict(processor.image_processor.size)
    return size.get("shortest_edge") or max(size["height"], size["width"])


def split_sentences(text: str) -> list[str]:
    """
    Split `text` into its sentences, each with its closing mark.

    DIFFERS: Long-CLIP (beichenzbc/Long-CLIP train/sharegpt4v.py) takes as the short text what stands before the first
    ". ": without the full stop, and going on past a question or exclamation mark or a line's end.
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """Put the sentences of `text` in another order, drawn from `rng`."""
    sentences = split_sentences(text)
    rng.shuffle(sentences)
    return " ".join(sentences)
