"""Checkpoints that appear whole or not at all: written beside their place, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor


CHECKPOINTS = "checkpoints"  # below a run folder; each is named step-00000350


def replace_folder(accelerator: Accelerator, folder: Path, write: Callable[[Path], None]) -> None:
    """
    Has all processes `write` a folder, and only then gives it its name.

    A crash leaves the old folder or none, never half of one: the new one grows under a name that starts with a dot,
    is flushed to disk, and replaces the old one by rename.
    """
    growing, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if accelerator.is_main_process:
        if old.exists() and not folder.exists():  # a crash between the two renames below
            old.rename(folder)
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write(growing)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in (*growing.rglob("*"), growing):
            _flush(path)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        growing.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(accelerator: Accelerator, run_folder: Path, step: int, keep: int) -> None:
    """Everything a resumed run needs (weights, optimizer, schedule, random states, position), the newest `keep` kept."""
    folder = run_folder / CHECKPOINTS / f"step-{step:08d}"
    replace_folder(accelerator, folder, lambda growing: accelerator.save_state(str(growing)))
    if accelerator.is_main_process:
        for old in _steps(run_folder)[:-keep]:
            shutil.rmtree(old)


def load_newest_state(accelerator: Accelerator, run_folder: Path) -> bool:
    """Restores the newest checkpoint; False when there is none."""
    steps = _steps(run_folder)
    if steps:
        accelerator.load_state(str(steps[-1]))
    return bool(steps)


def _steps(run_folder: Path) -> list[Path]:
    return sorted((run_folder / CHECKPOINTS).glob("step-*"))


def save_model(accelerator: Accelerator, model: LRSCLIPModel, processor: LRSCLIPProcessor, folder: Path) -> None:
    """A folder for `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained`, the code beside the weights."""

    def write(growing: Path) -> None:
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(growing)
            processor.save_pretrained(growing)

    replace_folder(accelerator, folder, write)
