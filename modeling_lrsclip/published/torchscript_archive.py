# SPDX-License-Identifier: Apache-2.0
"""
The tensors of a TorchScript archive, without building the module that it describes.

`torch.jit.load` runs a scripted `__setstate__`, which can write files (`torch.from_file(..., shared=True)`). Here the
archive's `data.pkl` is read by an unpickler that knows tensors and plain containers only; every scripted class becomes
an inert object that keeps its attributes. The format is that of torch/csrc/jit/docs/serialization.md.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CONTAINERS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_DEEPEST = 100  # modules inside one another


class _Module:
    """An object of a scripted class: its class name, and what `data.pkl` says of its attributes."""

    class_name = ""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """
    Read the parameters and buffers of a TorchScript archive; no code of the archive runs.

    Args:
        path: a file of `torch.jit.save`.

    Returns:
        The tensors by their names in the module's `state_dict()`, on the CPU.

    Raises:
        `pickle.UnpicklingError`: for anything in the archive besides modules, tensors and plain values.
        `ValueError`: for a module that restores itself by its own code, or modules nested beyond all reason.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        prefix = next(name for name in names if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
        sources = [name for name in names if name.endswith(".py")]
        code = {name.removeprefix(f"{prefix}code/"): archive.read(name).decode("utf-8", "replace") for name in sources}
        pickled = archive.read(f"{prefix}data.pkl")
    root = _Unpickler(io.BytesIO(pickled), torch._C.PyTorchFileReader(str(path))).load()
    tensors: dict[str, torch.Tensor] = {}
    _collect(root, "", code, tensors, 0)
    return tensors


def _collect(module: Any, prefix: str, code: dict[str, str], tensors: dict[str, torch.Tensor], depth: int) -> None:
    """Add the parameters and buffers of a module and of those inside it, `prefix` before their names."""
    if depth > _DEEPEST:
        raise ValueError(f"its modules are nested more than {_DEEPEST} deep")
    if not isinstance(module, _Module) or not isinstance(getattr(module, "state", None), dict):
        name = prefix.rstrip(".") or "itself"
        raise ValueError(f"its module {name} is restored by code of the file, which is not run")
    kept = _parameters_and_buffers(module.class_name, code)
    for name, value in module.state.items():
        if isinstance(value, torch.Tensor) and (kept is None or name in kept):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", code, tensors, depth + 1)


def _parameters_and_buffers(class_name: str, code: dict[str, str]) -> set[str] | None:
    """Names of the tensors that a class registers, as its source lists them; None where the source does not say."""
    module, _, name = class_name.rpartition(".")
    source = code.get(f"{module.replace('.', '/')}.py", "")
    body = re.search(rf"^class {re.escape(name)}\(.*?(?=^class |\Z)", source, re.M | re.S)
    lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*?)\]", body[0] if body else "", re.M)
    return {entry for listed in lists for entry in re.findall(r'"([^"]+)"', listed)} if lists else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, archive: Any):
        super().__init__(file)
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_ScriptedModule", (_Module,), {"class_name": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle" and name in _CONTAINERS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _type: value
        if (module, name) == ("torch", "device"):
            return torch.device
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no tensor, module or plain value")

    def persistent_load(self, stored: tuple) -> torch.Tensor:
        """The values of a storage, one-dimensional."""
        kind, dtype, key, _location, numel = stored
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        storage = self.archive.get_storage_from_record(f"data/{key}", numel * dtype.itemsize, torch.uint8)
        return torch.empty(0, dtype=dtype).set_(storage.untyped_storage())


def _rebuild_tensor(values: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 in size:
        return values.new_empty(size)
    if min((offset, *size, *stride)) < 0 or last >= len(values):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} reaches beyond its {len(values)} values")
    return values.as_strided(size, stride, offset)
