"""Checkpoints that appear whole or not at all: written beside their place, then renamed; each file's hash is kept."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.files.atomic import OLD, PARTIAL, growing_folder, publish_folder, replace_json, restore_folder
from modeling_lrsclip.files.hashing import file_sha256

from .distributed import MistakeError, check_checkpoint, is_sharded, runs_deepspeed, wait_for_all
from .model import has_adapters, merged


CHECKPOINTS = "checkpoints"  # below a run folder; each is named step-00000350
MANIFEST = "manifest.json"  # in a checkpoint: size in bytes and SHA-256 of every other file
STATES = (
    "states.json"  # in a checkpoint: what this package keeps beside accelerate's weights, optimizer and random states
)
TOKENIZER = "tokenizer"  # in a checkpoint: the folder of the tokenizer, where the run has trained one
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside
# Of Python, torch.save, safetensors and FSDP2's checkpoints where a disk is full; the last one is no `Exception`.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
_MB = 1e6
# All that torch's table of contents of an FSDP2 checkpoint, a pickle, is made of, beside types of numbers.
_CONTENTS_OF = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # in Python 3.13
}


@dataclass
class TrainState:
    """Progress of a run: all that, beside weights, optimizer, schedule, random states and data, a resumed run must know."""

    step: int = 0  # optimizer steps done
    best_recall: float = -1.0  # mean of long and short mR, percent
    best_step: int = 0
    validated: int = 0  # step of the last validation
    not_better: int = 0  # validations since the best one
    skipped: int = 0  # visits so far of rows that could not be used
    seconds: float = 0.0  # training time so far

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class NotSavedError(OSError):
    """A folder could not be written; what it was to replace is as it was. All processes raise it together."""


def replace_folder(
    accelerator: Accelerator, folder: Path, write: Callable[[Path], None], seal: Callable[[Path], None] | None = None
) -> None:
    """
    Have all processes `write` a folder, then the main process `seal` it, and only then give it its name.

    A crash leaves the old folder or none, never half of one: the new one grows under a name that starts with a dot,
    is flushed to disk, and replaces the old one by rename.

    Args:
        accelerator: of all processes, which must all call this.
        folder: its name when it is whole.
        write: called on every process with the folder's name while it grows.
        seal: called on the main process when all have written.

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
    """Take each process' `action`; where it fails on one, all raise, so that none waits for it."""
    failure = None
    try:
        action()
    except _WRITE_ERRORS as error:
        failure = error
    except Exception as error:
        if type(error) is not Exception:  # which is all that tokenizers say when a disk is full
            raise
        failure = error
    wait_for_all(f"{folder} was written")
    failures = [reason for reason in gather_object([failure and _reason(failure)]) if reason is not None]
    if failures:
        if accelerator.is_main_process:
            shutil.rmtree(growing_folder(folder), ignore_errors=True)
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / _MB
        raise NotSavedError(
            f"{folder} could not be written ({failures[0]}); {free:.1f} MB are free on that disk"
        ) from failure


def _reason(failure: BaseException) -> str:
    """Say in one line what failed; of a checkpoint that several processes wrote, the first one's failure."""
    if isinstance(failure, CheckpointException) and failure.failures:
        failure = next(iter(failure.failures.values()))[0]
    return " ".join(str(failure).split())


def write_manifest(folder: Path) -> None:
    """List the files of `folder` with their sizes and hashes, by which [`find_damage`] knows them again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    replace_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path) -> str | None:
    """Find what in a checkpoint is not as it was written; None when it is whole. Reads all of it, some 1.3 GB a second."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not files:
            return f"{MANIFEST} lists no file"
        for name, written in files.items():
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} bytes, {written['bytes']} were written"
            if file_sha256(folder / name) != written["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def save_state(
    accelerator: Accelerator, run_folder: Path, states: Mapping[str, Any], step: int, keep: int, tokenizer: Any = None
) -> None:
    """
    Save everything a resumed run needs.

    Args:
        accelerator: knows weights, optimizer and random states; every process must call this.
        run_folder: of the run.
        states: what else there is, as JSON has it.
        step: optimizer steps done.
        keep: checkpoints that stay, the newest ones.
        tokenizer: one that the run has trained, of which the data may be others when it is resumed.

    Raises:
        [`NotSavedError`]: says which checkpoint is the last one.
    """
    folder = run_folder / CHECKPOINTS / f"step-{step:08d}"

    def seal(growing: Path) -> None:
        replace_json(growing / STATES, states)
        if tokenizer is not None:
            tokenizer.save_pretrained(growing / TOKENIZER)
        write_manifest(growing)

    try:
        replace_folder(accelerator, folder, lambda growing: accelerator.save_state(str(growing)), seal)
    except NotSavedError as error:
        last = newest_checkpoint(run_folder)
        whole = f"the last checkpoint, {last}, is whole" if last else "there is no checkpoint yet"
        raise NotSavedError(f"{error}; {whole}. Make room and go on with --resume.") from error
    if accelerator.is_main_process:
        for old in _steps(run_folder)[:-keep]:
            gone = old.with_name(f".{old.name}.gone")  # by rename too: never half a folder of that name
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def load_newest_state(
    accelerator: Accelerator, run_folder: Path, say: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """
    Restore the newest checkpoint that is whole; damaged ones are set aside as damaged-step-*.

    Args:
        accelerator: what is restored into; every process must call this.
        run_folder: of the run.
        say: names damaged checkpoints, on the main process.

    Returns:
        the states that [`save_state`] was given; None when there is no checkpoint at all.

    Raises:
        `ValueError`: when there are checkpoints and all are damaged, and for one whose reading would run code.
    """
    outcome = [None, None]
    if accelerator.is_main_process:
        clean_up(run_folder)
        outcome = [*_newest_whole(run_folder, say)]
    wait_for_all("the first one looked through the checkpoints")
    folder, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise MistakeError(problem)
    if folder is None:
        return None
    check_checkpoint(accelerator, Path(folder))
    states = read_states(Path(folder))
    try:
        with only_numbers_unpickled(unless=runs_deepspeed(accelerator)):
            accelerator.load_state(folder)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{folder} holds a file of more than tensors and numbers, which is not read: {_reason(error)}"
        ) from error
    return states


def read_states(folder: Path) -> dict[str, Any]:
    """
    Read what this package has written into a checkpoint, and look into what torch would unpickle as it is.

    Raises:
        `ValueError`: for a checkpoint of an older version, and for a table of contents that names anything but numbers.
    """
    if not (folder / STATES).exists() or any(folder.glob("custom_checkpoint_*.pkl")):
        raise ValueError(
            f"{folder} is of an older version, whose states are pickles, which may run code and are not read; resume it "
            "with that version, or start anew from a model that it has saved (model.init)."
        )
    for path in sorted(folder.rglob(".metadata")):
        try:
            with path.open("rb") as file:
                _Contents(file).load()
        except Exception as error:  # whatever a pickle may raise that is none
            raise ValueError(f"{path} is no table of contents of a checkpoint ({error}) and is not read.") from error
    return json.loads((folder / STATES).read_text(encoding="utf-8"))


class _Contents(pickle.Unpickler):
    """Unpickles the table of contents of an FSDP2 checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_number and name not in _CONTENTS_OF.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def only_numbers_unpickled(unless: bool = False) -> Iterator[None]:
    """
    Have `torch.load` refuse all but tensors and plain values, whoever calls it and with whatever argument.

    DeepSpeed's own files hold objects of its classes: `unless` they are to be read.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if not unless:
        os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _newest_whole(run_folder: Path, say: Callable[[str], None]) -> tuple[str | None, str | None]:
    """The newest folder that is whole, or None, and why there is none although there should be."""
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
    """Remove what a killed run left unfinished; a folder whose successor was not yet in place returns."""
    for parent in (run_folder, run_folder / CHECKPOINTS):
        for path in (*parent.glob(f".*.{PARTIAL}"), *parent.glob(".*.gone")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        for old in parent.glob(f".*.{OLD}"):
            restore_folder(parent / old.name.removeprefix(".").removesuffix(f".{OLD}"))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the folder that a resumed run would look at first, if there is any."""
    return next(reversed(_steps(run_folder)), None)


def trained_tokenizer(run_folder: Path) -> Path | None:
    """Find the tokenizer that a run has trained, in the newest checkpoint that is whole and holds one."""
    folders = [folder for folder in reversed(_steps(run_folder)) if (folder / TOKENIZER).is_dir()]
    return next((folder / TOKENIZER for folder in folders if find_damage(folder) is None), None)


def _steps(run_folder: Path) -> list[Path]:
    return sorted((run_folder / CHECKPOINTS).glob("step-*"))


def save_model(accelerator: Accelerator, model: LRSCLIPModel, processor: LRSCLIPProcessor, folder: Path) -> None:
    """
    Write a folder for `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained`, the code beside the weights.

    Args:
        accelerator: every process must call this.
        model: bare, as it is trained; see [`whole_model`] for what is written.
        processor: for its inputs.
        folder: replaced in one step.

    Raises:
        [`NotSavedError`]: as [`replace_folder`].
    """
    whole = whole_model(accelerator, model)

    def write(growing: Path) -> None:
        if whole is not None:
            whole.save_pretrained(growing)
            processor.save_pretrained(growing)

    replace_folder(accelerator, folder, write)


def whole_model(accelerator: Accelerator, model: LRSCLIPModel) -> LRSCLIPModel | None:
    """
    Gather the model as it is published: not sharded, adapters merged into the weights they adapt. All processes must
    call it.

    Returns:
        on the main process, `model` itself where it is whole already, else a copy on the same device; None elsewhere.
    """
    if not has_adapters(model) and not is_sharded(accelerator):
        return model if accelerator.is_main_process else None
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not accelerator.is_main_process:
        return None
    with torch.random.fork_rng(devices=[]):  # a new model draws weights, and training must not notice
        if has_adapters(model):
            copy = merged(model, state_dict)
        else:
            copy = LRSCLIPModel._from_config(model.config, dtype=torch.float32)
            copy.load_state_dict(state_dict)
    return copy.to(accelerator.device).eval()
