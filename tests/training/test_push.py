"""A run pushes its models through the project's own command to a Hub on loopback, and survives a Hub that refuses."""

import json
import re
import shlex

import pytest

from tests import processes
from tests.hub_server import Fault, HubServer
from training import push as push_module
from training.push import PushConfig, measure_command, push_command
from training.run import run
from training.train import parse_config


REPO = "you/mine"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(push_module, "subprocess", processes.as_subprocess())
        yield server
        assert not server.unknown and not server.crashes


def arguments(run_arguments, captioned_folder, *options: str) -> list[str]:
    pushed = ["--push_to_hub", "--push.repo", REPO, "--push.private", "true", "--push.license", "apache-2.0"]
    return [*run_arguments, "--data.validation", str(captioned_folder / "captions.jsonl"), *pushed, *options]


def test_after_training_with_what_was_measured(hub, run_arguments, captioned_folder, capsys):
    final = run(parse_config(arguments(run_arguments, captioned_folder, "--push.measure", "true")))
    repo = hub.repo(REPO)
    assert repo.private
    assert [commit.title for commit in repo.history()] == ["final of a run, step 4", "initial commit"]
    files = repo.files()
    assert {"model.safetensors", "README.md", "results.json"} <= files.keys()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(final) and any(f"pushing {final} to {REPO}: done: " in line for line in lines)
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and "4 steps" in card and "not yet measured here" not in card.split("## ")[0]
    measured = json.loads(files["results.json"])["models"]
    assert str(final.parent) not in files["results.json"].decode() and measured


def test_a_hub_that_refuses(hub, run_arguments, captioned_folder, capsys):
    """Each new best model and the final one are tried; the run ends as if nothing had happened."""
    hub.faults.append(Fault("GET", "/api/whoami", 401, times=None))
    final = run(parse_config(arguments(run_arguments, captioned_folder, "--push.every", "validation")))
    out = capsys.readouterr().out
    assert (final / "model.safetensors").exists() and out.splitlines()[-1] == str(final)
    best = final.parent / "best"
    assert json.loads((best / "run.json").read_text())["weights"]["step"] == 4
    for folder in (best, final):
        # Refused (3), or on a machine so busy that the client gives up first: `tests/model_cards` tells which is which.
        assert re.search(
            rf"note: pushing {folder} to {REPO} failed \(exit status \d: error: .+\)\. Nothing of the", out
        )
        command = push_command(
            PushConfig(repo=REPO, private=True, license="apache-2.0"), folder, f"{folder.name} of a run, step 4"
        )
        assert f"\n  {shlex.join(command)}\n" in out
    assert not hub.repos


def test_what_takes_too_long_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(push_module, "LONGEST_PUSH", 0.2)
    command = [push_module.sys.executable, "-c", "import time; time.sleep(60)"]
    assert push_module.carry_out(command, "sleeping", said.append) is False
    assert said[0].startswith("note: sleeping failed (it took more than 0.2 s)") and said[0].endswith(
        shlex.join(command)
    )


def test_no_token_is_told_at_the_start(monkeypatch):
    said = []
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    push_module.look_for_a_token(said.append)
    assert not said
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    push_module.look_for_a_token(said.append)
    assert "hf auth login" in said[0]


def test_a_launcher_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("HF_TOKEN", "kept")
    said = []
    words = "import os; print(sorted({'RANK', 'ACCELERATE_USE_FSDP', 'HF_TOKEN'} & os.environ.keys()))"
    assert push_module.carry_out([push_module.sys.executable, "-c", words], "looking", said.append)
    assert said == ["looking: ['HF_TOKEN']"]


def test_mistakes(run_arguments):
    for options, message in (
        (["--push_to_hub"], "push.repo is not; name a repository, as owner/name"),
        (["--push.repo", "mine"], "push.repo='mine'"),
        (["--push_to_hub", "--push.repo", REPO, "--push.every", "validation"], "need data.validation"),
        (
            [
                "--push_to_hub",
                "--push.repo",
                REPO,
                "--push.measure",
                "true",
                "--data.validation",
                "[a.jsonl, b.jsonl]",
            ],
            "push.measure takes one data.validation, not a list",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            parse_config([*run_arguments, *options])


def test_commands(tmp_path):
    words = push_command(PushConfig(repo=REPO, private=True), tmp_path, "m", tmp_path / "results.json")
    assert words[-1] == "--private" and words[words.index("--results") + 1] == str(tmp_path / "results.json")
    assert json.dumps(measure_command(tmp_path, "d.jsonl", tmp_path / "r")).count("zcrl,zcrs") == 1
