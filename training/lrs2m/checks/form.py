"""Checks of an answer's form: whether it is a caption, a whole one, and nothing beside it."""

import re
from collections import Counter
from collections.abc import Iterable

from .candidate import Candidate, phrases, split_sentences, word_lists, word_set, words_of


ECHO = 6  # words in a row that an answer and its prompt's instructions may not share
_TAG = re.compile(r"</?[a-z!][^<>]*>|&(?:[a-z]{2,8}|#\d+|#x[\da-f]+);", re.IGNORECASE)
_SPECIAL = re.compile(
    r"<\|[^<>]{0,40}\|>|\|(?:im_start|im_end|endoftext)\||</?(?:s|pad|unk|eos|bos|image|img|start_of_turn|end_of_turn)>|"
    r"\[/?(?:INST|PAD|CLS|SEP|MASK|UNK)\]|<</?SYS>>|<0x[\dA-F]{2}>|\u2581|\ufffd"
)
_STRUCTURE = re.compile(
    r"[{}|`\\\[\]]|~(?!\d)|\*\*|__|##|--{2,}|^\s*[#>*-]\s|\"\w+\"\s*:|(?:^|\s)\d+\.\s+[A-Z].*\s\d+\.\s+[A-Z]"
)
_HEADING = re.compile(r"(?:^|[.!?:]\s+)[A-Z]\w*(?: \w+)?:\s")
_URL = re.compile(
    r"https?:|www\.|\S@\w+\.\w|\b[\w-]+\.(?:com|org|net|io|ai|cn|edu|gov|html?|jpe?g|png|tiff?|txt|json)\b",
    re.IGNORECASE,
)
_NUMBERED_MONTH = re.compile(r"\b(?:in|of|during|on|since) (?:march|may)\b(?: \d|,)", re.IGNORECASE)
_YEAR = re.compile(r"\b(?:1[89]\d\d|20\d\d)s?\b(?! (?:m|metres|meters|square|kilomet\w+|feet|ft)\b)")
_CLOCK = re.compile(r"\b\d{1,2}:\d\d\b|\b\d{1,2} ?[ap]\.?m\b|\b\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b", re.IGNORECASE)
_COURSE = re.compile(  # a direction of something long, which is no place: images are north up as a rule
    "|".join(
        rf"\b(?:from )?(?:the )?{begin}(?:-?(?:east|west))?(?: to |-to-|[-\u2013])(?:the )?{end}(?:-?(?:east|west))?\b"
        for begin, end in (("north", "south"), ("south", "north"), ("east", "west"), ("west", "east"))
    ),
    re.IGNORECASE,
)
_NAME = re.compile(
    r"(?<![.!?:;\u2026\"'\u201c\u2018(] )(?<![\"'\u201c\u2018(])(?<!^)\b[A-Z][a-z\u00df-\u00ff]{2,}(?!-(?:shaped|like)\b)"
)


def find_cut_off(candidate: Candidate) -> str | None:
    """An answer that the captioner's `max_tokens` ended."""
    return None if candidate.finished else "ended by max_tokens"


def find_length(candidate: Candidate) -> str | None:
    """An empty answer, one of a word or a placeholder, and one outside of the recipe's limits."""
    text, limits = candidate.text, candidate.limits
    if not text:
        return "empty"
    if text.lower().strip(" .!\"'()[]") in word_set("placeholders"):
        return "a placeholder"
    words = len(text.split())
    if words < 2:
        return "a single word"
    if limits.max_words is not None and words > limits.max_words:
        return f"over {limits.max_words} words"
    tokens = candidate.count_tokens(text)
    if tokens < limits.min_tokens:
        return f"under {limits.min_tokens} tokens"
    if limits.max_tokens is not None and tokens > limits.max_tokens:
        return f"over {limits.max_tokens} tokens"
    return None


def find_prompt_echo(candidate: Candidate) -> str | None:
    """
    Instructions of the prompt within the answer. What the prompt says of the image ("This is a remote sensing image, seen from
    above") may well be said again.
    """
    instructed = set()
    for sentence in split_sentences(candidate.instructions.replace(":", ".").replace('"', " ")):
        if not sentence.startswith(("This is", "You describe")):
            instructed.update(_runs(words_of(sentence)))
    return next((" ".join(run) for run in _runs(candidate.words) if run in instructed), None)


def find_tags(candidate: Candidate) -> str | None:
    """Tags and entities of HTML and XML."""
    return _first(_TAG, candidate.text)


def find_special_tokens(candidate: Candidate) -> str | None:
    """Tokens by which a chat template divides turns, which a server should have taken out."""
    return _first(_SPECIAL, candidate.text)


def find_role_names(candidate: Candidate) -> str | None:
    """A turn of a conversation, as `ASSISTANT:` or `### Response:`."""
    for role in re.finditer(r"(?:^|[.!?:#\"]\s*|\s)([A-Za-z]+)\s?:(?=\s|$)", candidate.text):
        at_start = not re.search(r"[^.!?:#\"\s]\s*$", candidate.text[: role.start(1)])
        if role[1].lower() in word_set("roles") and (at_start or role[1].isupper()):
            return role[1] + ":"
    return None


def find_structure(candidate: Candidate) -> str | None:
    """JSON, Markdown, tables, and paragraphs under headings, which a caption of plain prose has none of."""
    headings = _HEADING.findall(candidate.text)
    return _first(_STRUCTURE, candidate.text) or (headings[0].strip() if len(headings) > 1 else None)


def find_urls(candidate: Candidate) -> str | None:
    """Addresses of pages and mail, and names of files."""
    return _first(_URL, candidate.text)


def find_error_words(candidate: Candidate) -> str | None:
    """A message of a server or a program in place of a caption or within it."""
    return _first(phrases("errors"), candidate.text)


def find_boilerplate(candidate: Candidate) -> str | None:
    """Words about the captioner's task instead of the image: its caption, list, prompt, or itself."""
    return _first(phrases("boilerplate"), candidate.text)


def find_refusal(candidate: Candidate) -> str | None:
    """A refusal to answer or an excuse, anywhere in the answer."""
    return _first(phrases("refusals"), candidate.text)


def find_repetition(candidate: Candidate) -> str | None:
    """
    A text in circles: a word four times in a row, a sentence of six words twice or of three words three times, or, of 24
    words or more, fewer than six in ten of its groups of four words being new ones.
    """
    if match := re.search(r"\b(\w+)(?:\W+\1\b){3}", candidate.text, re.IGNORECASE):
        return match[0][:60]
    parts = (" ".join(words_of(sentence)) for sentence in re.split(r"[.!?;]+", candidate.text))
    times = Counter(part for part in parts if part.count(" ") >= 2)
    for part, count in times.items():
        if count >= (2 if part.count(" ") >= 5 else 3):
            return part[:60]
    groups = list(_runs(candidate.words, 4))
    return "groups of four words" if len(groups) > 20 and len(set(groups)) < 0.6 * len(groups) else None


def find_unknowable(candidate: Candidate) -> str | None:
    """
    Names of places, dates, times, and parts of the image by the compass, which pixels do not tell and the prompt did not.
    """
    prompt_parts = set(_parts_of(candidate.filled_in))
    text = _COURSE.sub(" ", candidate.text)
    for pattern in (_YEAR, _NUMBERED_MONTH, _CLOCK):
        if (match := pattern.search(text)) and match[0].lower() not in candidate.filled_in.lower():
            return match[0]
    for word in _parts_of(text):
        if word in word_set("compass") | word_set("months") and word not in prompt_parts:
            return word
    known = prompt_parts | word_set("english") | set(words_of(" ".join(word_lists()["landmarks"])))  # a Ferris wheel
    return next((name for name in _NAME.findall(text) if name.lower() not in known), None)


def _parts_of(text: str) -> list[str]:
    """Words of a text, and of those with a hyphen also each part."""
    return [part for word in words_of(text) for part in dict.fromkeys([word, *word.split("-")])]


def _runs(words: list[str], length: int = ECHO) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)))


def _first(pattern: re.Pattern, text: str) -> str | None:
    match = pattern.search(text)
    return match[0].strip()[:60] or "found" if match else None
