"""
Texts and images to unit embeddings. The towers of a CLIP compute less for the same embedding: of the last layer only the
token that the embedding is taken from, batches that a CPU's cache holds, and every core at a batch of its own.

Shapes: N texts, M images, L tokens of the longest text in a batch, B items of a batch, D width of the tower and then of the
shared space, A attention heads.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPTextModel

from .model_inputs import PixelBatcher, cut_tokens, encode_texts, pixel_batches, text_positions, unique_rows


# Bytes of a batch's widest activations, beyond which a CPU waits for its memory.
TEXT_CACHE_BYTES = 2 * 2**20  # 256 tokens of ViT-B; more gains nothing, and padding costs more
IMAGE_CACHE_BYTES = 10 * 2**20  # 4 images of ViT-B/16
LEGACY_EOS = 2  # of configurations before transformers#24773: the tower pools at the highest id instead

Item, Result = TypeVar("Item"), TypeVar("Result")


# ------------------------------------------------------------------------------------------------------- embeddings


def embed_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    batch_size: int = 64,
    max_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | str | tqdm = False,
) -> Tensor:
    """
    Unit embeddings of texts. Texts longer than the model's position table are cut ([`~.model_inputs.share_truncated`] says how many).

    Args:
        model: `LRSCLIPModel` or `CLIPModel`; its training state is left as found.
        processor: the model's processor.
        texts (sequence of N `str`).
        batch_size: most texts encoded at once; they are sorted by length, so that padding costs almost nothing, and a
            CPU takes as many as its cache holds.
        max_tokens: tokens kept of each text, start and end included; default, and at most, the model's positions.
        dtype: `torch.bfloat16` or `torch.float16` runs the towers under autocast; default the weights' own.
        progress: shows a bar on the main process of a terminal; a string is its description; a bar is moved on.

    Returns:
        `Tensor` (N, D), float32 on the CPU, in input order. Equal texts get bit-equal rows. No texts: (0, D).
    """
    rows = encode_texts(processor, texts)
    return embed_token_rows(model, processor, rows, batch_size, max_tokens, dtype, progress)


def embed_token_rows(
    model: Any,
    processor: Any,
    rows: Sequence[list[int]],
    batch_size: int = 64,
    max_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | str | tqdm = False,
) -> Tensor:
    """
    Unit embeddings of texts that [`~.model_inputs.encode_texts`] has turned into token ids.

    Args:
        model, processor, batch_size, max_tokens, dtype, progress: as in [`embed_texts`].
        rows: N rows of token ids.

    Returns:
        `Tensor` (N, D), float32 on the CPU, in input order.
    """
    _check_batch_size(batch_size)
    rows = cut_tokens(rows, min(max_tokens or text_positions(model), text_positions(model)))
    unique, source = unique_rows(rows)  # equal rows are encoded once
    pad = processor.tokenizer.pad_token_id
    embeds = torch.empty(len(unique), model.config.projection_dim)
    batches = text_batches(model, [len(row) for row in unique], batch_size)
    with (
        _inference(model, dtype),
        end_of_text_only(model) as text_features,
        progress_bar(len(unique), progress, "texts") as bar,
    ):

        def encode(indices: range) -> Tensor:
            _settle_thread(model.device, dtype)
            batch = [torch.tensor(unique[index]) for index in indices]
            lengths = torch.tensor([len(row) for row in batch])
            # What stands after a row's first end-of-text never matters: the tower is causal and pools there.
            input_ids = pad_sequence(batch, batch_first=True, padding_value=batch[0][-1] if pad is None else pad)
            attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (B, L)
            return _unit(text_features(input_ids.to(model.device), attention_mask.to(model.device)))  # (B, D)

        for indices, encoded in zip(batches, in_threads(encode, batches, model.device), strict=True):
            embeds[indices.start : indices.stop] = encoded
            bar.update(len(indices))
    return embeds[torch.tensor(source, dtype=torch.long)]  # (N, D)


def embed_images(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool | str | tqdm = False,
    workers: int = 0,
) -> Tensor:
    """
    Unit embeddings of images.

    Args:
        model, processor, dtype, progress: as in [`embed_texts`].
        images: M PIL images of any size and mode: a list, a generator, a `datasets` column, or an
            [`~.imagery.ImageFiles`]. Few batches are held decoded.
        batch_size: most images encoded at once; a CPU takes as many as its cache holds.
        workers: processes that decode and resize images ahead of the model; for a GPU, which would wait for them. 0:
            none; on a CPU each thread does it for its own batch, a generator is read in this one.

    Returns:
        `Tensor` (M, D), float32 on the CPU, in input order. No images: (0, D).
    """
    _check_batch_size(batch_size)
    size, total = image_batch_size(model, batch_size), len(images) if hasattr(images, "__len__") else None
    if total is not None and hasattr(images, "__getitem__"):
        prepare = PixelBatcher(processor.image_processor)
        batches = pixel_batches(prepare, images, size, workers, pin=model.device.type == "cuda")
    else:
        remaining = iter(images)
        batches = iter(lambda: list(itertools.islice(remaining, size)), [])  # until one is empty
    embeds = [torch.empty(0, model.config.projection_dim)]
    with progress_bar(total, progress, "images") as bar:
        for encoded in embed_batches(model, processor, batches, dtype):
            embeds.append(encoded)
            bar.update(len(encoded))
    return torch.cat(embeds)  # (M, D)


def embed_batches(model: Any, processor: Any, batches: Iterable, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """
    Unit embeddings of batches of images, each as soon as it is there: for work without an end in memory.

    Args:
        model, processor, dtype: as in [`embed_images`].
        batches: each `pixel_values` (B, 3, H, W), a list of B PIL images, or a function that returns one of these. Few
            are taken ahead of what is done.

    Yields:
        `Tensor` (B, D), float32 on the CPU, in the order of the batches.
    """
    prepare = PixelBatcher(processor.image_processor)
    with _inference(model, dtype), class_token_only(model):

        def encode(batch: Any) -> Tensor:
            _settle_thread(model.device, dtype)
            batch = batch() if callable(batch) else batch
            batch = batch if isinstance(batch, Tensor) else prepare(batch)  # (B, 3, H, W)
            return _unit(model.get_image_features(pixel_values=batch.to(model.device, non_blocking=True)))

        yield from in_threads(encode, batches, model.device)


def _unit(features: Any) -> Tensor:
    """A tower's projected output, or its tensor, as float32 unit rows on the CPU."""
    pooled = getattr(features, "pooler_output", features)
    return F.normalize(pooled.float(), dim=-1).cpu()


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, must be at least 1.")


@contextlib.contextmanager
def _inference(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no gradient, autocast if asked for; every module's training flag is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    cast = torch.autocast(model.device.type, dtype=dtype) if is_half(dtype) else contextlib.nullcontext()
    try:
        with torch.inference_mode(), cast:
            yield
    finally:
        for module, training in modes:
            module.training = training


def _settle_thread(device: torch.device, dtype: torch.dtype | None) -> None:
    """Set a helping thread, for its life, to the modes of [`_inference`], which hold for the thread that enters it only."""
    if torch.is_grad_enabled():
        torch.set_grad_enabled(False)
        if is_half(dtype):
            torch.set_autocast_dtype(device.type, dtype)
            torch.set_autocast_enabled(device.type, True)


def is_half(dtype: torch.dtype | None) -> bool:
    return dtype not in (None, torch.float32)


@contextlib.contextmanager
def progress_bar(total: int | None, progress: bool | str | tqdm, noun: str) -> Iterator[tqdm]:
    """
    Show a bar on the main process, where standard error is a terminal.

    Args:
        total: number of items; None: unknown.
        progress: False shows nothing; a string is the bar's description; a bar is one of a larger piece of work.
        noun: items, for example `texts`.

    Yields:
        The bar to move.
    """
    if isinstance(progress, tqdm):
        yield progress
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    hidden = not progress or (distributed and torch.distributed.get_rank() != 0)
    description = progress if isinstance(progress, str) else noun
    disable = True if hidden else None  # None: tqdm hides itself where standard error is not a terminal
    with tqdm(total=total, desc=description, unit=f" {noun}", leave=False, disable=disable) as bar:
        yield bar


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


class _LastLayer(nn.Module):
    """The last layer of a tower for one token of each row alone: by default the first one, an image's class token."""

    def __init__(self, layer: CLIPEncoderLayer):
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, pooled: Tensor | None = None, **_: Any
    ) -> Tensor:
        """(B, L, D) -> (B, 1, D); with (B,) positions of end-of-text tokens (B, L, D), that token at all positions."""
        if pooled is None:
            first = hidden_states.new_zeros(len(hidden_states), dtype=torch.long)
            return pooled_layer(self.layer, hidden_states, first)[:, None]
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
    if not layers or not is_stock_layer(layers[-1]):
        yield lambda ids, mask: model.get_text_features(input_ids=ids, attention_mask=mask)
        return
    last = layers[-1]

    def features(input_ids: Tensor, attention_mask: Tensor) -> Any:
        return model.get_text_features(input_ids=input_ids, pooled=pooled_positions(input_ids, tower.eos_token_id))

    activations = [layer.mlp.activation_fn for layer in layers]
    layers[-1] = _LastLayer(last).train(last.training)
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
    layers[-1] = _LastLayer(last).train(last.training)
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
    on_cpu, batches, start = model.device.type == "cpu", [], 0
    tokens = TEXT_CACHE_BYTES // (4 * model.config.text_config.intermediate_size) if on_cpu else 0  # in the cache
    while start < len(lengths):
        size = max(1, min(batch_size, tokens // lengths[start])) if on_cpu else batch_size
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
