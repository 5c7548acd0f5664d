# SPDX-License-Identifier: Apache-2.0
"""LRSCLIP for transformers. Importing it makes the Auto classes know `model_type` `lrsclip`."""

import sys
from importlib import import_module
from typing import Any


__version__ = "0.1.0"

__all__ = [
    "LRSCLIPConfig",
    "LRSCLIPImageProcessor",
    "LRSCLIPModel",
    "LRSCLIPOutput",
    "LRSCLIPProcessor",
    "LRSCLIPTextConfig",
    "LRSCLIPTextModelWithProjection",
    "LRSCLIPVisionConfig",
    "LRSCLIPVisionModelWithProjection",
    "stretch_position_embedding",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".auto_classes", __name__), name)


if not {"-h", "--help"} & set(sys.argv[1:]):  # the help of a command is shown without these seconds of imports
    from . import auto_classes  # noqa: F401
