"""SHA-256 of files, bytes, values and a model's weights, in hexadecimal."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22  # bytes read at a time


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def bytes_sha256(content: bytes | str | memoryview) -> str:
    """Hash of bytes in memory; of a text, those of its UTF-8 form."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def json_sha256(value: Any, **options: Any) -> str:
    """Hash of a value's JSON form; `options` are those of `json.dumps`."""
    return bytes_sha256(json.dumps(value, **options))


def weights_sha256(weights: "Iterable[tuple[str, Tensor]]") -> str:
    """
    Hash of names, shapes and values of a model's weights, as they are in float32, which evaluation computes in.

    Args:
        weights: names and tensors of any shape, as of `state_dict().items()`, sorted by name. One is in memory at a time
            where they come from an iterator.
    """
    import torch  # seconds, which those who hash files do without

    digest = hashlib.sha256()
    for name, weight in weights:
        weight = weight.detach().cpu()
        if weight.is_floating_point():
            weight = weight.float()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def git_blob_id(content: bytes) -> str:
    """SHA-1 by which Git, and so the Hub, knows a small file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
