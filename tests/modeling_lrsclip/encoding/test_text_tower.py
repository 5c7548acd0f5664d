"""The shortcuts change no embedding, leave the model as it was, and batches hold what they may."""

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_lrsclip.encoding.text_tower import end_of_text_only, pooled_positions, text_batches


def features(model, input_ids, attention_mask):
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
    whole = features(model, input_ids, mask)
    with torch.inference_mode(), end_of_text_only(model) as short:
        torch.testing.assert_close(short(input_ids, mask).pooler_output, whole, atol=3e-6, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = short(input_ids, mask).pooler_output.float()
        assert torch.nn.functional.cosine_similarity(half, whole).min() > 0.995
    assert torch.equal(features(model, input_ids, mask), whole)  # put back


def test_what_follows_the_first_end_of_text_does_not_matter(tiny_model, inputs):
    input_ids, mask = inputs
    changed = input_ids.clone()
    positions = pooled_positions(input_ids, tiny_model.config.text_config.eos_token_id)
    for row, position in zip(changed, positions, strict=True):
        row[position + 1 :] = 5
    assert not torch.equal(changed, input_ids)
    with torch.inference_mode(), end_of_text_only(tiny_model) as short:
        assert torch.equal(short(changed, mask).pooler_output, short(input_ids, mask).pooler_output)


def test_the_model_is_put_back_after_an_error(tiny_model):
    before = [str(module) for module in tiny_model.modules()]
    with pytest.raises(RuntimeError), end_of_text_only(tiny_model):
        assert not isinstance(tiny_model.text_model.encoder.layers[-1], CLIPEncoderLayer)
        raise RuntimeError
    assert [str(module) for module in tiny_model.modules()] == before


def test_a_tower_with_adapters_is_left_alone(tiny_model, inputs):
    class Adapted(torch.nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    attention = tiny_model.text_model.encoder.layers[-1].self_attn
    adapted = Adapted(32, 32)
    adapted.load_state_dict(attention.v_proj.state_dict())
    attention.v_proj = adapted
    with torch.inference_mode(), end_of_text_only(tiny_model) as short:
        assert torch.equal(short(*inputs).pooler_output, features(tiny_model, *inputs))


def test_batches_hold_what_the_cache_does(tiny_model):
    lengths = [248, 248, 100, 90, 20, 20, 20]
    assert text_batches(tiny_model, lengths, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    tiny_model.config.text_config.update({"intermediate_size": 2048})  # 256 tokens
    assert text_batches(tiny_model, lengths, 64) == [range(0, 1), range(1, 2), range(2, 4), range(4, 7)]
    tiny_model.config.text_config.update({"intermediate_size": 10**6})
    assert text_batches(tiny_model, lengths, 64) == [range(index, index + 1) for index in range(7)]
    assert text_batches(tiny_model, [], 64) == []
