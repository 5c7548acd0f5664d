"""The one folder below which everything is kept that can be made again."""

import os
from pathlib import Path


VARIABLE = "LRSCLIP_CACHE"


def cache_folder(name: str) -> Path:
    """`$LRSCLIP_CACHE/name`, by default `~/.cache/lrsclip/name`; it may not exist. `name` is `embeddings` or `indices`."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/lrsclip").expanduser() / name
