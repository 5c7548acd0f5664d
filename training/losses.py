"""
The dual-text contrastive loss, as pure functions of embeddings.

Shapes: B pairs (of all processes together), P projection width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def info_nce(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """
    Symmetric InfoNCE, eq. (1) of the paper, in float32; row i of both inputs is the positive pair i.

    Args:
        image_embeds (`(B, P)`): unit image embeddings.
        text_embeds (`(B, P)`): unit text embeddings.
        logit_scale (scalar): 1 / tau, already exponentiated.

    Returns:
        scalar: the mean of the image-to-text and the text-to-image cross entropy, without label smoothing.

    Raises:
        `ValueError`: for shapes that differ.
    """
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 2:
        raise ValueError(
            f"info_nce got image embeddings of shape {tuple(image_embeds.shape)} and text embeddings of shape "
            f"{tuple(text_embeds.shape)}; both must be (pairs, width) and equal."
        )
    logits = logit_scale.float() * image_embeds.float() @ text_embeds.float().T  # (B, B)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class DualTextLoss(NamedTuple):
    """Eq. (5) and its two parts (scalars); a part whose texts were not given is None."""

    loss: torch.Tensor
    long_loss: torch.Tensor | None
    short_loss: torch.Tensor | None


def dual_text_loss(
    image_embeds: torch.Tensor,
    long_embeds: torch.Tensor | None,
    short_embeds: torch.Tensor | None,
    logit_scale: torch.Tensor,
    long_weight: float = 0.8,
) -> DualTextLoss:
    """
    `long_weight * InfoNCE(images, long) + (1 - long_weight) * InfoNCE(images, short)`, eq. (5).

    Args:
        image_embeds, long_embeds, short_embeds (`(B, P)`): unit embeddings; with one kind of text left out (None) the
            loss is that of the other, whatever the weight.
        logit_scale (scalar): 1 / tau, already exponentiated.
        long_weight (`float`): omega, in [0, 1].

    Raises:
        `ValueError`: when both kinds of text are missing.
    """
    if long_embeds is None and short_embeds is None:
        raise ValueError("dual_text_loss got neither long nor short text embeddings; give at least one of them.")
    long_loss = None if long_embeds is None else info_nce(image_embeds, long_embeds, logit_scale)
    short_loss = None if short_embeds is None else info_nce(image_embeds, short_embeds, logit_scale)
    if short_loss is None:
        return DualTextLoss(long_loss, long_loss, None)
    if long_loss is None:
        return DualTextLoss(short_loss, None, short_loss)
    return DualTextLoss(long_weight * long_loss + (1 - long_weight) * short_loss, long_loss, short_loss)
