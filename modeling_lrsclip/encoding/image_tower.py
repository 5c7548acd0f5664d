"""
Encoding images faster with the same result: nothing is computed that the embedding does not depend on, and a CPU's
cores each take their own images.

Shapes: B images, L tokens of an image, D width of the tower.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .pooled_layer import is_clips_own, pooled_layer


CACHE_BYTES = 10 * 2**20  # of the widest activations of a batch; beyond, a CPU waits for its memory

Item, Result = TypeVar("Item"), TypeVar("Result")


class _PooledTokenLayer(nn.Module):
    """The last layer of a CLIP image tower for the first token alone."""

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, 1, D)"""
        first = hidden_states.new_zeros(len(hidden_states), dtype=torch.long)
        return pooled_layer(self.layer, hidden_states, first)[:, None]


@contextlib.contextmanager
def pooled_token_only(model: Any) -> Iterator[None]:
    """
    Within it, `model.get_image_features` leaves out what the embedding does not depend on: a twelfth of ViT-B's work, a
    twenty-fourth of ViT-L's. The `last_hidden_state` then has one token. A tower that is not CLIP's own (adapters,
    quantized layers) is left as it is.
    """
    layers = getattr(getattr(getattr(model, "vision_model", None), "encoder", None), "layers", None)
    last = layers[-1] if layers else None
    if not is_clips_own(last):
        yield
        return
    layers[-1] = _PooledTokenLayer(last).train(last.training)
    try:
        yield
    finally:
        layers[-1] = last


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
