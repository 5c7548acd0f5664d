"""
Texts as rows of token ids, without padding: encoded, counted, cut, each once, hashed.

Shapes: N texts.
"""

from collections.abc import Sequence
from typing import Any

from ..files.hashing import json_sha256


def encode_texts(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of texts, cleaned and without padding, start and end tokens included, cut at the tokenizer's length.

    Args:
        processor: an `LRSCLIPProcessor`, or any CLIP processor with a `tokenizer`.
        texts (sequence of N `str`).

    Returns:
        N rows of at most `tokenizer.model_max_length` ids.

    Raises:
        `ValueError`: for a single string in place of a sequence, or an entry that is not a string.
    """
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "encode_text"):
        return processor.encode_text(texts)
    return cut_tokens(_whole_rows(processor, texts), processor.tokenizer.model_max_length)


def token_lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    """Numbers of tokens of whole texts, before anything is cut, start and end tokens included."""
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "count_tokens"):
        return processor.count_tokens(texts)
    return [len(row) for row in _whole_rows(processor, texts)]


def _whole_rows(processor: Any, texts: list[str]) -> list[list[int]]:
    """Token ids by a stock CLIP processor's tokenizer, uncut."""
    return processor.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: write [text].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is {type(text).__name__} ({text!r:.60}); every text must be a string.")
    return texts


def cut_tokens(rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """
    Return rows of at most `max_tokens` ids: the first `max_tokens - 1`, and end-of-text put back as the last, as every
    CLIP tokenizer truncates. A row that is short enough is returned as it is.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}, must be at least 2: the start and the end token count.")
    return [row if len(row) <= max_tokens else row[: max_tokens - 1] + row[-1:] for row in rows]


def share_truncated(lengths: Sequence[int], max_tokens: int) -> float:
    """Share, from 0 to 1, of texts of these lengths ([`token_lengths`]) that are longer than `max_tokens` and lose their end."""
    return sum(length > max_tokens for length in lengths) / max(len(lengths), 1)


def text_positions(model: Any) -> int:
    """Number of tokens, start and end included, that the model's text position table holds: 77 or 248."""
    return model.config.text_config.max_position_embeddings


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each row once, by falling length (what fails, fails first), and for every row given its index among those."""
    unique = sorted(dict.fromkeys(map(tuple, rows)), key=len, reverse=True)
    index_of = {row: index for index, row in enumerate(unique)}
    return unique, [index_of[tuple(row)] for row in rows]


def hash_rows(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 over token rows."""
    return json_sha256([list(row) for row in rows])
