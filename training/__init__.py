"""Fine-tuning of LRSCLIP: `accelerate launch -m training.train --config training/configs/....yaml`."""

import ctypes
import os
import signal
import sys
from pathlib import Path


_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def end_with_the_launcher() -> None:
    """
    Have the kernel, on Linux, send SIGTERM to this process when its launcher dies: a killed `accelerate launch` or
    `torchrun` would leave it behind, training on and holding the run folder. Other parents (a shell) do not matter.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent or (
            parent == 1 and not _launches(1)
        ):  # it died before the call, which came too late
            os.kill(os.getpid(), signal.SIGTERM)


def _launches(pid: int) -> bool:
    """Whether a process may be a launcher, as the first one in a container is, and not what adopts the orphans."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


if any(word.endswith(("training.train", "lrsclip-train")) for word in sys.orig_argv):  # before seconds of imports
    end_with_the_launcher()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback of those imports, until `main` listens
