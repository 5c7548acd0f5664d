"""Claims of a caption as questions with yes or no for an answer: objects, counts, colours and positions."""

import functools
import re
from dataclasses import dataclass

from ..sources.anchors import plural
from .candidate import split_sentences, word_lists
from .classes import Mention, find_mentions, joined


MOST = 12  # claims of a caption


@dataclass(frozen=True)
class Claim:
    kind: str  # object, count, colour or position
    question: str


def claims_of(text: str) -> list[Claim]:
    """
    Claims of a caption about things that the lists of words know: that they are there, how many at least, in which colour and
    where.

    Args:
        text: a caption.

    Returns:
        At most `MOST` claims, each once, in the order of the text. What the caption denies is not asked.
    """
    claims: dict[str, Claim] = {}
    for sentence in split_sentences(text):
        mentions = [mention for mention in find_mentions(sentence, named_things()) if not mention.negated]
        for mention in mentions:
            for claim in _claims(mention, alone=len(mentions) == 1):
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


def _claims(mention: Mention, alone: bool) -> list[Claim]:
    name = mention.phrase
    coloured = f"{mention.colour} {name}" if mention.colour else name
    claims = [Claim("colour" if mention.colour else "object", f"Is there {_with_article(coloured)} in this image?")]
    if mention.number and mention.number > 1 and mention.exact:
        claims.append(Claim("count", f"Are there at least {mention.number} {plural(coloured)} in this image?"))
    elif alone and mention.position and not mention.plural:
        where = mention.position
        claims.append(Claim("position", f"Is there {_with_article(coloured)} in the {where} of this image?"))
    return claims


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
