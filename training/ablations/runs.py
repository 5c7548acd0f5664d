"""
The training runs of an ablation: each named by all that decides its weights, trained once whichever studies share it,
gone on with after an interruption.
"""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pydantic import RootModel

from modeling_lrsclip.files.atomic import replace_text
from modeling_lrsclip.files.configuration import read_yaml, set_field, validate
from modeling_lrsclip.files.hashing import json_sha256

from ..config import TrainConfig
from ..run_folder import RECORD, read_record
from .studies import Arm


CLONE = Path(__file__).parents[2]  # where the package `training` is
PATIENCE = 300  # seconds that an interrupted run gets to save its state
POLL = 1.0  # seconds between two looks at a run's log
CAPTION_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")


@dataclass(frozen=True)
class Source:
    """Training data: `data.train`, what tells it from other data, and how many pairs, where known."""

    train: str | list[dict[str, Any]]
    identity: str
    pairs: int | None = None


@dataclass(frozen=True)
class Run:
    """Call of `training.train`: the values of its recipe, its data, and the run whose final model it starts from."""

    label: str
    values: dict[str, Any]
    source: Source
    start: "Run | None" = None

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides the weights; raises as [`checked`] for a recipe with mistakes."""
        values, start = checked(self.values, self.source.train), self.start and self.start.key
        return json_sha256({"values": values, "data": self.source.identity, "start": start}, sort_keys=True)

    @property
    def name(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.label.lower()).strip('-')}-{self.key[:10]}"

    @property
    def steps(self) -> int | None:
        """Optimizer steps to come, where the number of pairs is known."""
        loop = self.values.get("loop", {})
        if loop.get("steps"):
            return loop["steps"]
        if self.source.pairs is None or not loop.get("batch_size"):
            return None
        return max(1, round(loop.get("epochs", 1.0) * (self.source.pairs // loop["batch_size"])))

    @property
    def samples(self) -> int:
        """Pairs seen; one, where it is not known, so that runs count alike."""
        return (self.steps or 1) * (self.values["loop"]["batch_size"] if self.steps else 1)


def checked(values: dict[str, Any], train: Any) -> dict[str, Any]:
    """
    A recipe as `training.train` reads it, without its data and what is at its default, so that equal ones look equal.

    Raises:
        `ValueError`: with all of its mistakes.
    """
    config = validate(TrainConfig, with_fields(values, {"output_dir": "", "data.train": train}))
    fields = RootModel[TrainConfig](config).model_dump(mode="json", exclude_defaults=True)
    del fields["output_dir"], fields["data"]["train"]
    return fields


def with_starts(runs: Sequence[Run]) -> list[Run]:
    """Each run once, after the one that it starts from."""
    ordered: dict[str, Run] = {}
    for run in runs:
        chain = [run]
        while chain[-1].start:
            chain.append(chain[-1].start)
        ordered |= {each.key: each for each in reversed(chain) if each.key not in ordered}
    return list(ordered.values())


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Values of a recipe of `training.train`; raises `ValueError` for a file that is none."""
    return read_yaml(path, "the recipes are in training/configs/")


def with_fields(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with some fields, by dotted names, set otherwise."""
    values = copy.deepcopy(values)
    for name, value in fields.items():
        set_field(values, name, value)
    return values


def field_of(values: dict[str, Any], name: str, default: Any = None) -> Any:
    """
    Return the field of a recipe that has a dotted name, or `default` where it is not set.

    Args:
        values: nested dictionaries.
        name: with dots, such as `loss.long_weight`.
        default: in place of what is not set.

    Returns:
        The value.
    """
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return default if values is None else values


def arm_fields(arm: Arm, values: dict[str, Any]) -> dict[str, Any]:
    """
    Fields of a recipe that an arm changes. Another batch size sees as many pairs in all; a part of the data is the first
    part of one epoch's permutation, which is a random choice of pairs, each seen once.

    Raises:
        `ValueError`: for a part of the data in a recipe of more than one epoch.
    """
    fields = dict(arm.fields)
    steps, batch = field_of(values, "loop.steps"), field_of(values, "loop.batch_size", 512)
    epochs = field_of(values, "loop.epochs", 1.0)
    if steps and "loop.batch_size" in fields:
        fields["loop.steps"] = max(1, round(steps * batch / fields["loop.batch_size"]))
    if arm.share != 1:
        if epochs > 1 and not steps:
            raise ValueError(
                f"the study subset_size shows each pair once, as the paper does, and the recipe has loop.epochs "
                f"{epochs:g}; add --set loop.epochs=1."
            )
        fields |= {"loop.steps": max(1, round(steps * arm.share))} if steps else {"loop.epochs": epochs * arm.share}
    return fields


def identify(source: str | list[dict[str, Any]]) -> str:
    """Identify a user's data: by its name, and size and time of change of its caption files."""
    if not isinstance(source, str):
        return "\n".join(f"{json.dumps(each, sort_keys=True)} {identify(str(each.get('path')))}" for each in source)
    path = Path(source)
    if not path.exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in CAPTION_FILES)
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return "\n".join([str(path.resolve()), *stamps])


def expected_seconds(runs: Sequence[Run], samples: int, seconds: float) -> float | None:
    """
    Foretell the time that runs will take.

    Args:
        runs: to come.
        samples: pairs that were seen so far.
        seconds: that these took.

    Returns:
        seconds; None before anything is known.
    """
    return sum(run.samples for run in runs) * seconds / samples if samples else None


def in_words(seconds: float) -> str:
    """Write a time as people say it."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class RunFolders:
    """
    Folders of the runs, one each, in which they are trained.

    Args:
        root: folder of the runs' folders.
        launch: words in front of `-m training.train`, for example `accelerate launch --num_processes 2`.
    """

    def __init__(self, root: Path, launch: Sequence[str]):
        self.root, self.launch = root, list(launch)

    def folder(self, run: Run) -> Path:
        return self.root / run.name

    def model(self, run: Run) -> Path:
        return self.folder(run) / "final"

    def finished(self, run: Run) -> bool:
        """`run.json` is the last that training writes."""
        return (self.folder(run) / RECORD).is_file() and (self.model(run) / "config.json").is_file()

    def train(self, run: Run, watch: Callable[[dict[str, Any]], None] = lambda entry: None) -> None:
        """
        Train a run to its end, from its newest checkpoint where it was interrupted; a finished one is left as it is.

        Args:
            watch: called now and then with the newest entry of the run's `log.jsonl`.

        Raises:
            `ValueError`: when training fails, with its last words and where the rest of them is.
            `KeyboardInterrupt`: after the run, interrupted too, had time to save its state.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{run.name}.lock"):  # another command may be at the same run
            if self.finished(run):
                return
            recipe, log = self.root / f"{run.name}.yaml", self.root / f"{run.name}.log"
            fields = {"output_dir": str(self.folder(run).resolve()), "data.train": run.source.train, "resume": True}
            fields |= {"model.init": str(self.model(run.start).resolve())} if run.start else {}
            replace_text(recipe, yaml.safe_dump(with_fields(run.values, fields), sort_keys=False))
            command = [*self.launch, "-m", "training.train", "--config", str(recipe.resolve())]
            # The clone is on Python's path, wherever the command is given.
            path = os.pathsep.join(filter(None, [str(CLONE), os.environ.get("PYTHONPATH")]))
            # In a session of its own, so that Ctrl-C reaches it once, through here.
            apart = {"env": os.environ | {"PYTHONPATH": path}, "start_new_session": True}
            with log.open("ab") as output:
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **apart)
                try:
                    while process.poll() is None:
                        if entry := _newest_entry(self.folder(run) / "log.jsonl"):
                            watch(entry)
                        time.sleep(POLL)
                finally:
                    _end(process)
            if process.returncode or not self.finished(run):
                raise ValueError(
                    f"training {run.label!r} ended with exit status {process.returncode}: {_last_words(log)} (all of it: {log}); "
                    "what is finished stays, the same command goes on from here."
                )
            shutil.rmtree(self.folder(run) / "checkpoints", ignore_errors=True)  # of use to unfinished runs only

    def seconds(self, run: Run) -> float:
        """Seconds of training, as the run recorded them."""
        return (read_record(str(self.folder(run))) or {}).get("seconds", 0.0)


class Work:
    """Trains runs, each once, and says how far it is."""

    def __init__(self, folders: RunFolders, say: Callable[[str], None], runs: Sequence[Run]):
        self.folders, self.say = folders, say
        done = [run for run in runs if folders.finished(run)]
        self.samples, self.seconds = sum(run.samples for run in done), sum(folders.seconds(run) for run in done)
        self.pending = [run for run in runs if run not in done]
        self.count = len(self.pending)
        say(f"{len(runs)} runs in all, {len(runs) - self.count} of them finished before")

    def train(self, run: Run) -> None:
        """Train a run that is not finished, and say how long it and the rest will take."""
        if run not in self.pending:
            return
        wait = expected_seconds(self.pending, self.samples, self.seconds)
        expected = f"about {in_words(wait)} to go" if wait else "no run is done yet to tell the wait from"
        self.say(f"run {self.count - len(self.pending) + 1} of {self.count}: {run.label}; {expected}")
        started, said = time.perf_counter(), wait is not None

        def watch(entry: dict[str, Any]) -> None:
            nonlocal said
            if not said and run.steps and entry["step"] >= run.steps / 10:
                said, pace = True, (entry["step"] * run.values["loop"]["batch_size"], entry["seconds"])
                whole, rest = (in_words(expected_seconds(runs, *pace)) for runs in ([run], self.pending))
                self.say(f"  step {entry['step']} of {run.steps}; this run takes about {whole}, all of them {rest}")

        self.folders.train(run, watch)
        self.pending.remove(run)
        self.samples += run.samples
        self.seconds += time.perf_counter() - started


def _newest_entry(log: Path) -> dict[str, Any] | None:
    """The last line of `log.jsonl` that tells the time; one that is being written is left out."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    entries = (json.loads(line) for line in reversed(lines) if line.endswith("\n"))
    return next((entry for entry in entries if "seconds" in entry), None)


def _end(process: subprocess.Popen) -> None:
    """Ask a run that is still there, with all its processes, to save its state and stop; waits until it has."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        os.killpg(process.pid, number)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def _last_words(log: Path) -> str:
    """Last words of a training run, without its progress bar."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("training:")]
    if "The configuration has mistakes:" in lines:
        at = len(lines) - 1 - lines[::-1].index("The configuration has mistakes:")
        return " ".join(lines[at:])
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"
