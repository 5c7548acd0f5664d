"""Answers of a captioner: cleaned of what is not caption, and checked before they enter the data set."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..sources.anchors import mentioned_share


@dataclass(frozen=True)
class Checks:
    """Conditions that an answer must fulfil to become a text."""

    min_tokens: int = 0  # CLIP tokens, start and end included
    max_tokens: int | None = None
    max_words: int | None = None
    label_names: Sequence[str] = ()
    anchor_share: float = 0.0  # of the label names, to be mentioned


_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^:.!\n]{0,60}[:.!,]\s*)?"
    r"(?:(?:here(?:['\u2019]s| is| are)|this is|below is|the following is)\b[^:\n]{0,80}:\s*)?"
    r"(?:(?:\w+\s){0,3}(?:caption|description|summary|answer|output|response)\s*(?:\([^)]*\))?\s*:\s*)?",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\s*(?:\(?\s*(?:word count|words?)\s*:\s*\d+\s*\)?|let me know\b.*|i hope this\b.*|feel free to\b.*|"
    r"(?:would|do) you (?:like|want|need)\b.*\?)\s*$",
    re.IGNORECASE | re.DOTALL,
)
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|$)", re.IGNORECASE | re.DOTALL)
_ITEM = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d+[.)])[ \t]+(.*\S)[ \t]*$", re.MULTILINE)
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb", "``")
_REFUSAL = re.compile(
    r"\b(?:i(?:['\u2019]m| am) sorry|i apologi[sz]e|as an ai\b|as a language model|i(?: can(?:['\u2019]t|not)|['\u2019]m unable| am unable|"
    r" do not| don['\u2019]t) (?:\w+ ){0,2}(?:to |see|view|provide|describe|identify|assist|help|have|comply|fulfil)|"
    r"unable to (?:provide|view|see|process|describe)|cannot (?:assist|provide|comply)|no image (?:was |is )?"
    r"(?:provided|attached|visible)|please (?:provide|upload|share) (?:the|an|a)\b)",
    re.IGNORECASE,
)
# Words that English prose can hardly do without and that other Latin-script languages do not share.
_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        "the of and with from are is there which this that by while along beside between into their its has have "
        "some several near through behind around across appears visible features surrounded two three four many "
        "few where it at on to for as an be was were also left right upper lower",
    )
)


def clean_answer(text: str) -> str:
    """An answer as one paragraph without preamble, closing words, markdown, reasoning tags and quotes around it."""
    text = _THINKING.sub("", text).replace("\u00a0", " ").strip()
    text = re.sub(r"```\w*", "", text)
    text = re.sub(r"^\s*#{1,6}\s+.*$", "", text, flags=re.MULTILINE) if "\n" in text else text.lstrip("# ")
    text = _ITEM.sub(lambda item: item[1] if item[1].endswith((".", "!", "?", ":")) else f"{item[1]}.", text)
    text = re.sub(r"(\*\*|__)(.+?)\1", r"\2", text)
    text = re.sub(r"(?<!\w)[*_](\S(?:[^*_]*\S)?)[*_](?!\w)", r"\1", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text).strip()
    for _ in range(2):  # a preamble within quotes, quotes after a preamble
        text = _unquoted(text)
        text = _PREAMBLE.sub("", text, count=1).strip()
    text = _CLOSING.sub("", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text[:1].upper() + text[1:]


def find_fault(text: str, checks: Checks, count_tokens: Callable[[str], int], finished: bool = True) -> str | None:
    """
    Return the reason why an answer cannot be used, in a few words that are counted, or None.

    Args:
        text: cleaned.
        count_tokens: CLIP's tokens of a text.
        finished: whether the captioner ended the text itself.
        checks: limits that an answer must keep.

    Returns:
        The reason; None for a good answer.
    """
    if not text:
        return "empty"
    if not finished:
        return "cut off"
    if _REFUSAL.search(text[:300]):
        return "refusal"
    if not english(text):
        return "not English"
    if repeats(text):
        return "loop"
    if checks.max_words is not None and len(text.split()) > checks.max_words:
        return f"over {checks.max_words} words"
    tokens = count_tokens(text)
    if tokens < checks.min_tokens:
        return f"under {checks.min_tokens} tokens"
    if checks.max_tokens is not None and tokens > checks.max_tokens:
        return f"over {checks.max_tokens} tokens"
    if mentioned_share(text, checks.label_names) < checks.anchor_share:
        return "anchors not mentioned"
    return None


def english(text: str) -> bool:
    """
    Tell whether a caption is in English: nearly all of its letters are Latin ones, and of 12 words or more, one in twelve
    is a function word of English. Shorter captions are judged by their letters alone.
    """
    latin = len(re.findall(r"[A-Za-z]", text))
    foreign = 0 if text.isascii() else sum(letter.isalpha() and not letter.isascii() for letter in text)
    if not latin or latin < 0.95 * (latin + foreign):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) < 12 or sum(word in _ENGLISH for word in words) * 12 >= len(words)


def repeats(text: str) -> bool:
    """
    Tell whether a text goes in circles: a word four times in a row, a sentence three times, or, of 24 words or more, fewer
    than six in ten of its groups of four words being new ones.
    """
    words = re.findall(r"\w+", text.lower())
    if re.search(r"\b(\w+)(?:\W+\1\b){3}", text, re.IGNORECASE):
        return True
    sentences = Counter(part.strip().lower() for part in re.split(r"[.!?]+", text) if len(part.split()) > 2)
    if sentences and max(sentences.values()) >= 3:
        return True
    groups = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return len(words) >= 24 and len(set(groups)) < 0.6 * len(groups)


def _unquoted(text: str) -> str:
    for opening, closing in _QUOTES:
        if len(text) > 1 and text[0] == opening and text[-1] == closing and text.count(opening) <= 2:
            return text[1:-1].strip()
    return text
