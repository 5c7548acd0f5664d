"""`run.json` says what a model was trained on, and belongs to the weights it lies beside."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import rasterio
from PIL import Image
from transformers import AutoModel

import evaluation.run
from evaluation.tasks import trained_images
from model_cards.result_tables import eval_results
from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.files.hashing import weights_sha256
from training import train
from training.run_folder import RunRecord, check_run_folder, git_state, read_record, versions
from training.run_log import draw_curves


def test_a_run_leaves_its_record(run_arguments, captioned_folder, tmp_path, capsys, monkeypatch):
    arguments = [*run_arguments, "--data.validation", str(captioned_folder), "--data.validation_pairs", "8"]
    train.main(arguments)
    folder = tmp_path / "run"
    record = json.loads((folder / "final" / "run.json").read_text())
    assert record == json.loads((folder / "run.json").read_text())
    assert record["init"] is None and record["init_run"] is None
    data = record["data"]
    assert (data["name"], data["kind"], data["pairs"]) == (str(captioned_folder), "local", 12)
    assert data["captions"].keys() == {"long_text", "short_text"}
    assert data["captions"]["long_text"]["mean_tokens"] > data["captions"]["short_text"]["mean_tokens"] > 2
    assert data["captions"]["long_text"]["share_truncated"] == 0
    assert record["validation"]["pairs"] == 8
    assert (record["steps"], record["processes"], record["device"], record["precision"]) == (4, 1, "cpu", "fp32")
    assert record["seconds"] > 0 and record["versions"] == versions()
    assert record["config"]["optim"]["learning_rate"] == 1e-3

    best = json.loads((folder / "best" / "run.json").read_text())
    assert best["best"] == record["best"] and best["weights"]["step"] == record["best"]["step"]
    for content in (record, best):
        weights = folder / ("final" if content is record else "best")
        assert content["weights"]["sha256"] == weights_sha256(
            sorted(AutoModel.from_pretrained(weights).state_dict().items())
        )
    assert not list(folder.rglob(".run.json*"))

    finish = RunRecord.finish
    monkeypatch.setattr(RunRecord, "finish", lambda *args: (shutil.rmtree(folder / "best"), finish(*args)))
    train.main([*arguments, "--resume", "true"])
    assert f"note: {folder / 'best'} of step {best['best']['step']} is no longer there" in capsys.readouterr().out


def test_a_run_that_starts_from_another_carries_its_record(run_arguments, tmp_path):
    train.main(run_arguments)
    first = json.loads((tmp_path / "run" / "final" / "run.json").read_text())
    assert first["validation"] is None and first["best"] is None and not (tmp_path / "run" / "best").exists()
    more = ["--output_dir", str(tmp_path / "second"), "--model.init", str(tmp_path / "run" / "final")]
    unset = {"--model.tokenizer", "--model.text", "--model.vision"}
    again = [word for pair in zip(run_arguments[::2], run_arguments[1::2]) if pair[0] not in unset for word in pair]
    train.main([*again, *more])
    second = json.loads((tmp_path / "second" / "run.json").read_text())
    assert second["init"] == {"name": str(tmp_path / "run" / "final"), "kind": "local"}
    assert second["init_run"] == first
    assert second["weights"]["sha256"] != first["weights"]["sha256"]


def test_what_was_trained_on_is_no_test(run_arguments, captioned_folder, tmp_path, capsys):
    """Marked by its images, wherever the file with them lies and whatever it is called; other images are not."""
    train.main([*run_arguments, "--loop.steps", "1"])
    model = tmp_path / "run" / "final"
    more = [*run_arguments, "--loop.steps", "1", "--data.train", str(tmp_path / "new"), "--model.init", str(model)]
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for name, count in (("copied", 5), ("new", 0)):  # images of the training data beside new ones
        folder = tmp_path / name
        folder.mkdir()
        for index, row in enumerate(rows):
            picture = captioned_folder / row["image"]
            content = picture.read_bytes()
            (folder / f"other-{index}.png").write_bytes(content)
            if index >= count:
                Image.open(picture).rotate(90).save(folder / f"other-{index}.png")
        other = [row | {"image": f"other-{index}.png"} for index, row in enumerate(rows)]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, other)))
    capsys.readouterr()
    data = [str(tmp_path / "copied"), str(tmp_path / "new")]
    command = ["--model", str(model), "--tasks", "zcrs", "--data", *data, "--output", str(tmp_path / "results")]
    assert evaluation.run.main([*command, "--cache", "none", "--device", "cpu"]) == 0
    copied, new = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    sentence = "copied: the model was trained on at least 5 of its 12 images (its run.json), so this is no test"
    assert copied["seen"] == sentence and "seen" not in new
    printed, table = capsys.readouterr().out, (tmp_path / "results" / "results.md").read_text()
    assert printed.count("seen in training") == 1 and f"† seen, not zero-shot: {sentence}." in table
    assert " ".join(printed.split()).count(sentence) == 1
    assert [entry.metric_value for entry in eval_results([copied])] == [] and eval_results([new])

    unset = {"--model.tokenizer", "--model.text", "--model.vision", "--model.vocab_size", "--model.projection_dim"}
    again = [word for pair in zip(more[::2], more[1::2]) if pair[0] not in unset for word in pair]
    train.main([*again, "--output_dir", str(tmp_path / "second")])
    second = load_encoder(str(tmp_path / "second" / "final"))
    assert len(trained_images(second)) == 24, "those of the run that it started from too"


@pytest.mark.parametrize("dark", [False, True])
def test_16_bits_are_recorded_and_black_images_said(run_arguments, captioned_folder, tmp_path, capsys, dark):
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for index in range(12):
        levels = np.asarray(Image.open(captioned_folder / f"{index}.png")).astype(np.uint16) * (0 if dark else 12)
        shape = {"height": 36, "width": 40, "count": 3, "dtype": "uint16"}
        with rasterio.open(tiles / f"{index}.tif", "w", driver="GTiff", **shape) as file:
            file.write(levels.transpose(2, 0, 1))
    text = (captioned_folder / "captions.jsonl").read_text().replace(".png", ".tif")
    (tiles / "captions.jsonl").write_text(text)
    train.main([*run_arguments, "--data.train", str(tiles), "--loop.steps", "1"])
    record = json.loads((tmp_path / "run" / "final" / "run.json").read_text())
    kind = {"bits": 16, "bands": 3, "stretch": "percentiles 2-98", "images": 12}
    assert record["data"]["imagery"] == {"sampled": 12, "dark": 12 if dark else 0, "kinds": [kind]}
    printed = capsys.readouterr().out
    assert "12 of 12 images looked at have 16 bits and 3 bands; they are read as RGB (percentiles 2-98)" in printed
    assert ("warning: 12 of 12 images of data.train looked at are nearly black" in printed) == dark


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", str(tmp_path), *words], check=True, capture_output=True)

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["modified"] is False
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == state | {"modified": True}


def test_one_validation_is_drawn_as_bars_and_several_as_curves(tmp_path):
    records = [{"kind": "train", "step": step, "loss": 2 - step / 10} for step in range(3)]
    validation = {"kind": "validation", "step": 3, "mR": 80.0}
    dark = []
    for count in (1, 2):
        path = draw_curves(
            records + [validation | {"step": 3 + number} for number in range(count)], tmp_path / "c.png"
        )
        with Image.open(path) as picture:
            right = picture.convert("L").crop((picture.width // 2, 0, picture.width, picture.height))
        dark.append(sum(right.histogram()[:80]))
    assert dark[0] > 5 * dark[1]  # a bar covers more than a line with two dots


@pytest.mark.parametrize("content", ["", '{"starts": [', "[]"])
def test_a_record_that_is_none_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json cannot be read .*remove it"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", ["", "- 1", "a: ["])
def test_a_configuration_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml "):
        check_run_folder(tmp_path, {}, resume=True)
