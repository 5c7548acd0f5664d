"""
A run's models to the Hub, by the project's own command (model_cards/push_to_hub.py), as one verified commit each.

A push that fails ends nothing: the reason is told, and the command that repeats it. The training's exit code is that of
the training.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import get_token

from .config import PushConfig


ROOT = Path(__file__).parents[1]  # of the clone
LONGEST_PUSH = 2 * 3600  # seconds, then it counts as failed
# What a launcher tells the processes of a run and would mislead another program.
_OF_THE_RUN = re.compile(
    r"((LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$|(ACCELERATE|FSDP|TORCHELASTIC|ROLE)_"
)


def look_for_a_token(say: Callable[[str], None]) -> None:
    """Say early, and without contacting anything, what would make every push of the run fail."""
    if get_token() is None:
        say("note: push_to_hub is set and no token is known here; log in with `hf auth login` before the run ends")


def push_command(config: PushConfig, checkpoint: Path, message: str, results: Path | None = None) -> list[str]:
    """
    The words of the command that pushes a model folder; its card has the tables of `results`, if given.

    Args:
        config: repository and its options.
        checkpoint: model folder.
        message: of the commit.
        results: `results.json`; None: not measured.

    Returns:
        Words, the interpreter first.
    """
    words = [sys.executable, str(ROOT / "model_cards" / "push_to_hub.py"), "--checkpoint", str(checkpoint.absolute())]
    words += ["--repo", config.repo, "--message", message]
    words += ["--results", str(results.absolute())] if results else []
    words += ["--license", config.license] if config.license else []
    return [*words, "--private"] if config.private else words


def measure_command(checkpoint: Path, data: str, output: Path) -> list[str]:
    """
    The words of the command that measures long and short retrieval of a model folder.

    Args:
        checkpoint: model folder.
        data: file, folder or Hub id.
        output: folder for `results.json`.

    Returns:
        Words, the interpreter first.
    """
    words = [sys.executable, "-m", "evaluation.run", "--model", str(checkpoint.absolute()), "--tasks", "zcrl,zcrs"]
    return [*words, "--data", data, "--output", str(output.absolute())]


def push(
    config: PushConfig, checkpoint: Path, step: int, say: Callable[[str], None], measured_on: str | None = None
) -> bool:
    """
    Push a model folder, on the main process only. Never raises for a push that failed.

    Args:
        config: where to, and how.
        checkpoint: as `training.checkpoint.save_model` leaves it, with its run.json.
        step: of these weights, for the commit's message.
        say: prints a line.
        measured_on: data to measure it on first, for its card.

    Returns:
        whether that went well.
    """
    results = None
    if measured_on is not None:
        output = checkpoint.parent / "results"
        measured_on = str(Path(measured_on).absolute()) if Path(measured_on).exists() else measured_on
        if not carry_out(measure_command(checkpoint, measured_on, output), "measuring", say):
            say("the model is pushed with a card that says that it was not measured yet")
        else:
            results = output / "results.json"
    command = push_command(config, checkpoint, f"{checkpoint.name} of a run, step {step}", results)
    return carry_out(command, f"pushing {checkpoint} to {config.repo}", say)


def carry_out(command: list[str], purpose: str, say: Callable[[str], None]) -> bool:
    """
    Run a command in a process of its own, and say how that went; of a failure, its last line and how to repeat it.

    Args:
        command: its words.
        purpose: of the command, for people.
        say: prints a line.

    Returns:
        whether it ended well.
    """
    try:
        others = {name: value for name, value in os.environ.items() if not _OF_THE_RUN.match(name)}
        limits = {"capture_output": True, "text": True, "timeout": LONGEST_PUSH}
        done = subprocess.run(command, cwd=ROOT, env=others, **limits)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f"it took more than {LONGEST_PUSH} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    else:
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        if done.returncode == 0:
            say(f"{purpose}: {lines[-1].strip() if lines else 'done'}")
            return True
        reason = f"exit status {done.returncode}: {lines[-1].strip() if lines else 'nothing was said'}"
    say(f"note: {purpose} failed ({reason}). Nothing of the training is lost; repeat it with\n  {shlex.join(command)}")
    return False
