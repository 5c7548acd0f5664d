"""JSON documents that somebody may have edited or a crash cut off: read, or refused in one sentence that names the file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """First line of an error's message, which says most, up to 500 characters; its kind where there is no message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 500 else line[:500] + " …"


def read_json(path: str | Path, advice: str) -> dict[str, Any]:
    """
    Read the object that a JSON file holds.

    Args:
        path: the file.
        advice: what to do about a file that cannot be used, such as "name a results.json".

    Raises:
        `ValueError`: for a file that is missing, no JSON in UTF-8, nested beyond all reason, or holds no object.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}); {advice}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} cannot be read (it holds a {type(document).__name__} and no object); {advice}.")
    return document


_MARKUP = str.maketrans({"<": "&lt;", ">": "&gt;", "[": r"\[", "]": r"\]", "|": r"\|", "`": "'"})


def without_markup(value: Any) -> Any:
    """
    Return JSON-like data whose texts a Markdown page shows as they are: on one line, without HTML, links, images, ends of
    cells or of code.
    """
    if isinstance(value, dict):
        return {without_markup(name): without_markup(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_markup(entry) for entry in value]
    return " ".join(value.split()).translate(_MARKUP) if isinstance(value, str) else value


@contextlib.contextmanager
def refuse_malformed(path: str | Path, advice: str, *also: type[Exception]) -> Iterator[None]:
    """
    Turn what a document without the expected fields makes of the code that uses it into one sentence.

    Args:
        path: the file that the document is from.
        advice: what to do about it.
        also: errors besides those of missing fields and values of another type, such as `ValueError` of a library.

    Returns:
        A context in which the document is used.

    Raises:
        `ValueError`: naming the file.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, *also) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} does not hold what it should ({reason}); {advice}.") from error
