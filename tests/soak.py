"""
Kills training runs at random moments, resumes them, and compares what comes out with a run that was left alone.

    python -m tests.soak [--kills 20] [--seed 0] [--output DIR]

Weights, losses and the samples of every batch must be equal to the bit, with one process and two, in memory and
streaming. Some kills wait for a folder to be half written. Ends with a table and exit code 0 if all were equal.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


ROOT = Path(__file__).parents[1]
PAIRS, STEPS, SAVE_EVERY = 60, 120, 6
MISSED = 5  # kills that may come too late for a run
LONGEST = 300  # seconds an attempt may take before something hangs
HALF_WRITTEN = {"checkpoint": "checkpoints/.step-*.partial", "model": ".*.partial"}  # what a kill waits for
WIDTH = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2"


@dataclass
class Kill:
    """
    When and whom.

    `moment`: "time", or the kind of half-written folder to wait for; `after`: seconds from the start until then or
    until the waiting begins; `into`: seconds more once it is there; `victim`: "all" processes, the "launcher" or one
    "rank"; `step`: which must be in the log before.
    """

    moment: str
    after: float
    into: float
    victim: str
    step: int = 0


def plan_kill(rng: random.Random, seconds: float, processes: int) -> Kill:
    """A kill of a run that takes `seconds`."""
    moment = rng.choice(["time", "time", "checkpoint", "model"])
    victim = rng.choice(["all", "all", "rank", "launcher"]) if processes > 1 else "all"
    return Kill(moment, rng.uniform(0, seconds), rng.uniform(0, 0.03), victim)


def make_data(folder: Path, pairs: int = PAIRS) -> Path:
    """Pictures of noise with two captions each, in three parquet shards' worth of rows; returns the caption file."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for index in range(pairs):
        Image.fromarray(rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        long_text = f"Field {index} lies in the north. The roof is grey. A road with {index} cars passes. " * 2
        lines.append({"image": f"{index}.png", "long_text": long_text.strip(), "short_text": f"Field {index}."})
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_arguments(captions: Path, folder: Path, steps: int = STEPS, save_every: int = SAVE_EVERY) -> list[str]:
    """The command line of a small run that saves and validates often and logs the samples of each batch."""
    options = {
        "output_dir": folder,
        "data.train": captions,
        "data.validation": captions,
        "data.validation_pairs": 16,
        "data.shuffle_sentences": "true",
        "model.init": "scratch",
        "model.tokenizer": "train",
        "model.vocab_size": 600,
        "model.text": f"{{{WIDTH}}}",
        "model.vision": f"{{{WIDTH}, image_size: 32, patch_size: 8}}",
        "model.projection_dim": 24,
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "optim.max_grad_norm": 1.0,
        "loop.batch_size": 8,
        "loop.steps": steps,
        "loop.log_every": 1,
        "loop.log_ids": "true",
        "loop.save_every": save_every,
        "loop.validate_every": 5 * save_every,
        "precision": "fp32",
        "resume": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class Attempt:
    """A run that was started or resumed by the command that a user gives: `torchrun` for several processes."""

    def __init__(self, arguments: list[str], processes: int, log: Path):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "training.train", *arguments]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("a") as output:
            self.process = psutil.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def everybody(self) -> list[psutil.Process]:
        """The launcher first, if there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return [self.process]

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(LONGEST)


def kill_at(attempt: Attempt, kill: Kill, folder: Path) -> bool:
    """Waits for the moment and kills; False when the run was done before it came."""
    began, pattern = time.monotonic(), HALF_WRITTEN.get(kill.moment)
    while (
        time.monotonic() - began < kill.after
        or (kill.step and not has_reached(folder, kill.step))
        or (pattern and not any(folder.glob(pattern)))
    ):
        if not attempt.is_running():
            return False
        assert time.monotonic() - began < LONGEST, f"nothing to kill for {LONGEST} seconds"
        time.sleep(0.001)
    time.sleep(kill.into)
    everybody = attempt.everybody()
    for victim in {"all": everybody, "launcher": everybody[:1], "rank": everybody[-1:]}[kill.victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    _, alive = psutil.wait_procs(everybody, timeout=LONGEST)  # the others notice, and end by themselves
    assert not alive, f"{alive} outlived the kill"
    return True


def has_reached(folder: Path, step: int) -> bool:
    """Whether a step is in the log."""
    path = folder / "log.jsonl"
    return path.exists() and f'"kind": "train", "step": {step},' in path.read_text()


def results_of(folder: Path) -> tuple[str, dict[int, dict], dict[int, list[str]]]:
    """SHA-256 of the final weights, losses by step, and sample ids of each batch by step."""
    weights = folder / "final/model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
    losses, batches = {}, {}
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        entry = json.loads(line) if line.endswith("\n") else {"kind": None}  # a kill may fall into the last one
        if entry["kind"] == "batch":
            batches[entry["step"]] = entry["ids"]
        elif entry["kind"] == "train":
            losses[entry["step"]] = {
                name: entry[name] for name in ("loss", "long_loss", "short_loss", "gradient_norm")
            }
    return digest, losses, batches


def differences(folder: Path, reference: Path, done: bool) -> list[str]:
    """In what a run, killed or done, is not the run that was left alone."""
    digest, losses, batches = results_of(folder)
    expected_digest, expected_losses, expected_batches = results_of(reference)
    assert all(expected_batches.values()), "the batches carry no sample ids"
    samples = [step for step, ids in batches.items() if ids != expected_batches[step]]
    values = [step for step, figures in losses.items() if figures != expected_losses[step]]
    mismatches = [f"the samples from step {samples[0]}"] if samples else []
    mismatches += [f"the losses from step {values[0]}"] if values else []
    if done:
        mismatches += [] if digest == expected_digest else ["the final weights"]
        mismatches += [] if batches.keys() == expected_batches.keys() else ["the steps in the log"]
    return mismatches


def state_of(folder: Path) -> str:
    """What a kill left behind, in words."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    half = [path.name for path in (*folder.glob(".*.*"), *(folder / "checkpoints").glob(".*")) if path.is_dir()]
    return f"step {max(results_of(folder)[1], default=0)}, {names[-1] if names else 'no checkpoint'}" + "".join(
        f", {name}" for name in half
    )


def leave_alone(starter: Callable[[Path], Attempt], reference: Path) -> float:
    """The run that the killed ones are compared with; returns the seconds it took."""
    began = time.monotonic()
    assert starter(reference).wait() == 0, "the run that was left alone failed"
    return time.monotonic() - began


def survive(
    starter: Callable[[Path], Attempt],
    reference: Path,
    kills: list[Kill],
    say: Callable[[str], None] = print,
) -> list[str]:
    """
    Kills and resumes a run, and when it is done the next one, until all `kills` are dealt; returns what differed from
    the run in `reference`.

    Args:
        starter: starts, or resumes, a run in a folder.
    """
    mismatches, run, left = [], 0, list(kills)
    while run <= len(kills) + MISSED:
        folder = reference.with_name(f"killed-{run}")
        attempt = starter(folder)
        if left and kill_at(attempt, left[0], folder):
            kill, wrong = left.pop(0), differences(folder, reference, done=False)
            mismatches += wrong
            say(
                f"{len(kills) - len(left):4d}  {kill.moment:10s}  {kill.victim:8s}  {kill.after:6.2f} s  "
                f"{state_of(folder):60s}  {'; '.join(wrong) or 'equal so far'}"
            )
            continue
        assert attempt.wait() == 0, f"a resumed run failed, see {folder.parent}"
        wrong = differences(folder, reference, done=True)
        mismatches += wrong
        say(f"done  weights {results_of(folder)[0][:16]}: {'; '.join(wrong) or 'equal to the bit'}")
        run += 1
        if not left:
            return mismatches
        left[0] = replace(left[0], moment="time", after=left[0].after / 2)  # it came too late
    raise AssertionError(f"{len(left)} kills never met a run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="kept, with the output of all runs; a temporary folder by default")
    options = parser.parse_args()
    output = options.output or Path(tempfile.mkdtemp(prefix="soak-"))
    captions, rng, mismatches = make_data(output / "data"), random.Random(options.seed), []
    scenarios = [(processes, streaming) for streaming in (False, True) for processes in (1, 2)]
    for index, (processes, streaming) in enumerate(scenarios):
        count = options.kills * (index + 1) // len(scenarios) - options.kills * index // len(scenarios)
        name = f"{processes} process{'es' * (processes > 1)}, {'streaming' if streaming else 'in memory'}"
        folder = output / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir()
        more = ["--data.streaming", "true", "--data.shuffle_buffer", "16"] if streaming else []

        def starter(run: Path, more=more, processes=processes, log=folder / "output.log") -> Attempt:
            return Attempt([*run_arguments(captions, run), *more], processes, log)

        seconds = leave_alone(starter, folder / "left-alone")
        print(f"\n{name}: left alone {seconds:.0f} s, weights {results_of(folder / 'left-alone')[0][:16]}")
        print("kill  moment      victim       after  left behind", flush=True)
        kills = [plan_kill(rng, seconds, processes) for _ in range(count)]
        mismatches += survive(starter, folder / "left-alone", kills, partial(print, flush=True))
    if not options.output:
        shutil.rmtree(output, ignore_errors=True)
    print(f"\n{options.kills} kills, {len(mismatches)} differences")
    raise SystemExit(bool(mismatches))


if __name__ == "__main__":
    main()
