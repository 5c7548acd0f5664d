"""A folder appears whole or not at all, whatever happens while it is written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from training.checkpoint import load_newest_state, replace_folder


ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
from training.checkpoint import replace_folder

def write(folder):
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

replace_folder(Accelerator(cpu=True), Path(sys.argv[1]), write)
"""


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_replaces(accelerator, tmp_path):
    for text in ("first", "second"):
        replace_folder(accelerator, tmp_path / "best", write(text))
        assert (tmp_path / "best" / "weights").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_an_error_leaves_the_old_one(accelerator, tmp_path):
    replace_folder(accelerator, tmp_path / "best", write("first"))

    def disk_full(folder):
        (folder / "weights").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        replace_folder(accelerator, tmp_path / "best", disk_full)
    assert (tmp_path / "best" / "weights").read_text() == "first"
    replace_folder(accelerator, tmp_path / "best", write("second"))  # what the error left behind is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_killed_while_writing(accelerator, tmp_path):
    replace_folder(accelerator, tmp_path / "best", write("first"))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "best")]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".best.partial" / "weights").read_text() == "half"
    assert (tmp_path / "best" / "weights").read_text() == "first"


def test_killed_between_the_renames(accelerator, tmp_path):
    replace_folder(accelerator, tmp_path / "best", write("first"))
    (tmp_path / "best").rename(tmp_path / ".best.old")
    with pytest.raises(ZeroDivisionError):
        replace_folder(accelerator, tmp_path / "best", lambda folder: 1 / 0)
    assert (tmp_path / "best" / "weights").read_text() == "first"


def test_half_a_checkpoint_is_not_resumed(accelerator, tmp_path):
    (tmp_path / "checkpoints" / ".step-00000009.partial").mkdir(parents=True)
    assert load_newest_state(accelerator, tmp_path) is False
