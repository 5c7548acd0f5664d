# SPDX-License-Identifier: Apache-2.0
"""LRSCLIP for transformers. Importing it makes the Auto classes know `model_type` `lrsclip`."""

import sys
from pathlib import Path


ROOMS = ("evaluation", "geosearch", "model_cards", "modeling_lrsclip", "training")  # folders that hold commands
__version__ = "0.1.0"


def _is_help_of_a_command() -> bool:
    """Whether this process only prints the help of a command of this project, not of a program that has a `-h` too."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    program = Path(sys.argv[0])
    package = sys.modules.get(module.partition(".")[0])
    folders = {Path(folder).resolve() for folder in (*getattr(package, "__path__", ()), program.parent)}
    ours = folders & {Path(__file__).resolve().parents[1] / room for room in ROOMS}
    console = program.name.startswith(("lrsclip-", "geosearch"))
    return bool({"-h", "--help"} & set(sys.argv[1:]) and (ours or console))


if not _is_help_of_a_command():  # which is shown without these seconds of imports
    from .auto_classes import *  # noqa: F403
    from .auto_classes import __all__  # noqa: F401
