"""
Texts and images -> unit embeddings.

Shapes: N texts, M images, L tokens of the longest text in a batch, D width of the shared space.
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
from typing import Any

import PIL
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_lrsclip.files.hashing import json_sha256, weights_sha256

from ..published.registry import ModelSource
from .cache import EmbeddingCache, SharedWork
from .image_batches import pixel_batches
from .image_tower import in_threads, pooled_token_only, tower_batch
from .text_tower import end_of_text_only, text_batches


PART = 256  # texts or images that are kept in one file of the cache, and handed to one process

# ----------------------------------------------------------------------------------------------------------- tokens


def encode_texts(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of texts, cleaned and without padding, start and end tokens included, cut at the tokenizer's length.

    Args:
        processor: an `LRSCLIPProcessor`, or any CLIP processor with a `tokenizer`.
        texts (sequence of N `str`).

    Returns:
        N rows of at most `tokenizer.model_max_length` ids.

    Raises:
        `ValueError`: for a single string in place of a sequence, or an entry that is not a string.
    """
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "encode_text"):
        return processor.encode_text(texts)
    rows = processor.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return cut_tokens(rows, processor.tokenizer.model_max_length)


def token_lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each whole text, before anything is cut, start and end tokens included."""
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "count_tokens"):
        return processor.count_tokens(texts)
    rows = processor.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return [len(row) for row in rows]


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: write [text].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is {type(text).__name__} ({text!r:.60}); every text must be a string.")
    return texts


def cut_tokens(rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """
    Rows of at most `max_tokens` ids: the first `max_tokens - 1` and end-of-text put back as the last, as every CLIP
    tokenizer truncates. A row that is short enough is returned as it is.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}, must be at least 2: the start and the end token count.")
    return [row if len(row) <= max_tokens else row[: max_tokens - 1] + row[-1:] for row in rows]


def share_truncated(lengths: Sequence[int], max_tokens: int) -> float:
    """Share, from 0 to 1, of the texts ([`token_lengths`]) that are longer than `max_tokens` and so lose their end."""
    return sum(length > max_tokens for length in lengths) / max(len(lengths), 1)


def text_positions(model: Any) -> int:
    """Number of tokens, start and end included, that the model's text position table holds: 77 or 248."""
    return model.config.text_config.max_position_embeddings


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
    Unit embeddings of texts. Texts longer than the model's position table are cut ([`share_truncated`] says how many).

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
    """As [`embed_texts`], for texts that [`encode_texts`] has turned into token ids already."""
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


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each row once, by falling length (what fails, fails first), and for every row given its place among those."""
    unique = sorted(dict.fromkeys(map(tuple, rows)), key=len, reverse=True)
    place = {row: index for index, row in enumerate(unique)}
    return unique, [place[tuple(row)] for row in rows]


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
            [`~evaluation.benchmarks.image_files.ImageFiles`]. Few batches are held decoded.
        batch_size: most images encoded at once; a CPU takes as many as its cache holds.
        workers: processes that decode and resize images ahead of the model; for a GPU, which would wait for them. 0:
            none; on a CPU each thread does it for its own batch, a generator is read in this one.

    Returns:
        `Tensor` (M, D), float32 on the CPU, in input order. No images: (0, D).
    """
    _check_batch_size(batch_size)
    size, total = tower_batch(model, batch_size), len(images) if hasattr(images, "__len__") else None
    prepared: Any = _batches(images, size)
    if total is not None and hasattr(images, "__getitem__"):
        prepared = pixel_batches(processor, images, size, workers, pin=model.device.type == "cuda")
    embeds = [torch.empty(0, model.config.projection_dim)]
    with _inference(model, dtype), pooled_token_only(model), _bar(total, progress, "images") as bar:

        def encode(batch: Any) -> Tensor:
            _settle_thread(model.device, dtype)
            batch = batch() if callable(batch) else batch
            if not isinstance(batch, Tensor):
                batch = processor(images=batch, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)
            return _unit(model.get_image_features(pixel_values=batch.to(model.device, non_blocking=True)))

        for encoded in in_threads(encode, prepared, model.device):
            embeds.append(encoded)
            bar.update(len(encoded))
    return torch.cat(embeds)  # (M, D)


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
    """What [`_inference`] means for computing holds for its own thread; a helping thread gets it here, for its life."""
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


@dataclass
class Encoder:
    """
    A model with everything that decides its embeddings; its weights must not change while it is in use. What was
    embedded before is not embedded again: images however many tasks ask for them, and with `cache_dir` images and texts
    of earlier runs, interrupted ones too.
    """

    model: Any
    processor: Any
    label: str = "model"
    path: str = ""
    batch_size: int = 64
    dtype: torch.dtype | None = None  # autocast; None: the weights' own
    progress: bool = False
    workers: int = 0  # processes that decode images, as in `embed_images`
    compile: bool = False  # torch.compile of the towers' layers: minutes at first, faster from then on
    cache_dir: str | Path | None = None  # folder of embeddings; None: nothing is kept on disk
    distributed: bool = (
        False  # the processes of torch.distributed share the work; all of them must make the same calls
    )
    image_seconds: dict[str, float] = field(default_factory=dict)  # by content, as first paid, of all processes
    text_seconds: dict[str, float] = field(default_factory=dict)  # by `hash_rows`, likewise
    _images: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.compile:
            for tower in (self.model.text_model, self.model.vision_model):
                for layer in tower.encoder.layers:
                    layer.compile(dynamic=True)

    @property
    def positions(self) -> int:
        """Tokens that the model reads of a text: what its table and its tokenizer allow."""
        return min(text_positions(self.model), self.processor.tokenizer.model_max_length)

    def images(self, images: Any) -> Tensor:
        """(M, D) unit embeddings of an `ImageFiles`, or its like with a `content_hash`, and so have its slices."""
        key = images.content_hash
        if key not in self._images:
            batch = tower_batch(self.model, self.batch_size)
            parts = self._parts(images, batch) if self.cache_dir or self.distributed else [images]
            work = SharedWork(self._cache("image"), self.distributed)
            with _bar(len(images), f"{self.label}: images" if self.progress else False, "images") as bar:

                def embed(part: Any) -> Tensor:
                    options = self.batch_size, self.dtype, bar, self.workers
                    return embed_images(self.model, self.processor, part, *options)

                embeds, seconds = work.embed(parts, lambda part: part.content_hash, embed)
            self._images[key], self.image_seconds[key] = embeds, seconds
        return self._images[key]

    def texts(self, rows: Sequence[list[int]]) -> Tensor:
        """(N, D) unit embeddings of token rows."""
        unique, source = unique_rows(rows)
        work = SharedWork(self._cache("text"), self.distributed)
        with _bar(len(unique), f"{self.label}: texts" if self.progress else False, "texts") as bar:

            def embed(part: Sequence[list[int]]) -> Tensor:
                return embed_token_rows(self.model, self.processor, part, self.batch_size, None, self.dtype, bar)

            embeds, self.text_seconds[hash_rows(rows)] = work.embed(
                self._parts(unique, self.batch_size), hash_rows, embed
            )
        return embeds[torch.tensor(source, dtype=torch.long)]

    def _parts(self, items: Any, batch: int) -> list[Any]:
        """Pieces of whole batches: embeddings do not depend on who computes a piece, nor on which were there before."""
        size = max(1, PART // batch) * batch
        return [items[start : start + size] for start in range(0, max(1, len(items)), size)]

    def _cache(self, kind: str) -> EmbeddingCache | None:
        """On disk; whatever the embeddings of one item depend on, beside the item, is in its name."""
        if self.cache_dir is None:
            return None
        known = {
            "kind": kind,
            "weights": self.weights_sha256,
            "config": _plain_config(self.model.config),
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.dtype or self.model.dtype),
            "device": self.model.device.type,
            "width": self.model.config.projection_dim,
        }
        if kind == "image":
            known["image_processor"] = self.processor.image_processor.to_dict()
            # Its own name of itself is the same with torchvision, whose pixels differ.
            known["image_processor_class"] = type(self.processor.image_processor).__qualname__
            known["torchvision"] = find_spec("torchvision") and version("torchvision")
            known["pillow"] = PIL.__version__
        return EmbeddingCache(Path(self.cache_dir).expanduser(), json.dumps(known, sort_keys=True, default=str))

    @cached_property
    def weights_sha256(self) -> str:
        return weights_sha256(sorted(self.model.state_dict().items()))

    def describe(self) -> dict[str, Any]:
        """What identifies the model in `results.json`."""
        return {
            "label": self.label,
            "path": self.path,
            "model_class": type(self.model).__name__,
            "positions": self.positions,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype or self.model.dtype).removeprefix("torch."),
            "image_processor": type(self.processor.image_processor).__name__,
            "tokenizer": type(self.processor.tokenizer).__name__,
            "device": str(self.model.device),
        }


def _plain_config(config: Any) -> dict[str, Any]:
    """What a configuration says of the model, without where and by which version it was saved."""
    fields = config.to_dict()
    return {name: value for name, value in fields.items() if name not in ("_name_or_path", "transformers_version")}


def hash_rows(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 over token rows."""
    return json_sha256([list(row) for row in rows])


def load_encoder(
    given: str | ModelSource,
    device: str = "cpu",
    label: str | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> Encoder:
    """
    Loads a model with float32 weights.

    Args:
        given: model folder or Hub id of an `LRSCLIPModel` or a `CLIPModel`, or what [`~modeling_lrsclip.published.registry.resolve`] made
            of it, a published checkpoint file among them.
        device: where the towers run, for example `cpu` or `cuda:0`.
        label: the model's name in tables; default its path.
        tokenizer: for a checkpoint file: Hub id, folder, or the published BPE file.
        options: `batch_size`, `dtype`, `progress`, `workers`, `compile`, `cache_dir`, `distributed` of [`Encoder`].

    Raises:
        `ValueError`: for something that cannot be loaded, or a checkpoint that lacks weights of the model.
    """
    source = given if isinstance(given, ModelSource) else ModelSource(given)
    model, processor = _load_file(source, tokenizer) if source.is_file else _load_pretrained(source)
    for name in ("get_text_features", "get_image_features"):
        if not hasattr(model, name):
            raise ValueError(f"{source.path}: {type(model).__name__} has no {name}; a CLIP model is needed here.")
    return Encoder(model.to(device).eval(), processor, label or source.path, source.path, **options)


def _load_pretrained(source: ModelSource) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    import modeling_lrsclip  # noqa: F401  registers the Auto classes

    path, hub = source.path, {"revision": source.revision} if source.revision else {}
    try:
        model, report = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **hub)
        processor = AutoProcessor.from_pretrained(path, **hub)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not loadable with AutoModel and AutoProcessor ({reason})") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would evaluate them at random values, with no more than a warning
        raise ValueError(f"{path}: {len(missing)} weights are missing from the checkpoint, first: {missing[0]}")
    return model, processor


def _load_file(source: ModelSource, tokenizer: str | None) -> tuple[Any, Any]:
    from modeling_lrsclip.convert import load_published

    try:
        return load_published(source.path, tokenizer=tokenizer, dtype=torch.float32, **source.load_options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(reason if source.path in reason else f"{source.path}: {reason}") from error
