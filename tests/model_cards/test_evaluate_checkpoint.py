"""The script that travels with a checkpoint: its figures are those of evaluation.run, and what was altered is told."""

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from evaluation import run as evaluation_run
from evaluation.benchmarks.retrieval_data import load_retrieval
from evaluation.retrieval import retrieval_recall
from model_cards import evaluate_checkpoint
from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor


@pytest.fixture
def data(tmp_path, images, long_texts, short_texts):
    """A long and two short captions an image; one image is named in two rows."""
    folder, rows = tmp_path / "data", []
    (folder / "images").mkdir(parents=True)
    for index, (image, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True)):
        image.save(folder / "images" / f"{index}.png")
        rows.append({"image": f"{index}.png", "long_text": long * 4, "short_text": [short, f"{short} Again."]})
    rows.append({"image": "1.png", "long_text": "Something else, at length.", "short_text": ["Something else."]})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def repo(tiny_checkpoint, data, tmp_path):
    """A folder as it is downloaded, with one result more that is no retrieval."""
    output = tmp_path / "results"
    assert evaluation_run.main(["--model", str(tiny_checkpoint), "--data", str(data), "--output", str(output)]) == 0
    document = json.loads((output / "results.json").read_text())
    zic = {"model": document["models"][0]["label"], "task": "zic", "dataset": "AID", "metrics": {"accuracy": 50.0}}
    document["results"].append(zic)
    (tiny_checkpoint / "results.json").write_text(json.dumps(document))
    shutil.copy(evaluate_checkpoint.__file__, tiny_checkpoint)
    files = [path for path in sorted(tiny_checkpoint.iterdir()) if path.name != "results.json"]
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (tiny_checkpoint / "SHA256SUMS").write_text(sums)
    return tiny_checkpoint


@pytest.fixture
def script(repo, monkeypatch):
    """`main` of the copy in the repository; it loads the model there by the package, elsewhere by remote code."""
    spec = importlib.util.spec_from_file_location("travelled", repo / "evaluate_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "travelled", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "AutoModel", LRSCLIPModel)
    monkeypatch.setattr(module, "AutoProcessor", LRSCLIPProcessor)
    return module.main


def change(repo: Path, **fields) -> None:
    document = json.loads((repo / "results.json").read_text())
    document["results"][0] |= fields
    (repo / "results.json").write_text(json.dumps(document))


def test_the_figures_of_evaluation_run(script, repo, data, capsys):
    results = json.loads((repo / "results.json").read_text())["results"]
    assert results[0]["curve"] and results[0]["share_truncated"] > 0
    assert script(["--data", str(data), "--tolerance", "1e-9"]) == 0
    output = capsys.readouterr().out
    assert "zcrl on data: 4 images, 5 texts" in output and "zcrs on data: 4 images, 9 texts" in output
    assert "skipped  zic on AID" in output and "those that were measured" in output
    assert f"{2 * 9 + 2 * len(results[0]['curve'])} figures compared" in output and output.endswith("all agree.\n")

    stored = results[0]["metrics"]
    change(repo, metrics=stored | {"mR": stored["mR"] + 1})
    assert script(["--data", str(data / "test.jsonl")]) == 1
    output = capsys.readouterr().out
    assert "-1.00" in output and "allowed 0.5: they do not agree." in output
    assert script(["--data", str(data), "--tolerance", "1.5"]) == 0


def test_what_was_altered_on_the_way(script, repo, data, capsys):
    weights, code = repo / "model.safetensors", repo / "modeling_lrsclip.py"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit: the length is the same, so the client does not notice
    weights.write_bytes(content)
    assert script(["--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert "1 of" in error and "not those of SHA256SUMS: model.safetensors; download them again" in error
    code.write_text(code.read_text() + "\nraise SystemExit('this must not run')\n")
    assert script(["--data", str(data)]) == 1
    assert "model.safetensors, modeling_lrsclip.py" in capsys.readouterr().err

    (repo / "SHA256SUMS").unlink()  # the weights are recognised without it
    code.write_text(code.read_text().replace("\nraise SystemExit('this must not run')\n", ""))
    assert script(["--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert "are not those that were measured" in error and error.count("\n") == 1


def test_other_data_and_none(script, repo, data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    rows[0]["long_text"] = "Other words."
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert script(["--data", str(data)]) == 0  # of the short ones
    assert "skipped  zcrl on data" in capsys.readouterr().out
    shutil.copy(data / "images" / "1.png", data / "images" / "0.png")
    (tmp_path / "empty").mkdir()
    (data / "images" / "3.png").rename(tmp_path / "3.png")
    for source, problem in (
        (data, "1 of 4 images"),
        (tmp_path / "empty", "holds none of"),
        (tmp_path / "none", "does not exist"),
    ):
        assert script(["--data", str(source)]) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1
    (tmp_path / "3.png").rename(data / "images" / "3.png")
    assert script(["--data", str(data)]) == 2
    assert "is none of the data that was measured" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "karpathy", "csv"])
def test_other_forms_of_data(form, data):
    """Texts, order and images are read as evaluation reads them, so that the hashes agree."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    (data / "test.jsonl").unlink()
    if form == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for row in rows:
            row["image"] = {"bytes": (data / "images" / row["image"]).read_bytes(), "path": row["image"]}
        parquet.write_table(pa.Table.from_pylist(rows), data / "test.parquet")
    elif form == "karpathy":
        images = [
            {"filename": row["image"], "split": "test", "sentences": [{"raw": text} for text in row["short_text"]]}
            for row in rows
        ]
        (data / "dataset_tiles.json").write_text(json.dumps({"images": [*images, images[0] | {"split": "train"}]}))
    else:
        lines = [f'images/{row["image"]},"{text}"' for row in rows for text in row["short_text"]]
        table = "\n".join(["filename,title", *lines, "images/0.png,\u536b\u661f"])
        (data / "tiles_test.csv").write_bytes(table.encode("gb18030"))
    pairs, expected = evaluate_checkpoint.read_pairs(data, "zcrs"), load_retrieval(data, "short_text")
    assert pairs.texts_sha256 == expected.texts_hash and pairs.images_sha256 == expected.images.content_hash


def test_recall_is_that_of_evaluation():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 8, generator=generator), torch.randn(90, 8, generator=generator)
    owners = [*range(40), *torch.randint(40, (50,), generator=generator).tolist()]
    images, texts = (torch.nn.functional.normalize(rows, dim=-1) for rows in (images, texts))
    assert evaluate_checkpoint.recall(images, texts, owners) == retrieval_recall(images, texts, owners)
    boundary = 0.75 + 2.0**-25  # between two numbers of float32: one score below it, one above, and yet a tie
    for bits in ([-1e-15, 1e-15], [1e-15, -1e-15]):
        images, texts = torch.tensor(bits, dtype=torch.float64)[:, None] + boundary, torch.ones(2, 1)
        metrics = evaluate_checkpoint.recall(images, texts, [0, 1])
        assert metrics == retrieval_recall(images, texts, [0, 1]) and metrics["text_to_image_R@1"] == 0
