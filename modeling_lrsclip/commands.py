"""Console commands for the rooms that are run from a clone: `lrsclip-train` and `lrsclip-evaluate` work from any folder."""

import importlib
import logging
import sys
from pathlib import Path


DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"  # of published files, which bring none
CLONE = Path(__file__).resolve().parents[1]  # where an editable installation finds this package


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
        record.msg, record.args = (
            f"The Hub does not answer; trying again for half a minute ({text.split(' thrown')[0]}).",
            (),
        )
        return True


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
