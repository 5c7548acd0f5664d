"""Facts for a card about the model itself, read from its folder or from a description of published weights."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel
from modeling_lrsclip.files.hashing import weights_sha256
from modeling_lrsclip.published.registry import MODELS, no_model_in


PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFacts:
    """Shapes and numbers of a model, and what identifies its weights."""

    config: LRSCLIPConfig
    parameters: int
    stored_dtype: str | None = None  # None: no folder at hand
    weights_sha256: str | None = None  # likewise

    @property
    def positions(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def positions_before(self) -> int | None:
        """Rows of the table before it was stretched; None: it was not."""
        text = self.config.text_config
        if text.stretch_ratio == 1:
            return None
        return text.kept_positions + (text.max_position_embeddings - text.kept_positions) // text.stretch_ratio


def read_checkpoint(folder: Path) -> ModelFacts:
    """
    Reads an LRSCLIP folder as `save_pretrained` wrote it.

    Raises:
        `ValueError`: for a folder without configuration or safetensors weights, or of another model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(no_model_in(folder) if folder.is_dir() else f"{folder} is no folder; give a model folder.")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != LRSCLIPConfig.model_type:
        raise ValueError(
            f"{folder} is a {model_type} model; cards are for lrsclip: python -m modeling_lrsclip.convert makes one of it."
        )
    sizes, dtypes = [], set()

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in stored_weights(folder):
            sizes.append(weight.numel())
            dtypes.add(str(weight.dtype).removeprefix("torch."))
            yield name, weight

    digest = weights_sha256(counted())
    return ModelFacts(LRSCLIPConfig.from_pretrained(folder), sum(sizes), ", ".join(sorted(dtypes)), digest)


def stored_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of a folder in the order of their names, one in memory at a time, from one file or from shards.

    Raises:
        `ValueError`: for missing or damaged files.
    """
    index = folder / INDEX
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / WEIGHTS).is_file():
        files = None
    else:
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; save the model with save_pretrained.")
    with ExitStack() as stack:
        try:
            names = sorted(set(files.values())) if files else [WEIGHTS]
            opened = {name: stack.enter_context(safe_open(folder / name, "pt")) for name in names}
            for name in sorted(files or opened[WEIGHTS].keys()):
                yield name, opened[files[name] if files else WEIGHTS].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the weights in {folder} cannot be read: {error}") from error


def published_model(key: str) -> tuple[dict[str, Any], ModelFacts]:
    """
    The description of published weights, and their shapes without having them.

    Raises:
        `ValueError`: for a key that is not described here.
    """
    if key not in PUBLISHED:
        raise ValueError(f"no published model {key!r} is described here; there are {', '.join(PUBLISHED)}.")
    described = PUBLISHED.get(PUBLISHED[key].get("like"), {}) | {"version": 1} | PUBLISHED[key]
    config = LRSCLIPConfig(**described["config"])
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in LRSCLIPModel(config).parameters())
    row = MODELS[key]
    weights = {"name": row.title, "weights_repo": row.repo, "weights_file": row.file, "revision": row.revision}
    return described | weights | {"key": key, "licence": row.licence}, ModelFacts(config, parameters)
