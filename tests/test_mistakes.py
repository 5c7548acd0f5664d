"""The mistakes of a first hour, each answered with one sentence that says what to do."""

import json
import logging
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from transformers import CLIPModel, SiglipConfig, SiglipModel

from evaluation import run as evaluation_run
from evaluation.benchmarks.aerial_scenes import data_set as aerial_scenes
from modeling_lrsclip import LRSCLIPModel, convert, export_onnx
from modeling_lrsclip.commands import say_once_that_the_hub_is_away
from modeling_lrsclip.train_tokenizer import train_tokenizer
from training import train


WIDTH = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
SMALL_RUN = [
    *("--model.init", "scratch", "--model.tokenizer", "train", "--model.vocab_size", "600"),
    *("--model.text", f"{{{WIDTH}}}", "--model.vision", f"{{{WIDTH}, image_size: 32, patch_size: 8}}"),
    *("--loop.batch_size", "2", "--loop.steps", "1"),
]
UNWRITABLE = "/proc/none/x"


@pytest.fixture
def rows(tmp_path, images, long_texts, short_texts):
    """Rows of captioned images, whose files lie in `tmp_path`."""
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    columns = zip(long_texts, short_texts, strict=True)
    return [{"image": f"{i}.png", "long_text": long, "short_text": short} for i, (long, short) in enumerate(columns)]


def lines(rows) -> str:
    return "\n".join(map(json.dumps, rows))


def csv_text(rows) -> str:
    return "image,long_text,short_text\n" + "".join(
        f'{row["image"]},"{row["long_text"]}",{row["short_text"]} Café\n' for row in rows
    )


def answer(command, arguments, capsys) -> str:
    """What a command that refuses says last."""
    AcceleratorState._reset_state(True)
    try:
        status = command([str(word) for word in arguments])
    except SystemExit as error:
        status = error.code
    assert status not in (None, 0)
    said = status if isinstance(status, str) else capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


# The file, what it holds of the rows, and what every way of reading it says: in memory, streamed, evaluation.
FILES = {
    "empty lines": ("e.jsonl", lambda rows: b"", ["e.jsonl has no rows"] * 3),
    "empty table": ("e.csv", lambda rows: b"", ["e.csv has no rows"] * 3),
    "empty list": ("e.json", lambda rows: b"", ["e.json is empty; it must hold a list of objects"] * 3),
    "empty parquet": ("e.parquet", lambda rows: b"", ["e.parquet is not a readable parquet file"] * 3),
    "broken line": (
        "b.jsonl",
        lambda rows: f"{lines(rows[:1])[:40]}\n{lines(rows[1:])}".encode(),
        ["line 1 is not valid JSON", "first row of b.jsonl cannot be read .is not valid JSON", "line 1 is not valid"],
    ),
    "Latin-1": (
        "l.csv",
        lambda rows: csv_text(rows).encode("latin-1"),
        ["save it as UTF-8", "is not UTF-8: .*save the file as UTF-8", "save it as UTF-8"],
    ),
    "numbers": (
        "n.jsonl",
        lambda rows: lines(row | {"short_text": number} for number, row in enumerate(rows)).encode(),
        [
            "n.jsonl: short_text holds 0, which is int, not text; name the column of captions with data.short_column",
            "no short caption at all .the first is int, not text.; name the column of captions with data.short_column",
            r"4 of 4 lines of .*n.jsonl have a number as short_text, not a text, first: line 1 \(0\)",
        ],
    ),
}


@pytest.mark.parametrize("mistake", FILES)
def test_data_files(mistake, rows, tiny_checkpoint, tmp_path, capsys):
    name, content, said = FILES[mistake]
    (tmp_path / name).write_bytes(content(rows))
    run = ["--output_dir", tmp_path / "run", *SMALL_RUN, "--data.train", tmp_path / name]
    in_memory, streamed = (answer(train.main, [*run, "--data.streaming", way], capsys) for way in ("false", "true"))
    options = ["--model", tiny_checkpoint, "--tasks", "zcrs", "--output", tmp_path / "out", "--data", tmp_path / name]
    evaluated = answer(evaluation_run.main, options, capsys)
    for text, pattern in zip((in_memory, streamed, evaluated), said, strict=True):
        assert text.startswith("error: ")
        assert re.search(pattern, text), text


def test_a_semicolon_table_is_read(rows, tmp_path):
    table = csv_text(rows).replace("; ", " ").replace(", ", " ").replace(",", ";")
    (tmp_path / "semicolons.csv").write_text(table, encoding="utf-8")
    for way in ("false", "true"):
        AcceleratorState._reset_state(True)
        words = ["--output_dir", str(tmp_path / way), *SMALL_RUN, "--data.train", str(tmp_path / "semicolons.csv")]
        train.main([*words, "--data.streaming", way])
        assert (tmp_path / way / "final" / "config.json").is_file()


def test_labels_without_names(rows, tiny_checkpoint, tmp_path, capsys):
    table = {"image": [str(tmp_path / row["image"]) for row in rows], "label": [0, 1, 0, 1]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "labels.parquet")
    options = [
        "--model",
        tiny_checkpoint,
        "--tasks",
        "zic",
        "--output",
        tmp_path,
        "--data",
        tmp_path / "labels.parquet",
    ]
    assert "labels are numbers without names; add a column class_name" in answer(evaluation_run.main, options, capsys)


@pytest.fixture
def folders(tmp_path, tiny_clip, tiny_model, tiny_processor) -> dict[str, Path]:
    """Folders that people give for a model."""
    paths = {name: tmp_path / name for name in ("clip", "siglip", "open_clip", "run", "nothing")}
    tiny_clip.save_pretrained(paths["clip"])
    tiny_processor.save_pretrained(paths["clip"])
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {
        "vision_config": towers | {"image_size": 32, "patch_size": 8},
        "text_config": towers | {"vocab_size": 700},
    }
    SiglipModel(SiglipConfig(**sizes)).save_pretrained(paths["siglip"])
    tiny_model.save_pretrained(paths["run"] / "final")
    for name in ("open_clip", "nothing"):
        paths[name].mkdir()
    for name in ("open_clip_config.json", "open_clip_pytorch_model.bin"):
        (paths["open_clip"] / name).write_text("{}")
    return paths


NO_MODEL = {
    "run": "it is the folder of a training run, give its model: .*run/final",
    "open_clip": "open_clip folder, open_clip_pytorch_model.bin: python -m modeling_lrsclip.convert .*model.bin OUT",
    "nothing": "give a model folder as save_pretrained writes it",
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_folders_without_a_model(kind, rows, folders, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    folder, data = folders[kind], tmp_path / "rows.jsonl"
    start = ["--output_dir", tmp_path / "mine", "--data.train", data, "--model.init", folder, "--loop.batch_size", "2"]
    for command, arguments in (
        (train.main, start),
        (convert.main, [folder, tmp_path / "converted"]),
        (evaluation_run.main, ["--model", folder, "--tasks", "zcrs", "--data", data, "--output", tmp_path / "out"]),
    ):
        said = answer(command, arguments, capsys)
        assert "has no config.json" in said and re.search(NO_MODEL[kind], said), said


def test_models_of_other_kinds(folders, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"a CLIP of 77 text positions; LRSCLIPModel.from_clip\(.*stretches it"):
        LRSCLIPModel.from_pretrained(folders["clip"])
    with pytest.raises(ValueError, match="a model of type siglip; LRSCLIPModel loads lrsclip, and from_clip takes"):
        LRSCLIPModel.from_pretrained(folders["siglip"])
    with pytest.raises(ValueError, match="siglip is siglip model in HuggingFace format; from_clip takes a CLIP"):
        LRSCLIPModel.from_clip(folders["siglip"])
    with pytest.raises(ValueError, match="open_clip is no model in HuggingFace format.*modeling_lrsclip.convert"):
        LRSCLIPModel.from_clip(folders["open_clip"])
    other = train_tokenizer(["other words"], vocab_size=530)
    with pytest.raises(ValueError, match="the tokenizer is another model's, or ids were cut by hand"):
        tiny_model.get_text_features(**other(["a road"], return_tensors="pt"))
    wide = CLIPModel.from_pretrained(folders["clip"])
    wide.save_pretrained(tmp_path / "again")
    assert LRSCLIPModel.from_clip(tmp_path / "again").config.text_config.max_position_embeddings == 248


@pytest.mark.parametrize(
    "command, arguments",
    [
        (train.main, ["--output_dir", UNWRITABLE, *SMALL_RUN, "--data.train", "{tmp}/rows.jsonl"]),
        (convert.main, ["{tmp}/clip", UNWRITABLE]),
        (export_onnx.main, ["{tmp}/clip", UNWRITABLE]),
        (aerial_scenes.main, [UNWRITABLE, "--scenes", "1"]),
        (
            evaluation_run.main,
            ["--model", "{tmp}/clip", "--data", "{tmp}/rows.jsonl", "--tasks", "zcrs", "--output", UNWRITABLE],
        ),
    ],
    ids=["train", "convert", "export_onnx", "aerial_scenes", "evaluate"],
)
def test_outputs_that_cannot_be_written(command, arguments, rows, folders, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    said = answer(command, [word.format(tmp=tmp_path) if "tmp" in word else word for word in arguments], capsys)
    assert "/proc/none" in said and "cannot be written to (No such file or directory); give another folder" in said


def test_retries_of_the_hub_are_said_once(caplog, monkeypatch):
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "filters", [])  # in this process it may have been said before
    say_once_that_the_hub_is_away()
    say_once_that_the_hub_is_away()
    for _ in range(5):
        logger.warning("'[Errno 111] Connection refused' thrown while requesting HEAD https://huggingface.co/x")
        logger.warning("Retrying in 1s [Retry 1/5].")
    logger.warning("something else")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("The Hub does not answer; trying again") and "Errno 111" in said[0]
