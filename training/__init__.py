"""Fine-tuning of LRSCLIP: `python -m training.train --config training/configs/....yaml`."""

import ctypes
import os
import signal
import sys
from pathlib import Path


# Exit codes of `python -m training.train`; `accelerate launch` and `torchrun` say 1 for any but 0.
FINISHED, FAILED, NOT_FINITE, NOT_SAVED = 0, 1, 3, 4
ENDED_BY_SIGNAL = 128  # plus its number, as shells say it: 130 for SIGINT, 143 for SIGTERM
EXIT_CODES = f"""\
exit codes:
  {FINISHED}    finished
  {FAILED}    an error, told in one sentence
  {NOT_FINITE}    the loss, its gradient or the weights are not finite; the batch is in nonfinite.json
  {NOT_SAVED}    a checkpoint could not be written (disk full); the one before is whole
  130  SIGINT (Ctrl-C): the step was finished and saved, --resume goes on; after a second one, at once and unsaved
  143  SIGTERM: likewise
accelerate launch and torchrun pass on 1 for any of these but 0. With several processes they kill what has not ended
30 seconds after a signal; give large models longer to save: export PET_SHUTDOWN_TIMEOUT=300
"""
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
        # It died before the call, which came too late.
        if os.getppid() != parent or (parent == 1 and not _launches(1)):
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
