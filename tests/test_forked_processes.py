"""The forked processes of the tests themselves: their failures are told, and at once."""

import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from tests import processes


@pytest.fixture(autouse=True, scope="module")
def small_server():
    """One with few libraries, which starts soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_SOCKETS", {})
        patch.setattr(processes, "LIBRARIES", ("numpy",))
        yield


@pytest.mark.parametrize("project", [False, True])
def test_a_server_that_does_not_start_is_told_once_and_again(monkeypatch, project):
    monkeypatch.setattr(processes, "_SOCKETS", {})
    monkeypatch.setattr(processes, "_FAILURES", {})
    monkeypatch.setattr(processes, "_SERVERS", [])
    monkeypatch.setattr(processes, "LIBRARIES", ("numpy", *[""] * (not project)))  # no module has an empty name
    monkeypatch.setattr(processes, "PROJECT", ("",))
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)ended with 1 instead of .*ValueError: Empty module name"):
            processes.run([sys.executable, "-c", ""], project=project)
        monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started for the second
    assert time.monotonic() - began < processes.PATIENCE / 5


def test_a_socket_has_a_short_path(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(processes, "_SOCKETS", {})
    assert processes.run([sys.executable, "-c", "print(1)"]).stdout == "1\n"


def test_a_rank_that_fails_ends_the_others():
    code = "import os, sys, time\n"
    code += "if os.environ['RANK'] == '1': sys.exit('lost')\n"
    code += "time.sleep(400)"
    began = time.monotonic()
    first, second = processes.run_ranks([sys.executable, "-c", code], 2)
    assert time.monotonic() - began < processes.PATIENCE / 5
    assert (first.returncode, second.returncode, second.stderr) == (-9, 1, "lost\n")


def test_a_process_takes_along_what_it_started(tmp_path):
    code = "import os, time\nos.fork()\nprint(os.getpid(), flush=True); time.sleep(400)"
    with (tmp_path / "output").open("wb") as output:
        process = processes.start([sys.executable, "-c", code], stdout=output)
    until = time.monotonic() + processes.PATIENCE
    while len(pids := (tmp_path / "output").read_text().split()) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    (child,) = (psutil.Process(int(pid)) for pid in pids if int(pid) != process.pid)
    process.kill()
    assert process.wait() == -9
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # nobody may be there to take its code
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_rank_that_cannot_start_raises():
    with pytest.raises(AssertionError, match="nonesuch"):
        processes.run_ranks(["nonesuch", "-c", ""], 2)
