"""Console commands for the rooms that are run from a clone: `lrsclip-train` and `lrsclip-evaluate` work from any folder."""

import importlib
import sys
from pathlib import Path


CLONE = Path(__file__).resolve().parents[1]  # where an editable installation finds this package


def train() -> int | None:
    """Run `python -m training.train`, in one process."""
    return _run("lrsclip-train", "training.train")


def evaluate() -> int | None:
    """Run `python -m evaluation.run`, in one process."""
    return _run("lrsclip-evaluate", "evaluation.run")


def _run(command: str, module: str) -> int | None:
    if not (CLONE / f"{module.replace('.', '/')}.py").is_file():
        raise SystemExit(
            f"error: {command} is run from a clone; install it there with pip install -e '.[train,eval]'."
        )
    sys.path.insert(0, str(CLONE))
    return importlib.import_module(module).main()
