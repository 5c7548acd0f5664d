"""
Encoding texts faster with the same result: batches that a CPU's cache holds, and of the last layer only what the
embedding is taken from.

Shapes: B texts, L tokens of the longest, D width of the tower, A attention heads.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModel


# Of the widest activations of a batch, 256 tokens of ViT-B. A CPU gains nothing from more, and padding costs more.
CACHE_BYTES = 2 * 2**20
LEGACY_EOS = 2  # of configurations before transformers#24773: the tower pools at the highest id instead


class _EndOfTextLayer(nn.Module):
    """
    The last layer of a CLIP text tower for the end-of-text token alone. With one query a head, the keys and values of
    the other tokens need not be computed: (W t) . q = t . (W^T q).
    """

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, pooled: Tensor, **kwargs: Any
    ) -> Tensor:
        """(B, L, D), (B,) positions of the end-of-text tokens -> (B, L, D), the end-of-text token in all places."""
        layer, attention = self.layer, self.layer.self_attn
        heads, (texts, length, _) = attention.num_heads, hidden_states.shape
        tokens, row = layer.layer_norm1(hidden_states), torch.arange(texts, device=pooled.device)
        query = attention.q_proj(tokens[row, pooled]).unflatten(1, (heads, -1)) * attention.scale  # (B, A, D/A)
        # The bias of the keys adds the same to all scores of a head, and softmax takes it out again.
        asked = torch.einsum("bap,apd->bad", query, attention.k_proj.weight.unflatten(0, (heads, -1)))  # (B, A, D)
        later = torch.arange(length, device=pooled.device) > pooled[:, None]  # (B, L)
        scores = (asked @ tokens.transpose(1, 2)).masked_fill(later[:, None], -torch.inf)  # (B, A, L)
        mixed = scores.softmax(dim=-1).to(tokens.dtype) @ tokens  # (B, A, D)
        values = torch.einsum("bad,apd->bap", mixed, attention.v_proj.weight.unflatten(0, (heads, -1)))
        values = values.flatten(1) + attention.v_proj.bias  # (B, D)
        embeds = hidden_states[row, pooled] + attention.out_proj(values)  # (B, D)
        embeds = embeds + layer.mlp(layer.layer_norm2(embeds))  # (B, D)
        return embeds[:, None].expand(-1, length, -1)


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
    if not layers or not _is_clips_own(layers[-1]):
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


def _is_clips_own(layer: nn.Module) -> bool:
    if not isinstance(layer, CLIPEncoderLayer):
        return False
    attention = layer.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return {type(part) for part in parts} == {nn.Linear}


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
