"""
Encoding texts faster with the same result: batches that a CPU's cache holds, and of the last layer only what the
embedding is taken from.

Shapes: B texts, L tokens of the longest, D width of the tower.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModel

from .pooled_layer import is_clips_own, pooled_layer


# Of the widest activations of a batch, 256 tokens of ViT-B. A CPU gains nothing from more, and padding costs more.
CACHE_BYTES = 2 * 2**20
LEGACY_EOS = 2  # of configurations before transformers#24773: the tower pools at the highest id instead


class _EndOfTextLayer(nn.Module):
    """The last layer of a CLIP text tower for the end-of-text token alone."""

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, pooled: Tensor, **kwargs: Any
    ) -> Tensor:
        """(B, L, D), (B,) positions of the end-of-text tokens -> (B, L, D), the end-of-text token in all places."""
        length = hidden_states.shape[1]
        later = torch.arange(length, device=pooled.device) > pooled[:, None]  # (B, L)
        return pooled_layer(self.layer, hidden_states, pooled, later)[:, None].expand(-1, length, -1)


class _QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), without two of the three passes over new memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.mul(hidden_states, 1.702).sigmoid_().mul_(hidden_states)


def pooled_positions(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """(B, L) token ids -> (B,) positions where a CLIP text tower pools: the first end-of-text token."""
    marks = input_ids if eos_token_id == LEGACY_EOS else (input_ids == eos_token_id).int()
    return marks.argmax(dim=-1)


@contextlib.contextmanager
def end_of_text_only(model: Any) -> Iterator[Callable[[Tensor, Tensor], Any]]:
    """
    Yields a function of (B, L) `input_ids` and `attention_mask` that does what `model.get_text_features` does, without
    what the embedding does not depend on: a twelfth of a tower of twelve layers, and the look at padding, which a
    causal tower that pools at the first end-of-text token never sees. A tower that is not CLIP's own (adapters,
    quantized layers) is left as it is.
    """
    tower = getattr(model, "text_model", None)
    layers = tower.encoder.layers if isinstance(tower, CLIPTextModel) else None
    if not layers or not is_clips_own(layers[-1]):
        yield lambda input_ids, attention_mask: model.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask
        )
        return
    last = layers[-1]

    def features(input_ids: Tensor, attention_mask: Tensor) -> Any:
        pooled = pooled_positions(input_ids, tower.eos_token_id)
        return model.get_text_features(input_ids=input_ids, pooled=pooled)

    activations = [layer.mlp.activation_fn for layer in layers]
    layers[-1] = _EndOfTextLayer(last).train(last.training)
    for mlp in (layer.mlp for layer in (*layers[:-1], last)):
        if type(mlp.activation_fn) is QuickGELUActivation:
            mlp.activation_fn = _QuickGELU()
    try:
        yield features
    finally:
        layers[-1] = last
        for layer, activation in zip(layers, activations, strict=True):
            layer.mlp.activation_fn = activation


def text_batches(model: Any, lengths: Sequence[int], batch_size: int) -> list[range]:
    """
    Cuts texts that are sorted by falling length into batches of `batch_size`, on a CPU of no more than its cache holds.

    Args:
        lengths: tokens of each text.
    """
    limit = None
    if model.device.type == "cpu":
        limit = CACHE_BYTES // (4 * model.config.text_config.intermediate_size)  # tokens
    batches, start = [], 0
    while start < len(lengths):
        size = batch_size if limit is None else max(1, min(batch_size, limit // lengths[start]))
        batches.append(range(start, min(start + size, len(lengths))))
        start = batches[-1].stop
    return batches
