"""
What is different where the model is not whole on every process (FSDP2) or its optimizer is not (DeepSpeed ZeRO-2).

The launch file chooses (training/accelerate/). Weights, gradients and the loss stay float32 under all of them and
autocast does the mixed precision, so that the result is that of one process. The 0-d `logit_scale`, which FSDP2
cannot shard, is kept whole on every process, outside of what is wrapped: its key and its shape stay.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    compare_versions,
    is_deepspeed_available,
    parse_flag_from_env,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from modeling_lrsclip import LRSCLIPModel

from .large_batch import Embedder
from .lora import has_adapters, merged


LAYERS = ["CLIPEncoderLayer"]  # a unit of FSDP2 each
_LAUNCH_FILES = {
    DistributedType.NO: "one process or DistributedDataParallel (ddp.yaml)",
    DistributedType.FSDP: "FSDP2 (fsdp2.yaml)",
    DistributedType.DEEPSPEED: "DeepSpeed (deepspeed_zero2.yaml)",
}


def check_launch(precision: str) -> None:
    """
    Raises `ValueError` for what the launch file asks for and cannot be had; looks at the environment only, so that it
    can be called before anything is loaded.

    Args:
        precision: the run's, by accelerate's name.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if not is_deepspeed_available():
            raise ValueError("The launch file asks for DeepSpeed, which is not installed; pip install deepspeed.")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("0", "1", "2"):
            raise ValueError(
                f"DeepSpeed's ZeRO stage is {stage}; stages up to 2 are supported, beyond it take fsdp2.yaml."
            )
    elif not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    elif os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("The launch file asks for FSDP version 1; set fsdp_version to 2, as in fsdp2.yaml.")
    elif compare_versions("torch", "<", "2.7") or compare_versions("accelerate", "<", "1.15"):
        raise ValueError(
            "FSDP2 with a parameter that is not sharded takes torch 2.7 and accelerate 1.15; pip install -U."
        )
    elif parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true; set it to false, it cannot load the 0-d logit_scale."
        )
    if precision == "fp16":
        raise ValueError(
            "precision is fp16, whose loss scaling is for one process and DDP only; set it to bf16 or fp32."
        )


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """
    The accelerator that the launch file describes, on a machine without GPU too, where accelerate by itself would
    quietly take DistributedDataParallel instead of FSDP2.

    Args:
        precision: the run's, by accelerate's name.
        options: of `Accelerator`.

    Raises:
        `ValueError`: see [`check_launch`].
    """
    check_launch(precision)
    accelerator = Accelerator(mixed_precision=precision, **options)
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has the whole model."""
    return accelerator.distributed_type == DistributedType.FSDP


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """For the embedder to cast by itself where accelerate leaves that to FSDP2's or DeepSpeed's own ways; else None."""
    own = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return torch.bfloat16 if own and accelerator.mixed_precision == "bf16" else None


def prepare(
    accelerator: Accelerator, model: LRSCLIPModel, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare` of the model as a training step calls it, and of its optimizer."""
    embedder = Embedder(model, autocast_dtype(accelerator))
    if is_sharded(accelerator):
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.ignored_modules = [torch.nn.ParameterList([model.logit_scale])]
        model.logit_scale.data = model.logit_scale.data.to(accelerator.device)
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, LAYERS
        for group in [optimizer.defaults, *optimizer.param_groups]:
            group |= {"fused": False, "foreach": True}  # SGD has no fused form for shards
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepare_deepspeed(accelerator, embedder, optimizer, max_grad_norm)
    return accelerator.prepare(embedder, optimizer)


def _prepare_deepspeed(accelerator, embedder, optimizer, max_grad_norm):
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = max_grad_norm or 0.0  # inside of the engine's step
    config["train_micro_batch_size_per_gpu"] = 1  # it must be told; batches do not pass through the engine
    told = config["bf16"]
    config["bf16"] = {"enabled": False}  # its engine would round the weights, the kept positions among them
    embedder.model.logit_scale.ds_optim_param = True  # not sent to the others at the start, which fails for 0-d ones
    prepared = accelerator.prepare(embedder, optimizer)
    config["bf16"] = told  # what `accelerator.mixed_precision` reads
    return prepared


@torch.no_grad()
def clamp_logit_scale(accelerator: Accelerator, model: LRSCLIPModel, largest: float) -> None:
    """After an optimizer step; DeepSpeed's optimizer keeps a copy of its own, which would undo it."""
    model.logit_scale.clamp_(max=largest)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and model.logit_scale.requires_grad:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(model.logit_scale, model.logit_scale.data)


def whole_model(accelerator: Accelerator, model: LRSCLIPModel) -> LRSCLIPModel | None:
    """
    The model as it is published: not sharded, adapters merged into the weights they adapt. All processes must call it.

    Returns:
        on the main process, `model` itself where it is whole already, else a copy on the same device; None elsewhere.
    """
    if not has_adapters(model) and not is_sharded(accelerator):
        return model if accelerator.is_main_process else None
    if is_sharded(accelerator):
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    else:
        state_dict = model.state_dict()
    if not accelerator.is_main_process:
        return None
    with torch.random.fork_rng(devices=[]):  # a new model draws weights, and training must not notice
        if has_adapters(model):
            copy = merged(model, state_dict)
        else:
            copy = LRSCLIPModel._from_config(model.config, dtype=torch.float32)
            copy.load_state_dict(state_dict)
    return copy.to(accelerator.device).eval()


def check_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """
    Raises `ValueError` for a checkpoint that this launch cannot read. Under DistributedDataParallel and FSDP2 the
    number of processes may be another one than before; the result is then equal but for rounding.
    """
    saved, now = _way_of(folder), accelerator.distributed_type
    now = now if now in _LAUNCH_FILES else DistributedType.NO
    if saved != now:
        raise ValueError(
            f"{folder} was saved under {_LAUNCH_FILES[saved]} and this run is launched otherwise; resume it with that, or "
            "start anew from an exported model (model.init)."
        )
    processes = len(list(folder.glob("random_states_*.pkl")))
    if saved == DistributedType.DEEPSPEED and processes != accelerator.num_processes:
        raise ValueError(
            f"{folder} was saved by {processes} processes and there are {accelerator.num_processes} now, which DeepSpeed "
            f"cannot do; launch {processes}."
        )


def _way_of(folder: Path) -> DistributedType:
    """How the processes of a checkpoint, as accelerate writes it, held the model."""
    if (folder / "pytorch_model_fsdp_0").exists():
        return DistributedType.FSDP
    return DistributedType.DEEPSPEED if (folder / "pytorch_model").is_dir() else DistributedType.NO
