"""
A run's folder: whether this run may have it, that no other has it at the same time, and `run.json`: what a model was
trained on and how, beside its weights, for its card and for whoever repeats the run.
"""

import datetime
import importlib.metadata
import math
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from modeling_lrsclip import LRSCLIPModel
from modeling_lrsclip.encoding.imagery import survey_lines
from modeling_lrsclip.files.atomic import make_folder, replace_json, replace_text
from modeling_lrsclip.files.configuration import read_yaml
from modeling_lrsclip.files.documents import read_json
from modeling_lrsclip.files.hashing import weights_sha256
from modeling_lrsclip.published.registry import MODELS

from .checkpoint import TrainState
from .config import PushConfig
from .model import SCRATCH, full_name


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


LOCK, CONFIG, RECORD = ".lock", "config.yaml", "run.json"
SCHEMA_VERSION = 1  # of run.json
VERSIONS_OF = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pillow", "numpy")
# What a resumed run may have otherwise than the run before it: where it is, how often it logs, validates and saves, who
# reads its data and how much of them may be unusable.
FREE = {"resume", "allow_changed_data", "output_dir", "push_to_hub"}
FREE |= {f"push.{field.name}" for field in fields(PushConfig)}
FREE |= {f"data.{name}" for name in ("workers", "prefetch_factor", "max_skipped_fraction")}
FREE |= {f"loop.{name}" for name in ("log_every", "log_ids", "trackers", "validate_every", "patience")}
FREE |= {f"loop.{name}" for name in ("save_every", "keep_checkpoints")}
LENGTHS = ("loop.steps", "loop.epochs")  # may become more


def check_run_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """
    Check that a run may have a folder; how often to log, validate and save may change when it is resumed, and it may
    become longer.

    Args:
        folder: may not exist yet.
        config: the run's configuration as nested dictionaries.
        resume: whether to go on with what is there.

    Raises:
        `ValueError`: when the folder holds a run and this one would overwrite it, or would go on with it under another
            configuration.
    """
    if not (folder / CONFIG).exists():
        return
    if not resume:
        raise ValueError(f"{folder} holds a run already; go on with it by --resume, or set another output_dir.")
    values = read_yaml(folder / CONFIG)
    if not values:
        raise ValueError(f"{folder / CONFIG} is empty; write back what it was, or set another output_dir.")
    before, now = flatten(values), flatten(config)
    changes = []
    for name in now | before:
        longer = name in LENGTHS and (now.get(name) or 0) > (before.get(name) or math.inf)
        if name not in FREE and before.get(name) != now.get(name) and not longer:
            changes.append(f"{name} was {before.get(name)!r} and is {now.get(name)!r}")
    if changes:
        raise ValueError(
            f"{folder} cannot be resumed with another configuration: {', '.join(changes)}; set another output_dir."
        )


def flatten(values: dict, prefix: str = "") -> dict:
    """Name the fields of nested sections with dots between."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name not in ("text", "vision")
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """
    Keep other runs out of `folder`, which is made, until this process leaves or ends, however it ends. Only the first
    process of a run needs it. Does nothing where the file system or Windows has no such locks.

    Raises:
        `ValueError`: when another run has it.
    """
    make_folder(folder)
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


# ----------------------------------------------------------------------------------------------------------- run.json


def versions() -> dict[str, str]:
    """Look up the versions of Python and of the libraries that have a say in the weights."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the clone that `folder` lies in, and whether tracked files differ from it; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)}


def describe_source(name: str) -> dict[str, str]:
    """Name of a model or a data set, and whether it is on this machine or on the Hub."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return {"name": name, "kind": "hub" if on_hub else "local"}


def describe_init(init: str) -> dict[str, str]:
    """Name of the model that a run started from; a published one by where it is published."""
    model = None if Path(init).exists() else MODELS.get(full_name(init).lower())
    return describe_source((model and (model.repo or model.url)) or init)


def describe_data(sources: str | list[dict[str, Any]]) -> dict[str, Any]:
    """
    Name of a run's data, and where they are.

    Args:
        sources: a name, or dictionaries with a `path` and maybe a `weight`. Several are on the Hub if all of them are.

    Returns:
        `name` and `kind` ("hub" or "local"), and of several all of them under `sources`.
    """
    if isinstance(sources, str):
        return describe_source(sources)
    each = [describe_source(source["path"]) | {"weight": source["weight"]} for source in sources]
    kind = "hub" if all(source["kind"] == "hub" for source in each) else "local"
    return {"name": ", ".join(source["name"] for source in each), "kind": kind, "sources": each}


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """
    Read the record in a model folder, if it has one.

    Raises:
        `ValueError`: for a file that is cut off or holds something else.
    """
    path = Path(folder) / RECORD
    return read_json(path, "remove it, or put back what the run wrote") if path.is_file() else None


@dataclass
class RunRecord:
    """Writes `run.json` into a run folder when the run starts or goes on, and beside the weights of its models."""

    folder: Path  # of the run
    config: dict[str, Any]  # the run's, as nested dictionaries
    accelerator: Accelerator  # what it computes on
    steps: int  # of the whole run
    data: dict[str, Any]  # what the training data are, see `data.inspection.inspect_pairs`
    validation_pairs: int | None  # rows that are validated on, None for none

    def __post_init__(self):
        self.init_run = read_record(self.config["model"]["init"])  # the run must not fail at its end for it

    def introduce(self, model: LRSCLIPModel, seen: set[str]) -> None:
        """
        Print what is trained on what, and how long the texts are against the model's table.

        Args:
            model: at the start of the run.
            seen: files or data sets that are both trained on and validated on.
        """
        positions = model.config.text_config.max_position_embeddings
        parameters, machine = sum(parameter.numel() for parameter in model.parameters()) / 1e6, self.accelerator
        print(
            f"{parameters:.1f} M parameters, {positions} text positions; {self.data['pairs']} pairs, {self.steps} steps of "
            f"{self.config['loop']['batch_size']} on {machine.num_processes} x {machine.device.type}, "
            f"{machine.mixed_precision.replace('no', 'fp32')}"
        )
        for location in sorted(seen):
            print(f"note: validation is on the training pairs themselves ({location}), so its recall is not held out")
        for column, lengths in self.data["captions"].items():
            print(
                f"{column}: {lengths['mean_tokens']:.0f} tokens on average, {lengths['share_truncated']:.0%} longer than "
                f"{positions} and cut"
            )
        warnings = [f"warning: {text}" for text in self.data["warnings"]]
        for line in (*warnings, *survey_lines(self.data["imagery"], "data.train")):
            print(line)

    def start(self, step: int, changed_data: list[str]) -> None:
        """
        Write `config.yaml`, and add a start of the run, or a resumption after `step`, to `run.json`; with `changed_data`,
        if they are others than before.
        """
        replace_text(self.folder / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
        record = read_record(self.folder) or {"schema_version": SCHEMA_VERSION}
        start = {"step": step} | self._machine() | ({"changed_data": changed_data} if changed_data else {})
        replace_json(self.folder / RECORD, record | {"starts": [*record.get("starts", []), start]})

    def finish(self, state: TrainState) -> None:
        """Write the whole record into the run folder and beside the weights of `final` and `best`."""
        best = self.folder / "best"
        if self.validation_pairs and best.exists():
            self.describe_model(best, state, state.best_step)
        elif self.validation_pairs:
            print(f"note: {best} of step {state.best_step} is no longer there, so it has no record")
        replace_json(self.folder / RECORD, self.describe_model(self.folder / "final", state, state.step))

    def describe_model(self, folder: Path, state: TrainState, step: int) -> dict[str, Any]:
        """
        Write the record beside the weights of a model folder.

        Args:
            folder: of the model.
            state: how far the run is.
            step: of these weights.

        Returns:
            the record, with their hash.
        """
        weights = weights_sha256(sorted(LRSCLIPModel.from_pretrained(folder).state_dict().items()))
        init, data, measured = self.config["model"]["init"], self.config["data"], self.validation_pairs
        share = data["validation"] if isinstance(data["validation"], float) else None
        held_out = measured and describe_data(data["train"] if share else data["validation"])
        record = self._machine() | {
            "schema_version": SCHEMA_VERSION,
            "starts": (read_record(self.folder) or {}).get("starts", []),
            "init": describe_init(init) if init != SCRATCH else None,
            "init_run": self.init_run,
            "data": describe_data(data["train"]) | self.data,
            "validation": measured and held_out | ({"share": share} if share else {}) | {"pairs": measured},
            "best": measured and {"step": state.best_step, "mR": state.best_recall},
            "steps": self.steps,
            "seconds": state.seconds,
            "config": self.config,
            "weights": {"step": step, "sha256": weights},
        }
        replace_json(folder / RECORD, record)
        return record

    def _machine(self) -> dict[str, Any]:
        """The time now, and what the run computes on and with."""
        device = self.accelerator.device.type
        return {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "precision": self.accelerator.mixed_precision.replace("no", "fp32"),
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
        }
