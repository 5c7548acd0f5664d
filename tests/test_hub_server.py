"""The test Hub, driven by the unmodified client: what it keeps, shows and refuses is what the real one does."""

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import Fault, HubServer


WEIGHTS = b"\0weights\1" * 4000


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        server.connect(monkeypatch)
        yield server
        assert not server.unknown and not server.crashes


@pytest.fixture
def api(hub):
    return HfApi(token="hf_you")


def push(api: HfApi, name: str = "you/tiny", kind: str = "model", **options):
    api.create_repo(name, repo_type=kind, exist_ok=True)
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "deep/er/notes.txt": b"deep"}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(name, operations, commit_message="All", repo_type=kind, **options)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_up_and_down(hub, api, kind, tmp_path):
    assert api.whoami()["name"] == "you"
    oid = push(api, kind=kind).oid
    assert [commit.title for commit in hub.repo("you/tiny", kind).history()] == ["All", "initial commit"]
    assert hub.called("PUT", "^/upload/") == hub.called("POST", r"\.git/info/lfs/objects/verify$") == 1

    files = {".gitattributes", "config.json", "model.safetensors", "deep/er/notes.txt"}
    assert set(api.list_repo_files("you/tiny", repo_type=kind)) == files
    info = api.repo_info("you/tiny", repo_type=kind, files_metadata=True)
    (weights,) = [file for file in info.siblings if file.lfs]
    assert info.sha == oid and weights.size == len(WEIGHTS) and weights.rfilename == "model.safetensors"
    top = {entry.path for entry in api.list_repo_tree("you/tiny", repo_type=kind)}
    assert top == {".gitattributes", "config.json", "model.safetensors", "deep"}
    (config,) = api.get_paths_info("you/tiny", ["config.json"], repo_type=kind)
    assert config.size == 2

    folder = api.snapshot_download("you/tiny", repo_type=kind, cache_dir=tmp_path)
    down = {path: (tmp_path / folder / path).read_bytes() for path in files}
    assert down == hub.repo("you/tiny", kind).files()
    again = push(api, kind=kind)  # nothing has changed: no second commit
    assert again.oid == oid and len(hub.repo("you/tiny", kind).history()) == 2
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("you/tiny", "missing.txt", repo_type=kind, cache_dir=tmp_path)
    api.delete_repo("you/tiny", repo_type=kind)
    assert not api.repo_exists("you/tiny", repo_type=kind)


def test_revisions_and_pull_requests(hub, api, tmp_path):
    first = push(api).oid
    api.create_tag("you/tiny", tag="v1")
    api.create_branch("you/tiny", branch="next")
    delete = [CommitOperationDelete("config.json"), CommitOperationDelete("deep/")]
    api.create_commit("you/tiny", delete, commit_message="Less", revision="next")
    opened = api.create_commit("you/tiny", delete[:1], commit_message="Please", create_pr=True)
    assert opened.pr_url == f"{hub.url}/you/tiny/discussions/1" and opened.pr_num == 1
    assert api.get_discussion_details("you/tiny", 1).is_pull_request

    refs = api.list_repo_refs("you/tiny", include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "next"} and refs.tags[0].target_commit == first
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    listed = {name: set(api.list_repo_files("you/tiny", revision=name)) for name in ("v1", "next", "refs/pr/1")}
    assert listed["next"] == {".gitattributes", "model.safetensors"}
    assert listed["v1"] - listed["refs/pr/1"] == {"config.json"} and listed["v1"] == set(hub.repo("you/tiny").files())
    assert [commit.title for commit in api.list_repo_commits("you/tiny", revision="next")][0] == "Less"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("you/tiny", tag="v1")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("you/tiny", delete[:1], commit_message="Late", revision="next", parent_commit=first)
    with pytest.raises(EntryNotFoundError):
        api.create_commit("you/tiny", [CommitOperationDelete("none")], commit_message="None")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("you/tiny", "config.json", revision="v9", cache_dir=tmp_path)
    api.delete_tag("you/tiny", tag="v1")
    api.delete_branch("you/tiny", branch="next")
    assert set(hub.repo("you/tiny").refs) == {"refs/heads/main", "refs/pr/1"}


def test_who_may_do_what(hub, api):
    push(api)
    hub.create("you/secret", private=True)
    other, nobody = HfApi(token="hf_other"), HfApi(token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").create_repo("you/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        other.create_repo("you/new")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(other)
    change = [CommitOperationAdd("config.json", b"{} ")]
    assert other.create_commit("you/tiny", change, commit_message="Please", create_pr=True).pr_num == 1
    for stranger in (other, nobody):
        assert stranger.repo_exists("you/tiny")
        with pytest.raises(RepositoryNotFoundError):
            stranger.repo_info("you/secret")
    assert api.repo_info("you/secret").private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("you/tiny")


def test_a_card_with_bad_metadata_is_refused(hub, api):
    api.create_repo("you/tiny")
    card = ModelCard(f"---\n{ModelCardData(license='mit').to_yaml()}\n---\nText.")
    target = {"path_in_repo": "README.md", "repo_id": "you/tiny"}
    api.upload_file(path_or_fileobj=str(card).encode(), **target)
    for metadata in ("license: [", "license: 3", "model-index:\n- results: []"):
        with pytest.raises((ValueError, HfHubHTTPError), match="metadata|license|model-index"):
            api.upload_file(path_or_fileobj=f"---\n{metadata}\n---\n".encode(), **target)
    assert hub.repo("you/tiny").files()["README.md"] == str(card).encode()


def test_faults(hub, api, tmp_path):
    hub.faults = [Fault("PUT", "^/upload/"), Fault("PUT", "^/upload/", status=None)]
    push(api)  # the client tries an upload six times
    assert [status for method, path, status in hub.requests if method == "PUT"] == [500, None, 200]
    hub.faults = [Fault("POST", "/commit/", status=None, perform=True)]
    with pytest.raises(Exception, match="disconnected|reset|closed"):  # but not a commit
        api.create_commit("you/tiny", [CommitOperationDelete("config.json")], commit_message="Lost")
    assert "config.json" not in hub.repo("you/tiny").files()  # it was done, though nobody was told

    hub.tampered["model.safetensors"] = lambda content: content[:-1]
    with pytest.raises(OSError, match="should be of size"):
        api.hf_hub_download("you/tiny", "model.safetensors", cache_dir=tmp_path)
    hub.tampered["model.safetensors"] = lambda content: content[:-1] + b"!"
    path = api.hf_hub_download("you/tiny", "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:  # the client looks at the size only
        assert file.read() == WEIGHTS[:-1] + b"!"
