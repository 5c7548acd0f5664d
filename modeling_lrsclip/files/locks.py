"""A folder or file that one process at a time works on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def only_process(lock: Path, busy: str) -> Iterator[None]:
    """
    Hold a lock for the length of the block; the system lets go of it when this process dies, however it does.

    Args:
        lock: the file that stands for what is held; its folder is there. It stays, as others may be about to lock it.
        busy: sentence for a user whose other process holds it.

    Raises:
        `ValueError`: `busy`.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(busy) from None
    try:
        yield
    finally:
        held.release()
