"""
Gradients of one loss over many pairs, with the activations of a micro-batch in memory at a time.

Cached gradients (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"): embed
everything without graph, take the loss and its gradient with respect to the embeddings, then embed once more, a
micro-batch at a time, and send that gradient on into the towers. The result is the gradient of the whole batch, unlike
plain gradient accumulation, whose negatives are the micro-batch's.

Shapes: b images of this process, n texts of it (long and short ones together), L tokens, P projection width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, DistributedType
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from .losses import DualTextLoss


# (b, P) images and (n, P) texts, in the order of the groups, to the loss.
Loss = Callable[[torch.Tensor, torch.Tensor], DualTextLoss]
# What is embedded at a time: images or None, and texts.
Piece = tuple[torch.Tensor | None, list[torch.Tensor]]


def cut(pixel_values: torch.Tensor, groups: list[torch.Tensor], micro_batch_size: int) -> list[Piece]:
    """
    Cut a batch into pieces of at most `micro_batch_size` images or one group of texts each; only the last holds both, so
    that a wrapper for several processes, which sends gradients with the last piece, sees all parameters there.

    Args:
        pixel_values (`(b, 3, H, W)`): images.
        groups (list of `(n_g, L_g)`): token ids.
        micro_batch_size: images a piece at most.

    Returns:
        the pieces, in the order of the images, then of the groups.
    """
    images = pixel_values.split(micro_batch_size)
    alone = [(part, []) for part in images[:-1]] + [(None, [group]) for group in groups[:-1]]
    return [*alone, (images[-1], groups[-1:])]


def cached_gradients(
    accelerator: Accelerator,
    embedder: torch.nn.Module,
    pieces: list[Piece],
    loss_of: Loss,
    logit_scale: torch.nn.Parameter,
) -> DualTextLoss:
    """
    Compute the gradients of one backward pass of the whole batch, at the memory of one piece's activations and the time of one more forward
    pass. Random numbers (dropout) are those of the first pass in the second one.

    Args:
        accelerator: what prepared `embedder`.
        embedder: an `Embedder`, or its wrapper; gradients are sent to the other processes with the last piece.
        pieces: see [`cut`].
        loss_of: the loss of embeddings `(b, P)` and `(n, P)`.
        logit_scale: the parameter that `loss_of` takes beside the embeddings.

    Returns:
        the losses, scalars.
    """
    random_states, embeds = [], []
    with torch.no_grad(), accelerator.autocast():  # one context for all pieces: weights are cast once
        for pixel_values, groups in pieces:
            # Of the CPU and of the devices that the piece lies on.
            random_states.append((torch.get_rng_state(), *get_device_states(pixel_values, *groups)))
            embeds.append(embedder(pixel_values, groups))
    kinds = ([part for part in parts if part is not None] for parts in zip(*embeds))
    leaves = [torch.cat(parts).requires_grad_() for parts in kinds]  # (b, P), (n, P)
    losses = loss_of(*leaves)
    scale = [logit_scale] if logit_scale.requires_grad else []
    *left, scale_gradient = [*torch.autograd.grad(losses.loss, [*leaves, *scale]), None][:3]  # (b, P), (n, P), scalar

    for number, (piece, (on_cpu, devices, on_devices)) in enumerate(zip(pieces, random_states), start=1):
        last = number == len(pieces)
        with nullcontext() if last else _gradients_kept_back(accelerator, embedder):
            torch.set_rng_state(on_cpu)
            set_device_states(devices, on_devices)
            # A scalar whose gradient with respect to the embeddings and the logit scale is the one just taken.
            surrogate = sum(parameter * scale_gradient for parameter in scale) if last else 0
            for kind, part in enumerate(embedder(*piece)):
                if part is not None:
                    gradient, left[kind] = left[kind].tensor_split([len(part)])
                    surrogate = surrogate + (part * gradient).sum()
            accelerator.backward(surrogate)
    return losses


@contextmanager
def _gradients_kept_back(accelerator: Accelerator, embedder: torch.nn.Module) -> Iterator[None]:
    """Keep gradients from the other processes: for all backward passes of a step but the last one."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine would step the optimizer at each
        accelerator.sync_gradients = False
        try:
            yield
        finally:
            accelerator.sync_gradients = True
    elif accelerator.distributed_type == DistributedType.FSDP:  # each reduces its own: kept, they would be whole ones
        yield
    else:  # `accelerator.no_sync` does nothing for a single process, although that may be wrapped too
        wrapped = isinstance(embedder, DistributedDataParallel)
        with embedder.no_sync() if wrapped else accelerator.no_sync(embedder):
            yield
