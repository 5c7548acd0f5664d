# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint file, which is recognised by its content: its name says nothing."""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files.documents import first_line
from .torchscript_archive import read_torchscript


TORCHSCRIPT, TORCH_ZIP, TORCH_LEGACY = "TorchScript archive", "torch.save file", "torch.save file of the old format"
SAFETENSORS = "safetensors file"

# torch/serialization.py: files of the format before torch 1.6 begin with this number, pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("module.", "_orig_mod.")  # put before every key by DistributedDataParallel and by torch.compile
_AGAIN = "download it again"


@dataclass
class PublishedFile:
    """Content of a checkpoint file, as it is stored."""

    path: Path
    form: str  # one of the constants above
    tensors: dict[str, Any]  # state dict; memory-mapped where the format allows
    activation: str | None  # what the code in a TorchScript archive computes; the other forms carry no code


def read_published_file(path: str | Path) -> PublishedFile:
    """
    Reads a state dict, bare or under `state_dict`, with `module.` before its keys or without.

    No code of the file runs: pickles are read with `weights_only=True`, of a TorchScript archive the
    tensors alone are read, its module is never built ([`read_torchscript`]).

    Args:
        path (`str` or `Path`): TorchScript archive, torch.save file (zip or old format) or safetensors.

    Raises:
        `ValueError`: for anything else, one sentence: empty, truncated, a Git-LFS pointer, a web page, a zip around
            a checkpoint, a pickle of other objects, not a checkpoint at all.
    """
    path = Path(path)
    form = recognise(path)
    activation = None
    if form == TORCHSCRIPT:
        content = _load(path, lambda: read_torchscript(path))
        activation = _activation_in_code(path)
    elif form == SAFETENSORS:
        content = _load(path, lambda: load_file(path))
    else:
        mapped = form == TORCH_ZIP
        content = _load(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    return PublishedFile(path, form, _state_dict(content, path), activation)


def recognise(path: Path) -> str:
    """Recognise one of the four forms from the first bytes and the table of contents; `ValueError` for anything else."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty; {_AGAIN}.")
    if start.startswith(b"version https://git-lfs"):
        advice = "`git lfs pull` in its clone fetches it"
        raise ValueError(f"{path} is a Git-LFS pointer of {size} bytes, not the checkpoint; {advice}.")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a checkpoint; {_AGAIN}, from the link of the file itself.")
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:
        return _recognise_safetensors(path, length, size)
    if head.startswith(b"\x80"):
        magic = head[2:15]
        if magic[:2] == b"\x8a\x0a" and int.from_bytes(magic[2:12], "little") == _LEGACY_MAGIC:
            return TORCH_LEGACY
        raise ValueError(f"{path} is a pickle that torch.save did not write; save its state dict with torch.save.")
    if head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is a gzip file, not a checkpoint; the tokenizer's BPE file goes to --tokenizer.")
    raise ValueError(
        f"{path} is not a checkpoint (its first bytes are {head[:8]!r}); give a .pt file of torch.save or TorchScript, "
        "safetensors, or a folder in HuggingFace format."
    )


def _recognise_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # also names that are no text, versions of no zip
        raise ValueError(
            f"{path} is truncated: the table at the end of the archive is missing or damaged; {_AGAIN}."
        ) from None
    if any(name.endswith("/constants.pkl") for name in names):
        return TORCHSCRIPT
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH_ZIP
    inside = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    if inside:
        raise ValueError(f"{path} is a zip around {inside[0]}; unpack it and give that file.")
    raise ValueError(f"{path} is a zip archive without a checkpoint in it; {_AGAIN}.")


def _recognise_safetensors(path: Path, length: int, size: int) -> str:
    with open(path, "rb") as file:
        header = file.read(8 + length)[8:]
    end = 8 + length
    if len(header) == length:
        try:
            tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            end += max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ValueError(f"{path} begins like safetensors, but its header cannot be read; {_AGAIN}.") from None
    if size < end:
        raise ValueError(f"{path} is truncated: it has {size:,} bytes of at least {end:,}; {_AGAIN}.")
    return SAFETENSORS


def _load(path: Path, load):
    try:
        return load()
    except Exception as error:  # damaged bytes let unpickling raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path} holds objects besides tensors ({foreign[1]}), and loading those can run code; have somebody "
                "who trusts the file save its state dict alone: torch.save(torch.load(FILE, weights_only=False)"
                "['state_dict'], 'weights.pt')."
            ) from None
        raise ValueError(f"{path} cannot be read ({first_line(error)}); it is damaged: {_AGAIN}.") from None


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        held = f"the keys {list_some(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds {held} and no tensors there or under state_dict; give a state dict.")
    tensors = {str(key): value for key, value in content.items()}
    while prefix := next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _activation_in_code(path: Path) -> str | None:
    """QuickGELU is x * sigmoid(1.702 x), in which the sigmoid is the only one of a CLIP; GELU is one operation."""
    with zipfile.ZipFile(path) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    quick, plain = b"torch.sigmoid(" in code, b"torch.gelu(" in code
    return None if quick == plain else "quick_gelu" if quick else "gelu"


def list_some(names, shown: int = 6) -> str:
    """`a, b and 12 more`, for messages; `none` for no names."""
    names = sorted(map(str, names))
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest if names else "none"
