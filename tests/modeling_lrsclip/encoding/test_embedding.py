"""The shortcuts change no embedding, leave the model as it was, keep the order, and batches hold what they may."""

import threading

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_lrsclip.encoding.embedding import (
    class_token_only,
    end_of_text_only,
    image_batch_size,
    in_threads,
    pooled_positions,
    text_batches,
)


def text_features(model, input_ids, attention_mask):
    with torch.inference_mode():
        return model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


@pytest.fixture
def inputs(tiny_processor, long_texts, short_texts):
    rows = tiny_processor(text=[*long_texts, *short_texts], padding=True, max_length=77, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]


@pytest.mark.parametrize("name", ["tiny_model", "tiny_clip"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_end_of_text_alone_gives_the_same_embedding(name, attention, legacy, inputs, request):
    model, (input_ids, mask) = request.getfixturevalue(name), inputs
    with torch.no_grad():  # biases start at zero and would hide an error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.set_attn_implementation(attention)
    if legacy:  # pools at the highest id
        model.config.text_config.eos_token_id = model.text_model.eos_token_id = 2
    whole = text_features(model, input_ids, mask)
    with torch.inference_mode(), end_of_text_only(model) as short:
        torch.testing.assert_close(short(input_ids, mask).pooler_output, whole, atol=3e-6, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = short(input_ids, mask).pooler_output.float()
        assert torch.nn.functional.cosine_similarity(half, whole).min() > 0.995
    assert torch.equal(text_features(model, input_ids, mask), whole)  # put back


def test_what_follows_the_first_end_of_text_does_not_matter(tiny_model, inputs):
    input_ids, mask = inputs
    changed = input_ids.clone()
    positions = pooled_positions(input_ids, tiny_model.config.text_config.eos_token_id)
    for row, position in zip(changed, positions, strict=True):
        row[position + 1 :] = 5
    assert not torch.equal(changed, input_ids)
    with torch.inference_mode(), end_of_text_only(tiny_model) as short:
        assert torch.equal(short(changed, mask).pooler_output, short(input_ids, mask).pooler_output)


def test_the_text_tower_is_put_back_after_an_error(tiny_model):
    before = [str(module) for module in tiny_model.modules()]
    with pytest.raises(RuntimeError), end_of_text_only(tiny_model):
        assert not isinstance(tiny_model.text_model.encoder.layers[-1], CLIPEncoderLayer)
        raise RuntimeError
    assert [str(module) for module in tiny_model.modules()] == before


def test_a_text_tower_with_adapters_is_left_alone(tiny_model, inputs):
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    attention = tiny_model.text_model.encoder.layers[-1].self_attn
    adapted = Adapted(32, 32)
    adapted.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = adapted
    with torch.inference_mode(), end_of_text_only(tiny_model) as short:
        assert torch.equal(short(*inputs).pooler_output, text_features(tiny_model, *inputs))


def test_batches_hold_what_the_cache_does(tiny_model):
    lengths = [248, 248, 100, 90, 20, 20, 20]
    assert text_batches(tiny_model, lengths, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    tiny_model.config.text_config.update({"intermediate_size": 2048})  # 256 tokens
    assert text_batches(tiny_model, lengths, 64) == [range(0, 1), range(1, 2), range(2, 4), range(4, 7)]
    tiny_model.config.text_config.update({"intermediate_size": 10**6})
    assert text_batches(tiny_model, lengths, 64) == [range(index, index + 1) for index in range(7)]
    assert text_batches(tiny_model, [], 64) == []


CPU = torch.device("cpu")


def image_features(model, pixel_values):
    with torch.inference_mode():
        return model.get_image_features(pixel_values=pixel_values).pooler_output


@pytest.fixture
def pixel_values():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["tiny_model", "tiny_clip"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_class_token_alone_gives_the_same_embedding(name, attention, pixel_values, request):
    model = request.getfixturevalue(name)
    with torch.no_grad():  # biases start at zero and would hide an error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.set_attn_implementation(attention)
    whole = image_features(model, pixel_values)
    with class_token_only(model):
        short = image_features(model, pixel_values)
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                torch.nn.functional.cosine_similarity(image_features(model, pixel_values).float(), whole).min() > 0.995
            )
    torch.testing.assert_close(short, whole, atol=2e-6, rtol=1e-5)
    assert torch.equal(image_features(model, pixel_values), whole)  # put back


def test_the_image_tower_is_put_back_after_an_error(tiny_model):
    before = list(tiny_model.state_dict())
    with pytest.raises(RuntimeError), class_token_only(tiny_model):
        assert not isinstance(tiny_model.vision_model.encoder.layers[-1], CLIPEncoderLayer)
        raise RuntimeError
    assert list(tiny_model.state_dict()) == before


def test_an_image_tower_with_adapters_is_left_alone(tiny_model, pixel_values):
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    attention = tiny_model.vision_model.encoder.layers[-1].self_attn
    adapted = Adapted(32, 32)
    adapted.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = adapted
    whole = image_features(tiny_model, pixel_values)
    with class_token_only(tiny_model):
        assert torch.equal(image_features(tiny_model, pixel_values), whole)


def test_batches_fit_the_cache(tiny_model):
    assert image_batch_size(tiny_model, 64) == 64  # 17 tokens of 64 values
    tiny_model.config.vision_config.update({"image_size": 224, "patch_size": 16, "intermediate_size": 3072})
    assert image_batch_size(tiny_model, 64) == 4 and image_batch_size(tiny_model, 3) == 3
    tiny_model.config.vision_config.update({"image_size": 1024})
    assert image_batch_size(tiny_model, 64) == 1


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_items(two_threads):
    barrier, taken = threading.Barrier(2, timeout=30), []

    def work(item):
        barrier.wait()  # passes only if two items are worked on at once
        return item, torch.get_num_threads()

    def items():
        for item in range(8):
            taken.append(item)
            yield item

    results = in_threads(work, items(), CPU)
    assert next(results) == (0, 1) and len(taken) <= 4  # few are taken ahead
    assert list(results) == [(item, 1) for item in range(1, 8)]
    assert torch.get_num_threads() == 2


def test_an_error_of_an_item_is_raised(two_threads):
    def work(item):
        if item == 3:
            raise ValueError("bad image")
        return item

    results = in_threads(work, range(100), CPU)
    with pytest.raises(ValueError, match="bad image"):
        list(results)
    assert torch.get_num_threads() == 2


def test_one_thread_works_in_place():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert list(in_threads(lambda item: threading.current_thread(), [1], CPU)) == [threading.main_thread()]
    finally:
        torch.set_num_threads(before)
