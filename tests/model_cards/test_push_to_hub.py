"""A checkpoint goes to the Hub as one commit or not at all, and comes back where nobody has this project."""

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import load
from transformers.utils import hub as transformers_hub

from evaluation import run as evaluation_run
from model_cards import staging, upload
from model_cards.checkpoint import read_checkpoint
from model_cards.push_to_hub import MESSAGE, main
from model_cards.redaction import without_paths
from modeling_lrsclip import LRSCLIPModel
from tests import processes
from tests.hub_server import Fault, HubServer


ROOT = Path(__file__).parents[2]
REPO = "you/tiny"
OURS = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
} | {f"{name}.py" for name in ("configuration_lrsclip", "modeling_lrsclip", "position_stretching")}
OURS |= {"image_processing_lrsclip.py", "processing_lrsclip.py"}

# What somebody does who has never heard of this project.
DOWN = """
import runpy, sys
sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor,
                          AutoTokenizer, CLIPModel, pipeline)
# `transformers.AutoImageProcessor` is a stub without torchvision in 5.17
from transformers.models.auto.image_processing_auto import AutoImageProcessor

repo, plain, data, out = sys.argv[1:]
remote = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(repo, **remote).text_config.max_position_embeddings == 248
processor = AutoProcessor.from_pretrained(repo, revision="v1", **remote)
image_processor = AutoImageProcessor.from_pretrained(repo, **remote)
assert type(image_processor).__name__ == "LRSCLIPImageProcessor"
assert AutoTokenizer.from_pretrained(repo, **remote).model_max_length == 248
image = Image.new("RGB", (50, 40), "teal")
inputs = processor(text=["a road \\u2019s end " * 30, "a road"], images=image, return_tensors="pt")
outputs = {}
for name, auto_class, source in (("AutoModel", AutoModel, repo), ("pushed by itself", AutoModel, plain),
                                 ("zero-shot", AutoModelForZeroShotImageClassification, repo)):
    model = auto_class.from_pretrained(source, **remote).eval()
    assert model.__class__.__module__.startswith("transformers_modules."), model.__class__
    outputs[name] = model(**inputs)
stock = CLIPModel.from_pretrained(repo).eval()  # without remote code
assert stock.config.text_config.max_position_embeddings == 248
outputs["CLIPModel"] = stock(**inputs)
scores = pipeline("zero-shot-image-classification", model=repo, **remote)(image, candidate_labels=["sea", "land"])
assert {score["label"] for score in scores} == {"sea", "land"}
features = pipeline("image-feature-extraction", model=repo, **remote)(image, return_tensors=True)
shown = {name: (output.logits_per_image.detach(), output.text_embeds.detach()) for name, output in outputs.items()}
torch.save((dict(inputs), shown, features.detach(), stock.state_dict()), out)

sys.argv = ["evaluate_checkpoint.py", "--data", data]
try:
    runpy.run_path(snapshot_download(repo) + "/evaluate_checkpoint.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
"""


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        server.connect(monkeypatch)
        yield server
        assert not server.unknown and not server.crashes


@pytest.fixture
def commands(monkeypatch):
    """`main` without the waits between attempts, and without the other process, which has tests of its own."""
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr(upload, "time", clock)
    monkeypatch.setattr(upload, "verify", lambda checkpoint, staged: {"text embeddings": 0.0})
    return waits


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """The clean process of `verify` is a fork; in `test_up_and_down_again`, where a process starts it, it is started."""
    monkeypatch.setattr(staging, "subprocess", processes.as_subprocess())


@pytest.fixture
def data(tmp_path, images, long_texts, short_texts):
    folder, rows = tmp_path / "data", []
    folder.mkdir()
    for index, (image, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True)):
        image.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "long_text": long, "short_text": [short, f"{short} Again."]})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def push(checkpoint, *options: str, repo: str = REPO) -> int:
    return main(["--checkpoint", str(checkpoint), "--repo", repo, *options])


def visible(hub: HubServer, repo: str = REPO) -> tuple[list[str], set[str]]:
    """Titles of the commits, newest first, and the files of the last one."""
    return [commit.title for commit in hub.repo(repo).history()], set(hub.repo(repo).files())


# ------------------------------------------------------------------------------------------------------------ up and down


def test_up_and_down_again(hub, tiny_model, tiny_processor, data, tmp_path, monkeypatch):
    checkpoint = tmp_path / "mine" / "final"
    tiny_model.save_pretrained(checkpoint, max_shard_size="150KB")
    tiny_processor.save_pretrained(checkpoint)
    shards = {path.name for path in checkpoint.glob("model*")}
    assert len(shards) > 2
    (checkpoint / "optimizer.bin").write_bytes(b"not for the Hub")
    assert evaluation_run.main(["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path)]) == 0

    command = [sys.executable, "model_cards/push_to_hub.py", "--checkpoint", str(checkpoint), "--repo", REPO]
    command += ["--results", str(tmp_path / "results.json"), "--revision", "v1", "--message", "First"]
    done = processes.run(command, cwd=ROOT, env=hub.environment(tmp_path / "up"))
    assert done.returncode == 0, done.stderr
    stages = ["staging", "staged", "verifying", "verified", "created", "uploading", "tagged", "done"]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[0] != " "] == stages
    titles, files = visible(hub)
    assert titles == ["First", "initial commit"]
    assert files == OURS | shards | {".gitattributes", "results.json", "evaluate_checkpoint.py"}
    assert hub.repo(REPO).refs["refs/tags/v1"] == hub.repo(REPO).refs["refs/heads/main"]
    for name, content in hub.repo(REPO).files().items():
        assert str(tmp_path).encode() not in content, name
    card = ModelCard(hub.repo(REPO).files()["README.md"].decode())
    assert card.data.eval_results and "python evaluate_checkpoint.py --data DATA" in card.text
    results = json.loads(hub.repo(REPO).files()["results.json"])
    assert results["command"].startswith(f"python -m evaluation.run --model {REPO} --data data")
    assert results["models"][0]["path"] == REPO and all("examples" not in result for result in results["results"])

    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # transformers keeps the client of its first call
    tiny_model.push_to_hub("you/plain")
    tiny_processor.push_to_hub("you/plain")
    assert visible(hub, "you/plain") == (
        ["Upload processor", "Upload model", "initial commit"],
        (OURS | {".gitattributes", "model.safetensors"}) - {"SHA256SUMS"},
    )

    out, arguments = tmp_path / "down.pt", [REPO, "you/plain", str(data)]
    environment = hub.environment(tmp_path / "down", token=None)
    down = processes.run([sys.executable, "-c", DOWN, *arguments, str(out)], cwd=tmp_path, env=environment)
    assert down.returncode == 0, down.stderr
    assert "largest difference 0.0000, allowed 0.5: all agree." in down.stdout
    inputs, outputs, features, weights = torch.load(out, weights_only=False)
    expected = tiny_model(**inputs)
    for name, (logits, text_embeds) in outputs.items():
        torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-5, rtol=1e-6, msg=name)
        torch.testing.assert_close(text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-6, msg=name)
    torch.testing.assert_close(features.flatten(), expected.image_embeds.flatten(), atol=1e-5, rtol=1e-6)
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny_model.state_dict().items())


def test_the_same_weights_as_a_stock_clip_beside_it(hub, tiny_checkpoint, tmp_path, capsys):
    (tiny_checkpoint / "notes.txt").write_text("mine")
    assert push(tiny_checkpoint, "--plain-clip", "you/tiny-clip", "--license", "mit") == 0
    output = capsys.readouterr().out
    assert output.count("verified: same token ids and weights") == 2
    plain, files = hub.repo("you/tiny-clip").files(), visible(hub)[1]
    assert files == OURS | {".gitattributes", "model.safetensors"}
    assert not any(name.endswith(".py") for name in plain) and json.loads(plain["config.json"])["model_type"] == "clip"
    assert {"tokenizer.json", "preprocessor_config.json", "SHA256SUMS", "conversion.json"} <= set(plain)
    cards = {repo: ModelCard(hub.repo(repo).files()["README.md"].decode()) for repo in (REPO, "you/tiny-clip")}
    assert "[you/tiny-clip](https://huggingface.co/you/tiny-clip)" in cards[REPO].text
    assert f"[{REPO}](https://huggingface.co/{REPO})" in cards["you/tiny-clip"].text
    assert cards["you/tiny-clip"].data.license == "mit" and cards["you/tiny-clip"].data.base_model == REPO
    weights = load(hub.repo(REPO).files()["model.safetensors"])
    for name, tensor in load(plain["model.safetensors"]).items():
        assert torch.equal(weights[name], tensor), name
    for wrong in (REPO, "tiny-clip"):
        assert push(tiny_checkpoint, "--plain-clip", wrong) == 2
        assert "must be owner/name of another repository" in capsys.readouterr().err


def test_a_dry_run_contacts_nothing(hub, tiny_clip, tiny_processor, tmp_path, capsys):
    """Here of a CLIP folder, which has none of the code."""
    folder = tmp_path / "clip"
    tiny_clip.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    assert push(folder, "--dry-run") == 0
    output = capsys.readouterr().out
    for name in OURS | {"model.safetensors"}:
        assert f"  {name} " in output
    assert "verified: same token ids and weights" in output and "a CLIP for remote-sensing" not in output
    assert "# tiny\n" in output and "not yet measured here" in output and output.endswith("nothing was contacted\n")
    assert not hub.requests and not list(folder.glob("*.py"))


def test_what_does_not_do_the_same_is_not_sent(hub, tiny_checkpoint, capsys):
    code = tiny_checkpoint / "modeling_lrsclip.py"
    code.write_text(code.read_text() + "\nimport something_that_nobody_has\n")
    assert push(tiny_checkpoint, "--trust-checkpoint-code") == 4
    assert "something_that_nobody_has" in capsys.readouterr().err
    processing = tiny_checkpoint / "processing_lrsclip.py"
    code.write_text(code.read_text().replace("\nimport something_that_nobody_has\n", ""))
    processing.write_text(processing.read_text().replace(".strip().lower()", ".strip().lower()[:20]"))
    assert push(tiny_checkpoint, "--trust-checkpoint-code") == 4
    assert "token ids of the staged copy differ" in capsys.readouterr().err
    assert not hub.repos


# --------------------------------------------------------------------------------------------------- an existing repository


def test_the_next_push_replaces_what_the_last_one_left(hub, commands, tiny_model, tiny_processor, tmp_path, capsys):
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    tiny_model.save_pretrained(sharded, max_shard_size="150KB")
    tiny_model.save_pretrained(single)
    for folder in (sharded, single):
        tiny_processor.save_pretrained(folder)
    assert push(sharded) == 0
    theirs = [CommitOperationAdd("notes.md", b"mine"), CommitOperationAdd("old_lrsclip.py", b"")]
    theirs.append(CommitOperationAdd("results.json", b"{}"))
    HfApi().create_commit(REPO, theirs, commit_message="By hand")
    capsys.readouterr()
    assert push(single, "--message", "Whole") == 0
    titles, files = visible(hub)
    assert titles == ["Whole", "By hand", MESSAGE, "initial commit"]
    assert files == OURS | {".gitattributes", "model.safetensors", "notes.md"}
    output = capsys.readouterr().out
    assert all(name in output for name in ("old_lrsclip.py", "results.json", "model-00001-of-", ".index.json"))

    assert push(single) == 0
    assert "unchanged: the repository holds these very files already" in capsys.readouterr().out
    assert len(visible(hub)[0]) == 4


def test_refused_before_anything_is_sent(hub, commands, tiny_checkpoint, tmp_path, capsys):
    assert push(tiny_checkpoint, "--revision", "v1") == 0
    before = len(hub.repo(REPO).commits)
    other = {"models": [{"label": "x", "weights_sha256": "0" * 64}], "results": [], "environment": {}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for options, problem in (
        (["--revision", "v1"], "has a tag v1 already"),
        (["--revision", "v2", "--create-pr"], "once it is merged"),
        (["--private"], "exists and is public"),
        (["--results", str(tmp_path / "other.json")], "not of the weights in"),
        (["--results", str(tmp_path / "none.json")], "cannot be read ("),
    ):
        capsys.readouterr()
        sent = hub.called("PUT", ".") + hub.called("POST", ".")
        assert push(tiny_checkpoint, *options) == 2, options
        error = capsys.readouterr().err
        assert error.startswith("error: ") and problem in error and error.count("\n") == 1, error
        assert hub.called("PUT", ".") + hub.called("POST", ".") == sent
    assert push(tiny_checkpoint, repo="tiny") == 2 and "give owner/name" in capsys.readouterr().err
    assert push(tmp_path, repo=REPO) == 2 and "config.json" in capsys.readouterr().err
    assert len(hub.repo(REPO).commits) == before


def test_private_and_pull_requests(hub, commands, tiny_checkpoint, capsys):
    assert push(tiny_checkpoint, "--private", repo="you/secret") == 0
    assert hub.repo("you/secret").private
    hub.create("other/theirs")
    assert push(tiny_checkpoint, repo="other/theirs") == 3
    assert "propose it with --create-pr" in capsys.readouterr().err
    assert push(tiny_checkpoint, "--create-pr", repo="other/theirs") == 0
    assert capsys.readouterr().out.endswith("other/theirs/discussions/1\n")
    assert visible(hub, "other/theirs") == (["initial commit"], {".gitattributes"})
    assert set(hub.repo("other/theirs").files("refs/pr/1")) == OURS | {".gitattributes", "model.safetensors"}


# ---------------------------------------------------------------------------------------------------------------- faults


def fault(method: str, path: str, status: int | None = 500, times: int | None = 1, perform: bool = False) -> Fault:
    return Fault(method, path, status, times, perform)


@pytest.mark.parametrize(
    "faults",
    [
        [fault("PUT", "^/upload/"), fault("PUT", "^/upload/", None)],
        [fault("POST", "/preupload/"), fault("POST", "/objects/batch$", None), fault("POST", "/objects/verify$")],
        [fault("POST", "/commit/", 503), fault("POST", "/commit/", None)],
        [fault("POST", "/commit/", None, perform=True)],  # carried out, but the answer is lost
    ],
    ids=["upload", "before and after it", "commit", "lost answer"],
)
def test_passing_faults(hub, commands, tiny_checkpoint, faults):
    hub.create(REPO)
    hub.faults = faults
    assert push(tiny_checkpoint, "--revision", "v1") == 0
    assert all(fault.times == 0 for fault in faults)
    titles, files = visible(hub)
    assert titles == [MESSAGE, "initial commit"]  # once
    assert files == OURS | {".gitattributes", "model.safetensors"}
    assert hub.repo(REPO).refs["refs/tags/v1"] == hub.repo(REPO).refs["refs/heads/main"]


@pytest.mark.parametrize(
    ("lasting", "problem"),
    [
        (fault("PUT", "^/upload/", 500, None), "run the same command again later"),
        (fault("PUT", "^/upload/", None, None), "run the same command again later"),
        (fault("PUT", "^/upload/", 403, None), "mend what it names"),
        (fault("POST", "/preupload/", 403, None), "--create-pr"),
        (fault("POST", "/commit/", 500, None), "run the same command again later"),
        (fault("POST", "/commit/", 413, None), "mend what it names"),
    ],
    ids=["500", "reset", "403 of the storage", "403", "commit 500", "commit 413"],
)
def test_lasting_faults(hub, commands, tiny_checkpoint, capsys, lasting, problem):
    HfApi().create_repo(REPO)
    HfApi().create_commit(REPO, [CommitOperationAdd("README.md", b"Before.")], commit_message="Before")
    before = visible(hub)
    hub.faults = [lasting]
    assert push(tiny_checkpoint, "--revision", "v1") == 3
    error = capsys.readouterr().err.split("\n")[-2]  # after the client's progress bars
    assert error.startswith(f"error: {REPO}: ") and problem in error
    assert "Nothing new is to be seen there" in error
    assert visible(hub) == before and hub.repo(REPO).files()["README.md"] == b"Before."
    assert "refs/tags/v1" not in hub.repo(REPO).refs

    hub.faults, hub.requests = [], []
    assert push(tiny_checkpoint, "--revision", "v1") == 0  # a second run finishes
    assert visible(hub) == ([MESSAGE, *before[0]], OURS | {".gitattributes", "model.safetensors"})
    assert hub.called("PUT", ".") == ("/commit/" not in lasting.path)  # what was uploaded is not sent twice


def test_what_is_left_is_told(hub, commands, tiny_checkpoint, capsys):
    def told(*options: str, repo: str = REPO) -> str:
        assert push(tiny_checkpoint, *options, repo=repo) == 3
        return capsys.readouterr().err.split("\n")[-2]

    hub.faults = [fault("PUT", "^/upload/", 403)]
    assert "The repository was made and is empty" in told(repo="you/new")
    assert visible(hub, "you/new") == (["initial commit"], {".gitattributes"})

    hub.create(REPO)
    hub.faults = [fault("POST", "/commit/", None, perform=True)]
    assert f"look at {hub.url}/{REPO}/discussions whether it is open" in told("--create-pr")
    assert "refs/pr/1" in hub.repo(REPO).refs and len(visible(hub)[0]) == 1

    # ... and since then the Hub has been down, so that nobody can tell
    hub.faults = [fault("GET", f"/api/models/{REPO}$", 200, 0), fault("POST", "/commit/", None, perform=True)]
    down = hub.faults[0]

    class Dying(HfApi):
        def create_commit(self, *arguments, **options):
            try:
                return super().create_commit(*arguments, **options)
            finally:
                down.status, down.times = 503, None

    options = ["--checkpoint", str(tiny_checkpoint), "--repo", REPO]
    assert main(options, Dying()) == 3
    error = capsys.readouterr().err.split("\n")[-2]
    assert f"look at {hub.url}/{REPO}/commits/main whether it is there" in error and "no second one" in error
    hub.faults = []
    assert main(options) == 0 and visible(hub)[0] == [MESSAGE, "initial commit"]


def test_a_hub_that_xet_cannot_reach(hub, commands, tiny_checkpoint, capsys, monkeypatch):
    """With `hf_xet` the client does not ask the server how to upload, and fails where only plain HTTP goes through."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.create(REPO)
    assert push(tiny_checkpoint) == 3
    assert "with HF_HUB_DISABLE_XET=1" in capsys.readouterr().err.split("\n")[-2]
    assert visible(hub) == (["initial commit"], {".gitattributes"})
    assert hub.called("GET", "/xet-write-token/") and not hub.called("PUT", ".")


@pytest.mark.parametrize(
    ("token", "problem"), [("hf_wrong", "the token was not accepted"), ("", "no token is known here")]
)
def test_without_a_valid_token(hub, commands, tiny_checkpoint, capsys, monkeypatch, tmp_path, token, problem):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(tiny_checkpoint) == 3
    captured = capsys.readouterr()
    assert problem in captured.err and "hf auth login" in captured.err and "HF_TOKEN" in captured.err
    assert not captured.out and not hub.repos  # seen before the work


def test_somebody_else_commits_meanwhile(hub, commands, tiny_checkpoint, capsys):
    class Slow(HfApi):
        def create_commit(self, *arguments, **options):
            HfApi().create_commit(REPO, [CommitOperationAdd("notes.md", b"!")], commit_message="Meanwhile")
            return super().create_commit(*arguments, **options)

    hub.create(REPO)
    assert main(["--checkpoint", str(tiny_checkpoint), "--repo", REPO], Slow()) == 3
    assert "somebody else committed there meanwhile" in capsys.readouterr().err
    assert visible(hub) == (["Meanwhile", "initial commit"], {".gitattributes", "notes.md"})


def test_a_commit_without_its_tag(hub, commands, tiny_checkpoint, capsys):
    hub.faults = [fault("POST", "/tag/", 500, None)]
    assert push(tiny_checkpoint, "--revision", "v1") == 5
    oid = hub.repo(REPO).refs["refs/heads/main"]
    assert f"hf repos tag create {REPO} v1 --revision {oid}" in capsys.readouterr().err
    assert visible(hub)[0] == [MESSAGE, "initial commit"]


# --------------------------------------------------------------------------------------------------------------- privacy


def test_paths_of_this_machine_stay_here(hub, commands, tiny_checkpoint, tmp_path):
    sha256 = read_checkpoint(tiny_checkpoint).weights_sha256
    home = "/home/nadine/secret"
    loss = {"long_weight": 0.8}
    optim = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    record = {
        "data": {"name": f"{home}/my tiles.jsonl", "kind": "local", "pairs": 4, "captions": {}},
        "weights": {"sha256": sha256, "step": 2},
        "config": {"loss": loss, "optim": optim, "loop": {"batch_size": 4}, "output_dir": f"{home}/runs"},
        **{"steps": 2, "processes": 1, "device": "cpu", "precision": "no", "seconds": 60.0, "versions": {}},
        **{"init": None, "init_run": None, "best": None, "git": None, "files": [f"{home}/a.parquet"]},
    }
    (tiny_checkpoint / "run.json").write_text(json.dumps(record))
    before = copy.deepcopy(record)
    assert push(tiny_checkpoint) == 0
    files = hub.repo(REPO).files()
    assert not [name for name, content in files.items() if b"nadine" in content]
    sent = json.loads(files["run.json"])
    assert sent["data"]["name"] == "my tiles.jsonl" and sent["files"] == ["a.parquet"]
    assert sent["weights"] == before["weights"] and json.loads((tiny_checkpoint / "run.json").read_text()) == before

    command = f"python -m evaluation.run --model {home}/final --data '{home}/my tiles' --output=~/out/x --dtype fp32"
    kept = "https://example.org/a/b, 3/4 of km/h, and/or 1/2, </w>, captions.csv: columns image and text"
    assert without_paths({"a": [command, kept, 5, None]}) == {
        "a": ["python -m evaluation.run --model final --data 'my tiles' --output=x --dtype fp32", kept, 5, None]
    }


def test_a_folder_without_its_code_gets_it(hub, commands, tiny_checkpoint, tiny_model, tmp_path):
    settings = json.loads((tiny_checkpoint / "config.json").read_text())
    del settings["auto_map"]
    (tiny_checkpoint / "config.json").write_text(json.dumps(settings))
    for path in tiny_checkpoint.glob("*.py"):
        path.unlink()
    assert push(tiny_checkpoint) == 0
    assert visible(hub)[1] == OURS | {".gitattributes", "model.safetensors"}
    again = shutil.copytree(tiny_checkpoint, tmp_path / "again")
    (again / "model.safetensors").write_bytes(hub.repo(REPO).files()["model.safetensors"])
    weights = LRSCLIPModel.from_pretrained(again).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny_model.state_dict().items())
