"""Inspection of a run's data: token lengths, how images are read, hashes of them, and what is probably a mistake in them."""

import contextlib
import re
import statistics
from collections import Counter
from typing import Any

from modeling_lrsclip import LRSCLIPProcessor
from modeling_lrsclip.encoding.imagery import SURVEYED, ImageError, read_image, spread, survey

from .pairs import Pairs
from .rows import Row, caption_fault, filled, image_sha256, text_list
from .sources import DataConfig


MEASURED_TEXTS = 1000  # whose token lengths are measured at the start of a run
HASHED, HASH_DIGITS = 2000, 16  # images that run.json knows, each by so many hexadecimal digits
FEW_ROWS = 4  # of which nothing is concluded


def inspect_pairs(pairs: Pairs, processor: LRSCLIPProcessor, config: DataConfig) -> dict[str, Any]:
    """
    Look at the data as far as a run's record and its first lines tell of them.

    Args:
        pairs: to train on.
        processor: counts the tokens of texts.
        config: the `data` section.

    Returns:
        `pairs`, how many there are; `captions`, as [`token_lengths`]; `imagery`, a [`survey`]; `images_sha256`, the
        first digits of the hashes of images, sorted, of all up to `HASHED` rows, else of some; `warnings`, sentences.
    """
    rows, hashes, images = [], [], []
    for number in _sample(pairs, HASHED):
        row = pairs.read([number])[0]
        if digest := image_sha256(row.image):
            hashes.append(digest[:HASH_DIGITS])
        row.image = None  # thousands of them would fill the memory
        rows.append(row)
    for number in _sample(pairs, SURVEYED):
        with contextlib.suppress(ImageError):  # training names it when its turn comes
            images.append(read_image(pairs.read([number])[0].image))
    lengths = token_lengths(pairs, processor, config)
    return {
        "pairs": len(pairs),
        "captions": lengths,
        "imagery": survey(images),
        "images_sha256": sorted(set(hashes)),
        "warnings": data_warnings(rows, hashes, lengths, config.columns(pairs.kinds)),
    }


def token_lengths(pairs: Pairs, processor: LRSCLIPProcessor, config: DataConfig) -> dict[str, dict[str, float]]:
    """
    Measure the first texts of each source.

    Args:
        pairs: to train on.
        processor: counts their tokens.
        config: names their columns.

    Returns:
        by column: `measured` texts, their `mean_tokens`, and `share_truncated`, from 0 to 1, which the model's
        table cuts.

    Raises:
        `ValueError`: where these rows have no such text.
    """
    positions, measured = processor.tokenizer.model_max_length, {}
    each = max(1, MEASURED_TEXTS // len(pairs.sources))
    for kind in pairs.kinds:
        texts = [text_list(stored)[0] for stored in pairs.texts(kind, each)]
        if not texts:
            first = next(pairs.parts[0].texts(kind), None)
            raise ValueError(
                f"The first {each} rows have no {kind} caption at all (the first is {caption_fault(first)}); name the "
                f"column of captions with data.{kind}_column."
            )
        lengths = processor.count_tokens(texts)
        cut = sum(length > positions for length in lengths) / len(lengths)
        name = config.columns([kind])[kind]
        measured[name] = {"measured": len(lengths), "mean_tokens": statistics.fmean(lengths), "share_truncated": cut}
    return measured


def _sample(pairs: Pairs, most: int) -> list[int]:
    """Numbers of up to `most` rows, as many of each source: evenly spread, or the first ones where it is streamed."""
    each, first, numbers = max(1, most // len(pairs.sources)), 0, []
    for end in pairs.source_ends.tolist():
        rows = end - first
        numbers += [first + number for number in (range(min(each, rows)) if pairs.buffer else spread(rows, each))]
        first = end
    return numbers


def data_warnings(
    rows: list[Row], image_hashes: list[str], lengths: dict[str, dict[str, float]], columns: dict[str, str]
) -> list[str]:
    """
    Find what is probably a mistake in data that can be trained on.

    Args:
        rows: some of the data.
        image_hashes: of their images.
        lengths: as [`token_lengths`] returns them.
        columns: names of the columns of texts, by kind.

    Returns:
        A sentence for each of: long and short columns swapped, HTML tags in captions, all captions equal, one image in
        more than half of the rows.
    """
    warnings = []
    if len(columns) == 2 and lengths[columns["long"]]["mean_tokens"] < lengths[columns["short"]]["mean_tokens"]:
        warnings.append(
            f"{columns['long']} is shorter than {columns['short']} on average: the two columns seem to be swapped "
            "(data.long_column, data.short_column)"
        )
    for kind, name in columns.items():
        texts = [text for row in rows if filled(getattr(row, kind)) for text in text_list(getattr(row, kind))]
        if tags := [tag[0] for text in texts if (tag := re.search(r"</?[a-zA-Z][^<>]*>", text))]:
            warnings.append(f"{len(tags)} of {len(texts)} texts of {name} looked at hold HTML tags, such as {tags[0]}")
        if len(texts) >= FEW_ROWS and len(set(texts)) == 1:
            warnings.append(f"all {len(texts)} texts of {name} looked at are equal: {texts[0][:60]!r}")
    common = Counter(image_hashes).most_common(1)[0][1] if image_hashes else 0
    if len(image_hashes) >= FEW_ROWS and common > len(image_hashes) / 2:
        warnings.append(f"{common} of {len(image_hashes)} rows looked at hold the same image")
    return warnings
