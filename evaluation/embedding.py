"""
Texts and images -> unit embeddings.

Shapes: N texts, M images, L tokens of the longest text in a batch, D width of the shared space.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


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
    progress: bool | str = False,
) -> Tensor:
    """
    Unit embeddings of texts. Texts longer than the model's position table are cut ([`share_truncated`] says how many).

    Args:
        model: `LRSCLIPModel` or `CLIPModel`; its training state is left as found.
        processor: the model's processor.
        texts (sequence of N `str`).
        batch_size: texts encoded at once; they are sorted by length, so that padding costs almost nothing.
        max_tokens: tokens kept of each text, start and end included; default, and at most, the model's positions.
        dtype: `torch.bfloat16` or `torch.float16` runs the towers under autocast; default the weights' own.
        progress: shows a bar on the main process of a terminal; a string is its description.

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
    progress: bool | str = False,
) -> Tensor:
    """As [`embed_texts`], for texts that [`encode_texts`] has turned into token ids already."""
    _check_batch_size(batch_size)
    rows = cut_tokens(rows, min(max_tokens or text_positions(model), text_positions(model)))
    place: dict[tuple[int, ...], int] = {}  # equal rows are encoded once
    source = [place.setdefault(tuple(row), len(place)) for row in rows]
    unique = list(place)
    order = sorted(range(len(unique)), key=lambda index: len(unique[index]), reverse=True)  # what fails, fails first
    pad = processor.tokenizer.pad_token_id
    embeds = torch.empty(len(unique), model.config.projection_dim)
    with _inference(model, dtype), _bar(len(unique), progress, "texts") as bar:
        for indices in _batches(order, batch_size):
            batch = [torch.tensor(unique[index]) for index in indices]
            lengths = torch.tensor([len(row) for row in batch])
            # What stands after a row's first end-of-text never matters: the tower is causal and pools there.
            input_ids = pad_sequence(batch, batch_first=True, padding_value=batch[0][-1] if pad is None else pad)
            attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (B, L)
            features = model.get_text_features(
                input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
            )
            embeds[indices] = _unit(features)  # (B, D)
            bar.update(len(indices))
    return embeds[torch.tensor(source, dtype=torch.long)]  # (N, D)


def embed_images(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool | str = False,
) -> Tensor:
    """
    Unit embeddings of images.

    Args:
        model, processor, dtype, progress: as in [`embed_texts`].
        images: M PIL images of any size and mode: a list, a generator, a `datasets` column, or an
            [`~evaluation.benchmarks.retrieval_data.ImageFiles`]. At most one batch is held decoded.
        batch_size: images encoded at once.

    Returns:
        `Tensor` (M, D), float32 on the CPU, in input order. No images: (0, D).
    """
    _check_batch_size(batch_size)
    batches = [torch.empty(0, model.config.projection_dim)]
    total = len(images) if hasattr(images, "__len__") else None
    with _inference(model, dtype), _bar(total, progress, "images") as bar:
        for batch in _batches(images, batch_size):
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)
            batches.append(_unit(model.get_image_features(pixel_values=pixel_values.to(model.device))))
            bar.update(len(batch))
    return torch.cat(batches)  # (M, D)


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
    half = dtype if dtype not in (None, torch.float32) else None
    cast = torch.autocast(model.device.type, dtype=half) if half else contextlib.nullcontext()
    try:
        with torch.inference_mode(), cast:
            yield
    finally:
        for module, training in modes:
            module.training = training


def _bar(total: int | None, progress: bool | str, noun: str) -> tqdm:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    hidden = not progress or (distributed and torch.distributed.get_rank() != 0)
    description = progress if isinstance(progress, str) else noun
    # disable=None: tqdm hides itself where standard error is not a terminal.
    return tqdm(total=total, desc=description, unit=f" {noun}", leave=False, disable=True if hidden else None)


# ---------------------------------------------------------------------------------------------------------- encoder


@dataclass
class Encoder:
    """
    A model with everything that decides its embeddings. Images that were embedded before are not embedded again,
    however many tasks ask for them.
    """

    model: Any
    processor: Any
    label: str = "model"
    path: str = ""
    batch_size: int = 64
    dtype: torch.dtype | None = None  # autocast; None: the weights' own
    progress: bool = False
    image_seconds: dict[str, float] = field(default_factory=dict)  # by content, as first paid
    _images: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def positions(self) -> int:
        """Tokens that the model reads of a text: what its table and its tokenizer allow."""
        return min(text_positions(self.model), self.processor.tokenizer.model_max_length)

    def images(self, images: Any) -> Tensor:
        """(M, D) unit embeddings of an `ImageFiles`, remembered under its `content_hash`."""
        key = images.content_hash
        if key not in self._images:
            started = time.perf_counter()
            title = f"{self.label}: images" if self.progress else False
            self._images[key] = embed_images(self.model, self.processor, images, self.batch_size, self.dtype, title)
            self.image_seconds[key] = time.perf_counter() - started
        return self._images[key]

    def texts(self, rows: Sequence[list[int]]) -> Tensor:
        """(N, D) unit embeddings of token rows."""
        title = f"{self.label}: texts" if self.progress else False
        return embed_token_rows(self.model, self.processor, rows, self.batch_size, dtype=self.dtype, progress=title)

    def describe(self) -> dict[str, Any]:
        """What identifies the model in `results.json`."""
        return {
            "label": self.label,
            "path": self.path,
            "model_class": type(self.model).__name__,
            "positions": self.positions,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "weights_sha256": weights_hash(self.model),
            "dtype": str(self.dtype or self.model.dtype).removeprefix("torch."),
            "image_processor": type(self.processor.image_processor).__name__,
            "tokenizer": type(self.processor.tokenizer).__name__,
            "device": str(self.model.device),
        }


def weights_hash(model: Any) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_encoder(path: str, device: str = "cpu", label: str | None = None, **options: Any) -> Encoder:
    """
    Loads a folder written by `save_pretrained`, or a Hub id, with float32 weights.

    Args:
        path: model folder or Hub id, of an `LRSCLIPModel` or a `CLIPModel`.
        device: where the towers run, for example `cpu` or `cuda:0`.
        label: the model's name in tables; default the folder's name.
        options: `batch_size`, `dtype`, `progress` of [`Encoder`].

    Raises:
        `ValueError`: for something that cannot be loaded, or a checkpoint that lacks weights of the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor

    import modeling_lrsclip  # noqa: F401  registers the Auto classes

    try:
        model, report = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not loadable with AutoModel and AutoProcessor ({reason})") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would evaluate them at random values, with no more than a warning
        raise ValueError(f"{path}: {len(missing)} weights are missing from the checkpoint, first: {missing[0]}")
    for name in ("get_text_features", "get_image_features"):
        if not hasattr(model, name):
            raise ValueError(f"{path}: {type(model).__name__} has no {name}; a CLIP model is needed here.")
    return Encoder(model.to(device).eval(), processor, label or path, path, **options)
