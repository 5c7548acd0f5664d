"""The model and processor that a run starts from: a CLIP stretched, a Long-CLIP, an LRSCLIP, or a small one from scratch."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from torch._inductor import config as inductor_config
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoConfig, AutoTokenizer

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.conversion import Prepared
from modeling_lrsclip.conversion import prepare as read_published
from modeling_lrsclip.files.documents import refuse_malformed
from modeling_lrsclip.published.registry import resolve
from modeling_lrsclip.train_tokenizer import train_tokenizer

from .config import SCRATCH, LoRAConfig, ModelConfig
from .distributed import is_sharded, runs_deepspeed


TRAIN_TOKENIZER = "train"
SHARDED_LAYERS = ["CLIPEncoderLayer"]  # each a unit of FSDP2
# Short words for `init`, by names of the published models (modeling_lrsclip/published/registry.py); the other sizes go by those names.
SHORTHANDS = {"clip": "clip-vit-b-16", "longclip": "long-clip-vit-b-16", "lrsclip": "lrsclip-vit-b-16"}


@dataclass
class Start:
    """Starting point of a run, found and opened."""

    config: ModelConfig  # with `init` a folder, a Hub id or a file
    positions: int  # rows of the text position table of the model to come
    stretched: bool = False  # before this run, so that its table stays as it is
    published: Prepared | None = None  # what a published checkpoint file holds


def open_start(config: ModelConfig) -> Start:
    """
    Find what `init` names and look into it; a published checkpoint file is fetched, read and stretched here, once.

    Raises:
        `ValueError`: for an `init` that is no file, folder, Hub id or published model, and for a file that cannot be
            fetched or converted.
        `OSError`: for a file or tokenizer out of reach.
    """
    config = resolve_init(config)
    if config.init == SCRATCH:
        return Start(config, config.text.get("max_position_embeddings", 248))
    stretching = {"kept_positions": config.kept_positions, "stretch_ratio": config.stretch_ratio}
    if os.path.isfile(config.init):
        reading = {"preset": config.preset, "activation": config.activation, "tokenizer": config.tokenizer}
        published = read_published(config.init, dtype=torch.float32, keep_stretched=True, **reading, **stretching)
        return Start(config, published.skeleton.config.text_config.max_position_embeddings, published=published)
    with refuse_malformed(config.init, "mend its config.json", StrictDataclassError):
        text_config = AutoConfig.from_pretrained(config.init).text_config
    positions = text_config.max_position_embeddings
    if getattr(text_config, "stretch_ratio", 1) != 1:
        return Start(config, positions, stretched=True)
    return Start(config, config.kept_positions + (positions - config.kept_positions) * config.stretch_ratio)


def resolve_init(config: ModelConfig) -> ModelConfig:
    """
    Return the same section with `init` a folder, a Hub id or a file, by whatever name it was given; fetches a published
    file.

    Raises:
        `ValueError`: for a name or path that is none of these, or a file that cannot be fetched.
    """
    if config.init == SCRATCH:
        return config
    source = resolve(full_name(config.init))
    options = {name: value for name, value in source.load_options.items() if getattr(config, name) is None}
    return replace(config, init=source.path, **options)


def full_name(init: str) -> str:
    """Return the published model's name for a short word; else `init` itself."""
    return init if Path(init).exists() else SHORTHANDS.get(init, init)


def build_processor(start: Start, texts: Iterable[str]) -> LRSCLIPProcessor:
    """Build the processor whose tokenizer cuts at the model's table; `texts` are read only to train a tokenizer."""
    config = start.config
    if start.published is not None:
        return start.published.processor
    if config.tokenizer == TRAIN_TOKENIZER:
        tokenizer = train_tokenizer(texts, config.vocab_size, model_max_length=start.positions)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or config.init, model_max_length=start.positions)
    if config.init != SCRATCH:
        return LRSCLIPProcessor(LRSCLIPImageProcessor.from_pretrained(config.init), tokenizer)
    size = config.vision.get("image_size", 224)
    cropped = {"height": size, "width": size}
    return LRSCLIPProcessor(LRSCLIPImageProcessor(size={"shortest_edge": size}, crop_size=cropped), tokenizer)


def build_model(start: Start, processor: LRSCLIPProcessor) -> LRSCLIPModel:
    """
    Build the model in float32, the kept positions guarded against training (see [`freeze_kept_positions`]).

    Raises:
        `ValueError`: for a tokenizer whose vocabulary does not fit a model loaded from `init`.
    """
    config, tokenizer = start.config, processor.tokenizer
    model = _scratch_model(start, tokenizer) if config.init == SCRATCH else _load_model(start)
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


def _scratch_model(start: Start, tokenizer: Any) -> LRSCLIPModel:
    """A small model of the widths that the configuration names, its weights drawn at random."""
    config = start.config
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    table = {"vocab_size": len(tokenizer), "max_position_embeddings": start.positions, "stretch_ratio": 1}
    towers = {"text_config": config.text | special | table, "vision_config": config.vision}
    with refuse_malformed(
        "the configuration's model section", "mend model.text or model.vision", StrictDataclassError
    ):
        model_config = LRSCLIPConfig(**towers, projection_dim=config.projection_dim)
    return LRSCLIPModel._from_config(model_config, **_attention(config))


def _load_model(start: Start) -> LRSCLIPModel:
    """The weights of `init`, stretched where they were not."""
    config = start.config
    if start.published is not None:
        model = start.published.build_model()
        if config.attn_implementation is not None:
            model.set_attn_implementation(config.attn_implementation)
        return model
    if start.stretched:
        return LRSCLIPModel.from_pretrained(config.init, dtype="float32", **_attention(config))
    stretching = {"kept_positions": config.kept_positions, "stretch_ratio": config.stretch_ratio}
    return LRSCLIPModel.from_clip(config.init, dtype="float32", **stretching, **_attention(config))


def _attention(config: ModelConfig) -> dict[str, str]:
    return {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}


class Embedder(torch.nn.Module):
    """
    The model as a training step calls it: images and groups of texts in one `forward`, since a model that is wrapped
    for several processes must see its whole batch in one.

    Args:
        autocast (`torch.dtype`, *optional*): to compute in, where no wrapper sees to that.
    """

    def __init__(self, model: LRSCLIPModel, autocast: torch.dtype | None = None):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(
        self, pixel_values: torch.Tensor | None, groups: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Embed images and groups of texts.

        Args:
            pixel_values (`(b, 3, H, W)`, *optional*): images.
            groups (list of `(n_g, L_g)`): token ids.

        Returns:
            unit embeddings of the images `(b, P)` and of the texts of all groups `(n, P)`; None for those not given.
        """
        device = self.model.logit_scale.device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            images = None if pixel_values is None else self.model(pixel_values=pixel_values).image_embeds
            texts = [self.model(input_ids=group).text_embeds for group in groups]
        return images, torch.cat(texts) if texts else None


def compile_layers(model: LRSCLIPModel) -> None:
    """
    Compile both towers with `torch.compile`, layer by layer: one layer's code serves all of its tower, whatever the number
    and the length of the texts, and is made in a twelfth of the whole tower's time. Dropout is drawn as without
    compiling, so that cached gradients can draw it again.
    """
    inductor_config.fallback_random = True
    for tower in (model.text_model, model.vision_model):
        for layer in tower.encoder.layers:
            layer.compile(dynamic=True)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Type for a model to cast to by itself, where accelerate leaves casting to FSDP2 and DeepSpeed; else None."""
    wrapped = is_sharded(accelerator) or runs_deepspeed(accelerator)
    return torch.bfloat16 if wrapped and accelerator.mixed_precision == "bf16" else None


def prepare(
    accelerator: Accelerator, embedder: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """
    Wrap a model and its optimizer for the processes and the precision of a run: `accelerator.prepare`.

    Args:
        accelerator: of [`make_accelerator`].
        embedder: the model as a training step calls it; its `model` is the LRSCLIP.
        optimizer: of its parameters.
        max_grad_norm: which DeepSpeed clips to inside of its step; None: not at all.

    Returns:
        both, wrapped.
    """
    if is_sharded(accelerator):
        logit_scale, plugin = embedder.model.logit_scale, accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.ignored_modules = [torch.nn.ParameterList([logit_scale])]
        logit_scale.data = logit_scale.data.to(accelerator.device)
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, SHARDED_LAYERS
        for group in [optimizer.defaults, *optimizer.param_groups]:
            group |= {"fused": False, "foreach": True}  # SGD has no fused form for shards
    elif runs_deepspeed(accelerator):
        return _prepare_deepspeed(accelerator, embedder, optimizer, max_grad_norm)
    return accelerator.prepare(embedder, optimizer)


def _prepare_deepspeed(accelerator, embedder, optimizer, max_grad_norm):
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = max_grad_norm or 0.0  # inside of the engine's step
    config["train_micro_batch_size_per_gpu"] = 1  # it must be told; batches do not pass through the engine
    mixed_precision = config["bf16"]
    config["bf16"] = {"enabled": False}  # its engine would round the weights, the kept positions among them
    embedder.model.logit_scale.ds_optim_param = True  # not sent to the others at the start, which fails for 0-d ones
    prepared = accelerator.prepare(embedder, optimizer)
    config["bf16"] = mixed_precision  # what `accelerator.mixed_precision` reads
    return prepared


@torch.no_grad()
def clamp_logit_scale(accelerator: Accelerator, model: LRSCLIPModel, most: float) -> None:
    """
    Hold the logit scale to `most` after an optimizer step.

    Args:
        accelerator: what the model was prepared for; DeepSpeed's optimizer has a copy, which would undo it.
        model: bare.
        most: the largest `logit_scale`, a logarithm.
    """
    model.logit_scale.clamp_(max=most)
    if runs_deepspeed(accelerator) and model.logit_scale.requires_grad:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(model.logit_scale, model.logit_scale.data)


def freeze_kept_positions(model: LRSCLIPModel) -> None:
    """
    Keep the first rows of a stretched position table bit-equal through training: what is looked up of them has no
    gradient, so that theirs is exactly 0 in whatever wrapper, clipping and momentum do not see them, and the table has
    no weight decay (training/optim.py).
    """
    text_config = model.config.text_config
    if text_config.stretch_ratio == 1 or text_config.kept_positions == 0:
        return

    def without_gradient(_table, position_ids, embeddings):
        is_kept = (position_ids[0] < text_config.kept_positions).unsqueeze(-1)  # (1, L, 1)
        return torch.where(is_kept, embeddings.detach(), embeddings)  # (1, L, D)

    model.text_model.embeddings.position_embedding.register_forward_hook(without_gradient)


# ------------------------------------------------------------------------------------------------- low-rank adapters
#
# Hu et al. 2021, "LoRA", on both towers, merged into the weights when a model is saved. GeoRSCLIP tried this beside full
# fine-tuning (Zhang et al. 2023, "RS5M and GeoRSCLIP"). The adapters take the place of the weight matrices; trained in
# full beside them are the logit scale and, in a stretched model, the text position table above its kept rows: the rows in
# between were interpolated and never trained, and a low-rank change of the table would move the kept rows too.


def add_adapters(model: LRSCLIPModel, config: LoRAConfig) -> None:
    """
    Put adapters into `model`, in place, and freeze all the rest but the logit scale and a stretched position table.

    Raises:
        `ValueError`: where peft is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError("model.lora is set and peft is not installed; pip install peft.")
    from peft import LoraConfig, inject_adapter_in_model

    settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(LoraConfig(target_modules=list(config.targets), **settings), model)
    model.logit_scale.requires_grad_(True)
    if model.config.text_config.stretch_ratio != 1:
        model.text_model.embeddings.position_embedding.weight.requires_grad_(True)


def has_adapters(model: LRSCLIPModel) -> bool:
    """Whether low-rank adapters are trained instead of the weights."""
    return hasattr(model, "peft_config")


def merged(model: LRSCLIPModel, state_dict: dict[str, torch.Tensor]) -> LRSCLIPModel:
    """
    Make a model of ordinary CLIP weights on the CPU: those that `state_dict` adapts, with their adapters' part added.

    Args:
        model: with adapters, as it is trained; left as it is, since to merge and to unmerge rounds.
        state_dict: its weights, whole.
    """
    from peft import get_peft_model

    bare = LRSCLIPModel._from_config(model.config, dtype=torch.float32)
    adapted = get_peft_model(bare, model.peft_config["default"])
    adapted.base_model.model.load_state_dict(state_dict)
    return adapted.merge_and_unload()
