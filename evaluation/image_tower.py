"""
Encoding images faster with the same result: nothing is computed that the embedding does not depend on, and a CPU's
cores each take their own images.

Shapes: B images, L tokens of an image, D width of the tower, A attention heads.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


CACHE_BYTES = 10 * 2**20  # of the widest activations of a batch; beyond, a CPU waits for its memory

Item, Result = TypeVar("Item"), TypeVar("Result")


class _PooledTokenLayer(nn.Module):
    """
    The last layer of a CLIP image tower for the first token alone, which is all that the embedding is taken from. With
    one query a head, the keys and values of the other tokens need not be computed: (W t) . q = t . (W^T q).
    """

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        layer, attention = self.layer, self.layer.self_attn
        heads = attention.num_heads
        tokens = layer.layer_norm1(hidden_states)  # (B, L, D)
        query = attention.q_proj(tokens[:, 0]).unflatten(1, (heads, -1)) * attention.scale  # (B, A, D/A)
        # The bias of the keys adds the same to all scores of a head, and softmax takes it out again.
        asked = torch.einsum("bap,apd->bad", query, attention.k_proj.weight.unflatten(0, (heads, -1)))  # (B, A, D)
        shares = (asked @ tokens.transpose(1, 2)).softmax(dim=-1)  # (B, A, L)
        mixed = shares @ tokens  # (B, A, D)
        values = torch.einsum("bad,apd->bap", mixed, attention.v_proj.weight.unflatten(0, (heads, -1)))
        values = values.flatten(1) + attention.v_proj.bias  # (B, D)
        pooled = hidden_states[:, 0] + attention.out_proj(values)  # (B, D)
        pooled = pooled + layer.mlp(layer.layer_norm2(pooled))  # (B, D)
        return pooled[:, None]  # (B, 1, D)


@contextlib.contextmanager
def pooled_token_only(model: Any) -> Iterator[None]:
    """
    Within it, `model.get_image_features` leaves out what the embedding does not depend on: a twelfth of ViT-B's work, a
    twenty-fourth of ViT-L's. The `last_hidden_state` then has one token. A tower that is not CLIP's own (adapters,
    quantized layers) is left as it is.
    """
    layers = getattr(getattr(getattr(model, "vision_model", None), "encoder", None), "layers", None)
    last = layers[-1] if layers else None
    if not isinstance(last, CLIPEncoderLayer) or {type(part) for part in _projections(last)} != {nn.Linear}:
        yield
        return
    layers[-1] = _PooledTokenLayer(last).train(last.training)
    try:
        yield
    finally:
        layers[-1] = last


def _projections(layer: CLIPEncoderLayer) -> tuple[nn.Module, ...]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj


def tower_batch(model: Any, batch_size: int) -> int:
    """Images to encode at once: `batch_size`, but on a CPU no more than its cache holds (4 of ViT-B/16)."""
    if model.device.type != "cpu":
        return batch_size
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return max(1, min(batch_size, CACHE_BYTES // (4 * tokens * vision.intermediate_size)))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """
    Results of a function of torch tensors, in the order of the items. On a CPU every core works on an item of its own,
    which beats all cores working on one: they never wait for each other, least of all where other programs run.

    Args:
        function: is called in other threads, where `torch.inference_mode` and autocast must be entered anew.
        items: taken one by one, few ahead of what is done.
        device: on another than the CPU everything happens in this thread.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return
    waiting: deque = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # a thread's number is also the default of later ones
