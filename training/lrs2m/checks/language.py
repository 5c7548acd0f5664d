"""Checks of an answer's language and script, sentence by sentence."""

import unicodedata

from .candidate import Candidate, word_set, words_of


# Signs that captions use beside letters, digits and ASCII.
_SIGNS = frozenset("°²³×÷±µ½¼¾–—‘’“”…´′″·•≈≤≥€£§«»‐‑")


def find_script(candidate: Candidate) -> str | None:
    """A letter of another script than Latin, an emoji or another sign that no English caption has."""
    for letter in candidate.text:
        if not letter.isascii() and letter not in _SIGNS and not _latin(letter):
            return f"{letter} {unicodedata.name(letter, 'unnamed').lower()}"
    return None


def find_language(candidate: Candidate) -> str | None:
    """
    A sentence that is not English: more of its words are frequent ones of another language than of English, or of 12 words
    or more, fewer than one in twelve is a frequent one of English.
    """
    english, foreign = word_set("english"), word_set("foreign")
    for sentence in candidate.sentences:
        words = words_of(sentence)
        known = sum(word in english for word in words)
        strange = sum(word in foreign - english or not word.isascii() for word in words)
        if strange > known or len(words) >= 12 and known * 12 < len(words):
            return sentence[:60]
    return None


def _latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN ") and unicodedata.normalize("NFKC", letter) == letter
