"""
Exact search over an index: the places whose windows are nearest to a text, an image, or both.

Shapes: N windows of the index, D width of the shared space, B windows of a block, K windows that are compared.
"""

import math
import mmap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import shapely
import torch
from PIL import Image

from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from modeling_lrsclip.encoding.ties import SCORE_TIE, best_first
from modeling_lrsclip.processing_lrsclip import clean_text

from .area import Area, SearchProblem
from .index_store import Index, IndexProblem


BLOCK = 2048  # windows that are widened to float32 at once: 4 MB of 512 values, which a core's cache holds
RELEASE = 16  # blocks after which their pages of the file are given back: memory stays flat however large the index
GATHER = 64  # rows that are read from here and there before their pages are given back
MARGIN = 1e-4  # more than float32 sums of D <= 2048 products of unit vectors differ between processors
SAMPLE = 65_536  # windows, evenly spread, from which the weights of several texts and images are made
FIRST_RANKS = 256  # windows that are ranked first; four times as many wherever they are too few places
SAME_PLACE = 0.2  # share of the smaller of two windows that the other covers; neighbours at half a window share 0.25


# ------------------------------------------------------------------------------------------------------------ question


@dataclass(frozen=True)
class ReadText:
    """A text as a model reads it."""

    text: str  # as the tokenizer got it: cleaned
    tokens: int  # of the whole, start and end included
    limit: int  # tokens that the model reads
    cut_at: int  # character from which on the model reads nothing
    clip_cut_at: int  # character from which on a CLIP of 77 tokens reads nothing

    @property
    def cut(self) -> str:
        """The end that is not read; empty for most texts."""
        return self.text[self.cut_at :].strip()

    def sentence(self) -> str:
        """Sentence on how long the text is and what of it is not read."""
        if not self.cut:
            return f"The text has {self.tokens} tokens; the model reads {self.limit}."
        return f"The text has {self.tokens} tokens, of which the model reads {self.limit}; not read: “{self.cut}”"


def read_text(encoder: Encoder, text: str) -> ReadText:
    """Count a text's tokens for a model, and find where its reading ends."""
    tokenizer, limit = encoder.processor.tokenizer, encoder.positions
    cleaned = clean_text(text)
    encoded = tokenizer(cleaned, return_offsets_mapping=True, truncation=False, verbose=False)
    spans = encoded["offset_mapping"]

    def end(positions: int) -> int:
        # The last position holds the end token, so positions - 1 tokens are read; the first is the start token.
        return len(cleaned) if len(spans) <= positions else spans[positions - 1][0]

    return ReadText(cleaned, len(spans), limit, end(limit), end(77))


def question_vector(
    index: Index, encoder: Encoder, text: str | None, image: Image.Image | None = None, exclude: str | None = None
) -> np.ndarray:
    """
    The direction in the shared space in which the windows that are asked for lie furthest.

    A single text or image is its own embedding. Several are added, each divided by the standard deviation of its
    similarities over the index, so that a text (whose similarities to images lie close together) counts as much as an
    image; `exclude` is subtracted.

    Args:
        index: its vectors set the weights.
        encoder: the model of the index.
        text: what shall be seen.
        image: what it shall look like.
        exclude: what shall not be seen.

    Returns:
        `(D,)` float32, unit length.

    Raises:
        [`SearchProblem`]: for neither text nor image, or an empty text.
    """
    for name, words in (("text", text), ("exclude", exclude)):
        if words is not None and not words.strip():
            raise SearchProblem(f"the {name} is empty: describe in words what is to be seen.")
    if text is None and image is None:
        raise SearchProblem("there is nothing to look for: give a text, an image or both.")
    texts = [words for words in (text, exclude) if words is not None]
    model, processor = encoder.model, encoder.processor
    embedded = embed_texts(model, processor, texts, encoder.batch_size, dtype=encoder.dtype) if texts else []
    wanted = [embedded[0]] if text is not None else []
    if image is not None:
        wanted.append(embed_images(model, processor, [image], dtype=encoder.dtype)[0])
    parts = wanted + ([embedded[-1]] if exclude is not None else [])
    if len(parts) == 1:
        return parts[0].numpy()
    vectors = index.vectors()
    sample = torch.from_numpy(vectors[:: max(1, len(vectors) // SAMPLE)].astype(np.float32))
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for number, part in enumerate(parts):
        deviation = (sample @ part).double().std(correction=0).clamp(min=1e-6)
        total += (-1 if number == len(wanted) else 1) * part.double() / deviation
    return torch.nn.functional.normalize(total, dim=0).float().numpy()


# ----------------------------------------------------------------------------------------------------------- similarity


def similarities(vectors: np.ndarray, query: np.ndarray, threads: int | None = None) -> np.ndarray:
    """
    Cosine similarities of a query to all windows, in float32 on every processor.

    A core widens some windows at a time into a buffer that its cache holds, so the file is read once, at the speed of
    the memory, and memory does not grow with the index.

    Args:
        vectors (`(N, D)` float16): unit rows, usually memory-mapped.
        query (`(D,)`): unit length.
        threads: default as many as torch uses.

    Returns:
        `(N,)` float32.
    """
    threads = threads or torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written to it
        rows = torch.from_numpy(vectors)  # (N, D)
    vector = torch.from_numpy(np.ascontiguousarray(query, dtype=np.float32))
    result = torch.empty(len(rows))
    share = math.ceil(len(rows) / threads / BLOCK) * BLOCK

    def work(start: int) -> None:
        buffer = torch.empty(BLOCK, rows.shape[1])
        stop = min(start + share, len(rows))
        for number, first in enumerate(range(start, stop, BLOCK), 1):
            block = rows[first : min(first + BLOCK, stop)]  # (B, D)
            wide = buffer[: len(block)].copy_(block)
            torch.mv(wide, vector, out=result[first : first + len(block)])
            if number % RELEASE == 0:
                _release(vectors, first + BLOCK - RELEASE * BLOCK, first + BLOCK)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, range(0, len(rows), max(share, 1))))
    finally:
        torch.set_num_threads(before)
    return result.numpy()


def _release(vectors: np.ndarray, start: int, stop: int) -> None:
    """Gives the pages of rows back to the system, which keeps them in its cache of files."""
    mapping = getattr(vectors, "_mmap", None)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED") or vectors.base is not mapping:
        return
    row = vectors.shape[1] * vectors.itemsize
    first = -(-start * row // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop * row // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapping.madvise(mmap.MADV_DONTNEED, first, length)


def _exact(vectors: np.ndarray, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Similarities of rising rows, summed in float64 and in one order for every row."""
    values = (vectors[rows].astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    _release(vectors, rows[0], rows[-1] + 1)  # the system maps up to 2 MB around each row it reads
    return values


def ranked_rows(
    vectors: np.ndarray, query: np.ndarray, scores: np.ndarray, allowed: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Rows by falling similarity, some at a time, equal ones in their own order: the same on every processor.

    Args:
        vectors (`(N, D)` float16), query (`(D,)`): as in [`similarities`].
        scores (`(N,)` float32): their product, known to within `MARGIN`.
        allowed (`(N,)` bool): which rows count; None: all.

    Yields:
        Row numbers `(K,)`, and their similarities `(K,)` float64, summed in one order for every row.
    """
    rows = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    rough = scores if allowed is None else scores[rows]
    done, count = 0, FIRST_RANKS
    while done < len(rows):
        count = min(count, len(rows))
        least = np.partition(rough, len(rows) - count)[len(rows) - count]
        near = rows[rough >= least - MARGIN]
        exact = np.concatenate([_exact(vectors, query, near[at : at + GATHER]) for at in range(0, len(near), GATHER)])
        order = best_first(exact, SCORE_TIE)[done:count]
        yield near[order], exact[order]
        done, count = count, count * 4


# ---------------------------------------------------------------------------------------------------------------- places


def distinct_places(outlines: np.ndarray, groups: np.ndarray, taken: Sequence[int] = ()) -> list[int]:
    """
    Those of ranked windows that show a place none before them shows.

    Args:
        outlines (`(K,)` shapely polygons): by falling similarity.
        groups (`(K,)` integers): only windows of the same group can show the same place.
        taken: windows, the first of all, that were chosen before; what overlaps one of the others does not come in.

    Returns:
        Numbers of the windows chosen, those of `taken` first.
    """
    first, second = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    pairs = (first < second) & (groups[first] == groups[second])
    first, second = first[pairs], second[pairs]
    areas = shapely.area(outlines)
    shared = shapely.area(shapely.intersection(outlines[first], outlines[second]))
    same = shared >= SAME_PLACE * np.minimum(areas[first], areas[second])
    better: dict[int, list[int]] = {}
    for one, other in zip(first[same].tolist(), second[same].tolist()):
        better.setdefault(other, []).append(one)
    chosen = dict.fromkeys(taken)
    for window in range(len(taken), len(outlines)):
        if not any(other in chosen for other in better.get(window, ())):
            chosen[window] = None
    return list(chosen)


@dataclass(frozen=True)
class Hits:
    """Places found, best first."""

    rows: pa.Table  # of the index, one a hit, with the columns of `HIT_COLUMNS`
    row_numbers: np.ndarray  # (H,) in the index
    similarity: np.ndarray  # (H,) float64
    mean: float  # of the similarities over the whole index
    deviation: float  # their standard deviation
    searched: int  # windows that were allowed
    text: ReadText | None = None
    vector: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)  # (D,) of the question
    coordinates: str = "wgs84"  # of the outlines; or `pixels`

    def __len__(self) -> int:
        return len(self.similarity)

    @cached_property
    def outlines(self) -> np.ndarray:
        """`(H,)` shapely polygons: the windows' four corners."""
        return shapely.from_wkb(self.rows["geometry"].to_pylist())

    @property
    def z_score(self) -> np.ndarray:
        """`(H,)`: how many standard deviations each lies above the mean of the whole index."""
        return (self.similarity - self.mean) / max(self.deviation, 1e-12)


HIT_COLUMNS = [
    "unique_id", "scene", "pixel_box", "scale", "gsd", "timestamp", "crs", "centre_lat", "centre_lon", "geometry"
]  # fmt: skip


def search(
    index: Index,
    text: str | None = None,
    *,
    encoder: Encoder,
    image: Image.Image | None = None,
    exclude: str | None = None,
    area: Area | None = None,
    top: int = 10,
) -> Hits:
    """
    Places whose windows are most similar to a description, exactly: every window is compared.

    Args:
        index: of [`~geosearch.index_store.open_index`].
        text: what shall be seen there, up to as many tokens as the model reads.
        encoder: the model that the index was made with ([`~modeling_lrsclip.encoding.encoder.load_encoder`]).
        image: what it shall look like, alone or with the text.
        exclude: a text for what shall not be seen there.
        area: where and when; default everywhere.
        top: most places to return. Windows that overlap by a fifth or more are one place, found where it is most similar.

    Returns:
        [`Hits`], best first.

    Raises:
        [`SearchProblem`]: for an empty question, `top` below 1, or an area without windows.
        [`~geosearch.index_store.IndexProblem`]: for another model than the index was made with.
    """
    if top < 1:
        raise SearchProblem(f"top is {top}; at least 1 place must be asked for.")
    index.check_model(encoder.weights_sha256)
    query = question_vector(index, encoder, text, image, exclude)
    return nearest_places(index, query, area, top, read_text(encoder, text) if text is not None else None)


def nearest_places(
    index: Index, query: np.ndarray, area: Area | None = None, top: int = 10, text: ReadText | None = None
) -> Hits:
    """
    Search as [`search`] does, for a question that is a unit vector `(D,)` already.

    Args:
        index: that is searched.
        query: (D,) unit vector.
        area: where to look; None: everywhere.
        top: places to return.
        text: how the text was read, for the record.

    Returns:
        Places by falling similarity.
    """
    allowed = (area or Area()).rows(index)
    vectors = index.vectors()
    scores = similarities(vectors, query)
    numbers, values, rows = np.zeros(0, dtype=np.int64), np.zeros(0), None
    for more_numbers, more_values in ranked_rows(vectors, query, scores, allowed):
        for start in range(0, len(more_numbers), FIRST_RANKS):
            part = slice(start, start + FIRST_RANKS)
            table = index.rows(HIT_COLUMNS, more_numbers[part])
            count = 0 if rows is None else len(rows)
            rows = table if rows is None else pa.concat_tables([rows, table])
            numbers = np.concatenate([numbers, more_numbers[part]])
            values = np.concatenate([values, more_values[part]])
            try:
                outlines = shapely.from_wkb(rows["geometry"].to_pylist())
            except shapely.GEOSException as error:
                damage = f"a damaged outline ({error})"
                raise IndexProblem(f"{index.folder} holds {damage}: index the scenes again.") from error
            kept = distinct_places(outlines, _groups(index, rows), range(count))[:top]
            rows, numbers, values = rows.take(kept), numbers[kept], values[kept]
            if len(kept) == top:
                break
        if len(numbers) == top:
            break
    mean, deviation = float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64))
    searched = len(index) if allowed is None else int(allowed.sum())
    coordinates = index.metadata["coordinates"]
    return Hits(rows.combine_chunks(), numbers, values, mean, deviation, searched, text, query, coordinates)


def _groups(index: Index, rows: pa.Table) -> np.ndarray:
    """Numbers that tell windows apart which cannot show the same place: of different scenes that know pixels only."""
    if index.metadata["coordinates"] == "wgs84":
        return np.zeros(len(rows), dtype=np.int64)
    return rows["scene"].combine_chunks().dictionary_encode().indices.to_numpy()
