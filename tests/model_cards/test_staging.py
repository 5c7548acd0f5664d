"""What of a checkpoint's folder is taken, before anything of it runs, and what is put beside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_cards import staging
from model_cards.push_to_hub import main
from model_cards.staging import NotVerified, compare_outputs, stage, stage_plain_clip, verify
from modeling_lrsclip.files.hashing import file_sha256
from tests import processes
from tests.model_cards.test_build_card import document, retrieval
from tests.model_cards.test_push_to_hub import OURS, REPO


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """The clean process of `verify` is a fork."""
    monkeypatch.setattr(staging, "subprocess", processes.as_subprocess())


@pytest.fixture
def staged(tmp_path):
    """The empty folder that is filled."""
    (tmp_path / "staged").mkdir()
    return tmp_path / "staged"


def test_code_of_somebody_else(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = tiny_checkpoint / "modeling_lrsclip.py"
    sees = f"import os\nopen({str(ran)!r}, 'w').write(f'{{\"HF_TOKEN\" in os.environ}} {{\"PATH\" in os.environ}}')\n"
    code.write_text(sees + code.read_text())
    command = ["--checkpoint", str(tiny_checkpoint), "--repo", REPO, "--dry-run"]
    assert main(command) == 2
    assert "modeling_lrsclip.py is not the code of this package" in capsys.readouterr().err and not ran.exists()
    assert main([*command, "--trust-checkpoint-code"]) == 0 and ran.read_text() == "False True"


@pytest.mark.parametrize("name", ["vocab.json", "run.json"])
def test_links_out_of_the_folder(tiny_checkpoint, tmp_path, capsys, name):
    (tmp_path / "secret").write_text("{}")
    (tiny_checkpoint / name).symlink_to(tmp_path / "secret")
    assert main(["--checkpoint", str(tiny_checkpoint), "--repo", REPO, "--dry-run"]) == 2
    assert f"{name} is a link to" in capsys.readouterr().err


def test_a_link_of_a_shard_out_of_the_folder(tiny_model, tiny_processor, staged, tmp_path):
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    tiny_processor.save_pretrained(tmp_path / "sharded")
    assert len(list(tmp_path.glob("sharded/*-of-*.safetensors"))) > 1
    shard = next(tmp_path.glob("sharded/*-of-*.safetensors"))
    shard.symlink_to(shard.rename(tmp_path / shard.name))
    with pytest.raises(ValueError, match="safetensors is a link to"):
        stage(tmp_path / "sharded", staged, REPO)


def test_modules_of_another_name(tiny_checkpoint, staged):
    """Code that this package has nothing to compare with; and code that lies in another repository."""
    settings = (tiny_checkpoint / "config.json").read_text()
    (tiny_checkpoint / "config.json").write_text(settings.replace('"modeling_lrsclip.', '"own_model.'))
    (tiny_checkpoint / "own_model.py").write_text("")
    with pytest.raises(ValueError, match="own_model.py is not the code of this package"):
        stage(tiny_checkpoint, staged, REPO)
    elsewhere = settings.replace('"modeling_lrsclip.', '"you/code--modeling_lrsclip.')
    (tiny_checkpoint / "config.json").write_text(elsewhere)
    assert set(stage(tiny_checkpoint, staged, REPO).sizes) > OURS
    assert json.loads((staged / "config.json").read_text())["auto_map"] == json.loads(settings)["auto_map"]


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "processor_config.json", "model.safetensors", "config.json"]
)
def test_a_file_is_missing(tiny_checkpoint, staged, name):
    (tiny_checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{name}"):
        stage(tiny_checkpoint, staged, REPO)


def test_weights_are_missing_in_a_folder_without_code(tiny_checkpoint, staged):
    for name in ("model.safetensors", "modeling_lrsclip.py"):
        (tiny_checkpoint / name).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        stage(tiny_checkpoint, staged, REPO)
    assert not list(staged.iterdir())


def test_what_is_staged(tiny_checkpoint, staged, monkeypatch):
    """Weights are linked where that is possible, settings lose their paths, figures their captions."""
    for name in ("config.json", "conversion.json"):
        settings = json.loads((tiny_checkpoint / name).read_text()) if name == "config.json" else {}
        (tiny_checkpoint / name).write_text(json.dumps(settings | {"source": "/home/nadine/clip.pt"}))
    recall = [retrieval("zcrl", "tiles", 4) | {"examples": ["a caption"]}, retrieval("zcrs", "tiles", 4)]
    results = document(tiny_checkpoint, recall) | {"command": "python -m evaluation.run --model /home/nadine/final"}
    prepared = stage(tiny_checkpoint, staged, REPO, results)
    assert prepared.bytes == sum(path.stat().st_size for path in staged.iterdir())
    linked = {path.name for path in staged.iterdir() if path.is_symlink()}
    assert linked == {"model.safetensors"}
    assert not [path for path in staged.iterdir() if b"nadine" in path.read_bytes()]
    assert json.loads((staged / "config.json").read_text())["source"] == "clip.pt"
    public = json.loads((staged / "results.json").read_text())
    assert "a caption" not in str(public) and len(public["results"]) == 2
    assert public["models"][0]["path"] == REPO and public["command"].endswith(f"--model {REPO}")
    assert (staged / "evaluate_checkpoint.py").read_bytes() == staging.EVALUATE.read_bytes()
    assert "python evaluate_checkpoint.py --data DATA" in (staged / "README.md").read_text()
    sums = dict(line.split("  ")[::-1] for line in (staged / "SHA256SUMS").read_text().splitlines())
    assert sums == {path.name: file_sha256(path) for path in staged.iterdir() if path.name in sums}
    assert set(sums) == set(prepared.sizes) - {"README.md", "SHA256SUMS"}

    def no_links(*_):
        raise OSError("operation not permitted")  # as on FAT

    monkeypatch.setattr("os.symlink", no_links)
    other = staged.with_name("copied")
    other.mkdir()
    prepared = stage(tiny_checkpoint, other, REPO, document(tiny_checkpoint, []))
    assert (other / "model.safetensors").read_bytes() == (staged / "model.safetensors").read_bytes()
    assert not (other / "model.safetensors").is_symlink()
    assert "evaluate_checkpoint" not in (other / "README.md").read_text()


def test_a_stock_clip_has_tags_of_its_own(tiny_checkpoint, staged):
    prepared = stage(tiny_checkpoint, staged, REPO, license_id="mit")
    plain = stage_plain_clip(prepared, staged.with_name("plain"), "you/tiny-clip", REPO)
    tags = [*prepared.card.data.tags, "sentence-transformers"]
    assert plain.card.data.tags == [tag for tag in tags if tag != "lrsclip"] and "lrsclip" in tags
    assert "# tiny-clip\n" in plain.card.text and "248" in plain.card.text


def test_a_card_that_is_read_as_another_one(tiny_checkpoint, staged):
    prepared = stage(tiny_checkpoint, staged, REPO)
    (staged / "README.md").write_text((staged / "README.md").read_text() + "more")
    with pytest.raises(NotVerified, match="the card that was written is read as another one"):
        verify(tiny_checkpoint, prepared)


@pytest.mark.parametrize(
    ("name", "most", "least"), [("token ids", 0, 1), ("pixel values", 9e-6, 2e-5), ("text embeddings", 9e-6, 2e-5)]
)
def test_outputs_may_differ_by_so_much(name, most, least):
    zeros = {name: torch.zeros(2, 3, dtype=torch.float64)}
    assert compare_outputs({name: zeros[name] - most}, zeros, Path("mine")) == {name: most}
    for other in (zeros[name] - least, zeros[name] + float("nan"), zeros[name][:, :2]):
        with pytest.raises(NotVerified, match=f"{name} of the staged copy differ from those of mine"):
            compare_outputs({name: other}, zeros, Path("mine"))


def test_a_download_from_the_hub_is_all_links(tiny_checkpoint, staged, tmp_path):
    repository = tmp_path / "models--you--tiny"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert "model.safetensors" in stage(snapshot, staged, REPO).sizes


def test_weights_that_change_meanwhile(tiny_checkpoint, staged):
    """A temperature is in no embedding: the hash alone sees it."""
    staged = stage(tiny_checkpoint, staged, REPO)
    weights = load_file(tiny_checkpoint / "model.safetensors")
    (staged.folder / "model.safetensors").unlink()
    save_file(
        weights | {"logit_scale": weights["logit_scale"] + 0.5},
        staged.folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(NotVerified, match="the staged weights are not those of"):
        verify(tiny_checkpoint, staged)
