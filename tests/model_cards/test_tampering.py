"""What is altered between the Hub and the disk: who notices, before any of the downloaded code runs."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download

from model_cards import push_to_hub, upload
from model_cards.evaluate_checkpoint import Differs, check_files
from tests.hub_server import HubServer


REPO = "you/tiny"


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def pushed(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(upload, "verify", lambda checkpoint, staged: {"text embeddings": 0.0})
    with HubServer() as hub:
        hub.connect(monkeypatch)
        assert push_to_hub.main(["--checkpoint", str(tiny_checkpoint), "--repo", REPO]) == 0
        yield hub
        assert not hub.unknown and not hub.crashes


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_lrsclip.py", "tokenizer.json"])
def test_a_file_of_the_same_length(pushed, tmp_path, name):
    folder = snapshot_download(REPO, cache_dir=tmp_path / "sound")
    assert check_files(Path(folder)).endswith("as listed in SHA256SUMS")

    pushed.tampered[name] = flip_last_bit
    folder = Path(snapshot_download(REPO, cache_dir=tmp_path / "altered"))  # the client compares lengths only
    assert (folder / name).read_bytes() == flip_last_bit(pushed.repo(REPO).files()[name])
    with pytest.raises(Differs, match=rf"^1 of \d+ files .*: {name}; download them again"):
        check_files(folder)
    checked = HfApi().verify_repo_checksums(REPO, cache_dir=tmp_path / "altered")  # `hf cache verify`
    assert [mismatch["path"] for mismatch in checked.mismatches] == [name]


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_lrsclip.py"])
def test_a_file_cut_short(pushed, tmp_path, name):
    cache = tmp_path / "cache"
    pushed.tampered[name] = lambda content: content[:-1]
    with pytest.raises(OSError, match="Consistency check failed"):
        snapshot_download(REPO, cache_dir=cache)
    assert not [path for path in cache.rglob(name) if path.is_file()]
    pushed.tampered.clear()
    folder = snapshot_download(REPO, cache_dir=cache)  # nothing of it was kept
    assert check_files(Path(folder)).endswith("as listed in SHA256SUMS")
