"""The checks of one answer by name, in the order they are made."""

from collections.abc import Callable
from typing import NamedTuple

from ..recipe import ChecksConfig
from .agreement import find_disagreement
from .candidate import Candidate
from .form import (
    find_boilerplate,
    find_cut_off,
    find_error_words,
    find_length,
    find_prompt_echo,
    find_refusal,
    find_repetition,
    find_role_names,
    find_special_tokens,
    find_structure,
    find_tags,
    find_unknowable,
    find_urls,
)
from .labels import find_count, find_excluded_class, find_invented_landmark, find_missing_class, find_negated_class
from .language import find_language, find_script


# A check returns what it found, in a few words, or None. What says most of an answer's fault comes first.
CHECKS: dict[str, Callable[[Candidate], str | None]] = {
    "cut_off": find_cut_off,
    "refusal": find_refusal,
    "error_words": find_error_words,
    "special_tokens": find_special_tokens,
    "role_names": find_role_names,
    "prompt_echo": find_prompt_echo,
    "boilerplate": find_boilerplate,
    "tags": find_tags,
    "urls": find_urls,
    "structure": find_structure,
    "script": find_script,
    "language": find_language,
    "repetition": find_repetition,
    "length": find_length,
    "unknowable": find_unknowable,
    "negated_class": find_negated_class,
    "missing_class": find_missing_class,
    "count": find_count,
    "excluded_class": find_excluded_class,
    "invented_landmark": find_invented_landmark,
    "agreement": find_disagreement,
}


class Fault(NamedTuple):
    check: str
    detail: str


def judge(candidate: Candidate, levels: ChecksConfig) -> tuple[Fault | None, list[str]]:
    """
    Judge an answer by every check of the recipe.

    Args:
        candidate: the answer.
        levels: by check `on`, `warn` or `off`.

    Returns:
        The first fault for which it is refused, or None; the names of the checks that warn of one that is kept.
    """
    warnings = []
    for name, find in CHECKS.items():
        level = getattr(levels, name)
        if level == "off" or (detail := find(candidate)) is None:
            continue
        if level == "on":
            return Fault(name, detail), []
        warnings.append(name)
    return None, warnings
