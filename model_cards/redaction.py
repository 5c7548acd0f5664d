"""Records of a run without the folders of somebody's machine, for everybody to see."""

import itertools
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any


def without_paths(value: Any) -> Any:
    """Absolute paths, and those that lead out of the working directory, cut to their last part, in JSON-like data."""
    if isinstance(value, dict):
        return {name: without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if PureWindowsPath(value).is_absolute() and not value.startswith("/"):
        return PureWindowsPath(value).name
    if Path(value).is_absolute() or value.startswith(("~", "../", "file:")):
        return Path(value).name
    value = re.sub(r"file:(?=/)", "", value)
    value = re.sub(r"(?<=')[~/][^']*/([^'/]+)/?(?=')", r"\1", value)  # in quotes, blanks belong to the path
    return re.sub(r"(?<![\w:/.~])(?:~|/)[^\s'\"]*/([^\s'\"/]+)/?", r"\1", value)


def command_for(command: str, address: str) -> str:
    """A command of evaluation.run for the model at `address` alone, without paths of another machine."""
    words, of_models = [], False
    options = [word.split("=", 1) if word.startswith("--") else [word] for word in shlex.split(command)]
    for word in itertools.chain(*options):
        if word.startswith("--"):
            of_models = word == "--model"
            words += [word, address] if of_models else [word]
        elif not of_models:
            name, equals, path = word.partition("=")
            words.append(f"{name}={without_paths(path)}" if equals else without_paths(word))
    return shlex.join(words)
