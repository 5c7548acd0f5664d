"""Embeddings equal one-at-a-time encoding, whatever the batches, the padding and the order."""

import io

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts, load_encoder
from modeling_lrsclip.encoding.model_inputs import cut_tokens, encode_texts, share_truncated, token_lengths
from modeling_lrsclip.files.hashing import weights_sha256


@pytest.fixture
def mixed_texts(long_texts, short_texts):
    return [text for pair in zip(long_texts, short_texts, strict=True) for text in pair]


def one_by_one(model, processor, texts, max_length=248):
    rows = []
    for text in texts:
        inputs = processor(
            text=[text], padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            rows.append(model.get_text_features(**inputs).pooler_output[0])
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_texts_equal_those_padded_to_248(tiny_model, tiny_processor, mixed_texts, batch_size):
    embeds = embed_texts(tiny_model, tiny_processor, mixed_texts, batch_size=batch_size)
    assert embeds.shape == (len(mixed_texts), 24) and embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(mixed_texts)))
    torch.testing.assert_close(embeds, one_by_one(tiny_model, tiny_processor, mixed_texts), atol=1e-5, rtol=0)


def test_a_model_of_77_positions_gets_77_tokens(tiny_clip, tiny_processor, mixed_texts):
    texts = [*mixed_texts, " ".join(mixed_texts)]
    reference = one_by_one(tiny_clip, tiny_processor, texts, max_length=77)
    torch.testing.assert_close(embed_texts(tiny_clip, tiny_processor, texts), reference, atol=1e-5, rtol=0)


def test_a_stock_clip_processor_works(tiny_clip, tiny_processor, mixed_texts, images):
    from transformers import CLIPProcessor

    stock = CLIPProcessor(tiny_processor.image_processor, tiny_processor.tokenizer)
    expected = embed_texts(tiny_clip, tiny_processor, mixed_texts)
    torch.testing.assert_close(embed_texts(tiny_clip, stock, mixed_texts), expected)
    assert token_lengths(stock, mixed_texts) == token_lengths(tiny_processor, mixed_texts)
    torch.testing.assert_close(embed_images(tiny_clip, stock, images), embed_images(tiny_clip, tiny_processor, images))


def test_cut_tokens_puts_the_end_of_text_back():
    assert cut_tokens([[1, 5, 6, 7, 2], [1, 5, 2], [1, 5, 6, 2]], 3) == [[1, 5, 2], [1, 5, 2], [1, 5, 2]]
    assert cut_tokens([[1, 5, 2]], 2) == [[1, 2]]
    with pytest.raises(ValueError, match="max_tokens=1"):
        cut_tokens([[1, 2]], 1)


def test_max_tokens_equals_the_processors_truncation(tiny_model, tiny_processor, long_texts):
    embeds = embed_texts(tiny_model, tiny_processor, long_texts, max_tokens=20)
    reference = one_by_one(tiny_model, tiny_processor, long_texts, max_length=20)
    torch.testing.assert_close(embeds, reference, atol=1e-5, rtol=0)
    assert (embeds - embed_texts(tiny_model, tiny_processor, long_texts)).abs().max() > 1e-3


def test_texts_beyond_the_table_are_counted_and_cut(tiny_model, tiny_processor, long_texts):
    texts = [*long_texts, " ".join(long_texts * 3)]
    lengths = token_lengths(tiny_processor, texts)
    assert lengths[-1] > 400 and max(lengths[:-1]) < 248
    assert share_truncated(lengths, 248) == 1 / len(texts)
    assert share_truncated([], 248) == 0
    assert len(encode_texts(tiny_processor, texts)[-1]) == 248
    reference = one_by_one(tiny_model, tiny_processor, texts)
    torch.testing.assert_close(embed_texts(tiny_model, tiny_processor, texts), reference, atol=1e-5, rtol=0)


def test_equal_texts_get_bit_equal_embeddings(tiny_model, tiny_processor, mixed_texts):
    embeds = embed_texts(tiny_model, tiny_processor, mixed_texts + mixed_texts[::-1], batch_size=3)
    count = len(mixed_texts)
    assert torch.equal(embeds[:count], embeds[count:].flip(0))


def test_images_equal_those_encoded_alone(tiny_model, tiny_processor, images):
    embeds = embed_images(tiny_model, tiny_processor, iter(images), batch_size=3)  # a generator has no length
    assert embeds.shape == (len(images), 24) and embeds.dtype == torch.float32
    for image, embed in zip(images, embeds, strict=True):
        with torch.no_grad():
            alone = tiny_model.get_image_features(**tiny_processor(images=image, return_tensors="pt")).pooler_output
        torch.testing.assert_close(embed, F.normalize(alone[0], dim=-1), atol=1e-5, rtol=0)


class Readable:
    """Like `ImageFiles`: opened when asked for; some cannot be read."""

    def __init__(self, images, bad=()):
        self.images, self.bad = images, bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Readable(self.images[index], [position - (index.start or 0) for position in self.bad])
        if index in self.bad:
            raise ValueError(f"image {index} cannot be read")
        return self.images[index]


def test_workers_decode_the_same_images(tiny_model, tiny_processor, images):
    expected = embed_images(tiny_model, tiny_processor, images, batch_size=3)
    embeds = embed_images(tiny_model, tiny_processor, Readable(images), batch_size=3, workers=1)
    assert torch.equal(embeds, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence(tiny_model, tiny_processor, images, workers):
    with pytest.raises(ValueError, match=r"^image 1 cannot be read$"):
        embed_images(tiny_model, tiny_processor, Readable(images, [1]), batch_size=4, workers=workers)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_threads_change_nothing(tiny_model, tiny_processor, mixed_texts, images, dtype, two_threads):
    def both():
        texts = embed_texts(tiny_model, tiny_processor, mixed_texts, 1, dtype=dtype)
        return texts, embed_images(tiny_model, tiny_processor, images, 1, dtype=dtype)

    threaded = both()
    torch.set_num_threads(1)
    for embeds, expected in zip(threaded, both(), strict=True):
        assert torch.equal(embeds, expected)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_a_bar_of_a_larger_piece_of_work_is_moved_on(tiny_model, tiny_processor, images, short_texts):
    with tqdm(total=8, disable=False, file=io.StringIO()) as bar:
        embed_images(tiny_model, tiny_processor, images, progress=bar)
        embed_texts(tiny_model, tiny_processor, short_texts, progress=bar)
        assert bar.n == 8


def test_a_compiled_encoder_compiles_every_layer(tiny_checkpoint, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    load_encoder(str(tiny_checkpoint), compile=True)
    assert compiled == [(CLIPEncoderLayer, {"dynamic": True})] * 4


def test_nothing_gives_no_rows(tiny_model, tiny_processor):
    assert embed_texts(tiny_model, tiny_processor, []).shape == (0, 24)
    assert embed_images(tiny_model, tiny_processor, []).shape == (0, 24)
    assert token_lengths(tiny_processor, []) == []


def test_bfloat16_is_close_and_returns_float32(tiny_model, tiny_processor, mixed_texts, images):
    for embed, items in ((embed_texts, mixed_texts), (embed_images, images)):
        exact = embed(tiny_model, tiny_processor, items)
        half = embed(tiny_model, tiny_processor, items, dtype=torch.bfloat16)
        assert half.dtype == torch.float32
        assert 0 < (exact - half).abs().max() < 0.03


def test_the_training_state_of_every_module_is_kept(tiny_model, tiny_processor, short_texts, images):
    tiny_model.train()
    tiny_model.vision_model.eval()  # a frozen tower
    before = [module.training for module in tiny_model.modules()]
    texts = embed_texts(tiny_model, tiny_processor, short_texts)
    embed_images(tiny_model, tiny_processor, images)
    with pytest.raises(ValueError):
        embed_images(tiny_model, tiny_processor, _failing())
    assert [module.training for module in tiny_model.modules()] == before
    (texts * torch.ones(24, requires_grad=True)).sum().backward()  # not an inference tensor


def _failing():
    raise ValueError("image cannot be read")
    yield


@pytest.mark.parametrize("texts, problem", [("a road", "one string"), (["a road", None], r"texts\[1\] is NoneType")])
def test_what_is_no_list_of_strings_is_named(tiny_model, tiny_processor, texts, problem):
    with pytest.raises(ValueError, match=problem):
        embed_texts(tiny_model, tiny_processor, texts)


def test_a_batch_size_of_zero_is_an_error(tiny_model, tiny_processor, images):
    with pytest.raises(ValueError, match="batch_size=0"):
        embed_texts(tiny_model, tiny_processor, ["a road"], batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        embed_images(tiny_model, tiny_processor, images, batch_size=0)


def test_a_loaded_encoder_embeds_as_the_saved_model(tiny_checkpoint, tiny_model, tiny_processor, mixed_texts):
    encoder = load_encoder(str(tiny_checkpoint), label="tiny")
    assert isinstance(encoder, Encoder) and encoder.positions == 248
    assert torch.equal(
        embed_texts(encoder.model, encoder.processor, mixed_texts),
        embed_texts(tiny_model, tiny_processor, mixed_texts),
    )
    described = encoder.describe()
    assert described["weights_sha256"] == weights_sha256(sorted(tiny_model.state_dict().items()))
    assert described["positions"] == 248 and described["dtype"] == "float32"
    with torch.no_grad():
        tiny_model.logit_scale += 1e-3
    assert described["weights_sha256"] != weights_sha256(sorted(tiny_model.state_dict().items()))


def test_a_checkpoint_without_some_weights_is_not_evaluated(tiny_checkpoint):
    from safetensors.torch import load_file, save_file

    file = tiny_checkpoint / "model.safetensors"
    weights = load_file(file)
    del weights["text_projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing .*text_projection\.weight"):
        load_encoder(str(tiny_checkpoint))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_encoder(str(tmp_path))
