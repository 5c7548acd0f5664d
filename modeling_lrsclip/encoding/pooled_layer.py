"""
The last layer of a CLIP tower for one token alone, which is all that the embedding is taken from.

Shapes: B texts or images, L tokens, D width of the tower, A attention heads.
"""

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


def is_clips_own(layer: nn.Module) -> bool:
    """Whether [`pooled_layer`] may stand for a layer: not for one with adapters or quantized weights."""
    if not isinstance(layer, CLIPEncoderLayer):
        return False
    attention = layer.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return {type(part) for part in parts} == {nn.Linear}


def pooled_layer(
    layer: CLIPEncoderLayer, hidden_states: Tensor, pooled: Tensor, unseen: Tensor | None = None
) -> Tensor:
    """
    What `layer` gives for one token of each row. With one query a head, the keys and values of the other tokens need
    not be computed: (W t) . q = t . (W^T q).

    Args:
        hidden_states: (B, L, D).
        pooled: (B,) position of the token.
        unseen: (B, L) bool, the tokens that it does not attend to; None: none.

    Returns:
        (B, D)
    """
    attention = layer.self_attn
    heads, rows = attention.num_heads, torch.arange(len(hidden_states), device=hidden_states.device)
    tokens = layer.layer_norm1(hidden_states)  # (B, L, D)
    query = attention.q_proj(tokens[rows, pooled]).unflatten(1, (heads, -1)) * attention.scale  # (B, A, D/A)
    # The bias of the keys adds the same to all scores of a head, and softmax takes it out again.
    asked = torch.einsum("bap,apd->bad", query, attention.k_proj.weight.unflatten(0, (heads, -1)))  # (B, A, D)
    scores = asked @ tokens.transpose(1, 2)  # (B, A, L)
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
    mixed = scores.softmax(dim=-1).to(tokens.dtype) @ tokens  # (B, A, D)
    values = torch.einsum("bad,apd->bap", mixed, attention.v_proj.weight.unflatten(0, (heads, -1)))
    values = values.flatten(1) + attention.v_proj.bias  # (B, D)
    embeds = hidden_states[rows, pooled] + attention.out_proj(values)  # (B, D)
    return embeds + layer.mlp(layer.layer_norm2(embeds))  # (B, D)
