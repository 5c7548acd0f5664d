"""Features of all processes in one matrix, with gradient. The only file that talks to the process group."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn


def gather_with_gradient(local: torch.Tensor | None) -> torch.Tensor | None:
    """
    Concatenates `local` of all processes in rank order; gradients flow back to the process they came from.

    Every process then computes the full loss on the gathered features. The backward pass sums the gradients of the W
    equal losses and DistributedDataParallel divides by W, so the result is the gradient of one process on the whole
    batch. (The published code gathers without gradient and loses part of it.)

    Args:
        local (`(B / W, P)`): this process' embeddings, equally many on every process; None stays None.

    Returns:
        `(B, P)`; `local` itself with one process.
    """
    if local is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return torch.cat(dist_nn.all_gather(local))
