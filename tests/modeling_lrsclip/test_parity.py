"""What published files hold gives the published embeddings, through every format, against plain arithmetic."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPModel

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.convert import convert, load_published
from tests.modeling_lrsclip.references import (
    published_image_embeds,
    published_pixels,
    published_state,
    published_text_embeds,
    slow_token_ids,
)
from tests.modeling_lrsclip.source_files import as_openai_stores_it, write_bpe_file, write_source
from tests.modeling_lrsclip.test_processing import HARD_TEXTS


CLOSE = 1e-5  # unit embeddings, fp32
SOURCES = [  # format, two tables, fp16 and fp32 as OpenAI's archives, options, activation
    ("zip", True, False, {}, "quick_gelu"),
    ("legacy", True, False, {}, "quick_gelu"),
    ("zip", True, True, {}, "quick_gelu"),
    ("farslip", True, False, {"preset": "farslip"}, "quick_gelu"),
    ("torchscript", False, True, {}, "quick_gelu"),
    ("torchscript_gelu", False, False, {}, "gelu"),
    ("zip", False, True, {"preset": "openai"}, "quick_gelu"),
    ("zip", False, False, {"preset": "open-clip"}, "gelu"),
    ("wrapped", False, False, {"activation": "gelu"}, "gelu"),
    ("safetensors", False, False, {"preset": "open-clip"}, "gelu"),
    ("custom_text", False, False, {"preset": "open-clip", "activation": "quick_gelu"}, "quick_gelu"),
]


@pytest.fixture
def tokenizer_folder(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def padded_rows(processor: LRSCLIPProcessor, texts: list[str]) -> torch.Tensor:
    """`(N, P)` as `longclip.tokenize` returns them: filled up with zeros to the length of the table."""
    rows = processor.encode_text(texts)
    return torch.tensor([row + [0] * (processor.tokenizer.model_max_length - len(row)) for row in rows])


def assert_equal_to_published(model, processor, state, heads, activation, texts, images):
    state = {name: tensor.float() for name, tensor in state.items()}
    with torch.no_grad():
        output = model(**processor(text=texts, images=images, return_tensors="pt"))
    expected = published_text_embeds(state, padded_rows(processor, texts), heads[1], activation)
    torch.testing.assert_close(output.text_embeds.float(), expected, atol=CLOSE, rtol=0)
    size = processor.image_processor.crop_size["height"]
    pixels = torch.stack([published_pixels(image, size) for image in images])
    expected = published_image_embeds(state, pixels, heads[0], activation)
    torch.testing.assert_close(output.image_embeds.float(), expected, atol=CLOSE, rtol=0)
    assert torch.equal(output.logits_per_text, model._logits(output.text_embeds, output.image_embeds))
    assert model.logit_scale.item() == pytest.approx(state["logit_scale"].item())


@pytest.mark.parametrize(("form", "two_tables", "mixed", "options", "activation"), SOURCES)
def test_embeddings(
    form, two_tables, mixed, options, activation, tokenizer_folder, tmp_path, images, long_texts, short_texts
):
    state = published_state(700, 248 if two_tables else 77, two_tables=two_tables)
    state = as_openai_stores_it(state) if mixed else state
    source = write_source(form, state, tmp_path)
    convert(source, tmp_path / "out", tokenizer=tokenizer_folder, **options)
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32  # where types are mixed, nothing is rounded
    # Two heads of 64 in the image tower, one in the text tower; texts that are cut, and the shortest.
    texts = [*long_texts, *short_texts, "tank " * 300, ""]
    assert_equal_to_published(model.eval(), processor, state, (2, 1), activation, texts, images)

    loaded, its_processor = load_published(source, tokenizer=tokenizer_folder, **options)
    assert type(loaded) is LRSCLIPModel and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert its_processor.encode_text(texts) == processor.encode_text(texts)
    for key in ("hidden_act", "num_attention_heads", "kept_positions", "stretch_ratio", "eos_token_id"):
        assert getattr(loaded.config.text_config, key) == getattr(model.config.text_config, key), key
    assert (model.config.text_config.hidden_act, model.config.vision_config.hidden_act) == (activation, activation)
    assert model.config.text_config.stretch_ratio == (4 if two_tables else 1)


def test_the_other_activation_is_another_model(tokenizer_folder, tmp_path, long_texts, images):
    source = write_source("zip", published_state(700), tmp_path)
    (quick, processor), (plain, _) = (
        load_published(source, tokenizer=tokenizer_folder, activation=name) for name in ("quick_gelu", "gelu")
    )
    inputs = processor(text=long_texts, images=images, return_tensors="pt")
    with torch.no_grad():
        assert (quick(**inputs).image_embeds - plain(**inputs).image_embeds).abs().max() > 100 * CLOSE


@pytest.mark.parametrize(
    ("vision_width", "text_width", "image", "options", "heads", "activation"),
    [
        (768, 512, (224, 16), {"preset": "openai"}, (12, 8), "quick_gelu"),
        (1024, 768, (224, 14), {"preset": "skyclip"}, (16, 12), "quick_gelu"),
        (768, 512, (64, 32), {"preset": "skyclip"}, (12, 8), "gelu"),
        (768, 512, (64, 32), {"preset": "georsclip"}, (12, 8), "quick_gelu"),
        (1280, 1024, (28, 14), {"preset": "georsclip"}, (16, 16), "gelu"),
    ],
)
def test_real_widths(
    vision_width, text_width, image, options, heads, activation, tokenizer_folder, tmp_path, images, long_texts
):
    """Two layers of ViT-B, ViT-L and ViT-H: head counts and activations as the published code runs them."""
    state = published_state(700, 77, vision_width, text_width, image, projection=text_width)
    state = {name: tensor * 0.3 if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    source = write_source("zip", state, tmp_path)
    model, processor = load_published(source, tokenizer=tokenizer_folder, **options)
    towers = (model.config.vision_config, model.config.text_config)
    assert tuple(tower.num_attention_heads for tower in towers) == heads
    assert_equal_to_published(model, processor, state, heads, activation, long_texts[:2], images[:1])


def test_huggingface_folder_and_state_dict(tiny_clip, tiny_processor, tmp_path, images, long_texts):
    """A folder keeps its outputs; its weights file alone does too, once the heads and the activation are said."""
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    inputs = tiny_processor(text=long_texts, images=images, return_tensors="pt", max_length=77)
    options = {"tokenizer": tmp_path / "clip", "activation": "quick_gelu", "heads": (2, 2)}
    with torch.no_grad():
        expected = tiny_clip(**inputs)
        for source, more in ((tmp_path / "clip", {}), (tmp_path / "clip" / "model.safetensors", options)):
            model, _ = load_published(source, **more)
            assert torch.equal(model(**inputs).logits_per_image, expected.logits_per_image), source


def test_stock_clip_reads_it(tokenizer_folder, tmp_path, images, long_texts):
    source = write_source("zip", published_state(700, 248, two_tables=True), tmp_path)
    convert(source, tmp_path / "out", tokenizer=tokenizer_folder)
    clip, model = CLIPModel.from_pretrained(tmp_path / "out"), LRSCLIPModel.from_pretrained(tmp_path / "out")
    inputs = LRSCLIPProcessor.from_pretrained(tmp_path / "out")(text=long_texts, images=images, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(clip(**inputs).logits_per_text, model(**inputs).logits_per_text)


def test_tokens_of_the_bpe_file(tmp_path, long_texts):
    """48,894 of the file's merges, no more: the ids of the published tokenizer, also after a save."""
    merges = write_bpe_file(tmp_path / "bpe.gz")
    state = published_state(49408, 248, two_tables=True, vision_width=64)
    source = write_source("zip", state, tmp_path)
    convert(source, tmp_path / "out", tokenizer=tmp_path / "bpe.gz")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    vocab = processor.tokenizer.get_vocab()
    assert len(vocab) == 49408 and vocab["<|startoftext|>"] == 49406 and vocab["<|endoftext|>"] == 49407
    assert vocab["!"] == 0 and vocab["!</w>"] == 256 and vocab["".join(merges[0])] == 512
    texts = HARD_TEXTS + long_texts
    for text, ids in zip(texts, processor.encode_text(texts)):
        assert ids == slow_token_ids(text, vocab, merges, 248), text
    assert {"tokenizer.json", "vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}
