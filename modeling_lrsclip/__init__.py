# SPDX-License-Identifier: Apache-2.0
"""LRSCLIP for transformers. Importing it makes the Auto classes know `model_type` `lrsclip`."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


ROOMS = ("evaluation", "geosearch", "modeling_lrsclip", "training")  # packages that hold commands
FILES = "model_cards"  # the folder whose commands are files
SCRIPTS = ("lrsclip-convert", "lrsclip-evaluate", "lrsclip-train", "geosearch")  # as setup.py names them
__version__ = "0.1.0"


def _runs_a_command() -> bool:
    """Whether this process runs a command of this project, which imports the model where it comes to need one."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    program = Path(sys.argv[0])
    clone, name = Path(__file__).resolve().parents[1], module.partition(".")[0]
    folders = [Path(folder).resolve() for folder in getattr(sys.modules.get(name), "__path__", ())]
    package, file = name in ROOMS and clone / name in folders, program.resolve().parent == clone / FILES
    return package or file or program.stem in SCRIPTS


def __getattr__(name: str) -> Any:
    """Import the model for a command, at the first of its names."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".auto_classes", __name__), name)


if not _runs_a_command():  # seconds of imports, which --help and many commands go without
    from .auto_classes import *  # noqa: F403
    from .auto_classes import __all__  # noqa: F401
