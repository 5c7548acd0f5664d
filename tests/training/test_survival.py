"""Runs that are killed, ended by a signal, short of disk, or in trouble: what is left, and what goes on from it."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from tests import processes
from tests.soak import ROOT, Attempt, Kill, has_reached, leave_alone, make_data, run_arguments, survive
from tests.training.test_processes import SHARDED, meet
from training import FAILED, NOT_FINITE, NOT_SAVED, distributed, end_with_the_launcher, train
from training import signals as interruption
from training.config import DataConfig
from training.data import batches
from training.data.batches import load_batches
from training.data.pairs import CaptionedImages, load_pairs
from training.data.visiting_order import VisitSampler
from training.signals import Interruption


PATIENCE = 300  # seconds for what should take a few, on a busy machine


def work(arguments: list[str], rank: int, world: int, store: Path, output: Path, before: Callable[[], None] | None):
    os.chdir(ROOT)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if before:
        before()
    if world > 1:
        meet(store, rank, world)
    train.main(arguments)


class Forked(Attempt):
    """A run in processes that have imported everything already."""

    def __init__(self, arguments: list[str], world: int, output: Path, before: Callable[[], None] | None = None):
        self.output = output
        store = Path(tempfile.mkdtemp()) / "store"
        of_ranks = [(arguments, rank, world, store, output, before) for rank in range(world)]
        self.processes = [processes.call(work, *of_rank) for of_rank in of_ranks]

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def everybody(self) -> list[psutil.Process]:
        alive = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                alive.append(psutil.Process(process.pid))
        return alive

    def wait(self) -> int:
        codes = {process.wait(PATIENCE) for process in self.processes}
        assert len(codes) == 1, f"exit codes {codes}: {self.output.read_text()[-3000:]}"
        return codes.pop()


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("soak") / "data", pairs=24)


def wait_for_step(attempt: Attempt, folder: Path, step: int) -> None:
    until = time.monotonic() + PATIENCE
    while not has_reached(folder, step):
        assert attempt.is_running() and time.monotonic() < until, f"step {step} was never reached"
        time.sleep(0.01)


def log_of(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(("world", "streaming"), [(1, False), (1, True), (2, False)])
def test_killed_runs_go_on_to_the_bit(captions, tmp_path, world, streaming):
    more = ["--data.streaming", "true", "--data.shuffle_buffer", "10"] if streaming else []

    def starter(folder: Path) -> Forked:
        return Forked([*run_arguments(captions, folder, steps=24, save_every=3), *more], world, tmp_path / "output")

    leave_alone(starter, tmp_path / "left-alone")
    kills = [Kill("checkpoint", 0, 0.002, "all", step=5), Kill("time", 0, 0, "all", step=13)]
    if world > 1:
        kills = [Kill("checkpoint", 0, 0, "rank", step=8)]
    assert survive(starter, tmp_path / "left-alone", kills) == []


@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_the_run_after_its_step(captions, tmp_path, world, number):
    arguments = run_arguments(captions, tmp_path / "run", steps=200, save_every=1000)
    attempt = Forked(arguments, world, tmp_path / "output")
    wait_for_step(attempt, tmp_path / "run", 3)
    os.kill(attempt.processes[-1].pid, number)  # one process; the others learn of it
    assert attempt.wait() == 128 + number
    last = log_of(tmp_path / "run", "train")[-1]["step"]
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.name == f"step-{last:08d}" and 3 <= last < 200
    output = (tmp_path / "output").read_text()
    assert output.count(f"{number.name} ended the run after step {last} of 200, saved in {checkpoint}") == 1
    again = Forked(arguments, world, tmp_path / "output", be_impatient)
    wait_for_step(again, tmp_path / "run", last + 1)
    waiting, *others = again.processes
    for process in others:
        os.kill(process.pid, signal.SIGSTOP)
    if others:
        assert waiting.wait(PATIENCE) == FAILED
        assert re.search(
            "error: Process 0 waited for the others .* while taking step .*go on with --resume",
            (tmp_path / "output").read_text(),
        )
    for process in again.everybody():
        process.kill()
    assert f"resumed after step {last} of 200" in (tmp_path / "output").read_text()
    starts = json.loads((tmp_path / "run/run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, last]
    assert all({"versions", "git", "processes"} <= start.keys() for start in starts)


def test_a_signal_to_the_whole_group_reaches_the_end_of_the_step(captions, tmp_path):
    arguments = [*run_arguments(captions, tmp_path / "run", steps=5000), "--data.workers", "2"]
    attempt = Forked(arguments, 1, tmp_path / "output")
    wait_for_step(attempt, tmp_path / "run", 2)
    (trainer,) = attempt.everybody()
    workers = trainer.children(recursive=True)
    assert len(workers) >= 2
    for process in (*workers, trainer):
        process.send_signal(signal.SIGTERM)
    assert attempt.wait() == 128 + signal.SIGTERM
    assert "SIGTERM ended the run after step" in (tmp_path / "output").read_text()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive


def take_shared_memory() -> None:
    """Give this process a /dev/shm that holds no batch (98 kB), whatever the others see."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS of sched.h
        os._exit(77)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm takes a privileged user")
def test_batches_come_without_shared_memory(captions, tmp_path):
    for name, before in (("whole", None), ("small", take_shared_memory)):
        arguments = [*run_arguments(captions, tmp_path / name, steps=3), "--data.workers", "2"]
        assert Forked(arguments, 1, tmp_path / f"{name}.txt", before).wait() == 0
    assert "no shared memory left for batches" in (tmp_path / "small.txt").read_text()
    assert "no shared memory" not in (tmp_path / "whole.txt").read_text()
    whole, small = (log_of(tmp_path / name, "train") for name in ("whole", "small"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in small]


def be_impatient() -> None:
    batches.LONGEST_READ, batches._LATE = 3, 1
    distributed.LONGEST_STEP = distributed.LONGEST_ALONE = timedelta(seconds=5)


def test_lost_workers_end_the_run(captions, tmp_path):
    arguments = [*run_arguments(captions, tmp_path / "run", steps=5000), "--data.workers", "1"]
    attempt = Forked(arguments, 1, tmp_path / "output", be_impatient)
    wait_for_step(attempt, tmp_path / "run", 1)
    (trainer,) = attempt.everybody()
    for worker in trainer.children(recursive=True):  # readers are those of a fork server
        worker.send_signal(signal.SIGKILL)
    assert attempt.wait() == FAILED
    output = (tmp_path / "output").read_text()
    assert f"error: The processes that read {captions}" in output and "Traceback" not in output
    assert "DataLoader worker" in output and "set data.workers lower or to 0, and go on with --resume" in output


def read_for_ever(captions: Path, processor, output: Path) -> None:
    be_impatient()
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    config = DataConfig(str(captions), workers=1)
    images = CaptionedImages(load_pairs(config, ("long",)), config, seed=0)
    visits = VisitSampler(images.pairs.order(0), batch_size=2, steps=10**6, start=6)
    try:
        for _ in load_batches(images, processor, visits, torch.device("cpu")):
            output.with_name("first").touch()
    except RuntimeError as error:
        raise SystemExit(f"error: {batches.explain_lost_workers(error, images, 7)}") from None


def test_a_reader_that_stands_still_ends_the_run(captions, tmp_path, tiny_processor):
    """It may do so while it hands a batch over, where torch's own limit does not reach."""
    trainer = processes.call(read_for_ever, captions, tiny_processor, tmp_path / "output")
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "first").exists():
        assert trainer.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    (reader,) = psutil.Process(trainer.pid).children()
    reader.send_signal(signal.SIGSTOP)
    assert trainer.wait(PATIENCE) == FAILED
    output = (tmp_path / "output").read_text()
    assert re.search(f"error: The processes that read {captions} .* no batch for step [0-9]+ in 3 s", output)
    psutil.wait_procs([reader], timeout=PATIENCE)
    assert not reader.is_running()


def stand_still_or_wait(store: Path, rank: int) -> None:
    be_impatient()
    meet(store, rank, 2)
    distributed.wait_for_all("all start")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        distributed.wait_for_all("the first one validated after step 3")
    except distributed.LostProcessError as error:
        store.with_name("message").write_text(str(error))


def test_who_waits_for_one_that_works_for_all_says_for_what(tmp_path):
    first, other = (processes.call(stand_still_or_wait, tmp_path / "store", rank) for rank in (0, 1))
    assert other.wait(PATIENCE) == 0
    first.kill()
    assert re.match(
        "Process 1 waited for the others .* stands still, while the first one validated after step 3 .*rank 0",
        (tmp_path / "message").read_text(),
    )


def test_a_batch_that_cannot_be_sent_ends_the_worker():
    """By default it would be dropped, and waited for."""
    process = multiprocessing.get_context("fork").Process(target=send_what_cannot_be_sent)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 1


def send_what_cannot_be_sent() -> None:
    batches._start_worker(0)
    multiprocessing.get_context("fork").Queue().put(lambda: None)
    time.sleep(PATIENCE)


def test_torchrun_hands_a_signal_on(captions, tmp_path):
    attempt = Attempt(run_arguments(captions, tmp_path / "run", steps=5000), 2, tmp_path / "output")
    wait_for_step(attempt, tmp_path / "run", 2)
    launcher, *ranks = attempt.everybody()
    launcher.send_signal(signal.SIGTERM)
    assert attempt.wait() == 1  # torchrun's own code, whatever its processes say
    psutil.wait_procs(ranks, timeout=PATIENCE)
    last = log_of(tmp_path / "run", "train")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}/manifest.json").exists()
    assert f"SIGTERM ended the run after step {last} of 5000" in (tmp_path / "output").read_text()


def test_a_second_signal_ends_at_once():
    context = multiprocessing.get_context("fork")
    entered = context.Event()

    def hang():
        with Interruption():
            entered.set()
            while True:
                time.sleep(0.01)

    process = context.Process(target=hang)
    process.start()
    assert entered.wait(PATIENCE)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # of the same moment: a terminal and torchrun may both send one
    process.join(2.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGTERM


def test_the_death_of_a_launcher_is_not_a_second_signal(monkeypatch):
    """Ctrl-C reaches both, and the launcher may take longer to go than `ONE_SIGNAL`."""
    monkeypatch.setattr(interruption, "ONE_SIGNAL", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    context = multiprocessing.get_context("fork")
    receiver, entered = context.Pipe(duplex=False)

    def hang():
        end_with_the_launcher()
        with Interruption():
            entered.send(os.getpid())
            while True:
                time.sleep(0.01)

    def launch():
        process = context.Process(target=hang)
        process.start()
        process.join()

    launcher = context.Process(target=launch)
    launcher.start()
    assert receiver.poll(PATIENCE)
    trainer = psutil.Process(receiver.recv())
    trainer.send_signal(signal.SIGINT)
    time.sleep(1)
    launcher.kill()
    launcher.join()
    time.sleep(0.5)
    assert trainer.is_running()
    trainer.send_signal(signal.SIGINT)  # a second one indeed
    until = time.monotonic() + PATIENCE
    while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:  # nobody may be there to take its code
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def importing(tmp_path):
    """Start `python -m training.train` below a launcher, and give both while the command is still importing."""
    (tmp_path / "accelerate.py").write_text(
        f"import os, time\nos.replace({str(tmp_path / 'growing')!r}, {str(tmp_path / 'pid')!r})\ntime.sleep({PATIENCE})"
    )
    launching = "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'training.train']).wait()"
    (tmp_path / "growing").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "TORCHELASTIC_RUN_ID": "x"}
    command, output = [sys.executable, "-c", launching], (tmp_path / "output").open("w")
    launcher = psutil.Popen(command, cwd=tmp_path, env=environment, stderr=output, start_new_session=True)
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < until and launcher.is_running()
        time.sleep(0.01)
    (trainer,) = launcher.children()
    yield launcher, trainer, tmp_path / "output"
    for process in (launcher, trainer):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


def test_a_launcher_killed_during_the_imports_leaves_nobody(importing):
    launcher, trainer, _ = importing
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([trainer], timeout=20)
    assert not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_during_the_imports_ends_without_a_traceback(importing):
    launcher, trainer, output = importing
    trainer.send_signal(signal.SIGINT)
    launcher.wait(PATIENCE)
    assert output.read_text() == ""


def wait_for_nobody() -> None:
    interruption.LONGEST_MEETING = 2
    os.environ |= {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}  # where nobody listens


def test_processes_that_never_meet_end(captions, tmp_path):
    attempt = Forked(run_arguments(captions, tmp_path / "run"), 1, tmp_path / "output", wait_for_nobody)
    assert attempt.wait() == FAILED
    assert "the 2 processes of this run have not met at 127.0.0.1:9 for 2 s" in (tmp_path / "output").read_text()


def test_two_runs_do_not_share_a_folder(captions, tmp_path):
    arguments = run_arguments(captions, tmp_path / "run", steps=5000)
    first = Forked(arguments, 1, tmp_path / "output")
    wait_for_step(first, tmp_path / "run", 1)
    with pytest.raises(SystemExit, match=f"run is in use by process {first.processes[0].pid} on .*; wait until"):
        train.main(arguments)
    first.processes[0].kill()
    first.processes[0].wait()
    train.main([*arguments[:-2], "--loop.steps", "1", "--output_dir", str(tmp_path / "other")])


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # bytes: less than the weights


def test_no_room_for_a_checkpoint(captions, tmp_path):
    arguments = run_arguments(captions, tmp_path / "run", steps=4, save_every=2)
    whole = Forked([*arguments, "--loop.validate_every", "1000"], 1, tmp_path / "output")
    wait_for_step(whole, tmp_path / "run", 3)
    whole.wait()
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    more = ["--output_dir", str(tmp_path / "short")]
    assert Forked([*arguments, *more], 2, tmp_path / "told", before=limit_file_size).wait() == NOT_SAVED
    output = (tmp_path / "told").read_text()
    assert "step-00000002 could not be written (" in output and "MB are free on that disk" in output
    assert "there is no checkpoint yet. Make room and go on with --resume." in output
    assert list((tmp_path / "short/checkpoints").iterdir()) == []
    assert before == ["step-00000002", "step-00000004"]


def limit_file_size_of_shards() -> None:
    os.environ.update(SHARDED)
    limit_file_size()


def test_no_room_for_a_sharded_checkpoint(captions, tmp_path):
    """FSDP2's checkpoints tell of a full disk by an exception of their own."""
    arguments = run_arguments(captions, tmp_path / "run", steps=4, save_every=2)
    assert Forked(arguments, 2, tmp_path / "told", before=limit_file_size_of_shards).wait() == NOT_SAVED
    output = (tmp_path / "told").read_text()
    assert "step-00000002 could not be written (" in output and "Make room and go on with --resume." in output
    assert "Traceback" not in output and list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_mistake_in_the_data_is_told_once(captions, tmp_path):
    """By the first process, and the other one ends with it instead of a traceback."""
    arguments = [*run_arguments(captions, tmp_path / "run"), "--data.long_column", "longtext"]
    assert Forked(arguments, 2, tmp_path / "told").wait() == FAILED
    output = (tmp_path / "told").read_text()
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert output.count("did you mean 'long_text'") == 2  # for the training and for the held-out data


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes a privileged user")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(captions, small_disk, tmp_path):
    arguments = run_arguments(captions, small_disk / "run", steps=40, save_every=2)
    arguments += ["--loop.keep_checkpoints", "50", "--loop.validate_every", "1000"]
    assert Forked(arguments, 1, tmp_path / "told").wait() == NOT_SAVED
    output = (tmp_path / "told").read_text()
    checkpoints = sorted((small_disk / "run/checkpoints").iterdir())
    assert f"the last checkpoint, {checkpoints[-1]}, is whole. Make room and go on with --resume." in output
    assert not list(small_disk.rglob(".*.partial"))
    for checkpoint in checkpoints[:-1]:
        shutil.rmtree(checkpoint)
    step = int(checkpoints[-1].name.removeprefix("step-"))
    more = ["--resume", "--loop.keep_checkpoints", "1"]
    resumed = Forked([*arguments, *more], 1, tmp_path / "told")
    wait_for_step(resumed, small_disk / "run", step + 3)
    for process in resumed.everybody():
        process.kill()


def test_a_batch_that_is_not_finite_stops_all_processes(captions, tmp_path):
    arguments = [*run_arguments(captions, tmp_path / "run", steps=9, save_every=1), "--optim.name", "sgd"]
    arguments += ["--optim.max_grad_norm", "null", "--optim.learning_rate", "1e18"]
    attempt = Forked(arguments, 2, tmp_path / "output")
    assert attempt.wait() == NOT_FINITE
    document = json.loads((tmp_path / "run/nonfinite.json").read_text())
    batches = {record["step"]: record["ids"] for record in log_of(tmp_path / "run", "batch")}
    assert document["ids"] == batches[document["step"]] and len(document["ids"]) == 8
    assert {"loss", "long_loss", "short_loss", "gradient_norm", "logit_scale"} <= document.keys()
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    assert (
        document["checkpoint"] == str(checkpoints[-1]) and checkpoints[-1].name == f"step-{document['step'] - 1:08d}"
    )
    printed = (tmp_path / "output").read_text()
    assert printed.count("error: The ") == 1 and f"at step {document['step']}; lower optim.learning_rate" in printed
    assert f"The last good checkpoint is {checkpoints[-1]}" in printed


class TestTheRunFolder:
    def test_what_the_log_says(self, captions, tmp_path):
        arguments = run_arguments(captions, tmp_path / "run", steps=4, save_every=2)
        train.main([*arguments, "--loop.log_every", "2", "--optim.max_grad_norm", "null"])
        first, second = log_of(tmp_path / "run", "train")
        assert second["tokens_with_padding"] >= second["tokens"] > 16 * 20
        assert second["samples_per_second"] == pytest.approx(16 / (second["seconds"] - first["seconds"]))
        assert second["gradient_norm"] > 0 and second["skipped"] == 0 and 0.05 < second["peak_memory_gib"] < 20
        assert [len(record["ids"]) for record in log_of(tmp_path / "run", "batch")] == [8] * 4
        with Image.open(tmp_path / "run/curves.png") as picture:
            assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 50

    def test_no_tracker(self, captions, tmp_path):
        arguments = run_arguments(captions, tmp_path / "run", steps=1)
        train.main([*arguments, "--loop.trackers", "none"])
        assert not list((tmp_path / "run").rglob("events.out.tfevents*"))

    def test_early_stop(self, captions, tmp_path):
        arguments = run_arguments(captions, tmp_path / "run", steps=40, save_every=4)
        arguments += ["--loop.validate_every", "1", "--loop.patience", "2", "--optim.learning_rate", "1e-12"]
        train.main(arguments)
        validations = log_of(tmp_path / "run", "validation")
        assert [record["step"] for record in validations] == [1, 2, 3]  # the best one, and two that are no better
        assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003"]
        assert json.loads((tmp_path / "run/final/run.json").read_text())["weights"]["step"] == 3
        train.main(arguments)  # resumed: has ended already
        assert log_of(tmp_path / "run", "validation") == validations
