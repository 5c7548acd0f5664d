"""
Embeddings kept on disk, and work shared by several processes.

A part is some of the texts or images, embedded by itself and kept in a file of its own, so that an interrupted run goes
on where it was, and processes can take turns. Shapes: B items of a part, D width of the shared space.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modeling_lrsclip.files.atomic import replace_bytes
from modeling_lrsclip.files.hashing import bytes_sha256


LAYOUT = 2  # of the files; another number leaves the earlier ones unread


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
    problems = [found for _, found in gathered if found]
    if problems:
        raise ValueError(problems[0])
    return {number: part for parts, _ in gathered for number, part in parts.items()}
