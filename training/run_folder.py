"""A run's folder: whether this run may have it, and that no other has it at the same time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LOCK = ".lock"
# What a resumed run may have otherwise than the run before it: where it is, how often it logs, validates and saves, who
# reads its data and how much of them may be unusable.
FREE = {"resume", "output_dir", "data.workers", "data.prefetch_factor", "data.max_skipped_fraction"}
FREE |= {f"loop.{name}" for name in ("log_every", "log_ids", "trackers", "validate_every", "patience")}
FREE |= {f"loop.{name}" for name in ("save_every", "keep_checkpoints")}
FREE |= {"push_to_hub", *(f"push.{name}" for name in ("repo", "private", "every", "license", "measure"))}


def check_run_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """
    Raises `ValueError` when the folder holds a run and this one would overwrite it, or would go on with it under
    another configuration; how often to log, validate and save may change.

    Args:
        folder: may not exist yet.
        config: the run's configuration as nested dictionaries.
        resume: whether to go on with what is there.
    """
    if not (folder / "config.yaml").exists():
        return
    if not resume:
        raise ValueError(f"{folder} holds a run already; go on with it by --resume, or set another output_dir.")
    before, now = flatten(yaml.safe_load((folder / "config.yaml").read_text())), flatten(config)
    changed = [name for name in now | before if name not in FREE and before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ValueError(f"{folder} cannot be resumed with another configuration: {told}; set another output_dir.")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested sections as dotted names."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name not in ("text", "vision")
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """
    Keeps other runs out of `folder`, which is made, until this process leaves or ends, however it ends. Only the first
    process of a run needs it. Does nothing where the file system or Windows has no such locks.

    Raises:
        `ValueError`: when another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            # Of the process, unlike flock: processes that read data do not inherit it, nor keep it when the run is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip()
            raise ValueError(f"{folder} is in use by {owner}; wait until that run has ended, or end it.") from None
        except (OSError, AttributeError):  # a network file system without locks; Windows
            pass
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
