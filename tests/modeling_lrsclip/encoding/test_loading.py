"""Each family of dual encoders against its own interface, one text and one image at a time; what cannot be taken, and why."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessorPil,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from evaluation import run
from modeling_lrsclip.convert import convert
from modeling_lrsclip.encoding import embed_images, embed_texts, load_encoder
from modeling_lrsclip.encoding.loading import DualEncoder
from modeling_lrsclip.published.registry import resolve


WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def siglip(tiny_tokenizer, tmp_path):
    folder = tmp_path / "siglip"
    torch.manual_seed(0)
    text = WIDTH | {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    text |= {name: getattr(tiny_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = SiglipConfig(text_config=text, vision_config=WIDTH | {"image_size": 32, "patch_size": 8})
    SiglipModel(config).save_pretrained(folder)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: getattr(tiny_tokenizer, name) for name in names}
    special |= {"model_input_names": ["input_ids"], "model_max_length": 64}  # no mask, as SigLIP's own tokenizers
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, **special)
    SiglipProcessor(SiglipImageProcessorPil(size=SIZE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def chinese_clip(tmp_path):
    folder = tmp_path / "chinese-clip"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "the",
        "two",
        "white",
        "red",
        "road",
        "beside",
        "of",
        "tanks",
        "lake",
        "pier",
        "sand",
        "and",
        "trees",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = ChineseCLIPConfig(
        text_config=WIDTH | {"vocab_size": len(words), "max_position_embeddings": 52},
        vision_config=WIDTH | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    ChineseCLIPModel(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=52)
    ChineseCLIPProcessor(ChineseCLIPImageProcessorPil(size=SIZE, crop_size=SIZE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def remote_code(tiny_checkpoint):
    """LRSCLIP's own folder under a model type that nobody knows: only its code can read it."""
    for name in ("config.json", "configuration_lrsclip.py"):
        path = tiny_checkpoint / name
        path.write_text(path.read_text().replace('"lrsclip"', '"foreignclip"'))
    return tiny_checkpoint


@pytest.fixture
def sentence_transformer(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path / "plain", "plain-clip")
    SentenceTransformer(str(tmp_path / "plain"), device="cpu").save(str(tmp_path / "st"))
    return tmp_path / "st"


def one_by_one(folder, texts, images, **text_options):
    """The slow reference: transformers' own classes, each text and image alone."""
    options = {"trust_remote_code": True}
    model, processor = (kind.from_pretrained(folder, **options) for kind in (AutoModel, AutoProcessor))
    model.eval()
    with torch.no_grad():
        text_outputs = [
            model.get_text_features(**processor(text=[text], truncation=True, return_tensors="pt", **text_options))
            for text in texts
        ]
        seen = [model.get_image_features(**processor(images=image, return_tensors="pt")) for image in images]
    return tuple(
        normalize(torch.cat([output.pooler_output for output in outputs]), dim=-1) for outputs in (text_outputs, seen)
    )


def embedded(encoder, texts, images):
    embeds = embed_texts(encoder.model, encoder.processor, texts)
    return embeds, embed_images(encoder.model, encoder.processor, images)


@pytest.fixture
def texts(long_texts, short_texts):
    return [*short_texts, "two white tanks beside a red road", "a", *long_texts, "sand " * 100]


def test_siglip_with_its_fixed_length(siglip, texts, images):
    encoder = load_encoder(str(siglip))
    assert type(encoder.model) is DualEncoder and encoder.positions == 64
    wanted = one_by_one(siglip, texts, images, padding="max_length", max_length=64)
    for ours, theirs in zip(embedded(encoder, texts, images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    # Padding matters here, as it does not to CLIP: without it the embedding is another one.
    unpadded, _ = one_by_one(siglip, texts[:1], images[:1], padding=False)
    assert (unpadded - wanted[0][:1]).abs().max() > 1e-3


def test_chinese_clip_with_its_mask(chinese_clip, texts, images):
    encoder = load_encoder(str(chinese_clip))
    assert type(encoder.model) is DualEncoder and encoder.positions == 52
    wanted = one_by_one(chinese_clip, texts, images, padding=True)
    for ours, theirs in zip(embedded(encoder, texts, images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_remote_code_runs_only_when_it_is_trusted(remote_code, texts, images, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = remote_code / "modeling_lrsclip.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(ValueError, match="brings code of its own, which runs with --trust-remote-code only; read it"):
        load_encoder(str(remote_code))
    assert not (tmp_path / "ran").exists()
    encoder = load_encoder(str(remote_code), trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(encoder.model) is DualEncoder and type(encoder.model.inner).__module__.startswith(
        "transformers_modules"
    )
    wanted = one_by_one(remote_code, texts, images)
    for ours, theirs in zip(embedded(encoder, texts, images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_sentence_transformers_folder(sentence_transformer, texts, images):
    encoder = load_encoder(resolve(str(sentence_transformer)))
    assert encoder.positions == 248
    model = SentenceTransformer(str(sentence_transformer), device="cpu")
    wanted = [torch.cat([model.encode([item], convert_to_tensor=True) for item in items]) for items in (texts, images)]
    for ours, theirs in zip(embedded(encoder, texts, images), wanted, strict=True):
        torch.testing.assert_close(ours, normalize(theirs, dim=-1), atol=1e-6, rtol=1e-5)


def test_a_plain_clip_folder_takes_the_shortcuts(tiny_checkpoint, texts, images, tmp_path):
    convert(tiny_checkpoint, tmp_path / "plain", "plain-clip")
    encoder = load_encoder(str(tmp_path / "plain"))
    assert not isinstance(encoder.model, DualEncoder)
    wanted = one_by_one(tmp_path / "plain", texts, images)
    for ours, theirs in zip(embedded(encoder, texts, images), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_benchmark_measures_them_beside_each_other(siglip, chinese_clip, images, short_texts, tmp_path, capsys):
    rows = []
    for index, (image, short) in enumerate(zip(images, short_texts, strict=True)):
        image.save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "short_text": [short]})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", str(siglip), str(chinese_clip), "--data", str(tmp_path / "test.jsonl")]
    assert run.main([*arguments, "--tasks", "zcrs", "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert [model["positions"] for model in document["models"]] == [64, 52]
    assert [model["model_class"] for model in document["models"]] == ["SiglipModel", "ChineseCLIPModel"]
    assert len({model["weights_sha256"] for model in document["models"]}) == 2


def test_what_cannot_be_taken_says_why(tmp_path, tiny_tokenizer, siglip):
    folder = tmp_path / "bert"
    BertModel(BertConfig(**WIDTH, vocab_size=len(tiny_tokenizer))).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match="BertModel has no get_text_features; a dual encoder, as CLIP is one, is needed"
    ):
        load_encoder(str(folder))
    config = json.loads((siglip / "config.json").read_text())
    config["model_type"] = "unheard_of"
    (siglip / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="siglip: not loadable with AutoModel and AutoProcessor"):
        load_encoder(str(siglip))


def test_towers_that_do_not_meet(siglip, monkeypatch):
    monkeypatch.setattr(SiglipModel, "get_image_features", lambda self, pixel_values: torch.ones(len(pixel_values), 7))
    with pytest.raises(ValueError, match=r"a text becomes \(1, 32\), an image \(1, 7\); they must share one space"):
        load_encoder(str(siglip))

    def fails(self, pixel_values):
        raise RuntimeError("it needs coordinates, too")

    monkeypatch.setattr(SiglipModel, "get_image_features", fails)
    with pytest.raises(
        ValueError, match=r"SiglipModel cannot embed a text and an image \(it needs coordinates, too\)"
    ):
        load_encoder(str(siglip))


def test_options_that_are_clips_alone(siglip):
    with pytest.raises(ValueError, match="only the towers of CLIP and LRSCLIP are compiled; leave --compile out"):
        load_encoder(str(siglip), compile=True)
