"""Bounds that a reader of foreign bytes is held to: seconds, memory, and no code, process or connection of the file's."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


SECONDS = 20  # far more than any reader needs for a file of some kilobytes, on a machine that does much else
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
    raise BrokenRule(f"more than {SECONDS} s")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Keep a block within the bounds."""
    global _watching
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _watching = True
        yield
    finally:
        _watching = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
