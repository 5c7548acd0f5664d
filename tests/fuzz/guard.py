"""Bounds that a reader of foreign bytes is held to: seconds, memory, and no code, process or connection of the file's."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


SECONDS = 20  # of computing; far more than any reader needs for a file of some kilobytes
WAITING = 300  # seconds, whoever else has the processor
MEMORY = 3 << 30  # bytes of address space beside what the process has
# Audit events of Python that a reader never raises (PEP 578).
CODE = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect"}
CODE |= {"ctypes.dlopen", "pty.spawn", "webbrowser.open"}


class BrokenRule(BaseException):
    """A reader took too long or ran code; no `except Exception` of the reader's takes it."""


_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event in CODE:
        raise BrokenRule(f"the file led to {event} {arguments!r:.200}")


sys.addaudithook(_audit)


def _too_long(*_: object) -> None:
    raise BrokenRule(f"more than {SECONDS} s of computing, or {WAITING} s")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Keep a block within the bounds."""
    global _watching
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = [signal.signal(number, _too_long) for number, _, _ in limits]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
        for _, timer, seconds in limits:
            signal.setitimer(timer, seconds)
        _watching = True
        yield
    finally:
        _watching = False
        for (number, timer, _), handler in zip(limits, before):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
