"""The exported towers against torch: other batch sizes, other lengths, the names that readers look for."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from evaluation import run
from modeling_lrsclip import onnx_towers
from modeling_lrsclip.encoding import embed_images, embed_texts, load_encoder
from modeling_lrsclip.export_onnx import TOLERANCE, OnnxTowers, export_onnx, main


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model, saved and exported once: the exporter takes its time."""
    from tests import conftest

    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = conftest.train_tokenizer(conftest.LONG + conftest.SHORT, vocab_size=700)
    torch.manual_seed(0)
    model = conftest.LRSCLIPModel(conftest.LRSCLIPConfig(**conftest.tower_configs(tokenizer))).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tokenizer.model_max_length = 248
    processor = conftest.LRSCLIPProcessor(conftest.LRSCLIPImageProcessor(**size), tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    record = export_onnx(folder / "model", folder / "out")
    return model, processor, folder / "out", record


def test_any_batch_and_any_length(exported, long_texts, short_texts, images):
    model, processor, folder, record = exported
    towers = OnnxTowers(folder)
    for texts in (
        ["a"],
        short_texts[:1],
        short_texts,
        long_texts[:3],
        ["tank " * 300],
        [*long_texts, "tank " * 300] * 3,
    ):
        inputs = processor(text=texts, return_tensors="pt")
        with torch.no_grad():
            wanted = model.get_text_features(**inputs).pooler_output
        distance = 1 - cosine_similarity(towers.text(inputs["input_ids"]), wanted)
        assert distance.max() <= TOLERANCE and towers.text(inputs["input_ids"]).shape == (len(texts), 24)
    for batch in (images[:1], images, images * 3):
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            wanted = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(towers.image(pixels), wanted, atol=1e-4, rtol=1e-4)
    assert max(record["cosine_distance"].values()) <= TOLERANCE


def test_padding_changes_nothing(exported, short_texts):
    _, processor, folder, _ = exported
    towers, plain = OnnxTowers(folder), AutoTokenizer.from_pretrained(folder)
    whole = plain(short_texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert whole.shape[1] == 248
    short = processor(text=short_texts, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(towers.text(whole), towers.text(short), atol=1e-5, rtol=1e-5)


def test_the_names_that_transformers_js_looks_for(exported):
    """huggingface/transformers.js scripts/extra/clip.py: split towers, in `onnx/`, beside config and tokenizer."""
    *_, folder, record = exported
    expected = {
        "text_model": ("input_ids", ["batch_size", "sequence_length"], "text_embeds"),
        "vision_model": ("pixel_values", ["batch_size", 3, 32, 32], "image_embeds"),
    }
    for name, (input_name, shape, output_name) in expected.items():
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        (one,), (other,) = session.get_inputs(), session.get_outputs()
        assert (one.name, list(one.shape), other.name) == (input_name, shape, output_name)
        assert list(other.shape) == ["batch_size", 24]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "export.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    assert record["files"]["onnx/text_model.onnx"] == (folder / "onnx/text_model.onnx").stat().st_size
    assert not list(folder.rglob("*.data"))


def test_evaluation_takes_the_exported_folder(exported, images, long_texts, short_texts, tmp_path, capsys):
    _, _, folder, _ = exported
    rows = []
    for index, (image, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True)):
        image.save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "long_text": long, "short_text": [short]})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = [str(folder.parent / "model"), str(folder)]
    arguments = ["--model", *models, "--data", str(tmp_path / "test.jsonl"), "--output", str(tmp_path / "results")]
    assert run.main([*arguments, "--tasks", "zcrl,zcrs"]) == 0
    document = json.loads((tmp_path / "results/results.json").read_text())
    torch_model, onnx_model = document["models"]
    assert onnx_model["model_class"] == "OnnxModel" and onnx_model["positions"] == torch_model["positions"] == 248
    assert onnx_model["weights_sha256"] != torch_model["weights_sha256"]
    for task in ("zcrl", "zcrs"):
        one, other = (result for result in document["results"] if result["task"] == task)
        assert one["metrics"] == other["metrics"]


def test_embeddings_by_the_encoder(exported, images, short_texts):
    model, _, folder, _ = exported
    pairs = []
    for path in (folder.parent / "model", folder):
        encoder = load_encoder(str(path))
        texts = embed_texts(encoder.model, encoder.processor, short_texts)
        pairs.append((texts, embed_images(encoder.model, encoder.processor, images)))
    for ours, theirs in zip(*pairs, strict=True):
        assert np.abs(ours.numpy() - theirs.numpy()).max() < 1e-5


def test_int8_is_smaller_near_and_told_apart(exported, images, short_texts, tmp_path, monkeypatch, capsys):
    model, processor, folder, record = exported

    def exported_before(model, name, example, path):  # the exporter takes its time, and gave these files
        shutil.copy(folder / "onnx" / path.name, path)

    monkeypatch.setattr(onnx_towers, "_export", exported_before)
    main([str(folder.parent / "model"), str(tmp_path / "int8"), "--int8"])
    assert "text_model_quantized.onnx" in capsys.readouterr().out
    quantized = json.loads((tmp_path / "int8/export.json").read_text())
    files = {name for name in quantized["files"] if name.endswith(".onnx")}
    assert files == {"onnx/text_model_quantized.onnx", "onnx/vision_model_quantized.onnx"}
    vision = quantized["files"]["onnx/vision_model_quantized.onnx"], record["files"]["onnx/vision_model.onnx"]
    assert vision[0] < vision[1]
    encoders = [load_encoder(str(path)) for path in (folder, tmp_path / "int8")]
    assert encoders[0].weights_sha256 != encoders[1].weights_sha256
    exact, near = (embed_texts(encoder.model, encoder.processor, short_texts) for encoder in encoders)
    assert 1e-7 < 1 - (exact * near).sum(dim=1).min() < 0.1
    exact, near = (embed_images(encoder.model, encoder.processor, images) for encoder in encoders)
    assert 1e-7 < 1 - (exact * near).sum(dim=1).min() < 0.1


def test_mistakes_are_one_sentence(exported, tmp_path, monkeypatch):
    *_, folder, _ = exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(SystemExit, match="mine holds something else than an earlier export; give a new folder"):
        main([str(folder.parent / "model"), str(tmp_path / "mine")])
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "broken/onnx").mkdir(parents=True)
    for name in ("text_model", "vision_model"):
        (tmp_path / f"broken/onnx/{name}.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"text_model\.onnx cannot be run \(.*\); export it again"):
        OnnxTowers(tmp_path / "broken")
