"""Rows of all processes in one matrix, with gradient. The only file that talks to the process group."""

import datetime

import torch
import torch.distributed as dist


def gather(local: torch.Tensor) -> torch.Tensor:
    """
    `local` of all processes, concatenated in rank order, without gradient.

    Args:
        local (`(B / W, ...)`): of one shape on every process.

    Returns:
        `(B, ...)`; `local` itself with one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def gather_with_gradient(local: torch.Tensor | None) -> torch.Tensor | None:
    """
    [`gather`], through which gradients flow back to the process that the rows came from; None stays None.

    Every process must then compute the same loss on the gathered rows. So each knows its gradient without asking the
    others: its own rows', times W, since DistributedDataParallel divides the sum over the processes by W. A parameter
    that the loss takes directly (the logit scale) has the whole gradient everywhere, which the same division of W
    equal summands leaves as it is. The result is the gradient of one process on the whole batch. (The published code
    gathers without gradient and loses part of it.)
    """
    if local is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return _Gather.apply(local)


def fewest(count: int, device: torch.device) -> int:
    """The smallest of the processes' counts."""
    return int(gather(torch.tensor([count], device=device)).min())


def average_gradient(parameter: torch.nn.Parameter) -> None:
    """The mean of the processes' gradients of a parameter that no wrapper reduces."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local):
        return gather(local)

    @staticmethod
    def backward(ctx, gradient):
        share = len(gradient) // dist.get_world_size()
        first = dist.get_rank() * share
        return gradient[first : first + share] * dist.get_world_size()


_kept: list[dist.ProcessGroup] = []


def keep_until_exit() -> None:
    """
    Keeps the process group of all from being taken apart while the process lives: that waits for gloo's threads with the
    interpreter's lock held, and such a thread may be waiting for the lock to let go of a tensor. Neither would go on.
    """
    if dist.is_initialized():
        _kept.append(dist.group.WORLD)


def cpu_group(longest_wait: datetime.timedelta) -> dist.ProcessGroup | None:
    """A group of all processes whose CPUs talk to each other, past any GPU; None with one process. All must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    _kept.append(dist.new_group(backend="gloo", timeout=longest_wait))
    return _kept[-1]


def largest(number: int, group: dist.ProcessGroup | None) -> int:
    """The largest `number` that any process gave; `group` is that of [`cpu_group`]."""
    if group is None:
        return number
    told = torch.tensor([number])
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    return int(told)
