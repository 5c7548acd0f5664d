"""
Parts that the commands of all rooms share, and the console commands for the rooms that are run from a clone:
`lrsclip-train` and `lrsclip-evaluate` work from any folder.
"""

import argparse
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec


Arguments = ParamSpec("Arguments")
DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"  # of published files, which bring none
CLONE = Path(__file__).resolve().parents[1]  # where an editable installation finds this package


def command_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser that shows `description` with its own line breaks."""
    return argparse.ArgumentParser(prog, None, description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command(
    status: int = 2, interrupted: str = "interrupted"
) -> Callable[[Callable[Arguments, int | None]], Callable[Arguments, int]]:
    """
    Decorate the function of a command: what goes wrong is one sentence on standard error and an exit status.

    Args:
        status: exit status for `ValueError` and `OSError`; any exception with an `exit_status` has its own.
        interrupted: the sentence for Ctrl-C, which ends with status 130, as shells count it.

    Returns:
        A decorator of functions that return an exit status, or None for 0.
    """

    def decorate(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def run(*args: Arguments.args, **options: Arguments.kwargs) -> int:
            try:
                return main(*args, **options) or 0
            except Exception as error:
                if not isinstance(error, (ValueError, OSError)) and not hasattr(error, "exit_status"):
                    raise  # a fault of this project, which its traceback tells
                print(f"error: {error}", file=sys.stderr)
                return getattr(error, "exit_status", status)
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130

        return run

    return decorate


def say_once_that_the_hub_is_away() -> None:
    """Have huggingface_hub say once, not with two lines a retry, that it waits for the Hub."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if not any(isinstance(known, _FirstRetry) for known in logger.filters):
        logger.addFilter(_FirstRetry())


class _FirstRetry(logging.Filter):
    """Passes the first line about a request that failed and is tried again, in other words."""

    def __init__(self):
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" not in text:
            return not text.startswith("Retrying in ")
        if self.said:
            return False
        self.said = True
        request = text.split(" thrown")[0]
        record.msg, record.args = f"The Hub does not answer; trying again for half a minute ({request}).", ()
        return True


def train() -> int | None:
    """Run `python -m training.train`, in one process."""
    return _run("lrsclip-train", "training.train")


def evaluate() -> int | None:
    """Run `python -m evaluation.run`, in one process."""
    return _run("lrsclip-evaluate", "evaluation.run")


def _run(command: str, module: str) -> int | None:
    if not (CLONE / f"{module.replace('.', '/')}.py").is_file():
        advice = "install it there with pip install -e '.[train,eval]'"
        raise SystemExit(f"error: {command} is run from a clone; {advice}.")
    sys.path.insert(0, str(CLONE))
    return importlib.import_module(module).main()
