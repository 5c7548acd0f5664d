"""Optimizer and learning-rate schedule."""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


@dataclass(config=ConfigDict(extra="forbid"))
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"  # Table X
    learning_rate: float = Field(3e-4, gt=0)  # peak
    momentum: float = Field(0.9, ge=0, lt=1)  # SGD
    dampening: float = Field(0.1, ge=0, lt=1)  # SGD
    beta1: float = Field(0.9, ge=0, lt=1)  # AdamW
    beta2: float = Field(0.999, ge=0, lt=1)  # AdamW
    eps: float = Field(1e-8, gt=0)  # AdamW
    weight_decay: float = Field(0.0, ge=0)  # matrices only, see build_optimizer
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # linear from 0
    max_grad_norm: float | None = Field(None, gt=0)  # clip to this norm


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """
    Build SGD or AdamW. Weight decay is for the weight matrices: not for biases, norms, the logit scale, the class
    embedding, nor the position tables (whose kept rows must not move at all).
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "position_embedding" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.name == "sgd":
        options = {"momentum": config.momentum, "dampening": config.dampening}
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True, **options)
    options = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True, **options)


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LRScheduler:
    """
    Build the schedule of the learning rate: linear warm-up, then constant or cosine to zero.

    Args:
        optimizer: whose rates are scheduled.
        config: its section.
        steps: optimizer steps of the run.

    Returns:
        to be stepped once an optimizer step.
    """
    name = {"constant": "constant_with_warmup", "cosine": "cosine"}[config.schedule]
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)
