# SPDX-License-Identifier: Apache-2.0
"""LRSCLIP for transformers. Importing it makes the Auto classes know `model_type` `lrsclip`."""

import sys
from pathlib import Path
from typing import Any


ROOMS = ("evaluation", "geosearch", "model_cards", "modeling_lrsclip", "training")  # folders that hold commands
__version__ = "0.1.0"


def _needs_no_model() -> bool:
    """
    Whether this process only prints the help of a command of this project, not of a program that has a `-h` too, or looks at
    the first rows of a data set that is to be built.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    program = Path(sys.argv[0])
    package = sys.modules.get(module.partition(".")[0])
    folders = {Path(folder).resolve() for folder in (*getattr(package, "__path__", ()), program.parent)}
    ours = folders & {Path(__file__).resolve().parents[1] / room for room in ROOMS}
    console = program.name.startswith(("lrsclip-", "geosearch"))
    looks = module == "training.lrs2m.build" and "--check" in sys.argv[1:]
    return bool(looks or {"-h", "--help"} & set(sys.argv[1:])) and bool(ours or console)


def __getattr__(name: str) -> Any:
    """Import what a process asks for after all of which it was not expected."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto_classes

    return getattr(auto_classes, name)


if not _needs_no_model():  # which goes without these seconds of imports
    from .auto_classes import *  # noqa: F403
    from .auto_classes import __all__  # noqa: F401
