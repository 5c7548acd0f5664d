"""Checkpoints that appear whole or not at all: written beside their place, then renamed; each file's hash is kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.files.atomic import OLD, PARTIAL, growing_folder, publish_folder, replace_json, restore_folder
from modeling_lrsclip.files.hashing import file_sha256

from .sharding import check_checkpoint, whole_model


CHECKPOINTS = "checkpoints"  # below a run folder; each is named step-00000350
MANIFEST = "manifest.json"  # in a checkpoint: size in bytes and SHA-256 of every other file
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside
# Of Python, torch.save, safetensors and FSDP2's checkpoints where a disk is full; the last one is no `Exception`.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
_MB = 1e6


class NotSavedError(OSError):
    """A folder could not be written; what it was to replace is as it was. All processes raise it together."""


def replace_folder(
    accelerator: Accelerator,
    folder: Path,
    write: Callable[[Path], None],
    seal: Callable[[Path], None] | None = None,
) -> None:
    """
    Has all processes `write` a folder, then the main process `seal` it, and only then gives it its name.

    A crash leaves the old folder or none, never half of one: the new one grows under a name that starts with a dot,
    is flushed to disk, and replaces the old one by rename.

    Raises:
        [`NotSavedError`]: on all processes if one of them could not write; what it had written is removed.
    """
    growing = growing_folder(folder)
    _on_main(accelerator, folder, lambda: _make_room(growing, folder))
    _together(accelerator, folder, lambda: write(growing))

    def publish() -> None:
        if seal is not None:
            seal(growing)
        publish_folder(growing, folder)

    _on_main(accelerator, folder, publish)


def _make_room(growing: Path, folder: Path) -> None:
    restore_folder(folder)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)


def _on_main(accelerator: Accelerator, folder: Path, action: Callable[[], None]) -> None:
    _together(accelerator, folder, action if accelerator.is_main_process else lambda: None)


def _together(accelerator: Accelerator, folder: Path, action: Callable[[], None]) -> None:
    """Each process' `action`; where it fails on one, all raise, so that none waits for it."""
    failure = None
    try:
        action()
    except _WRITE_ERRORS as error:
        failure = error
    failures = [told for told in gather_object([failure and _reason(failure)]) if told is not None]
    if failures:
        if accelerator.is_main_process:
            shutil.rmtree(growing_folder(folder), ignore_errors=True)
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / _MB
        raise NotSavedError(
            f"{folder} could not be written ({failures[0]}); {free:.1f} MB are free on that disk"
        ) from failure


def _reason(failure: BaseException) -> str:
    """In one line; of a checkpoint that several processes wrote, what the first of them says that failed."""
    if isinstance(failure, CheckpointException) and failure.failures:
        failure = next(iter(failure.failures.values()))[0]
    return " ".join(str(failure).split())


def write_manifest(folder: Path) -> None:
    """Lists the files of `folder` with their sizes and hashes, by which [`find_damage`] knows them again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    replace_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path) -> str | None:
    """What about a checkpoint is not as it was written; None when it is whole. Reads all of it, some 1.3 GB a second."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, told in files.items():
            size = (folder / name).stat().st_size
            if size != told["bytes"]:
                return f"{name} has {size} bytes, {told['bytes']} were written"
            if file_sha256(folder / name) != told["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_state(accelerator: Accelerator, run_folder: Path, step: int, keep: int) -> None:
    """
    Everything a resumed run needs (weights, optimizer, schedule, random states, position), the newest `keep` kept.

    Raises:
        [`NotSavedError`]: says which checkpoint is the last one.
    """
    folder = run_folder / CHECKPOINTS / f"step-{step:08d}"
    try:
        replace_folder(accelerator, folder, lambda growing: accelerator.save_state(str(growing)), write_manifest)
    except NotSavedError as error:
        last = newest_checkpoint(run_folder)
        whole = f"the last checkpoint, {last}, is whole" if last else "there is no checkpoint yet"
        raise NotSavedError(f"{error}; {whole}. Make room and go on with --resume.") from error
    if accelerator.is_main_process:
        for old in _steps(run_folder)[:-keep]:
            gone = old.with_name(f".{old.name}.gone")  # by rename too: never half a folder of that name
            shutil.rmtree(gone, ignore_errors=True)
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load_newest_state(accelerator: Accelerator, run_folder: Path, say: Callable[[str], None] = print) -> bool:
    """
    Restores the newest checkpoint that is whole; False when there is none at all.

    Damaged ones are named by `say` on the main process and set aside as damaged-step-*.

    Raises:
        `ValueError`: when there are checkpoints and all are damaged.
    """
    told = [None, None]
    if accelerator.is_main_process:
        clean_up(run_folder)
        told = [*_newest_whole(run_folder, say)]
    folder, problem = broadcast_object_list(told)
    if problem is not None:
        raise ValueError(problem)
    if folder is not None:
        check_checkpoint(accelerator, Path(folder))
        accelerator.load_state(folder)
    return folder is not None


def _newest_whole(run_folder: Path, say: Callable[[str], None]) -> tuple[str | None, str | None]:
    """The folder, or None, and why there is none although there should be."""
    steps = _steps(run_folder)
    for folder in reversed(steps):
        damage = find_damage(folder)
        if damage is None:
            return str(folder), None
        aside = folder.with_name(DAMAGED + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        say(f"{folder} is damaged ({damage}); set aside as {aside.name}")
    if steps:
        return None, (
            f"All {len(steps)} checkpoints in {run_folder / CHECKPOINTS} were damaged and are set aside as {DAMAGED}*; "
            "give the command again to start at step 0."
        )
    return None, None


def clean_up(run_folder: Path) -> None:
    """What a killed run left unfinished: half a folder goes, a folder whose successor was not yet in place returns."""
    for place in (run_folder, run_folder / CHECKPOINTS):
        for path in (*place.glob(f".*.{PARTIAL}"), *place.glob(".*.gone")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        for old in place.glob(f".*.{OLD}"):
            restore_folder(place / old.name.removeprefix(".").removesuffix(f".{OLD}"))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The folder that a resumed run would look at first."""
    return next(reversed(_steps(run_folder)), None)


def _steps(run_folder: Path) -> list[Path]:
    return sorted((run_folder / CHECKPOINTS).glob("step-*"))


def save_model(accelerator: Accelerator, model: LRSCLIPModel, processor: LRSCLIPProcessor, folder: Path) -> None:
    """A folder for `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained`, the code beside the weights."""

    whole = whole_model(accelerator, model)

    def write(growing: Path) -> None:
        if whole is not None:
            whole.save_pretrained(growing)
            processor.save_pretrained(growing)

    replace_folder(accelerator, folder, write)
