"""A captioner's answer with what is known of its row, as every check reads it, and the lists of words."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.configuration import read_yaml

from ..sources.anchors import Label


@dataclass(frozen=True)
class Limits:
    """Lengths that an answer must keep, and the share of the labelled classes that it must name."""

    min_tokens: int = 0  # CLIP tokens, start and end included
    max_tokens: int | None = None
    max_words: int | None = None
    anchor_share: float = 0.0  # of the label names


@dataclass(frozen=True)
class Candidate:
    """An answer that may become a text of the data set."""

    text: str  # cleaned
    which: str  # "long" or "short"
    count_tokens: Callable[[str], int] = lambda text: len(text.split()) + 2  # CLIP's
    finished: bool = True  # the captioner ended the text itself
    limits: Limits = Limits()
    instructions: str = ""  # the prompt's words, without what was filled in
    filled_in: str = ""  # what was filled into the prompt: captions, labels, fields
    other: str | None = None  # the row's other text, where it is known by now
    labels: Sequence[Label] = ()
    classes: Sequence[str] = ()  # all that the labels would list if they were there

    @cached_property
    def sentences(self) -> list[str]:
        return split_sentences(self.text)

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.text)


@functools.cache
def word_lists() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("words.yaml"))


@functools.cache
def word_set(name: str) -> frozenset[str]:
    """A list of single words."""
    return frozenset(word_lists()[name].split())


@functools.cache
def phrases(name: str) -> re.Pattern:
    """A list of phrases as one pattern."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'(?:{one})' for one in word_lists()[name])})(?!\w)", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?;\u2026])[\"'\u2019\u201d)]*\s+", text) if part.strip()]


def words_of(text: str) -> list[str]:
    """Words in lower case, apostrophes and hyphens within them kept: `tree-lined`, `it's`."""
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("\u2019", "'"))


@functools.lru_cache(2**16)
def singular(word: str) -> str:
    """A word without the ending of its plural, by its letters: `ferries` to `ferry`, `buses` to `bus`, `glass` to itself."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word) and not word.endswith(("houses", "ses")):
        return word[:-2]
    if word.endswith("buses"):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word
