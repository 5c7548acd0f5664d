"""
A model with what decides its embeddings, those kept on disk, and work shared by several processes.

Shapes: N texts, M images, B items of a file of the cache, D width of the shared space.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.atomic import replace_bytes
from ..files.hashing import bytes_sha256, weights_sha256
from ..published.registry import ModelSource
from .embedding import embed_images, embed_token_rows, image_batch_size, is_half, progress_bar
from .loading import OnnxModel, load_model
from .model_inputs import hash_rows, text_positions, unique_rows


PART = 256  # texts or images that are kept in one file of the cache, and handed to one process
LAYOUT = 2  # of the cache's files; another number leaves the earlier ones unread

# ------------------------------------------------------------------------------------------------------------ cache


class EmbeddingCache:
    """
    Files of embeddings, named after what they were computed from: something else has another name.

    Args:
        folder: is made when the first file is written. Several processes and models may share it.
        origin: text that identifies model and preprocessing.
    """

    def __init__(self, folder: Path, origin: str):
        self.folder, self.origin = folder, origin

    def load(self, content: str) -> tuple[Tensor, float] | None:
        """
        Embeddings (B, D) and the seconds they took, of items with this hash; None where they are not kept. A file that
        is damaged is left out with a warning.
        """
        path = self._path(content)
        try:
            with safe_open(path, "pt") as file:
                embeds, known = file.get_tensor("embeddings"), file.metadata()
            if self._sha256(path, embeds) != known["sha256"]:
                raise ValueError("its values, or its name, do not match its checksum")
            return embeds, float(known["seconds"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} cannot be used and is computed again: {error}", stacklevel=2)
            return None

    def save(self, content: str, embeds: Tensor, seconds: float) -> None:
        """
        Writes one file in one step; where the disk does not take it, a warning says so and the run goes on.

        Args:
            content: hash of the items.
            embeds: (B, D) their embeddings.
            seconds: that computing them took.
        """
        path = self._path(content)
        known = {"seconds": repr(seconds), "sha256": self._sha256(path, embeds)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, save({"embeddings": embeds.contiguous()}, metadata=known))
        except OSError as error:
            warnings.warn(f"embeddings are not kept in {self.folder}: {error.strerror or error}", stacklevel=2)

    def _path(self, content: str) -> Path:
        name = bytes_sha256(f"{LAYOUT} {self.origin} {content}")
        return self.folder / name[:2] / f"{name}.safetensors"

    @staticmethod
    def _sha256(path: Path, embeds: Tensor) -> str:
        """Hash of a file's name, which says what was embedded, and of the values."""
        digest = hashlib.sha256(f"{path.name} {tuple(embeds.shape)}".encode())
        digest.update(embeds.contiguous().numpy())
        return digest.hexdigest()


class SharedWork:
    """
    Embeds what is not in the cache; with `distributed`, every process its share of the parts.

    Args:
        cache: where finished parts are looked for and kept; None: nowhere.
        distributed: the processes of the default group of `torch.distributed` take turns, part by part, and all get
            the whole. Each must ask for the same parts.
    """

    def __init__(self, cache: EmbeddingCache | None = None, distributed: bool = False):
        if distributed and not dist.is_initialized():
            raise ValueError("distributed=True needs a process group: start with accelerate launch, or leave it out.")
        self.cache, self.distributed = cache, distributed

    def embed(
        self, parts: Sequence[Any], hash_of: Callable[[Any], str], embed: Callable[[Any], Tensor]
    ) -> tuple[Tensor, float]:
        """
        Embeddings of all parts, in their order.

        Args:
            parts: at least one; each has a length.
            hash_of: a part's content, called only where there is a cache.
            embed: a part -> (B, D).

        Returns:
            (N, D) tensor, and the seconds that computing it took, in all processes and runs together.

        Raises:
            `ValueError`: of any process, in all of them.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        done: dict[int, tuple[Tensor, float]] = {}
        problem = None
        try:
            for number in range(rank, len(parts), world):
                done[number] = self._one(parts[number], hash_of, embed)
        except ValueError as error:
            if not self.distributed:
                raise
            problem = str(error)  # the others must not wait for this process
        if self.distributed:
            done = _gather(done, problem)
        for number, part in enumerate(parts):
            if number not in done or len(done[number][0]) != len(part):
                raise RuntimeError(f"part {number} of {len(parts)} came back from no process as it went out")
        embeds = torch.cat([done[number][0] for number in range(len(parts))])  # (N, D)
        return embeds, sum(seconds for _, seconds in done.values())

    def _one(self, part: Any, hash_of: Callable[[Any], str], embed: Callable[[Any], Tensor]) -> tuple[Tensor, float]:
        content = hash_of(part) if self.cache else ""
        kept = self.cache.load(content) if self.cache else None
        if kept is not None and len(kept[0]) == len(part):
            return kept
        started = time.perf_counter()
        embeds = embed(part)
        seconds = time.perf_counter() - started
        if self.cache:
            self.cache.save(content, embeds, seconds)
        return embeds, seconds


def _gather(done: dict[int, tuple[Tensor, float]], problem: str | None) -> dict[int, tuple[Tensor, float]]:
    """The parts of all processes by number, each once."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (done, problem))
    if problems := [problem for _, problem in gathered if problem]:
        raise ValueError(problems[0])
    return {number: part for parts, _ in gathered for number, part in parts.items()}


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
            with progress_bar(len(images), f"{self.label}: images" if self.progress else False, "images") as bar:

                def embed(part: Any) -> Tensor:
                    options = self.batch_size, self.dtype, bar, self.workers
                    return self._usable(embed_images(self.model, self.processor, part, *options), "images")

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
        with progress_bar(len(unique), f"{self.label}: texts" if self.progress else False, "texts") as bar:

            def embed(part: Sequence[list[int]]) -> Tensor:
                options = self.batch_size, None, self.dtype, bar
                return self._usable(embed_token_rows(self.model, self.processor, part, *options), "texts")

            embeds, seconds = work.embed(self._parts(unique, self.batch_size), hash_rows, embed)
        return Embeddings(embeds[torch.tensor(source, dtype=torch.long)], seconds)

    def _usable(self, embeds: Tensor, noun: str) -> Tensor:
        """Unit embeddings (N, D); those of a model whose weights are damaged are all zeros, or no numbers."""
        if lost := int((~(embeds.norm(dim=-1) > 0)).sum()):  # NaN is not more than 0 either
            raise ValueError(
                f"{self.label} gives {lost} of {len(embeds)} {noun} no direction (zeros, or no numbers), so nothing can be "
                "measured; look whether its weights and its projections are whole, and whether --dtype fits it."
            )
        return embeds

    def _parts(self, items: Any, batch: int) -> list[Any]:
        """Cut items into pieces of whole batches, so that embeddings depend neither on who computes a piece nor on which were kept."""
        size = max(1, PART // batch) * batch
        return [items[start : start + size] for start in range(0, max(1, len(items)), size)]

    def _cache(self, kind: str) -> EmbeddingCache | None:
        """The folder of embeddings on disk; its name holds all that an item's embedding depends on beside the item."""
        if self.cache_dir is None:
            return None
        where_saved = ("_name_or_path", "transformers_version")
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in where_saved}
        origin = {
            "kind": kind,
            "weights": self.weights_sha256,
            "config": config,
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
        parameters = getattr(self.model, "parameter_count", None)
        return {
            "label": self.label,
            "path": self.path,
            "model_class": getattr(self.model, "name", type(self.model).__name__),
            "positions": self.positions,
            "parameters": parameters or sum(weight.numel() for weight in self.model.parameters()),
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype or self.model.dtype).removeprefix("torch."),
            "image_processor": type(self.processor.image_processor).__name__,
            "tokenizer": type(self.processor.tokenizer).__name__,
            "device": str(self.model.device),
        }


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
    if isinstance(model, OnnxModel) and (torch.device(device).type != "cpu" or is_half(options.get("dtype"))):
        raise ValueError(f"{source.path}: exported towers run on the CPU, in the type they were exported with.")
    return Encoder(model.to(device).eval(), processor, label or source.path, source.path, **options)
