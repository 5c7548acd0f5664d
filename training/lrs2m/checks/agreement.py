"""Whether a short caption follows from the long one of its row."""

import functools
from collections.abc import Iterable

from .candidate import Candidate, singular, word_lists, word_set, words_of
from .classes import find_mentions, phrases_of, synonyms_of


SUPPORTED = 0.25  # of a short caption's content words, at least, to be found in the long one


def find_disagreement(candidate: Candidate) -> str | None:
    """A landmark of the short caption that the long one lacks, and one most of whose content words it does not support."""
    if not candidate.other:
        return None
    short, long = (candidate.text, candidate.other)[:: 1 if candidate.which == "short" else -1]
    content = content_words(short)
    if not content:
        return "no content words" if candidate.which == "short" else None
    landmarks = phrases_of(tuple(word_lists()["landmarks"]), "synonyms")
    named = {mention.phrase for mention in find_mentions(short, landmarks) if not mention.negated}
    missing = unsupported_phrases(sorted(named), long)
    if not missing:
        words = unsupported_phrases(content, long)
        missing = words if len(words) > (1 - SUPPORTED) * len(content) else []
    return f"not in the long one: {', '.join(missing)}"[:120] if missing else None


def content_words(text: str) -> list[str]:
    """Words of a caption that say what is in the image, in the singular, each once."""
    empty = word_set("english") | word_set("empty_words")
    words = (part for word in words_of(text) for part in word.split("-"))
    return list(dict.fromkeys(singular(word) for word in words if word not in empty and len(word) > 2))


def unsupported_phrases(wanted: Iterable[str], text: str) -> list[str]:
    """
    Phrases that a text lacks: in the singular or plural, in another form (the first five letters decide), and all their
    synonyms and related words.
    """
    known = set(content_words(text))
    known |= {word[:5] for word in known if len(word) > 4}
    return [
        phrase
        for phrase in wanted
        if not any(all(word in known or word[:5] in known for word in words) for words in _forms(phrase))
    ]


@functools.lru_cache(2**14)
def _forms(phrase: str) -> list[tuple[str, ...]]:
    """Words, in the singular, of all that may stand for a phrase; "tank" is enough for "storage tank"."""
    phrases = (words_of(one) for one in synonyms_of(phrase, related=True))
    forms = {tuple(singular(word) for word in words) for words in phrases}
    return sorted(forms | {tuple(singular(word) for word in words_of(phrase))[-1:]})
