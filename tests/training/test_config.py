"""Mistakes in a configuration are told all at once, with the nearest valid name, before anything loads."""

import re

import pytest

from training.config import TRACKERS
from training.data.pairs import open_data
from training.train import parse_config


def test_file_and_overrides(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: tiles}\nloss: {long_weight: 0.6}\noptim: {learning_rate: 1.0e-5}\n")
    config = parse_config(
        ["--config", str(recipe), "--output_dir", "7", "--optim.learning_rate=3e-4", "--loop.steps", "9"]
    )
    assert (config.output_dir, config.data.train, config.loss.long_weight) == ("7", "tiles", 0.6)
    assert (config.optim.learning_rate, config.loop.steps, config.model.stretch_ratio) == (3e-4, 9, 4)
    assert config.precision == "auto" and config.optim.name == "sgd"


def test_switches():
    config = parse_config(["--resume", "--output_dir", "x", "--data.train", "y", "--data.shuffle_sentences"])
    assert config.resume and config.data.shuffle_sentences and config.output_dir == "x"


def test_what_yaml_would_misread(tmp_path):
    """Patterns of files, dates as folders, and sections whose fields are all commented out."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: tiles}\nloop:\nloss:\n  # long_weight: 0.6\n")
    arguments = ["--config", str(recipe), "--output_dir", "2026-01-31", "--loop.steps", "9"]
    config = parse_config([*arguments, "--data.train", "*.parquet", "--data.validation", "{000..003}.tar"])
    assert (config.output_dir, config.loop.steps, config.loss.long_weight) == ("2026-01-31", 9, 0.8)
    assert (config.data.train, config.data.validation) == ("*.parquet", "{000..003}.tar")
    numbers = parse_config([*arguments, "--data.train", "2024", "--data.validation", "2023"]).data
    assert (numbers.train, numbers.validation, numbers.share) == ("2024", "2023", None)
    recipe.write_text("- data\n")
    with pytest.raises(SystemExit, match="recipe.yaml holds a list; write fields and sections"):
        parse_config(arguments)


def test_every_mistake_at_once():
    with pytest.raises(SystemExit) as caught:
        parse_config(
            [
                "--output_dir",
                "x",
                "--loss.long_weight",
                "1.5",
                "--optim.learning_rat",
                "1e-3",
                "--loop.batch_size",
                "many",
            ]
        )
    message = str(caught.value)
    assert "optim.learning_rat is not a field; did you mean optim.learning_rate?" in message
    assert "loss.long_weight=1.5: input should be less than or equal to 1." in message
    assert "loop.batch_size='many'" in message and "data is not set; it is required." in message


def test_mistakes_of_the_data_are_told_with_the_others(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": "0.png", "longtext": "a", "short_text": "b"}\n')
    (tmp_path / "held_out.jsonl").write_text('{"image": "0.png", "long_text": "a", "short_text": " "}\n')
    arguments = ["--output_dir", "x", "--data.train", str(tmp_path / "train.jsonl")]
    arguments += ["--data.validation", str(tmp_path / "held_out.jsonl")]
    expected = [
        "train.jsonl has no column 'long_text'; .*did you mean 'longtext'",
        "held_out.jsonl has 1 rows with an empty",
    ]
    with pytest.raises(SystemExit) as caught:
        parse_config([*arguments, "--loss.long_weight", "-0.1", "--loop.stepz", "3", "--loop.trackers", "[neptune]"])
    expected += [
        "loss.long_weight=-0.1: ",
        "loop.stepz is not a field; did you mean loop.steps",
        "loop.trackers.0='neptune'",
    ]
    for message in expected:
        assert re.search(message, str(caught.value)), message
    with pytest.raises(ValueError) as caught:  # nothing else is wrong: before the model loads
        config = parse_config(arguments)
        open_data(config.data, config.loss.kinds, batch_size=config.loop.batch_size, seed=0, processes=1)
    assert all(re.search(message, str(caught.value)) for message in expected[:2])


def test_trackers(monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", ("no_such_package",))
    required = ["--output_dir", "x", "--data.train", "y"]
    with pytest.raises(
        SystemExit, match="loop.trackers names wandb, which is not installed; pip install it, or set it to none"
    ):
        parse_config([*required, "--loop.trackers", "wandb"])
    monkeypatch.setitem(TRACKERS, "wandb", ("json",))
    for value, expected in (("wandb", ["wandb"]), ("none", []), ("[tensorboard, wandb]", ["tensorboard", "wandb"])):
        assert parse_config([*required, "--loop.trackers", value]).loop.trackers == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["steps", "3"], "'steps' stands where a --field was expected"),
        (["--loop.steps"], "--loop.steps has no value"),
        (["--loop.steps", "--resume"], "--loop.steps has no value"),
        (
            ["--output_dir", "x", "--data.train", "y", "--model.text", "{hiden_size: 32}"],
            "hiden_size .* did you mean hidden_size",
        ),
        (
            [
                "--output_dir",
                "x",
                "--data.train",
                "y",
                "--loss.short_text",
                "first_sentence",
                "--loss.long_weight",
                "1",
            ],
            "loss.short_text is first_sentence and loss.long_weight is 1, which leaves one of the two texts out",
        ),
        (
            ["--output_dir", "x", "--data.train", "y", "--loss.long_weight.start", "2"],
            "loss.long_weight.start=2: input should be less than or equal to 1",
        ),
        (
            ["--output_dir", "x", "--data.train", "y", "--loss.long_weight.begin", "1"],
            "loss.long_weight.begin is not a field; did you mean loss.long_weight",
        ),
        (
            ["--output_dir", "x", "--data.train", "y", "--loss.long_weight", "{start_share: 0.7, end_share: 0.7}"],
            "loss.long_weight.start_share and end_share are 0.7 and 0.7, together more than the whole run",
        ),
        (["--output_dir", "x", "--data.train", "y", "--loss.chunk_size", "0"], "loss.chunk_size=0: .* greater than"),
        (
            ["--output_dir", "x", "--data.train", "y", "--loop.validate_every", "5", "--loop.patience", "2"],
            "loop.patience is set and data.validation is not; set both",
        ),
        (
            ["--output_dir", "x", "--output_dir.sub", "3"],
            "The configuration has mistakes:\n  output_dir.sub: output_dir is a single value",
        ),
        (["--output_dir", "x", "--data.train", "y", "--model.init", "scratch"], "model.tokenizer is not set"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(SystemExit, match=message):
        parse_config(arguments)


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "loss.long_weight" in printed and "float | Curriculum, default 0.8" in printed and "data.train" in printed
