"""
Texts and images to unit embeddings.

Shapes: N texts, M images, L tokens of the longest text in a batch, B items of a batch, D width of the shared space.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_lrsclip.files.hashing import weights_sha256

from ..published.registry import ModelSource
from .cache import EmbeddingCache, SharedWork
from .loading import OnnxModel, load_model
from .model_inputs import PixelBatcher, cut_tokens, encode_texts, hash_rows, pixel_batches, text_positions, unique_rows
from .towers import class_token_only, end_of_text_only, image_batch_size, in_threads, text_batches


PART = 256  # texts or images that are kept in one file of the cache, and handed to one process

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
        _bar(len(unique), progress, "texts") as bar,
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
    prepared: Any = _batches(images, size)
    if total is not None and hasattr(images, "__getitem__"):
        prepare = PixelBatcher(processor.image_processor)
        prepared = pixel_batches(prepare, images, size, workers, pin=model.device.type == "cuda")
    embeds = [torch.empty(0, model.config.projection_dim)]
    with _bar(total, progress, "images") as bar:
        for encoded in embed_batches(model, processor, prepared, dtype):
            embeds.append(encoded)
            bar.update(len(encoded))
    return torch.cat(embeds)  # (M, D)


def embed_batches(
    model: Any, processor: Any, batches: Iterable[Any], dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
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
            if not isinstance(batch, Tensor):
                batch = prepare(batch)  # (B, 3, H, W)
            return _unit(model.get_image_features(pixel_values=batch.to(model.device, non_blocking=True)))

        yield from in_threads(encode, batches, model.device)


def _unit(features: Any) -> Tensor:
    """A tower's projected output, or its tensor, as float32 unit rows on the CPU."""
    pooled = getattr(features, "pooler_output", features)
    return F.normalize(pooled.float(), dim=-1).cpu()


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, must be at least 1.")


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@contextlib.contextmanager
def _inference(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no gradient, autocast if asked for; every module's training flag is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    cast = torch.autocast(model.device.type, dtype=dtype) if _is_half(dtype) else contextlib.nullcontext()
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
        if _is_half(dtype):
            torch.set_autocast_dtype(device.type, dtype)
            torch.set_autocast_enabled(device.type, True)


def _is_half(dtype: torch.dtype | None) -> bool:
    return dtype not in (None, torch.float32)


@contextlib.contextmanager
def _bar(total: int | None, progress: bool | str | tqdm, noun: str) -> Iterator[tqdm]:
    if isinstance(progress, tqdm):
        yield progress  # of a larger piece of work
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    hidden = not progress or (distributed and torch.distributed.get_rank() != 0)
    description = progress if isinstance(progress, str) else noun
    # disable=None: tqdm hides itself where standard error is not a terminal.
    with tqdm(total=total, desc=description, unit=f" {noun}", leave=False, disable=True if hidden else None) as bar:
        yield bar


# ---------------------------------------------------------------------------------------------------------- encoder


class Embeddings(NamedTuple):
    """Unit embeddings and what they cost."""

    embeds: Tensor  # (N, D) float32 on the CPU
    seconds: float  # that computing them took, in all processes together, when they were first computed


@dataclass
class Encoder:
    """
    A model with everything that decides its embeddings; its weights must not change while it is in use. What was
    embedded before is not embedded again: images however many tasks ask for them, and with `cache_dir` images and texts
    of earlier runs, interrupted ones too.
    """

    model: Any
    processor: Any
    label: str = "model"  # the model's name in tables
    path: str = ""  # where it was loaded from
    batch_size: int = 64  # texts or images encoded at once, at most
    dtype: torch.dtype | None = None  # autocast; None: the weights' own
    progress: bool = False
    workers: int = 0  # processes that decode images, as in `embed_images`
    compile: bool = False  # torch.compile of the towers' layers: minutes at first, faster from then on
    cache_dir: str | Path | None = None  # folder of embeddings; None: nothing is kept on disk
    distributed: bool = False  # processes of torch.distributed share the work; all must make the same calls
    _images: dict[str, Embeddings] = field(default_factory=dict, repr=False)  # by content

    def __post_init__(self):
        if self.compile:
            for tower in (self.model.text_model, self.model.vision_model):
                for layer in tower.encoder.layers:
                    layer.compile(dynamic=True)

    @property
    def positions(self) -> int:
        """Number of tokens that the model reads of a text: what its table and its tokenizer allow."""
        return min(text_positions(self.model), self.processor.tokenizer.model_max_length)

    def images(self, images: Any) -> Embeddings:
        """
        Embed images, or return what was embedded of the same content before.

        Args:
            images: M images that can be cut into slices and have a `content_hash`, as
                [`~.imagery.ImageFiles`] and its slices have.

        Returns:
            (M, D) unit embeddings and their seconds.
        """
        key = images.content_hash
        if key not in self._images:
            batch = image_batch_size(self.model, self.batch_size)
            parts = self._parts(images, batch) if self.cache_dir or self.distributed else [images]
            work = SharedWork(self._cache("image"), self.distributed)
            with _bar(len(images), f"{self.label}: images" if self.progress else False, "images") as bar:

                def embed(part: Any) -> Tensor:
                    options = self.batch_size, self.dtype, bar, self.workers
                    return embed_images(self.model, self.processor, part, *options)

                self._images[key] = Embeddings(*work.embed(parts, lambda part: part.content_hash, embed))
        return self._images[key]

    def texts(self, rows: Sequence[list[int]]) -> Embeddings:
        """
        Embed texts.

        Args:
            rows: N token rows of [`encode_texts`].

        Returns:
            (N, D) unit embeddings and their seconds; equal rows are embedded once.
        """
        unique, source = unique_rows(rows)
        work = SharedWork(self._cache("text"), self.distributed)
        with _bar(len(unique), f"{self.label}: texts" if self.progress else False, "texts") as bar:

            def embed(part: Sequence[list[int]]) -> Tensor:
                return embed_token_rows(self.model, self.processor, part, self.batch_size, None, self.dtype, bar)

            embeds, seconds = work.embed(self._parts(unique, self.batch_size), hash_rows, embed)
        return Embeddings(embeds[torch.tensor(source, dtype=torch.long)], seconds)

    def _parts(self, items: Any, batch: int) -> list[Any]:
        """Cut items into pieces of whole batches, so that embeddings depend neither on who computes a piece nor on which were kept."""
        size = max(1, PART // batch) * batch
        return [items[start : start + size] for start in range(0, max(1, len(items)), size)]

    def _cache(self, kind: str) -> EmbeddingCache | None:
        """The folder of embeddings on disk; its name holds all that an item's embedding depends on beside the item."""
        if self.cache_dir is None:
            return None
        origin = {
            "kind": kind,
            "weights": self.weights_sha256,
            "config": _plain_config(self.model.config),
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.dtype or self.model.dtype),
            "device": self.model.device.type,
            "width": self.model.config.projection_dim,
        }
        if kind == "image":
            origin["image_processor"] = self.processor.image_processor.to_dict()
            # Its own name of itself is the same with torchvision, whose pixels differ.
            origin["image_processor_class"] = type(self.processor.image_processor).__qualname__
            origin["torchvision"] = find_spec("torchvision") and version("torchvision")
            origin["pillow"] = PIL.__version__
            origin["more_than_8_bits"] = "percentiles 2-98"  # as `.imagery` reads them
        return EmbeddingCache(Path(self.cache_dir).expanduser(), json.dumps(origin, sort_keys=True, default=str))

    @cached_property
    def weights_sha256(self) -> str:
        return weights_sha256(sorted(self.model.state_dict().items()))

    def describe(self) -> dict[str, Any]:
        """Return the fields that identify the model in `results.json`."""
        return {
            "label": self.label,
            "path": self.path,
            "model_class": getattr(self.model, "name", type(self.model).__name__),
            "positions": self.positions,
            "parameters": getattr(self.model, "parameter_count", None)
            or sum(weight.numel() for weight in self.model.parameters()),
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype or self.model.dtype).removeprefix("torch."),
            "image_processor": type(self.processor.image_processor).__name__,
            "tokenizer": type(self.processor.tokenizer).__name__,
            "device": str(self.model.device),
        }


def _plain_config(config: Any) -> dict[str, Any]:
    """A configuration's fields without those that tell where and by which version it was saved."""
    fields = config.to_dict()
    return {name: value for name, value in fields.items() if name not in ("_name_or_path", "transformers_version")}


def load_encoder(
    source: str | ModelSource,
    device: str = "cpu",
    label: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Encoder:
    """
    Loads a model with float32 weights.

    Args:
        source: model folder or Hub id of a CLIP or another dual encoder (see [`~.loading.load_model`]); or the result of
            [`~modeling_lrsclip.published.registry.resolve`], which may be a published checkpoint file.
        device: where the towers run, for example `cpu` or `cuda:0`.
        label: the model's name in tables; default its path.
        tokenizer: for a checkpoint file: Hub id, folder, or the published BPE file.
        trust_remote_code: whether code that lies beside the weights may run.
        options: `batch_size`, `dtype`, `progress`, `workers`, `compile`, `cache_dir`, `distributed` of [`Encoder`].

    Returns:
        [`Encoder`], its model in evaluation mode.

    Raises:
        `ValueError`: for something that cannot be loaded, or a checkpoint that lacks weights of the model.
    """
    source = source if isinstance(source, ModelSource) else ModelSource(source)
    model, processor = load_model(source, tokenizer, trust_remote_code)
    if options.get("compile") and not hasattr(model, "text_model"):
        raise ValueError(f"{source.path}: only the towers of CLIP and LRSCLIP are compiled; leave --compile out.")
    if isinstance(model, OnnxModel) and (torch.device(device).type != "cpu" or _is_half(options.get("dtype"))):
        raise ValueError(f"{source.path}: exported towers run on the CPU, in the type they were exported with.")
    return Encoder(model.to(device).eval(), processor, label or source.path, source.path, **options)
