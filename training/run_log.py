"""The log of a run: progress bar, `log.jsonl`, trackers (TensorBoard, trackio, Weights & Biases), curves."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from modeling_lrsclip.files.atomic import replace_text, replacing
from modeling_lrsclip.files.hashing import bytes_sha256

from .checkpoint import TrainState
from .distributed import gather
from .losses import DualTextLoss
from .run_folder import read_record


LOG, CURVES = "log.jsonl", "curves.png"  # below a run folder
LOSSES = {"loss": "#22303c", "long_loss": "#1769aa", "short_loss": "#d1603d"}  # colours of the curves
RECALLS = {"mR": "#22303c", "long_mR": "#1769aa", "short_mR": "#d1603d"}
_GIB = 2**30


class RunLog:
    """
    Lines of `log.jsonl` have a `kind` (train, validation, batch), a `step` and numbers; the trackers get the same.

    Args:
        accelerator: made with `log_with` naming the trackers.
        folder: the run folder.
        steps: of the whole run.
        batch_size: pairs a step.
        log_ids: whether each batch's sample ids are written too.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, batch_size: int, log_ids: bool = False):
        self.accelerator, self.folder, self.steps, self.batch_size = accelerator, folder, steps, batch_size
        self.log_ids, self.path, self.bar = log_ids, folder / LOG, None
        self.counts = Counter()  # of this process since the last line, which says those of all processes together
        self.since = (0, 0.0)  # step and seconds of that line
        self.drawn = 0  # bytes of the log that the curves show

    @contextmanager
    def running(self, state: TrainState) -> Iterator[None]:
        """Take up the log where `state` stands, with the progress bar on the main process."""
        self._rewind(state)
        self.since = (state.step, state.seconds)
        name, begun = self.folder.resolve().name, (read_record(str(self.folder)) or {}).get("starts", [{}])[0]
        identity = bytes_sha256(f"{name} {begun.get('created')}")[:16]  # kept when resumed
        options = {
            "tensorboard": {"purge_step": state.step + 1},
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"id": identity, "name": name, "dir": str(self.folder), "resume": "allow"},
        }
        self.accelerator.init_trackers("lrsclip", init_kwargs=options)
        looks = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5}
        silent = not self.accelerator.is_main_process
        with tqdm(desc="training", total=self.steps, initial=state.step, disable=silent, **looks) as self.bar:
            yield

    def _rewind(self, state: TrainState) -> None:
        """Take out of `log.jsonl` what a killed run wrote after the checkpoint that it goes on from."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # else the kill fell into it
        ends = [state.validated if record["kind"] == "validation" else state.step for record in records]
        kept = [line for line, record, end in zip(lines, records, ends) if record["step"] <= end]
        replace_text(self.path, "".join(kept))

    def say(self, text: str) -> None:
        """Print a line past the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def batch(self, step: int, ids: list[str]) -> None:
        """Log the sample ids of this process' share of the batch, where that was asked for."""
        if self.log_ids:
            self._append({"kind": "batch", "step": step, "ids": gather_object(ids)})

    def losses(self, state: TrainState, losses: DualTextLoss, numbers: dict[str, Any], write: bool) -> None:
        """
        Show one step's losses and, if `write`, log them with its speed.

        Args:
            state: after the step.
            losses: of the global batch.
            numbers: what else is known of the step.
            write: whether to write a line; numbers are read off the device only then. Every process must give the same.
        """
        self.bar.update()
        if not write:
            return
        parts = {name: value.item() for name, value in losses._asdict().items() if value is not None}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in parts.items()}, refresh=False)
        numbers = parts | {name: float(value) for name, value in numbers.items()}
        progress = {"skipped": state.skipped, "seconds": state.seconds}
        self._write("train", state.step, numbers | self._totals(state) | progress)

    def _totals(self, state: TrainState) -> dict[str, float]:
        """Sum the counts of all processes since the last line; peak memory is that of the process with most, since its start."""
        step, seconds = self.since
        self.since = (state.step, state.seconds)
        names = sorted(self.counts)
        mine = torch.tensor([*(self.counts[name] for name in names), peak_memory(self.accelerator.device)])
        counts = gather(mine.to(self.accelerator.device)[None]).cpu()  # (W, counts + 1)
        self.counts = Counter(dict.fromkeys(names, 0))
        rate = self.batch_size * (state.step - step) / max(state.seconds - seconds, 1e-9)
        totals = dict(zip(names, counts[:, :-1].sum(dim=0).tolist()))
        return {"samples_per_second": rate} | totals | {"peak_memory_gib": counts[:, -1].max().item() / _GIB}

    def validation(self, state: TrainState, numbers: dict[str, float]) -> None:
        """Say and log recall, in percent by name, and draw the curves anew."""
        shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items() if "mR" in name or "R@1" in name)
        self.say(f"step {state.step}: validation {shown}")
        self._write("validation", state.step, numbers)
        self.draw()

    def draw(self) -> Path | None:
        """Draw the curves of the log so far, on the main process, unless they show all of it already."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return None
        size = self.path.stat().st_size
        if size != self.drawn:
            draw_curves([json.loads(line) for line in self.path.read_text().splitlines()], self.folder / CURVES)
            self.drawn = size
        return self.folder / CURVES

    def _write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.accelerator.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)
        self._append({"kind": kind, "step": step} | numbers)

    def _append(self, record: dict) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as log:
                log.write(json.dumps(record) + "\n")


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, in bytes: what was allocated on a CUDA device, elsewhere the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def draw_curves(records: list[dict], path: Path) -> Path:
    """
    Draw a PNG of the losses and, where there are any, of the validations; drawn from `log.jsonl` alone, so that a
    resumed run's is whole.

    Args:
        records: the log's lines.
        path: replaced in one step.

    Returns:
        `path`.
    """
    validations = [record for record in records if record["kind"] == "validation"]
    figure = Figure(figsize=(11 if validations else 6, 4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if validations else 1, squeeze=False)[0]
    _draw(axes[0], [record for record in records if record["kind"] == "train"], LOSSES, "loss")
    if len(validations) == 1:
        _draw_bars(axes[1], validations[0], RECALLS, "recall on held-out pairs, %")
    elif validations:
        _draw(axes[1], validations, RECALLS, "recall on held-out pairs, %", marker="o")
    with replacing(path) as growing:
        figure.savefig(growing, format="png")
    return path


def _draw(axes: Axes, records: list[dict], colours: dict[str, str], label: str, marker: str | None = None) -> None:
    for name, colour in colours.items():
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points), color=colour, linewidth=1.4, marker=marker, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.grid(color="#d9dfe5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if records:
        axes.legend(frameon=False)


def _draw_bars(axes: Axes, record: dict, colours: dict[str, str], label: str) -> None:
    """Draw a single validation as bars, since it makes no curve."""
    shown = {name: colour for name, colour in colours.items() if name in record}
    bars = axes.barh(list(shown), [record[name] for name in shown], color=list(shown.values()), height=0.5)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set(xlim=(0, 103), xlabel=f"{label}, at step {record['step']}")
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
