"""A folder appears whole or not at all, whatever happens while it is written."""

import json
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests import processes
from training.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    STATES,
    NotSavedError,
    clean_up,
    find_damage,
    load_newest_state,
    only_numbers_unpickled,
    replace_folder,
    save_state,
    write_manifest,
)


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
    killed = processes.run(command, cwd=ROOT, project=True)
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
    assert load_newest_state(accelerator, tmp_path) is None


def a_checkpoint(run_folder: Path, step: int) -> Path:
    folder = run_folder / CHECKPOINTS / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(100)))
    (folder / STATES).write_text(json.dumps({"step": step}))
    write_manifest(folder)
    return folder


def shorten(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(range(99)))


def flip_a_bit(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes([1, *range(1, 100)]))


def lose(folder: Path) -> None:
    (folder / "weights").unlink()


def halve_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:30])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shorten, "weights has 99 bytes, 100 were written"),
        (flip_a_bit, "weights is not what was written"),
        (lose, "FileNotFoundError: .*weights"),
        (halve_the_manifest, "JSONDecodeError: "),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path, monkeypatch, damage, named):
    accelerator, said, loaded = Accelerator(cpu=True), [], []
    older, newest = a_checkpoint(tmp_path, 2), a_checkpoint(tmp_path, 4)
    assert find_damage(older) is None and find_damage(newest) is None
    damage(newest)
    monkeypatch.setattr(accelerator, "load_state", loaded.append)
    assert load_newest_state(accelerator, tmp_path, said.append) == {"step": 2}
    assert loaded == [str(older)]
    assert len(said) == 1 and re.search(named, said[0]) and "set aside as damaged-step-00000004" in said[0]
    assert sorted(path.name for path in older.parent.iterdir()) == ["damaged-step-00000004", "step-00000002"]


def test_all_damaged(accelerator, tmp_path):
    for step in (1, 2):
        shorten(a_checkpoint(tmp_path, step))
    with pytest.raises(ValueError, match="All 2 checkpoints in .* were damaged .* to start at step 0"):
        load_newest_state(accelerator, tmp_path, print)
    assert load_newest_state(accelerator, tmp_path, print) is None


def test_old_ones_go_after_the_new_one_is_there(accelerator, tmp_path, monkeypatch):
    seen = []

    def save(folder: str) -> None:
        (Path(folder) / "weights").write_text("new")
        seen.append(sorted(path.name for path in (tmp_path / CHECKPOINTS).glob("step-*")))

    monkeypatch.setattr(accelerator, "save_state", save)
    for step in (1, 2, 3):
        save_state(accelerator, tmp_path, {"step": step}, step, keep=1)
    assert seen == [[], ["step-00000001"], ["step-00000002"]]
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000003"]
    assert find_damage(tmp_path / CHECKPOINTS / "step-00000003") is None


def test_clean_up(tmp_path):
    for name in (".best.old", ".final.old", "final", ".final.partial", "checkpoints/.step-00000001.gone"):
        (tmp_path / name).mkdir(parents=True)
    clean_up(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "best",
        "checkpoints",
        "final",
    ]


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model and its optimizer, as accelerate writes it."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    save_state(accelerator, tmp_path, {"progress": {"seconds": 0.1}}, 7, keep=1)
    return accelerator, tmp_path / CHECKPOINTS / "step-00000007"


def test_what_was_saved_returns(saved, tmp_path):
    accelerator, folder = saved
    assert not list(folder.glob("custom_checkpoint_*"))
    assert load_newest_state(accelerator, tmp_path) == {"progress": {"seconds": 0.1}}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("custom_checkpoint_0.pkl", "of an older version, whose states are pickles"),
        ("optimizer.bin", "holds a file of more than tensors and numbers"),
        ("pytorch_model_fsdp_0/.metadata", "no table of contents .* names pathlib"),
    ],
)
def test_no_file_of_a_checkpoint_runs_code(saved, tmp_path, monkeypatch, name, named):
    accelerator, folder = saved
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(Bomb(tmp_path / "gone-off"), folder / name, _use_new_zipfile_serialization=False)
    if name.endswith(".metadata"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "gone-off")))
        monkeypatch.setattr("training.checkpoint.check_checkpoint", lambda *_: None)  # this launch is not sharded
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match=named):
        load_newest_state(accelerator, tmp_path)
    assert not (tmp_path / "gone-off").exists()


def test_torch_load_is_restricted_whatever_it_is_told(tmp_path):
    torch.save(Bomb(tmp_path / "gone-off"), tmp_path / "file")
    with only_numbers_unpickled(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=False)
    assert not (tmp_path / "gone-off").exists()


def test_a_full_disk_as_tokenizers_tell_it(accelerator, tmp_path):
    def disk_full(folder):
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(NotSavedError, match="best could not be written .No space left"):
        replace_folder(accelerator, tmp_path / "best", disk_full)
    assert list(tmp_path.iterdir()) == []
