"""Checkpoint files as they are published, made small: every format that convert reads."""

import gzip
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn


class _QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class _Archive(nn.Module):
    """The parameters of a state dict under their names, and a forward that holds the activation alone."""

    def __init__(self, state: dict[str, torch.Tensor], activation: nn.Module):
        super().__init__()
        self.activation = activation
        for name, tensor in state.items():
            module, *parents = self, *name.split(".")[:-1]
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            if tensor.is_floating_point():
                module.register_parameter(name.split(".")[-1], nn.Parameter(tensor))
            else:
                module.register_buffer(name.split(".")[-1], tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x)


def as_openai_stores_it(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """openai/CLIP model.py, `convert_weights`: Linear, Conv, attention and projections in fp16, the rest in fp32."""
    halved = (".attn.", ".mlp.", "conv1", "proj")
    return {name: tensor.half() if any(part in name for part in halved) else tensor for name, tensor in state.items()}


def write_source(form: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """One file of the format `form` below `folder`; file names are misleading on purpose."""
    path = folder / f"{form}.bin"
    if form == "zip":
        torch.save(state, path)
    elif form == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "wrapped":  # open_clip_train's epoch_20.pt
        training = {"epoch": 20, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
        training["optimizer"] = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-5}]}
        torch.save(training, path)
    elif form == "farslip":  # NJU-LHRS/FarSLIP open_clip/model.py: the masks of the two tables are saved with them
        kept = (torch.arange(len(state["positional_embedding"])) < 20).float()[:, None]
        torch.save({"epoch": 1, "state_dict": state | {"mask1": kept, "mask2": 1 - kept}}, path)
    elif form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif form == "custom_text":  # open_clip's CustomTextCLIP keeps the text tower under `text.`
        outside = ("visual.", "logit_scale")
        torch.save({key if key.startswith(outside) else f"text.{key}": value for key, value in state.items()}, path)
    elif form in ("torchscript", "torchscript_gelu"):
        activation = nn.GELU() if form.endswith("gelu") else _QuickGELU()
        patches = len(state["visual.positional_embedding"]) - 1
        statements = {
            "input_resolution": int(patches**0.5) * state["visual.conv1.weight"].shape[-1],
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
        }
        state = state | {name: torch.tensor(value) for name, value in statements.items()}
        torch.jit.script(_Archive(state, activation)).save(str(path))
    else:
        raise AssertionError(form)
    return path


def write_bpe_file(path: Path, merges: int = 48894, more: int = 100) -> list[tuple[str, str]]:
    """A file of the published BPE file's form, with invented merges, the first `merges` of which are returned."""
    alphabet = sorted(ByteLevel.alphabet(), key=ord)
    pairs = [(first, second + end) for first in alphabet for second in alphabet for end in ("</w>", "")]
    # Letters first, or plain words would never merge.
    pairs.sort(key=lambda pair: not (pair[0].islower() and pair[0].isascii()))
    pairs = pairs[: merges + more]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), compresslevel=1))
    return pairs[:merges]
