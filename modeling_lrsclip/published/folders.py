# SPDX-License-Identifier: Apache-2.0
"""The folders that `convert` writes, and what reads each of them back."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ..modeling_lrsclip import LRSCLIPModel
from ..processing_lrsclip import LRSCLIPProcessor
from .open_clip import write_open_clip
from .plain_clip import write_plain_clip
from .state_dict_keys import Tensors, rename_published


_PROBE = "It\u2019s 2 white tanks &amp; a road."


def write_lrsclip(skeleton: LRSCLIPModel, tensors: Tensors, processor: LRSCLIPProcessor, folder: Path) -> None:
    """
    Writes weights, processor, tokenizer, and the code for `trust_remote_code=True`; arguments as the others'.

    Args:
        skeleton: the model, for its configuration.
        tensors: weights by name.
        processor: image processor and tokenizer.
        folder: is there and empty.
    """
    skeleton.save_pretrained(folder, state_dict=dict(tensors))
    processor.save_pretrained(folder)
    # vocab.json and merges.txt, for readers that do not know tokenizer.json.
    processor.tokenizer.backend_tokenizer.model.save(str(folder))


WRITERS = {"lrsclip": write_lrsclip, "plain-clip": write_plain_clip, "open-clip": write_open_clip}


def check_written(folder: Path, tensors: Tensors, processor: LRSCLIPProcessor, layout: str) -> None:
    """
    Reads back every weight, which must be equal to the bit, and the tokenizer by what it does.

    Args:
        folder (`Path`): as one of the `WRITERS` left it.
        tensors (`dict`): the weights under the names of `CLIPModel`.
        processor (`LRSCLIPProcessor`): whose token ids are wanted.
        layout (`str`): key of `WRITERS`.

    Raises:
        `OSError`: for anything that differs.
    """
    left = set(tensors)
    for path in sorted(folder.glob("*.safetensors")):
        for name, written in _read_back(path, layout):
            expected = tensors[name]
            if written.dtype != expected.dtype or not torch.equal(_bytes(written), _bytes(expected)):
                raise OSError(f"{path.name}: {name} reads back differently from what was written; check the disk.")
            left.remove(name)
    if left:
        raise OSError(f"{folder} lacks {len(left)} weights after writing; check the disk.")
    if layout == "open-clip":
        return
    if layout == "lrsclip":
        rows = LRSCLIPProcessor.from_pretrained(folder).encode_text([_PROBE])
    else:
        rows = AutoTokenizer.from_pretrained(folder)([_PROBE])["input_ids"]
    if rows != processor.encode_text([_PROBE]):
        raise OSError(f"The tokenizer in {folder} reads back differently from what was written; check the disk.")


def _read_back(path: Path, layout: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a file under the names of `CLIPModel`; opened anew for each, so that memory holds one at a time."""
    if layout == "open-clip":
        yield from rename_published(load_file(path), path)[0].items()
        return
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
