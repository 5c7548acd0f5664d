"""The model and processor that a run starts from: a CLIP stretched, a Long-CLIP, an LRSCLIP, or a small one from scratch."""

import difflib
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch._inductor import config as inductor_config
from transformers import AutoConfig, AutoTokenizer

from modeling_lrsclip import (
    LRSCLIPConfig,
    LRSCLIPImageProcessor,
    LRSCLIPModel,
    LRSCLIPProcessor,
    LRSCLIPTextConfig,
    LRSCLIPVisionConfig,
)
from modeling_lrsclip.convert import load_published, prepare
from modeling_lrsclip.published.checkpoints import ACTIVATIONS, PRESETS, read_published_checkpoint
from modeling_lrsclip.train_tokenizer import train_tokenizer

from .lora import LoRAConfig, add_adapters


SCRATCH, TRAIN_TOKENIZER = "scratch", "train"
# Short words for `init`, by names of the published models (modeling_lrsclip/published/registry.py); the other sizes go by those names.
SHORTHANDS = {"clip": "clip-vit-b-16", "longclip": "long-clip-vit-b-16", "lrsclip": "lrsclip-vit-b-16"}


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class ModelConfig:
    # Hub id, folder or published checkpoint file of a CLIP, Long-CLIP or LRSCLIP, its name (clip, longclip, lrsclip,
    # clip-vit-l-14, long-clip-vit-l-14, remoteclip-vit-l-14, ...), or "scratch"; one of 77 positions is stretched
    init: str = "openai/clip-vit-base-patch16"
    preset: str | None = None  # of a checkpoint file that does not say how it computes, see modeling_lrsclip.convert
    activation: str | None = None  # likewise
    kept_positions: int = Field(20, ge=0)  # stretching a CLIP: first rows kept ...
    stretch_ratio: int = Field(4, ge=1)  # ... and rows for each later one; 1 leaves 77 positions
    freeze_kept_positions: bool = True  # keep those rows bit-equal while training
    tokenizer: str | None = None  # Hub id, folder, BPE file; by default init's; "train": a BPE from the captions
    vocab_size: int = Field(1000, ge=514)  # of a tokenizer trained here
    text: dict[str, Any] = Field(default_factory=dict)  # scratch: fields of LRSCLIPTextConfig
    vision: dict[str, Any] = Field(default_factory=dict)  # scratch: fields of LRSCLIPVisionConfig
    projection_dim: int = Field(512, ge=1)  # scratch
    initial_logit_scale: float | None = Field(None, gt=0, le=100)  # 1 / tau to start from; by default init's
    attn_implementation: str | None = None  # eager, sdpa, flash_attention_2; by default what transformers picks
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None  # train low-rank adapters instead of the weights

    @model_validator(mode="after")
    def _choices_exist(self):
        for name, choices in (("preset", PRESETS), ("activation", ACTIVATIONS)):
            given = getattr(self, name)
            if given is not None and given not in choices:
                raise ValueError(f"model.{name} is {given}; choose among {', '.join(choices)}")
        if self.lora and self.init == SCRATCH:
            raise ValueError("model.lora adapts trained weights and model.init is scratch; leave one of them out")
        return self

    @model_validator(mode="after")
    def _tower_fields_exist(self):
        for given, config_class in ((self.text, LRSCLIPTextConfig), (self.vision, LRSCLIPVisionConfig)):
            known = {field.name for field in fields(config_class)}
            for name in given:
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{name} is not a field of {config_class.__name__}; did you mean {nearest}?")
        return self


def build_processor(config: ModelConfig, captions: Iterable[str]) -> LRSCLIPProcessor:
    """The processor whose tokenizer cuts at the model's table; `captions` are read only to train a tokenizer."""
    if os.path.isfile(config.init):
        return prepare(config.init, **_reading(config)).processor
    positions = _positions(config)
    if config.tokenizer == TRAIN_TOKENIZER:
        tokenizer = train_tokenizer(captions, config.vocab_size, model_max_length=positions)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.init, model_max_length=positions)
    if config.init == SCRATCH:
        size = config.vision.get("image_size", 224)
        image_processor = LRSCLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    else:
        image_processor = LRSCLIPImageProcessor.from_pretrained(config.init)
    return LRSCLIPProcessor(image_processor, tokenizer)


def build_model(config: ModelConfig, processor: LRSCLIPProcessor) -> LRSCLIPModel:
    """
    The model in float32, the kept positions guarded against training (see [`freeze_kept_positions`]).

    Raises:
        `ValueError`: for a tokenizer whose vocabulary does not fit a model loaded from `init`.
    """
    tokenizer = processor.tokenizer
    kwargs = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    if config.init == SCRATCH:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        table = {"vocab_size": len(tokenizer), "max_position_embeddings": _positions(config), "stretch_ratio": 1}
        model_config = LRSCLIPConfig(
            text_config=config.text | special | table,
            vision_config=config.vision,
            projection_dim=config.projection_dim,
        )
        model = LRSCLIPModel._from_config(model_config, **kwargs)
    elif os.path.isfile(config.init):
        model = load_published(config.init, **_reading(config))[0]
        if config.attn_implementation is not None:
            model.set_attn_implementation(config.attn_implementation)
    elif _stretched_before(config):
        model = LRSCLIPModel.from_pretrained(config.init, dtype="float32", **kwargs)
    else:
        model = LRSCLIPModel.from_clip(
            config.init,
            kept_positions=config.kept_positions,
            stretch_ratio=config.stretch_ratio,
            dtype="float32",
            **kwargs,
        )
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries, {config.init} reads {model.config.text_config.vocab_size}; "
            "leave model.tokenizer out to use the checkpoint's own."
        )
    if config.initial_logit_scale is not None:
        model.logit_scale.data.fill_(config.initial_logit_scale).log_()
    if config.lora is not None:
        add_adapters(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_kept_positions:
        freeze_kept_positions(model)
    return model


def compile_layers(model: LRSCLIPModel) -> None:
    """
    `torch.compile` of both towers, layer by layer: one layer's code serves all of its tower, whatever the number and
    the length of the texts, and is made in a twelfth of the whole tower's time. Dropout is drawn as without compiling,
    so that cached gradients can draw it again.
    """
    inductor_config.fallback_random = True
    for tower in (model.text_model, model.vision_model):
        for layer in tower.encoder.layers:
            layer.compile(dynamic=True)


def freeze_kept_positions(model: LRSCLIPModel) -> None:
    """
    Keeps the first rows of a stretched position table bit-equal through training: what is looked up of them has no
    gradient, so that theirs is exactly 0 in whatever wrapper, clipping and momentum do not see them, and the table has
    no weight decay (training/optim.py).
    """
    text_config = model.config.text_config
    if text_config.stretch_ratio == 1 or text_config.kept_positions == 0:
        return
    kept = text_config.kept_positions

    def without_gradient(_table, position_ids, embeddings):
        is_kept = (position_ids[0] < kept).unsqueeze(-1)  # (1, L, 1)
        return torch.where(is_kept, embeddings.detach(), embeddings)  # (1, L, D)

    model.text_model.embeddings.position_embedding.register_forward_hook(without_gradient)


def _reading(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `modeling_lrsclip.convert` for a checkpoint file; one of 77 positions is stretched."""
    given = {"preset": config.preset, "activation": config.activation}
    given = {name: value for name, value in given.items() if value is not None}
    text_config = read_published_checkpoint(config.init, **given).config.text_config
    if text_config.stretch_ratio == 1:
        given |= {"kept_positions": config.kept_positions, "stretch_ratio": config.stretch_ratio}
    return given | {"tokenizer": config.tokenizer, "dtype": torch.float32}


def _text_config(config: ModelConfig):
    return AutoConfig.from_pretrained(config.init).text_config


def _stretched_before(config: ModelConfig) -> bool:
    return getattr(_text_config(config), "stretch_ratio", 1) != 1


def _positions(config: ModelConfig) -> int:
    """Rows of the text position table of the model to come."""
    if config.init == SCRATCH:
        return config.text.get("max_position_embeddings", 248)
    positions = _text_config(config).max_position_embeddings
    if _stretched_before(config):
        return positions
    return config.kept_positions + (positions - config.kept_positions) * config.stretch_ratio
