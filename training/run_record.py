"""`run.json`: what a model was trained on and how, beside its weights, for its card and for whoever repeats the run."""

import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.atomic import replace_json


RECORD = "run.json"
SCHEMA_VERSION = 1
VERSIONS_OF = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that have a say in the weights."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the clone that `folder` lies in and whether tracked files differ from it; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)}


def describe_source(name: str) -> dict[str, str]:
    """A model or a data set by its name, and whether that names something on this machine or on the Hub."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return {"name": name, "kind": "hub" if on_hub else "local"}


def describe_data(given: str | list[Any]) -> dict[str, Any]:
    """
    The data of a run as its configuration gives them: a name, or sources with a `path` and maybe a `weight`. Several are
    on the Hub if all of them are, and listed under `sources`.
    """
    if isinstance(given, str):
        return describe_source(given)
    sources = [describe_source(source.path) | {"weight": source.weight} for source in given]
    kinds = {source["kind"] for source in sources}
    names = ", ".join(source["name"] for source in sources)
    return {"name": names, "kind": "hub" if kinds == {"hub"} else "local", "sources": sources}


def read_record(folder: str) -> dict[str, Any] | None:
    """The record in a model folder, if it has one."""
    path = Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record in one step."""
    replace_json(folder / RECORD, record)


def record_start(folder: Path, start: dict[str, Any]) -> None:
    """Adds a start of the run, or a resumption, to the record of its folder; the rest follows when the run is done."""
    record = read_record(str(folder)) or {"schema_version": SCHEMA_VERSION}
    write_record(folder, record | {"starts": [*record.get("starts", []), start]})
