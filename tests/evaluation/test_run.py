"""The command from its arguments to its files, and its errors."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from evaluation import run
from evaluation.benchmarks.aerial_scenes import data_set as aerial_scenes
from evaluation.results import Column, Table, make_console, markdown, print_table
from evaluation.retrieval import LAST_BAR, LONGEST_EXAMPLE, TOKEN_BIN, retrieval_recall
from evaluation.tasks import TASKS, prepare_output
from modeling_lrsclip.encoding import embed_images, embed_texts
from modeling_lrsclip.files.atomic import replace_json
from modeling_lrsclip.files.locks import only_process
from modeling_lrsclip.published.registry import MODELS, ModelSource, label_models
from tests import processes
from tests.modeling_lrsclip.references import published_state
from tests.modeling_lrsclip.source_files import write_source


@pytest.fixture
def data(tmp_path, images, long_texts, short_texts):
    folder = tmp_path / "tiles"
    folder.mkdir()
    rows = []
    for index, (image, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True)):
        image.save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "long_text": f"{long} {long}", "short_text": short}))
    (folder / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "captions.jsonl"


@pytest.fixture
def clip_checkpoint(tiny_clip, tiny_processor, tmp_path):
    folder = tmp_path / "tiny-clip"
    tiny_clip.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def arguments(models, data, output, *more):
    return ["--model", *map(str, models), "--data", str(data), "--output", str(output), "--device", "cpu", *more]


def test_two_models_on_both_tasks(
    clip_checkpoint, tiny_checkpoint, tiny_model, tiny_processor, images, data, tmp_path, capsys
):
    output = tmp_path / "new" / "results"
    models = [clip_checkpoint, tiny_checkpoint]
    assert run.main(arguments(models, data, output, "--tasks", "zcrl,zcrs", "--tokens-kept", "20,77,100")) == 0

    document = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [model["positions"] for model in document["models"]] == [77, 248]
    assert [(result["model"], result["task"]) for result in document["results"]] == [
        (model, task) for model in ("tiny-clip", "tiny-lrsclip") for task in ("zcrl", "zcrs")
    ]
    clip, ours = (result for result in document["results"] if result["task"] == "zcrl")
    assert clip["share_truncated"] == 1 and ours["share_truncated"] == 0
    assert [point["tokens"] for point in clip["curve"]] == [20, 77]
    assert [point["tokens"] for point in ours["curve"]] == [20, 77, 100, 248]
    texts = [json.loads(line)["long_text"] for line in data.read_text(encoding="utf-8").splitlines()]
    image_embeds = embed_images(tiny_model, tiny_processor, images)
    for point in ours["curve"]:
        embeds = embed_texts(tiny_model, tiny_processor, texts, max_tokens=point.pop("tokens"))
        assert point == retrieval_recall(image_embeds, embeds, range(4))
    assert ours["metrics"] == ours["curve"][-1]
    assert {len(ranks) for ranks in ours["ranks"].values()} == {4}

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-5])) <= 100
    assert "tiny-clip" in printed and str(output / "retrieval_gallery.png") in printed
    assert "| tiny-lrsclip | 248 |" in (output / "results.md").read_text(encoding="utf-8")
    for name in ("recall_vs_tokens.png", "retrieval_gallery.png"):
        assert min(Image.open(output / name).size) > 500
    assert [path.name for path in output.glob(".*")] == [".lock"]


def test_how_images_were_read_is_said_and_recorded(tiny_checkpoint, data, images, tmp_path, capsys):
    for index, image in enumerate(images):
        levels = np.asarray(image.convert("L")).astype(np.uint16) * 40
        Image.fromarray(levels).save(data.parent / f"{index}.tif")
    data.write_text(data.read_text().replace(".png", ".tif"))
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "out", "--tasks", "zcrs")) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    kind = {"bits": 16, "bands": 1, "stretch": "percentiles 2-98", "images": 4}
    assert result["imagery"]["kinds"] == [kind]
    assert "4 of 4 images looked at have 16 bits and 1 bands; they are read as RGB" in capsys.readouterr().out


def test_images_are_encoded_once_for_both_tasks(tiny_checkpoint, data, tmp_path, monkeypatch):
    import modeling_lrsclip.encoding.encoder as encoding

    calls = []
    original = encoding.embed_images
    monkeypatch.setattr(encoding, "embed_images", lambda *inputs: calls.append(len(inputs[2])) or original(*inputs))
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "out", "--tokens-kept", "none")) == 0
    assert calls == [4]
    assert not (tmp_path / "out" / "recall_vs_tokens.png").exists()


def test_bfloat16_is_recorded(tiny_checkpoint, data, tmp_path):
    assert run.main(arguments([tiny_checkpoint], data, tmp_path, "--tasks", "zcrs", "--dtype", "bf16")) == 0
    assert json.loads((tmp_path / "results.json").read_text())["models"][0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--tasks", "zrcl"], "unknown task 'zrcl'; --tasks takes zcrl, zcrs, zic, selo or all. Did you mean zcrl?"),
        (["--tasks", ","], "no task given"),
        (["--tokens-kept", "20,x"], "--tokens-kept '20,x' must be whole numbers"),
        (["--tokens-kept", "1"], "--tokens-kept 1 must be at least 2"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--workers", "-1"], "--workers -1 must be at least 0"),
        (["--allow-missing", "-1"], "--allow-missing -1 must be at least 0"),
        (["--templates", "papier"], "template"),
        (["--tasks", "selo"], "captions.jsonl"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_checkpoint, data, tmp_path, capsys, more, problem):
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and problem in printed and printed.count("\n") == 1


def test_missing_models_and_output_are_named_before_anything_is_loaded(tiny_checkpoint, data, tmp_path, capsys):
    assert run.main(arguments([tiny_checkpoint, tmp_path / "none"], data, tmp_path / "out")) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert run.main(arguments([tmp_path], data, tmp_path / "out")) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert run.main(arguments([tiny_checkpoint] * 2, data, tmp_path / "out")) == 2
    assert "given twice" in capsys.readouterr().err
    assert run.main(arguments([tiny_checkpoint], data, data / "below-a-file")) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert run.main(arguments([tiny_checkpoint], tmp_path / "no.jsonl", tmp_path / "out")) == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err


def test_what_was_measured_stays_when_a_later_model_fails(tiny_checkpoint, clip_checkpoint, data, tmp_path, capsys):
    (clip_checkpoint / "model.safetensors").write_bytes(b"broken")
    assert run.main(arguments([tiny_checkpoint, clip_checkpoint], data, tmp_path / "out", "--tasks", "zcrs")) == 2
    assert "tiny-clip: not loadable" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == 1


def test_labels_take_parents_until_they_differ(tmp_path):
    named = MODELS["long-clip-vit-b-16"]
    assert label_models([ModelSource("a/last"), ModelSource("b/last")]) == ["a/last", "b/last"]
    assert label_models([ModelSource("runs/a/final"), ModelSource("x.pt", named)]) == ["a", named.name]
    assert label_models([ModelSource("a/x.pt", named), ModelSource("b/x.pt", named)]) == ["a/x.pt", "b/x.pt"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn scenes, and one canvas with regions."""
    folder = tmp_path_factory.mktemp("drawn") / "scenes"
    aerial_scenes.main([str(folder), "--scenes", "8", "--test-scenes", "24", "--image-size", "256", "--canvases", "1"])
    return folder


def test_all_tasks_on_drawn_scenes(tiny_checkpoint, scenes, tmp_path, capsys):
    assert run.main(arguments([tiny_checkpoint], scenes, tmp_path, "--cache", str(tmp_path / "kept"))) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "results.json").read_text())
    assert [result["task"] for result in document["results"]] == ["zcrl", "zcrs", "zic", "selo"]
    for result in document["results"]:
        for metric, value in result["metrics"].items():
            low, high = result["intervals"][metric]
            assert low <= value <= high, (result["task"], metric)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(result["metrics"]) for result in document["results"])
    for title in ("(ZCRL)", "(ZCRS)", "(ZIC)", "(SeLo)"):
        assert title in printed and title in (tmp_path / "results.md").read_text()
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        "recall_vs_tokens.png", "token_lengths.png", "retrieval_gallery.png", "token_lengths-zcrs.png",
        "retrieval_gallery-zcrs.png", "confusion_matrix.png", "localization.png",
    }  # fmt: skip

    again = tmp_path / "again"
    more = ["--tasks", "zcrl,zcrs,zic", "--cache", str(tmp_path / "kept")]
    assert run.main(arguments([tiny_checkpoint], scenes, again, *more)) == 0
    for first, second in zip(document["results"], json.loads((again / "results.json").read_text())["results"]):
        assert {**first, "seconds": None} == {**second, "seconds": None}
        assert first["seconds"]["images"] == second["seconds"]["images"]  # those that were paid


def test_a_task_without_data_is_left_out_of_all(tiny_checkpoint, data, tmp_path, capsys):
    assert run.main(arguments([tiny_checkpoint], data, tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "zic is left out: " in printed and "selo is left out: " in printed
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 2


def test_a_source_that_no_task_can_use(tiny_checkpoint, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    options = ["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]
    assert run.main([*options, "--data", str(data), str(tmp_path / "empty")]) == 2
    assert f"--data {tmp_path / 'empty'} holds nothing for zcrl, zcrs, zic, selo" in capsys.readouterr().err
    assert run.main([*options, "--data", str(data), str(data)]) == 2
    assert "twice" in capsys.readouterr().err


def test_a_published_file_under_its_models_name(tiny_tokenizer, data, tmp_path, capsys):
    state = published_state(len(tiny_tokenizer), 248)
    path = write_source("zip", state, tmp_path).rename(tmp_path / "LRSCLIP_ViT-B-16.pt")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = ["--tasks", "zcrs", "--tokenizer", str(tmp_path / "tokenizer")]
    assert run.main(arguments([path], data, tmp_path / "out", *more)) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["models"][0]["label"] == "lrsclip-vit-b-16"
    assert document["models"][0]["model_class"] == "LRSCLIPModel"
    assert "Not compared with the paper" not in capsys.readouterr().out  # this is no data of the paper's

    (tmp_path / "other.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert run.main(arguments([tmp_path / "other.pt"], data, tmp_path / "out", *more)) == 2
    assert "other.pt" in capsys.readouterr().err


def test_the_table_is_readable_in_80_columns():
    columns = [Column("model"), *(Column(f"R@{k}", "text to image", 1, True) for k in (1, 5, 10)), Column("mR", "", 1)]
    table = Table("Title", columns, [["a", 1.0, 2.0, 100.0, 3.0], ["b", None, 2.5, 1.0, 3.25]], "A note.")
    file = io.StringIO()
    print_table(make_console(file), table)
    lines = file.getvalue().splitlines()
    assert lines[2].split() == ["text", "to", "image"]
    assert lines[3].split() == ["model", "R@1", "R@5", "R@10", "mR"]
    assert lines[6].split() == ["b", "–", "2.5", "1.0", "3.2"]
    assert "\x1b" not in file.getvalue()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    print_table(console, table)
    assert "\x1b[1m2.5" in console.file.getvalue()  # the best in bold
    assert "| b | – | **2.50** | 1.00 | 3.25 |" in markdown(table)


def test_json_keeps_lists_of_numbers_on_a_line(tmp_path):
    document = {"ranks": [1, 2, 30], "text": "[1,  2]", "curve": [{"tokens": 20}]}
    replace_json(tmp_path / "a.json", document)
    assert '"ranks": [1, 2, 30]' in (tmp_path / "a.json").read_text()
    assert json.loads((tmp_path / "a.json").read_text()) == document
    with pytest.raises(ValueError):
        replace_json(tmp_path / "a.json", {"mR": float("nan")}, allow_nan=False)
    assert json.loads((tmp_path / "a.json").read_text()) == document


def test_two_processes_report_what_one_does(tiny_checkpoint, data, tmp_path):
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "one")) == 0
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--mixed_precision", "no", "--main_process_port", "0", "--dynamo_backend", "no", "-m", "evaluation.run"]
    command = [sys.executable, *launch, *options, *arguments([tiny_checkpoint], data, tmp_path / "two")]
    done = processes.run(command, project=True)  # the launcher; it starts the two
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Long-text retrieval (ZCRL)") == 2  # once as a heading, once over the tokens kept
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["results"], two["results"], strict=True):
        assert {**first, "seconds": None} == {**second, "seconds": None}


def test_each_task_takes_the_sources_that_hold_its_data(tiny_checkpoint, data, tmp_path, capsys):
    tiles = tmp_path / "classes"
    for name in ("lake", "road"):
        (tiles / name).mkdir(parents=True)
        shutil.copy(data.parent / "0.png", tiles / name / "0.png")
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(data.parent / "0.png", small / "0.png")
    region = {"image": "0.png", "text": "a road", "polygons": [[[0, 0], [9, 0], [9, 9]]]}
    (small / "localization.jsonl").write_text(json.dumps(region))
    assert run.main(["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out"), "--data", str(data), str(tiles), str(small)]) == 0  # fmt: skip
    tasks = [result["task"] for result in json.loads((tmp_path / "out" / "results.json").read_text())["results"]]
    assert tasks == ["zcrl", "zcrs", "zic"]
    assert f"selo leaves out {small}" in " ".join(capsys.readouterr().out.split())


def test_a_line_without_its_caption_is_named(tiny_checkpoint, data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], lines[1].replace("long_text", "other"), *lines[2:]]))
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "out")) == 2
    assert f"{data}, line 2" in capsys.readouterr().err


def test_a_word_without_end_is_measured_and_drawn_as_far_as_it_is_read(tiny_checkpoint, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["long_text"] += " and" + "ab" * 100_000
    data.write_text("\n".join(map(json.dumps, rows)))
    assert run.main(arguments([tiny_checkpoint], data, tmp_path / "results", "--tasks", "zcrl")) == 0
    (result,) = json.loads((tmp_path / "results/results.json").read_text())["results"]
    histogram = result["tokens"]["histogram"]
    assert result["tokens"]["longest"] > 100_000 and len(histogram) == LAST_BAR // TOKEN_BIN + 1
    assert histogram[-1] == 1 and sum(histogram) == 4
    shown = result["examples"][0]["text"]
    assert (
        shown == rows[0]["long_text"][:LONGEST_EXAMPLE] + " …"
        and result["examples"][1]["text"] == rows[1]["long_text"]
    )


def test_two_evaluations_do_not_write_one_folder(tiny_checkpoint, data, tmp_path, capsys):
    command = arguments([tiny_checkpoint], data, tmp_path / "out", "--tasks", "zcrs", "--tokens-kept", "none")
    with only_process(prepare_output(str(tmp_path / "out")) / ".lock", "busy"):
        assert run.main(command) == 2
    assert f"--output {tmp_path / 'out'} is being written by another evaluation" in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists() and run.main(command) == 0


@pytest.mark.parametrize("projection, value", [("visual_projection", 0.0), ("text_projection", float("nan"))])
def test_a_model_without_directions_is_not_measured(
    tiny_model, tiny_processor, data, tmp_path, capsys, projection, value
):
    torch.nn.init.constant_(getattr(tiny_model, projection).weight, value)
    for part in (tiny_model, tiny_processor):
        part.save_pretrained(tmp_path / "empty")
    assert run.main(arguments([tmp_path / "empty"], data, tmp_path / "out", "--tasks", "zcrs")) == 2
    noun = "images" if projection == "visual_projection" else "texts"
    assert f"empty gives 4 of 4 {noun} no direction (zeros, or no numbers)" in capsys.readouterr().err


def test_the_help_names_every_task():
    """It is printed before the tasks, with torch below them, are imported."""
    assert tuple(TASKS) == run.TASK_NAMES
