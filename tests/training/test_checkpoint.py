"""A folder appears whole or not at all, whatever happens while it is written."""

import json
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from transformers import AutoTokenizer

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from tests import processes
from training.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    STATES,
    NotSavedError,
    TrainState,
    clean_up,
    find_damage,
    load_newest_state,
    only_numbers_unpickled,
    read_states,
    replace_folder,
    save_model,
    save_state,
    trained_tokenizer,
    whole_model,
    write_manifest,
)
from training.model import LoRAConfig, add_adapters


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


def test_the_tokenizer_that_was_trained(accelerator, tmp_path, monkeypatch, tiny_tokenizer):
    assert trained_tokenizer(tmp_path) is None
    monkeypatch.setattr(accelerator, "save_state", lambda folder: (Path(folder) / "weights").write_bytes(b"x" * 100))
    for step in (1, 2, 3):
        save_state(accelerator, tmp_path, {}, step, keep=9, tokenizer=tiny_tokenizer)
    save_state(accelerator, tmp_path, {}, 4, keep=9)
    shorten(tmp_path / CHECKPOINTS / "step-00000003")
    folder = trained_tokenizer(tmp_path)
    assert folder == tmp_path / CHECKPOINTS / "step-00000002" / "tokenizer"
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer.get_vocab()


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


def test_what_cannot_be_removed_ends_no_run(accelerator, tmp_path, monkeypatch):
    """As on NFS, where an open file stays."""
    monkeypatch.setattr(accelerator, "save_state", lambda folder: (Path(folder) / "weights").write_text("new"))
    save_state(accelerator, tmp_path, {}, 1, keep=1)

    def refuse(*_, **__):
        raise OSError("device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        save_state(accelerator, tmp_path, {}, 2, keep=1)
        clean_up(tmp_path)
    assert (tmp_path / CHECKPOINTS / ".step-00000001.gone" / "weights").exists()
    clean_up(tmp_path)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000002"]


def test_a_full_disk_says_which_checkpoint_is_the_last(accelerator, tmp_path, monkeypatch):
    def disk_full(folder):
        raise dcp.api.CheckpointException("all of them", {1: (OSError("no\nspace left"), None)})

    monkeypatch.setattr(accelerator, "save_state", disk_full)
    with pytest.raises(
        NotSavedError, match=r"step-00000003 could not be written \(no space left\); .* no checkpoint yet"
    ):
        save_state(accelerator, tmp_path, {}, 3, keep=1)
    a_checkpoint(tmp_path, 2)
    with pytest.raises(NotSavedError, match="the last checkpoint, .*step-00000002, is whole. Make room"):
        save_state(accelerator, tmp_path, {}, 3, keep=1)


def test_a_folder_below_a_file(accelerator, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotSavedError, match="file/best could not be written"):
        replace_folder(accelerator, tmp_path / "file" / "best", write("x"))


def test_progress_returns():
    progress = TrainState(step=3, best_recall=51.5, best_step=2, validated=3, not_better=1, skipped=4, seconds=0.5)
    resumed = TrainState()
    resumed.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert resumed == progress != TrainState()
    fresh = TrainState()
    assert fresh.best_recall < 0 == fresh.step == fresh.best_step == fresh.validated  # a recall of 0 is better
    assert (fresh.not_better, fresh.skipped, fresh.seconds) == (0, 0, 0.0)


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


def test_a_sharded_checkpoint_has_a_table_of_contents(tmp_path):
    tensors = {"weight": torch.ones(3), "half": torch.ones(2, dtype=torch.float16), "bytes": [1]}
    dcp.save(tensors, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    (tmp_path / STATES).write_text('{"step": 1}')
    assert read_states(tmp_path) == {"step": 1}
    for word in (b"torch\nfrom_file", b"os\nsystem"):  # what lies beside numbers, and what is like them in nothing
        (tmp_path / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"c" + word + b"\n.")
        with pytest.raises(ValueError, match=f"it names {word.decode().replace(chr(10), '.')}"):
            read_states(tmp_path)


def test_a_saved_model_has_ordinary_weights(accelerator, tmp_path, tiny_model, tiny_processor):
    assert whole_model(accelerator, tiny_model) is tiny_model
    save_model(accelerator, tiny_model, tiny_processor, tmp_path / "best")
    plain = LRSCLIPModel.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in tiny_model.state_dict().items())
    assert LRSCLIPProcessor.from_pretrained(tmp_path / "best").tokenizer.vocab_size
    add_adapters(tiny_model.train(), LoRAConfig(rank=2))
    random = torch.get_rng_state()
    merged = whole_model(accelerator, tiny_model)
    assert torch.equal(torch.get_rng_state(), random) and not merged.training
    assert all(
        torch.equal(tensor, plain[name]) for name, tensor in merged.state_dict().items()
    )  # adapters begin at zero


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
