"""Claims of a caption as questions with yes or no for an answer: objects, counts, colours and positions."""

import functools
import re
from dataclasses import dataclass

from ..sources.anchors import plural
from .candidate import split_sentences, word_lists
from .classes import Mention, find_mentions, joined


MOST = 16  # claims of a caption


@dataclass(frozen=True)
class Claim:
    kind: str  # object, count, colour or position
    question: str


def claims_of(text: str) -> list[Claim]:
    """
    Claims of a caption about things that the lists of words know: how many there are at least, where they are, in which
    colour, or only that they are there; of each thing that is named, the one that says most.

    Args:
        text: a caption.

    Returns:
        At most `MOST` claims, each once, in the order of the text. What the caption denies is not asked.
    """
    claims: dict[str, Claim] = {}
    for sentence in split_sentences(text):
        for index, mention in enumerate(find_mentions(sentence, named_things())):
            if not mention.negated:
                claim = _claim(mention, first=index == 0)
                claims.setdefault(claim.question, claim)
    return list(claims.values())[:MOST]


@functools.cache
def named_things() -> tuple[str, ...]:
    """Every class that the lists of words know, each name once."""
    groups = [*word_lists()["synonyms"], *word_lists()["related"], word_lists()["landmarks"]]
    return tuple({joined(phrase): phrase for group in groups for phrase in group}.values())


def read_answer(text: str) -> bool | None:
    """The yes or no that an answer begins with; None where it begins with neither."""
    word = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return word[1].lower() == "yes" if word else None


def _claim(mention: Mention, first: bool) -> Claim:
    name = f"{mention.colour} {mention.phrase}" if mention.colour else mention.phrase
    if mention.number and mention.number > 1 and mention.exact:
        return Claim("count", f"Are there at least {mention.number} {plural(name)} in this image?")
    if first and mention.position and not mention.plural:
        return Claim("position", f"Is there {_with_article(name)} in the {mention.position} of this image?")
    return Claim("colour" if mention.colour else "object", f"Is there {_with_article(name)} in this image?")


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
