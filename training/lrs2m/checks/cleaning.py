"""Answers of a captioner cleaned of what is not caption."""

import html
import re

import ftfy


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


def clean_answer(text: str) -> str:
    """
    An answer as one paragraph without preamble, closing words, emphasis, reasoning tags and quotes around it, and with damaged
    characters mended.
    """
    text = ftfy.fix_text(html.unescape(_THINKING.sub("", text)), uncurl_quotes=False).strip()
    text = re.sub(
        r"[\u00a0\u2002-\u200a\u202f]|[\u200b-\u200d\u2060\ufeff]", lambda sign: " " * (sign[0] < "\u200b"), text
    )
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


def _unquoted(text: str) -> str:
    for opening, closing in _QUOTES:
        if len(text) > 1 and text[0] == opening and text[-1] == closing and text.count(opening) <= 2:
            return text[1:-1].strip()
    return text
