"""Files and folders that a crash or a full disk leaves as they were or as they shall be, never half written."""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


NUMBERS = re.compile(r"\[\n[\s\d.,eE+-]+\]")  # a list of numbers, a line each
PARTIAL = "partial"  # ends the name under which something grows; the name begins with a dot
OLD = "old"  # ends the name of a folder that is being replaced


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    A path to write a file to, which takes the place of `path` at the end of the block, when it is on disk.

    After an error nothing is left of it, and `path` is as it was. Several threads, processes and machines may replace
    a file at a time: the last one stays.
    """
    path = Path(path)
    growing = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{PARTIAL}")
    try:
        yield growing
        sync(growing)
        os.replace(growing, path)
    except BaseException:
        with contextlib.suppress(OSError):
            growing.unlink()
        raise
    sync(path.parent)


def replace_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file anew in one step; it is on disk before it has its name."""
    with replacing(path) as growing:
        growing.write_bytes(content)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 file anew in one step, as [`replace_bytes`]."""
    replace_bytes(path, text.encode())


def replace_json(path: str | Path, value: Any, allow_nan: bool = True) -> None:
    """
    Writes a value as indented JSON, lists of plain numbers on one line each, in one step, as [`replace_bytes`].

    Args:
        path: file to write.
        value: of dictionaries, lists, texts, numbers and None.
        allow_nan: writes NaN and infinity, which strict readers of JSON refuse; False: they are a `ValueError`.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan)
    replace_text(path, NUMBERS.sub(lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text) + "\n")


def make_folder(folder: str | Path) -> Path:
    """
    Make a folder to write into, and those above it.

    Raises:
        `ValueError`: one sentence where that is not possible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{folder} cannot be written to ({reason}); give another folder.") from error
    return Path(folder)


def growing_folder(folder: Path) -> Path:
    """The path under which the successor of a folder is written, for [`publish_folder`]; nothing is made."""
    return folder.with_name(f".{folder.name}.{PARTIAL}")


def publish_folder(growing: Path, folder: Path) -> None:
    """
    Flushes a folder with all its files to disk and gives it the name `folder`, whose former content goes.

    Where this is interrupted between its two renames, [`restore_folder`] brings the former content back.
    """
    for path in (*growing.rglob("*"), growing):
        sync(path)
    restore_folder(folder)
    if folder.exists():
        folder.rename(_old(folder))
    try:
        growing.rename(folder)
    except OSError:
        restore_folder(folder)
        raise
    sync(folder.parent)
    restore_folder(folder)


def restore_folder(folder: Path) -> None:
    """Brings a folder back whose replacement was interrupted, and removes what is left of a finished one."""
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{OLD}")


def sync(path: str | Path) -> None:
    """Forces a file or a folder to disk."""
    if os.name == "nt" and Path(path).is_dir():  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
