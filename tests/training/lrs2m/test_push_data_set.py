"""A push over loopback HTTP: whole or without a manifest, and finished by a second run."""

import json

import pytest
from huggingface_hub import HfApi

from tests.hub_server import Fault, HubServer
from tests.training.lrs2m.small_builds import build, source
from training.lrs2m import push
from training.lrs2m.push import main


REPO = "you/tiles"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(push, "COMMIT_FILES", 1)
    with HubServer() as server:
        server.connect(monkeypatch)
        yield server
        assert not server.unknown and not server.crashes


@pytest.fixture
def built(write_recipe, tiles, tmp_path):
    def make(name: str = "set", **fields):
        read = {"kind": "table", "path": str(tiles / "captions.jsonl")}
        folder = tmp_path / name
        assert build(write_recipe([source("merge", read, join=read)], shard_rows=6, **fields), folder) == 0
        return folder

    return make


def send(folder, *more: str) -> int:
    return main([str(folder), "--repo", REPO, *more], HfApi(token="hf_you"))


def files(hub) -> dict[str, bytes]:
    held = hub.repo(REPO, "dataset").files()
    return {path: content for path, content in held.items() if path != ".gitattributes"}


def test_the_manifest_comes_last(hub, built, capsys):
    folder = built()
    assert send(folder, "--dry-run") == 0 and not hub.requests
    shown = capsys.readouterr().out
    assert "data/train-00000-of-" in shown and "# test" in shown
    assert send(folder, "--private") == 0 and hub.repo(REPO, "dataset").private
    held = files(hub)
    wanted = [
        path for path in folder.rglob("*") if path.is_file() and "work" not in path.parts and path.stat().st_size
    ]
    wanted = {path.relative_to(folder).as_posix() for path in wanted if ".cache" not in path.parts}
    assert set(held) == wanted and {"README.md", "manifest.json", "statistics.json", "token_lengths.png"} < set(held)
    assert all((folder / path).read_bytes() == content for path, content in held.items())
    titles = [commit.title for commit in hub.repo(REPO, "dataset").history()]
    assert titles[0] == "Manifest, card and statistics" and sum("Shards" in title for title in titles) >= 2

    assert send(folder) == 0 and "unchanged" in capsys.readouterr().out
    assert len(hub.repo(REPO, "dataset").history()) == len(titles)


FAULTS = {
    "an upload is reset": Fault("PUT", "^/upload/", status=None, times=None),
    "an upload is refused": Fault("PUT", "^/upload/", status=403, times=None),
    "the commit of the second shard fails": Fault("POST", "/commit/", status=500, times=None, after=2),
    "the last commit fails": Fault("POST", "/commit/", status=400, times=None, after=3),
    "the list of files fails": Fault("GET", "/tree/", status=503, times=None),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_failure_leaves_no_manifest_and_a_second_run_finishes(hub, built, capsys, monkeypatch, what):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # waits of the client
    first, second = built("first"), built("second", seed=1)
    assert send(first) == 0
    hub.faults = [FAULTS[what]]
    assert send(second) == 3
    error = capsys.readouterr().err.strip().rpartition("\n")[2]  # after the client's progress
    assert error.startswith("error: you/tiles: ") and "run the same command again" in error
    held = files(hub)
    if "list" not in what:  # where nothing was begun, the old one is whole
        assert "manifest.json" not in held
    monkeypatch.undo()
    hub.faults = []
    monkeypatch.setattr(push, "COMMIT_FILES", 1)
    hub.connect(monkeypatch)
    assert send(second) == 0
    held = files(hub)
    manifest = json.loads(held["manifest.json"])
    shards = {file["path"] for split in manifest["splits"].values() for file in split["files"]}
    assert {path for path in held if path.startswith("data/")} == shards  # what the first push had is gone
    assert held["manifest.json"] == (second / "manifest.json").read_bytes()


def test_a_changed_file_is_not_sent(hub, built, capsys):
    folder = built()
    shard = next((folder / "data").iterdir())
    shard.write_bytes(shard.read_bytes() + b"!")
    (folder / "README.md").write_text("mine")
    assert send(folder) == 2 and "is not what was built" in capsys.readouterr().err
    shard.unlink()
    assert send(folder) == 2 and "is missing" in capsys.readouterr().err
    assert not hub.requests


def test_who_may_push_where(hub, built, capsys):
    folder = built()
    for repo, token, status, problem in (
        ("tiles", "hf_you", 2, "has no owner"),
        (REPO, "hf_wrong", 3, "token was not accepted"),
        (REPO, "hf_other", 3, "may not write to you/tiles"),
    ):
        assert main([str(folder), "--repo", repo], HfApi(token=token)) == status
        assert problem in capsys.readouterr().err
    hub.create(REPO, "dataset")
    assert send(folder, "--private") == 2 and "exists and is public" in capsys.readouterr().err
