"""
A CLIP's towers computing less for the same embedding: of the last layer only the token that the embedding is taken from,
batches that a CPU's cache holds, and every core at a batch of its own.

Shapes: B texts or images, L tokens, D width of the tower, A attention heads.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModel


# Bytes of a batch's widest activations, beyond which a CPU waits for its memory.
TEXT_CACHE_BYTES = 2 * 2**20  # 256 tokens of ViT-B; more gains nothing, and padding costs more
IMAGE_CACHE_BYTES = 10 * 2**20  # 4 images of ViT-B/16
LEGACY_EOS = 2  # of configurations before transformers#24773: the tower pools at the highest id instead

Item, Result = TypeVar("Item"), TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------- last layer


def is_stock_layer(layer: nn.Module) -> bool:
    """Whether [`pooled_layer`] may stand for a layer: not for one with adapters or quantized weights."""
    if not isinstance(layer, CLIPEncoderLayer):
        return False
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return {type(projection) for projection in projections} == {nn.Linear}


def pooled_layer(
    layer: CLIPEncoderLayer, hidden_states: Tensor, pooled: Tensor, unseen: Tensor | None = None
) -> Tensor:
    """
    The output of a layer for one token of each row. With one query a head, the keys and values of the other tokens need
    not be computed: (W t) . q = t . (W^T q).

    Args:
        layer: passes [`is_stock_layer`].
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
    key_query = torch.einsum("bap,apd->bad", query, attention.k_proj.weight.unflatten(0, (heads, -1)))  # (B, A, D)
    scores = key_query @ tokens.transpose(1, 2)  # (B, A, L)
    if unseen is not None:
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
    mixed = scores.softmax(dim=-1).to(tokens.dtype) @ tokens  # (B, A, D)
    values = torch.einsum("bad,apd->bap", mixed, attention.v_proj.weight.unflatten(0, (heads, -1)))
    values = values.flatten(1) + attention.v_proj.bias  # (B, D)
    embeds = hidden_states[rows, pooled] + attention.out_proj(values)  # (B, D)
    return embeds + layer.mlp(layer.layer_norm2(embeds))  # (B, D)


class _EndOfTextLayer(nn.Module):
    """The last layer of a CLIP text tower for the end-of-text token alone."""

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, pooled: Tensor, **kwargs: Any
    ) -> Tensor:
        """(B, L, D), (B,) positions of the end-of-text tokens -> (B, L, D), the end-of-text token at all positions."""
        length = hidden_states.shape[1]
        later = torch.arange(length, device=pooled.device) > pooled[:, None]  # (B, L)
        return pooled_layer(self.layer, hidden_states, pooled, later)[:, None].expand(-1, length, -1)


class _ClassTokenLayer(nn.Module):
    """The last layer of a CLIP image tower for the class token alone."""

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, 1, D)"""
        first = hidden_states.new_zeros(len(hidden_states), dtype=torch.long)
        return pooled_layer(self.layer, hidden_states, first)[:, None]


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
    if not layers or not is_stock_layer(layers[-1]):
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


@contextlib.contextmanager
def class_token_only(model: Any) -> Iterator[None]:
    """
    Lets `model.get_image_features` leave out what the embedding does not depend on: a twelfth of ViT-B's work, a
    twenty-fourth of ViT-L's. The `last_hidden_state` then has one token. A tower that is not CLIP's own (adapters,
    quantized layers) is left as it is.
    """
    layers = getattr(getattr(getattr(model, "vision_model", None), "encoder", None), "layers", None)
    last = layers[-1] if layers else None
    if not is_stock_layer(last):
        yield
        return
    layers[-1] = _ClassTokenLayer(last).train(last.training)
    try:
        yield
    finally:
        layers[-1] = last


# -------------------------------------------------------------------------------------------------- batches and threads


def text_batches(model: Any, lengths: Sequence[int], batch_size: int) -> list[range]:
    """
    Cuts texts that are sorted by falling length into batches.

    Args:
        model: on a CPU, a batch has no more tokens than its cache holds.
        lengths: tokens of each text.
        batch_size: most texts of a batch.

    Returns:
        Indices of each batch's texts.
    """
    limit = None
    if model.device.type == "cpu":
        limit = TEXT_CACHE_BYTES // (4 * model.config.text_config.intermediate_size)  # tokens
    batches, start = [], 0
    while start < len(lengths):
        size = batch_size if limit is None else max(1, min(batch_size, limit // lengths[start]))
        batches.append(range(start, min(start + size, len(lengths))))
        start = batches[-1].stop
    return batches


def image_batch_size(model: Any, batch_size: int) -> int:
    """Number of images to encode at once: `batch_size`, but on a CPU no more than its cache holds."""
    if model.device.type != "cpu":
        return batch_size
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return max(1, min(batch_size, IMAGE_CACHE_BYTES // (4 * tokens * vision.intermediate_size)))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """
    Yields the results of a function of torch tensors, in the order of the items. On a CPU every core works on an item of
    its own, which beats all cores working on one: they never wait for each other, least of all where other programs run.

    Args:
        function: is called in other threads, where `torch.inference_mode` and autocast must be entered anew.
        items: taken one by one, few ahead of what is done.
        device: on another than the CPU everything happens in this thread.

    Returns:
        An iterator of the results.
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
