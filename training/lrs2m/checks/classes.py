"""Classes that a text names: in which words, how many of them, and whether it says that there are none."""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .candidate import singular, split_sentences, word_lists, word_set


REACH = 12  # words that a negation reaches
_TOKEN = re.compile(r"\d+(?:,\d{3})+|\w+(?:['\u2019-]\w+)*|[,;:()]")
_NUMBERS = {word: number for number, word in enumerate(word_lists()["numbers"].split())}
_TENS = {word: 10 * tens for tens, word in enumerate(word_lists()["tens"].split(), start=2)}
_NUMBERS |= _TENS | {f"{ten}-{one}": _TENS[ten] + _NUMBERS[one] for ten in _TENS for one in list(_NUMBERS)[1:10]}
_SCALES = {"hundred": 100, "thousand": 1000}
_ONE = {"single": 1, "lone": 1, "solitary": 1, "sole": 1}
Reach = Literal["synonyms", "heads", "related"]
_POSITION = re.compile(
    r"\b(?:(?:upper|lower|top|bottom|centre|center|middle) (?:left|right|middle|centre|center)|(?:left|right|top|bottom) edge|"
    r"centre|center|middle|(?:left|right|upper|lower) half)\b"
)
_LONGEST = 4  # words of a class


@dataclass(frozen=True)
class Mention:
    """A class named in a text."""

    phrase: str  # as asked for
    negated: bool = False
    number: int | None = None  # as stated
    exact: bool = True  # no `about`, `dozens` or `several`
    part: bool = False  # the sentence says where, or speaks of others too
    colour: str | None = None
    plural: bool = False
    position: str | None = None  # the one that its sentence names: `upper left`


def find_mentions(text: str, phrases: Iterable[str]) -> list[Mention]:
    """
    Phrases that a text names, each place by the longest one.

    Args:
        text: a caption.
        phrases: names of classes, singular or plural, in one word or several.

    Returns:
        The mentions in their order.
    """
    known = {joined(phrase): phrase for phrase in phrases}
    beginnings = {key[:3] for key in known} | {key[:2] for key in known}
    mentions = []
    for words, stems in _sentences(text):
        start = 0
        while start < len(words):
            if stems[start][:3] not in beginnings:  # most words
                start += 1
                continue
            ends = range(min(len(words), start + _LONGEST), start, -1)
            end = next((end for end in ends if _join(stems[start:end]) in known), None)
            if end is not None:
                mentions.append(_mention(known[_join(stems[start:end])], words, start, end))
            start = end or start + 1
    return mentions


@functools.lru_cache(16)  # the checks of one answer
def _sentences(text: str) -> list[tuple[list[str], list[str]]]:
    """Words of every sentence, commas and the like among them, and the same in the singular."""
    sentences = []
    for sentence in split_sentences(text):
        words = [word.lower() for word in _TOKEN.findall(sentence)]
        sentences.append((words, [singular(word).replace("-", "").replace("'", "") for word in words]))
    return sentences


@functools.cache
def joined(phrase: str) -> str:
    """A phrase as it is looked for: every word in the singular, in one, so that `base ball` is `baseball`; but a green house is
    no greenhouse."""
    return _join([singular(word) for word in re.findall(r"\w+", phrase.lower())])


def _join(words: list[str]) -> str:
    if len(words) == 1:
        return words[0]
    return (" " if words[0] in word_set("colours") else "").join([words[0], "".join(words[1:])])


@functools.cache
def synonyms_of(phrase: str, related: bool = False) -> frozenset[str]:
    """Phrases that mean the same, itself included; with `related`, also those that may stand for it."""
    same = _groups("synonyms").get(joined(phrase), frozenset()) | {phrase}
    return same.union(*(_groups("related").get(joined(one), ()) for one in same)) if related else same


@functools.cache
def _groups(name: str) -> Mapping[str, frozenset[str]]:
    """Phrases of all groups of a list that hold a phrase, by it in the singular."""
    by_phrase: dict[str, frozenset[str]] = {}
    for group in word_lists()[name]:
        for phrase in group:
            by_phrase[joined(phrase)] = by_phrase.get(joined(phrase), frozenset()).union(group)
    return by_phrase


@functools.cache
def phrases_of(names: tuple[str, ...], reach: Reach) -> Mapping[str, frozenset[str]]:
    """
    Phrases by which classes are known.

    Args:
        names: of the classes, an attribute such as a colour before them.
        reach: take the names and their synonyms; a name's last word and its synonyms too; related phrases too. A phrase of a
            wider reach never takes that of a closer one from another class.

    Returns:
        By phrase, the names that it may stand for.
    """
    heads = {name: _head(name) for name in names if name.split()}
    steps = [lambda name: [name], synonyms_of]
    if reach != "synonyms":
        steps += [lambda name: synonyms_of(heads[name])]
    if reach == "related":
        steps += [lambda name: synonyms_of(name, True) | synonyms_of(heads[name], True)]
    by_key: dict[str, tuple[str, set[str]]] = {}
    for step in steps:
        new: dict[str, tuple[str, set[str]]] = {}
        for name in heads:
            for phrase in sorted(step(name)):
                if joined(phrase) not in by_key:
                    new.setdefault(joined(phrase), (phrase, set()))[1].add(name)
        by_key |= new
    return {phrase: frozenset(meant) for phrase, meant in by_key.values()}


def _head(name: str) -> str:
    last = name.split()[-1]
    return name if last in word_set("generic") else last


def _mention(phrase: str, words: list[str], start: int, end: int) -> Mention:
    number, exact = _number_before(words, start)
    negated = number == 0 or _negated_before(words, start, end) or _absent_after(words, end)
    part = not word_set("parts").isdisjoint(words[:start] + words[end:])
    before = words[max(0, start - 2) : start]
    colour = next((word for word in reversed(before) if word in word_set("colours")), None)
    plural, positions = words[end - 1] != singular(words[end - 1]), _POSITION.findall(" ".join(words))
    position = positions[0] if len(positions) == 1 else None
    return Mention(phrase, negated, number or None, exact, part, colour, plural, position)


def _negated_before(words: list[str], start: int, end: int) -> bool:
    begins_clause = words[end : end + 1] not in ([], [","], ["and"], ["or"], ["nor"])  # no item of a list
    for index in range(start - 1, max(-1, start - 1 - REACH), -1):
        if words[index] in word_set("negators"):
            return True
        begins = words[index] in word_set("articles") | word_set("about") or words[index] in _NUMBERS
        if begins and words[index - 1 : index] in ([","], ["and"]) or words[index] in word_set("negation_ends"):
            return False
        if words[index] == "," and begins_clause and _is_noun(words[index - 1]):  # "without trees, planes wait"
            return False
        begins_clause = begins_clause and words[index] not in ("and", "or", "nor")
    return False


def _is_noun(word: str) -> bool:
    """Whether a word is a plural or a class that the lists know; an adjective is neither."""
    return singular(word) != word or word in _groups("synonyms") or word in _groups("related")


def _absent_after(words: list[str], end: int) -> bool:
    after = words[end : end + 6]
    after = after[: next((index for index, word in enumerate(after) if word in (",", ";", "(")), len(after))]
    if not word_set("absent").isdisjoint(after):
        return True
    denied = r"\b(?:not|cannot|can['\u2019]t)(?: be)? (?:visible|seen|found|present|shown|there|spotted)\b"
    return re.search(denied, " ".join(after)) is not None


def _number_before(words: list[str], start: int) -> tuple[int | None, bool]:
    """The number stated of what begins at `start`, and whether it is an exact one."""
    stops = {"and", "or", "the", "is", "are", "(", ")", ",", ";", ":"} | word_set("negation_ends")
    for index in range(start - 1, max(-1, start - 5), -1):
        word = words[index]
        if singular(words[index + 1]) in word_set("units"):  # "a 30 m wide road", "a two lane road"
            return None, True
        if _is_number(word) or word in _ONE:
            first = _number_begins(words, index)
            number = _ONE.get(word) or _number_of(words[first : index + 1])
            vague = words[max(0, first - 1) : first]  # "several hundred"
            before = words[max(0, first - 3) : first]
            return number, word_set("about").isdisjoint(before) and {*word_lists()["vague"], "few"}.isdisjoint(vague)
        if word in word_lists()["vague"]:
            return word_lists()["vague"][word], False
        of_others = word == "of" and index > 0 and words[index - 1] not in word_lists()["vague"]
        if word in stops or of_others:
            return None, True
    return None, True


def _is_number(word: str) -> bool:
    return word in _NUMBERS or word in _SCALES or word.replace(",", "").isdecimal() and len(word) < 8


def _number_begins(words: list[str], last: int) -> int:
    """Where the number begins that ends at `last`: `two` of "two hundred and five"."""
    first = last
    while first > 0:
        if _is_number(words[first - 1]):
            first -= 1
        elif first > 1 and words[first - 1] == "and" and words[first - 2] in _SCALES:
            first -= 2
        else:
            break
    return first


def _number_of(words: list[str]) -> int:
    total = part = 0
    for word in words:
        if word == "thousand":
            total, part = total + 1000 * (part or 1), 0
        elif word in _SCALES:
            part = _SCALES[word] * (part or 1)
        elif word != "and":
            part += _NUMBERS[word] if word in _NUMBERS else int(word.replace(",", ""))
    return total + part
