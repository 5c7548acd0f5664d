"""The search of a large set in processes of its own answers as one process does, and nothing waits for one that ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.lrs2m.duplicates import workers
from training.lrs2m.duplicates.finder import BLOCK, DuplicateFinder, Query
from training.lrs2m.duplicates.workers import Guard


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


@pytest.fixture(autouse=True)
def _all_sets_are_large(monkeypatch):
    monkeypatch.setattr(workers, "LARGE", 0)


def smooth(rng: np.random.Generator) -> np.ndarray:
    """A thumbnail unlike the others."""
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
    return np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC))


def children(parent: int) -> list[int]:
    """Processes below one."""
    stats = {int(path.name): path / "stat" for path in Path("/proc").iterdir() if path.name.isdigit()}
    found = []
    for number, stat in stats.items():
        try:
            above = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if above == parent:
            found += [number, *children(number)]
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(processes: list[int]) -> None:
    last = time.monotonic() + 30
    while any(map(is_running, processes)):
        assert time.monotonic() < last, processes
        time.sleep(0.02)


def test_workers_answer_as_one_process_does(tmp_path):
    """Over the end of a block and a stop, with an evaluation set, copies near and far, flat images and rows of one image."""
    rng = np.random.default_rng(0)
    (tmp_path / "evaluated").mkdir()
    evaluated = [smooth(rng) for _ in range(4)]
    for index, thumb in enumerate(evaluated):
        Image.fromarray(thumb).save(tmp_path / "evaluated" / f"{index}.png")
    thumbs = [smooth(rng) for _ in range(BLOCK + 60)]
    thumbs[40], thumbs[BLOCK + 20], thumbs[BLOCK + 40] = thumbs[3].T, thumbs[7], thumbs[BLOCK + 12][::-1]
    thumbs[50] = thumbs[BLOCK + 30] = evaluated[2]
    thumbs[60] = np.full((32, 32), 9, np.uint8)
    queries = [Query(f"row-{index}", thumb) for index, thumb in enumerate(thumbs)]
    queries[30] = Query("row-30", thumbs[29], "row-29")
    queries[BLOCK + 45] = Query("row-x", None)
    queries[BLOCK + 30].against = []
    alone = DuplicateFinder([tmp_path / "evaluated"])
    expected = [alone.check_all([query])[0] for query in queries]
    assert sum(map(bool, expected)) == 4

    found = []
    for first, last in ((0, 500), (500, len(queries))):
        guard = Guard(2, against=[tmp_path / "evaluated"], store=tmp_path / "prints.sqlite")
        for start in range(first, last, 100):
            found += guard.check_all(queries[start : min(start + 100, last)])
        guard.commit()
        guard.close()
    assert found == expected
    again = Guard(1, against=[tmp_path / "evaluated"], store=tmp_path / "prints.sqlite")
    assert again.check_all(queries) == expected and isinstance(again._finder, DuplicateFinder)
    again.close()


@pytest.mark.parametrize("who", ["search", "worker"])
def test_a_process_that_is_ended_is_said(tmp_path, who):
    rng = np.random.default_rng(1)
    guard = Guard(2, store=tmp_path / "prints.sqlite")
    assert guard.check_all([Query("a", smooth(rng))]) == [None]
    search = guard._finder._process.pid
    others = children(search)
    assert len(others) == 2
    ended = search if who == "search" else others[0]
    os.kill(ended, signal.SIGKILL)
    wait_for_end([ended])
    with pytest.raises(ValueError, match="process.* for near-duplicates was ended, .* run the same command again"):
        guard.check_all([Query(name, smooth(rng)) for name in "bc"])
    guard.close()
    wait_for_end([search, *others])


def test_the_processes_end_with_the_one_that_asks(tmp_path):
    script = (
        "import sys, numpy as np\n"
        "from training.lrs2m.duplicates import workers\n"
        "from training.lrs2m.duplicates.finder import Query\n"
        "workers.LARGE = 0\n"
        f"guard = workers.Guard(2, store={str(tmp_path / 'prints.sqlite')!r})\n"
        "guard.check_all([Query('a', np.arange(1024, dtype=np.uint8).reshape(32, 32))])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    below = children(process.pid)
    assert len(below) == 3
    process.kill()
    process.communicate()
    wait_for_end(below)


def test_a_mistake_in_the_data_is_said_as_without_workers(tmp_path):
    with pytest.raises(ValueError, match="does not exist here; give a folder of images"):
        Guard(2, against=[tmp_path / "nothing"], store=tmp_path / "prints.sqlite")


def test_a_change_of_processes_that_fails_is_said(tmp_path, monkeypatch):
    """The images stored so far are kept."""
    rng = np.random.default_rng(2)
    (tmp_path / "evaluated").mkdir()
    Image.fromarray(smooth(rng)).save(tmp_path / "evaluated" / "0.png")
    monkeypatch.setattr(workers, "LARGE", 3)
    guard = Guard(2, against=[tmp_path / "evaluated"], store=tmp_path / "prints.sqlite")
    assert guard.check_all([Query(name, smooth(rng)) for name in "abc"]) == [None] * 3
    (tmp_path / "evaluated").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="does not exist here; give a folder of images"):
        guard.check_all([Query("d", smooth(rng))])
    guard.close()
    (tmp_path / "elsewhere").rename(tmp_path / "evaluated")
    guard = Guard(2, against=[tmp_path / "evaluated"], store=tmp_path / "prints.sqlite")
    assert guard.check_all([Query(name, smooth(rng)) for name in "cd"]) == [None] * 2
    guard.close()
