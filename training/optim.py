"""Optimizer and learning-rate schedule."""

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .config import OptimConfig


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


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
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


def follow_schedule(scheduler: LambdaLR) -> None:
    """Set the rates of its next step: those restored from a checkpoint are of the schedule that the run had then."""
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
