"""Runs that are asked to end: a signal is noted and answered after the step that it falls into, on all processes together."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import active_children
from types import FrameType

from . import FAILED
from .distributed import cpu_group, largest


SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_SIGNAL = 2.0  # seconds: a terminal and torchrun may both send the same one, which is not a second one
LONGEST_MEETING = 900  # seconds from the first process of a run to its last one
_TROUBLE = 1000  # above the numbers of all signals


class Interrupted(Exception):  # noqa: N818 (no error: what was asked for)
    """The run ended early and whole, since `signal_number` asked for it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class Interruption:
    """
    Notes SIGTERM and SIGINT while it is entered, and has all processes stop after the same step.

    [`agree`] costs one number sent between the processes' CPUs a step, whatever they compute on: no GPU waits for it.
    A second signal ends the process at once. Outside of the main thread, where Python takes no signals, it only agrees.
    """

    def __init__(self):
        self.noted, self.agreed = 0, 0  # numbers of signals: this process' own, and the one all stop for
        self._group, self._before, self._first = cpu_group(), {}, 0.0
        self._parent = os.getppid()

    def __enter__(self) -> "Interruption":
        with suppress(ValueError):  # not in the main thread
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        parent, self._parent = self._parent, os.getppid()
        if not self.noted:
            self.noted, self._first = number, time.monotonic()
        # A launcher that Ctrl-C ends too is slow to go, and its death, which sends SIGTERM here, is no second wish.
        elif self._parent == parent and time.monotonic() - self._first > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agree(self, trouble: bool = False) -> bool:
        """
        Whether any process is in `trouble`; if none is, `agreed` becomes the signal noted by any of them, or 0. To be
        called once a step by every process.
        """
        agreed = largest(_TROUBLE if trouble else self.noted, self._group)
        self.agreed = 0 if agreed == _TROUBLE else agreed
        return agreed == _TROUBLE


@contextmanager
def limited(seconds: float, explain: Callable[[], str]) -> Iterator[None]:
    """
    End this process, its children with it, where the block takes longer; also where it waits in code that hears no signal.

    Args:
        seconds: that it may take.
        explain: says in a sentence what was waited for.
    """

    def end() -> None:
        print(f"error: {explain()}", file=sys.stderr, flush=True)
        for process in active_children():
            process.kill()
        os._exit(FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def limited_meeting() -> AbstractContextManager[None]:
    """End this process where the block, in which the processes of a run meet, takes longer than [`LONGEST_MEETING`]."""

    def explain() -> str:
        rank, world, *address = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        return (
            f"the {world} processes of this run have not met at {':'.join(map(str, address))} for {LONGEST_MEETING} "
            f"s, which process {rank} waited for; look why the others or their launcher ended, and start the run again."
        )

    return limited(LONGEST_MEETING, explain)


def leave_signals_to_the_parent(_worker: int = 0) -> None:
    """Ignore signals in a process that reads data: one to the whole group must not take it from under the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
