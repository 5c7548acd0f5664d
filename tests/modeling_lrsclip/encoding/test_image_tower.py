"""The shortcuts change no embedding, leave the model as it was, and keep the order."""

import threading

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_lrsclip.encoding.image_tower import in_threads, pooled_token_only, tower_batch


CPU = torch.device("cpu")


def features(model, pixel_values):
    with torch.inference_mode():
        return model.get_image_features(pixel_values=pixel_values).pooler_output


@pytest.fixture
def pixel_values():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["tiny_model", "tiny_clip"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_pooled_token_alone_gives_the_same_embedding(name, attention, pixel_values, request):
    model = request.getfixturevalue(name)
    with torch.no_grad():  # biases start at zero and would hide an error
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.set_attn_implementation(attention)
    whole = features(model, pixel_values)
    with pooled_token_only(model):
        short = features(model, pixel_values)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.nn.functional.cosine_similarity(features(model, pixel_values).float(), whole).min() > 0.995
    torch.testing.assert_close(short, whole, atol=2e-6, rtol=1e-5)
    assert torch.equal(features(model, pixel_values), whole)  # put back


def test_the_model_is_put_back_after_an_error(tiny_model):
    before = list(tiny_model.state_dict())
    with pytest.raises(RuntimeError), pooled_token_only(tiny_model):
        assert not isinstance(tiny_model.vision_model.encoder.layers[-1], CLIPEncoderLayer)
        raise RuntimeError
    assert list(tiny_model.state_dict()) == before


def test_a_tower_with_adapters_is_left_alone(tiny_model, pixel_values):
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    attention = tiny_model.vision_model.encoder.layers[-1].self_attn
    adapted = Adapted(32, 32)
    adapted.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = adapted
    whole = features(tiny_model, pixel_values)
    with pooled_token_only(tiny_model):
        assert torch.equal(features(tiny_model, pixel_values), whole)


def test_batches_fit_the_cache(tiny_model):
    assert tower_batch(tiny_model, 64) == 64  # 17 tokens of 64 values
    tiny_model.config.vision_config.update({"image_size": 224, "patch_size": 16, "intermediate_size": 3072})
    assert tower_batch(tiny_model, 64) == 4 and tower_batch(tiny_model, 3) == 3
    tiny_model.config.vision_config.update({"image_size": 1024})
    assert tower_batch(tiny_model, 64) == 1


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
