"""Cached gradients are those of the whole batch: for any cut, with dropout, checkpointing, loss scaling and compile."""

from functools import partial, partialmethod

import pytest
import torch
from accelerate import Accelerator

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel
from tests.conftest import tower_configs
from training.large_batch import cached_gradients, cut
from training.losses import LossConfig, dual_text_loss
from training.model import Embedder, compile_layers
from training.text_groups import as_they_come, group_by_length


PAIRS = 7


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def batch(tiny_tokenizer):
    """7 images, 7 long texts of 20 to 80 tokens and 7 short ones of 4 to 10."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for shortest, longest in ((20, 80), (4, 10)):
        ids = torch.randint(10, 500, (PAIRS, longest), generator=generator)
        for row in ids:
            row[int(torch.randint(shortest - 1, longest, (), generator=generator)) :] = tiny_tokenizer.eos_token_id
        matrices.append(ids)
    return torch.randn(PAIRS, 3, 32, 32, generator=generator), matrices


def model_of(tokenizer, **fields) -> LRSCLIPModel:
    torch.manual_seed(0)
    configs = tower_configs(tokenizer, **fields)
    configs["vision_config"] |= fields
    return LRSCLIPModel(LRSCLIPConfig(**configs)).train()


def loss_of(image_embeds, text_embeds, model, order, config=LossConfig()):  # noqa: B008
    long, short = text_embeds[order].split(PAIRS)
    return dual_text_loss(image_embeds, long, short, model.logit_scale.exp(), config)


def gradients_of(model):
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def assert_equal(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=tolerance, rtol=tolerance, msg=name)


def run(accelerator, model, batch, config, micro_batch_size=None):
    """The losses and the gradients of one backward pass."""
    pixel_values, matrices = batch
    if micro_batch_size is None:
        texts = as_they_come(matrices)
    else:
        texts = group_by_length(matrices, model.config.text_config.eos_token_id, rows=micro_batch_size)
    loss = partial(loss_of, model=model, order=texts.order, config=config)
    embedder = Embedder(model)
    if micro_batch_size is None:
        losses = loss(*embedder(pixel_values, texts.groups))
        accelerator.backward(losses.loss)
    else:
        pieces = cut(pixel_values, texts.groups, micro_batch_size)
        losses = cached_gradients(accelerator, embedder, pieces, loss, model.logit_scale)
    return torch.stack(losses).detach(), gradients_of(model)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 6, 20])
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(pcm_rank=3, chunk_size=4, label_smoothing=0.1)])
def test_equals_the_plain_step(accelerator, tiny_tokenizer, batch, micro_batch_size, config):
    model = model_of(tiny_tokenizer)
    losses, expected = run(accelerator, model, batch, config)
    cached_losses, got = run(accelerator, model, batch, config, micro_batch_size)
    torch.testing.assert_close(cached_losses, losses, atol=1e-5, rtol=1e-5)
    assert_equal(got, expected)
    assert got["logit_scale"].abs() > 1e-4


def test_pieces(batch):
    pixel_values, matrices = batch
    pieces = cut(pixel_values, [*matrices, matrices[0]], 3)
    assert [(None if images is None else len(images), len(groups)) for images, groups in pieces] == [
        (3, 0),
        (3, 0),
        (None, 1),
        (None, 1),
        (1, 1),
    ]


def test_memory_is_that_of_a_piece(accelerator, tiny_tokenizer, batch):
    """Seen from the graph: what the second pass saves for backward at a time, against the plain step."""
    peaks = []
    for micro_batch_size in (None, 2):
        alive, peak = 0, 0

        def pack(tensor):
            nonlocal alive, peak
            alive += tensor.numel()
            peak = max(peak, alive)
            return tensor

        def unpack(tensor):
            nonlocal alive
            alive -= tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            run(accelerator, model_of(tiny_tokenizer), batch, LossConfig(), micro_batch_size)
        peaks.append(peak)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_replayed(accelerator, tiny_tokenizer, batch, checkpointing):
    model = model_of(tiny_tokenizer, attention_dropout=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pixel_values, matrices = batch
    texts = group_by_length(matrices, model.config.text_config.eos_token_id, rows=2)
    pieces = cut(pixel_values, texts.groups, 2)
    loss = partial(loss_of, model=model, order=texts.order)
    embedder = Embedder(model)

    torch.manual_seed(5)
    images, texts = zip(*(embedder(*piece) for piece in pieces))  # all of it with graph
    loss(*(torch.cat([part for part in parts if part is not None]) for parts in (images, texts))).loss.backward()
    expected, drawn_next = gradients_of(model), torch.rand(3)

    torch.manual_seed(5)
    cached_gradients(accelerator, embedder, pieces, loss, model.logit_scale)
    assert torch.equal(torch.rand(3), drawn_next), "the second pass draws nothing of its own"
    assert_equal(gradients_of(model), expected)
    torch.manual_seed(6)
    cached_gradients(accelerator, embedder, pieces, loss, model.logit_scale)
    other = gradients_of(model)
    assert any((other[name] - expected[name]).abs().max() > 1e-4 for name in other), "there is dropout to replay"


def test_scaled_backward(accelerator, tiny_tokenizer, batch, monkeypatch):
    """fp16's loss scaling multiplies what is handed to `accelerator.backward`; every gradient must come out scaled."""
    model = model_of(tiny_tokenizer)
    _, expected = run(accelerator, model, batch, LossConfig())
    monkeypatch.setattr(accelerator, "backward", lambda loss: (loss * 1024).backward())
    _, got = run(accelerator, model, batch, LossConfig(), 3)
    assert_equal({name: gradient / 1024 for name, gradient in got.items()}, expected)


def test_bf16(tiny_tokenizer, batch):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = model_of(tiny_tokenizer)
    embedder = accelerator.prepare(Embedder(model))
    pixel_values, matrices = batch
    texts = group_by_length(matrices, model.config.text_config.eos_token_id, rows=3)
    loss = partial(loss_of, model=model, order=texts.order)
    accelerator.backward(loss(*embedder(pixel_values, texts.groups)).loss)
    expected = gradients_of(model)
    cached_gradients(accelerator, embedder, cut(pixel_values, texts.groups, 3), loss, model.logit_scale)
    got = gradients_of(model)
    assert got["text_projection.weight"].dtype == torch.float32
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, name


def test_frozen_logit_scale(accelerator, tiny_tokenizer, batch):
    model = model_of(tiny_tokenizer)
    model.logit_scale.requires_grad_(False)
    pixel_values, matrices = batch
    texts = group_by_length(matrices, model.config.text_config.eos_token_id, rows=3)
    loss = partial(loss_of, model=model, order=texts.order)
    cached_gradients(accelerator, Embedder(model), cut(pixel_values, texts.groups, 3), loss, model.logit_scale)
    assert model.logit_scale.grad is None and model.text_projection.weight.grad.abs().max() > 0


def test_compiled_layers(accelerator, tiny_tokenizer, batch, monkeypatch):
    # Without the code generator, which takes a minute and a half; what is traced and differentiated is the same.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    model = model_of(tiny_tokenizer)
    _, expected = run(accelerator, model, batch, LossConfig())
    names = set(model.state_dict())
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    for micro_batch_size in (None, 4):  # none leaves a single image, a size of 1 would be traced by itself
        _, got = run(accelerator, model, batch, LossConfig(), micro_batch_size)
        assert_equal(got, expected)
    counters = torch._dynamo.utils.counters
    assert set(model.state_dict()) == names
    # A graph for each tower, with and without gradient: none more for other lengths or another layer.
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
