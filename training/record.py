"""`run.json`: what a model was trained on and how, beside its weights, for its card and for whoever repeats the run."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


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
    return {"name": name, "kind": "local" if Path(name).exists() else "hub"}


def read_record(folder: str) -> dict[str, Any] | None:
    """The record in a model folder, if it has one."""
    path = Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record in one step."""
    unfinished = folder / f".{RECORD}.{os.getpid()}"
    unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)
