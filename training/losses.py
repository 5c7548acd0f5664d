"""
The dual-text contrastive loss, as pure functions of embeddings.

Shapes: B pairs (of all processes together), P projection width, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .config import LossConfig


def info_nce(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    chunk_size: int | None = None,
    *,
    label_smoothing: float = 0.0,
    text_hashes: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Symmetric InfoNCE, eq. (1) of the paper, in float32 at least; row i of both inputs is the positive pair i.

    Args:
        image_embeds (`(B, P)`): unit image embeddings.
        text_embeds (`(B, P)`): unit text embeddings.
        logit_scale (scalar): 1 / tau, already exponentiated.
        chunk_size (`int`, *optional*): rows of the logits held at a time. The value and the gradients are those of
            the whole matrix, at B x chunk_size instead of several B x B of memory and a fourth matrix product beside
            three.
        label_smoothing (`float`): share of the target spread evenly over all candidates, the positive among them
            (as in `torch.nn.functional.cross_entropy`).
        text_hashes (`(B,)` integers, *optional*): equal for identical texts. Then i and j != i with
            `text_hashes[i] == text_hashes[j]` are no candidates for each other, in either direction: text j is left out
            of the denominator of image i, and image i out of that of text j.

    Returns:
        scalar: the mean of the image-to-text and the text-to-image cross entropy.

    Raises:
        `ValueError`: for shapes that differ, or a chunk size below 1.
    """
    if image_embeds.shape != text_embeds.shape or image_embeds.ndim != 2:
        raise ValueError(
            f"info_nce got image embeddings of shape {tuple(image_embeds.shape)} and text embeddings of shape "
            f"{tuple(text_embeds.shape)}; both must be (pairs, width) and equal."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give 1 row or more, or None for the whole matrix.")
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    images, texts, scale = image_embeds.to(dtype), text_embeds.to(dtype), logit_scale.to(dtype)
    pairs = len(images)
    with torch.autocast(images.device.type, enabled=False):
        if chunk_size is None and text_hashes is None:
            logits = scale * images @ texts.T  # (B, B)
            targets = torch.arange(pairs, device=logits.device)
            rows = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
            columns = F.cross_entropy(logits.T, targets, label_smoothing=label_smoothing)
            return (rows + columns) / 2
        chunk_size = min(chunk_size or pairs, pairs)
        return _ChunkedInfoNCE.apply(images, texts, scale, chunk_size, label_smoothing, text_hashes)


class _ChunkedInfoNCE(torch.autograd.Function):
    """
    Eq. (1) a chunk of rows at a time. The log-sum-exp of a row is complete with its chunk, that of a column with the
    last one, so the backward pass computes the chunks again and turns each into its part of both gradients.
    """

    @staticmethod
    def forward(ctx, images, texts, scale, chunk_size, smoothing, hashes):
        pairs = len(images)
        row_lse, positives = images.new_empty(pairs), images.new_empty(pairs)  # (B,)
        column_max = images.new_full((pairs,), torch.finfo(images.dtype).min)  # (B,); finite where all is excluded
        column_sum = images.new_zeros(pairs)
        smoothed = images.new_zeros(())
        share = _share_of_smoothing(images, hashes)
        for rows, block, spare, excluded in _logit_blocks(images * scale, texts, chunk_size, hashes):
            positives[rows] = block[:, rows].diagonal()
            if smoothing:
                candidates = block if excluded is None else block.masked_fill(excluded, 0)
                smoothed += candidates.sum(1) @ share[rows] + candidates.sum(0) @ share
            if excluded is not None:
                block.masked_fill_(excluded, -torch.inf)
            row_max = block.amax(1, keepdim=True)  # (C, 1)
            row_lse[rows] = torch.sub(block, row_max, out=spare).exp_().sum(1).log_().add_(row_max[:, 0])
            larger = torch.maximum(column_max, block.amax(0))
            column_sum.mul_(column_max.sub_(larger).exp_()).add_(block.sub_(larger).exp_().sum(0))
            column_max = larger
        column_lse = column_sum.log_().add_(column_max)
        ctx.save_for_backward(images, texts, scale, row_lse, column_lse, hashes)
        ctx.chunk_size, ctx.smoothing = chunk_size, smoothing
        loss = (row_lse + column_lse).mean() - 2 * (1 - smoothing) * positives.mean() - smoothing * smoothed / pairs
        return loss / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        images, texts, scale, row_lse, column_lse, hashes = ctx.saved_tensors
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)  # (B, P)
        scale_gradient = torch.zeros_like(scale)
        share = _share_of_smoothing(images, hashes)
        with torch.autocast(images.device.type, enabled=False):
            scaled = images * scale
            for rows, block, spare, excluded in _logit_blocks(scaled, texts, ctx.chunk_size, hashes):
                if excluded is not None:
                    block.masked_fill_(excluded, -torch.inf)
                # The two softmaxes less the two (smoothed) targets: 2 B times the gradient by the logits, (C, B).
                torch.sub(block, row_lse[rows, None], out=spare).exp_()
                block.sub_(column_lse).exp_().add_(spare)
                if ctx.smoothing:
                    torch.add(share[rows, None], share, out=spare)
                    block.sub_(spare if excluded is None else spare.masked_fill_(excluded, 0), alpha=ctx.smoothing)
                block[:, rows].diagonal().sub_(2 * (1 - ctx.smoothing))
                torch.mm(block, texts, out=image_gradient[rows])  # (C, B) x (B, P)
                scale_gradient += (image_gradient[rows] * images[rows]).sum()
                text_gradient.addmm_(block.T, scaled[rows])
        weight = gradient / (2 * len(images))
        image_gradient.mul_(scale * weight)
        return image_gradient, text_gradient.mul_(weight), scale_gradient * weight, None, None, None


def _logit_blocks(
    scaled_images: torch.Tensor, texts: torch.Tensor, chunk_size: int, hashes: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """
    The rows, their logits `(C, B)`, a buffer of that shape, and which of them are excluded (or None). All blocks
    share the same two buffers.
    """
    pairs = len(texts)
    buffers = texts.new_empty(2, chunk_size, pairs)
    for start in range(0, pairs, chunk_size):
        rows = slice(start, min(start + chunk_size, pairs))
        block, spare = buffers[:, : rows.stop - start]
        torch.mm(scaled_images[rows], texts.T, out=block)
        excluded = None
        if hashes is not None:
            excluded = hashes[rows, None] == hashes  # (C, B)
            excluded[:, rows].diagonal().fill_(False)
        yield rows, block, spare, excluded


def _share_of_smoothing(images: torch.Tensor, hashes: torch.Tensor | None) -> torch.Tensor:
    """`(B,)`: one over the number of candidates of each row, which is also that of its column."""
    pairs = len(images)
    if hashes is None:
        return images.new_full((pairs,), 1 / pairs)
    _, kind, count = hashes.unique(return_inverse=True, return_counts=True)
    return 1 / (pairs + 1 - count[kind]).to(images.dtype)


def principal_components(x: torch.Tensor, rank: int) -> torch.Tensor:
    """
    Long-CLIP's primary component matching: `x` rebuilt from its mean and its first `rank` principal components
    (beichenzbc/Long-CLIP model/model_longclip.py, `PCA`). The rows are not brought back to length 1 there, nor here.

    The gradient goes through the components too, as theirs does through the singular vectors.
    DIFFERS: theirs divides by the differences of all singular values and is not finite where two are equal; the result
    depends on the kept components as a whole only, so here only the gaps between kept and dropped ones count.
    DIFFERS: they take the components of each process' rows; give this function the rows of the global batch.
    DIFFERS: float64 inside, the gaps are small.

    Args:
        x (`(B, P)`): unit image embeddings.
        rank (`int`): components kept; from min(B - 1, P) on, the result is `x` itself.

    Returns:
        `(B, P)`, in the type of `x`, float32 at least.

    Raises:
        `ValueError`: for another shape, or a rank below 1.
    """
    if x.ndim != 2 or rank < 1:
        raise ValueError(
            f"principal_components got shape {tuple(x.shape)} and rank {rank}; give (rows, width) and a rank of 1 or more."
        )
    return _PrincipalComponents.apply(x.to(torch.promote_types(x.dtype, torch.float32)), rank)


class _PrincipalComponents(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rank):
        with torch.autocast(x.device.type, enabled=False):
            mean = x.double().mean(0)
            centred = x.double() - mean  # (B, P)
            variances, directions = torch.linalg.eigh(centred.T @ centred)  # (P,) ascending, (P, P)
            kept = directions[:, -rank:]  # (P, rank)
            ctx.save_for_backward(x, variances, directions)
            ctx.rank = rank
            return (centred @ kept @ kept.T + mean).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, variances, directions = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            gradient = gradient.double()
            centred = x.double() - x.double().mean(0)
            kept, dropped = directions[:, -ctx.rank :], directions[:, : -ctx.rank]  # (P, R), (P, P - R)
            gaps = variances[-ctx.rank :, None] - variances[: -ctx.rank]  # (R, P - R)
            # First order: the projector P moves by the sum of (v' dA w) / gap (v w' + w v') over kept v, dropped w,
            # where A = X'X. A gap of nothing but rounding belongs to directions without variance, which add nothing.
            by_projector = centred.T @ gradient  # (P, P)
            turned = (kept.T @ (by_projector + by_projector.T) @ dropped) / gaps  # (R, P - R)
            turned = torch.where(gaps > 1e-12 * variances[-1], turned, 0)
            turned = kept @ turned @ dropped.T
            by_centred = gradient @ kept @ kept.T + centred @ (turned + turned.T)  # (B, P)
            return (by_centred - by_centred.mean(0) + gradient.mean(0)).to(x.dtype), None


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
    config: LossConfig,
    long_hashes: torch.Tensor | None = None,
    short_hashes: torch.Tensor | None = None,
) -> DualTextLoss:
    """
    Weigh `long_weight * InfoNCE(images, long) + (1 - long_weight) * InfoNCE(images, short)`, eq. (5); with `pcm_rank`,
    the short texts are matched to the principal components of the images.

    Args:
        image_embeds, long_embeds, short_embeds (`(B, P)`): unit embeddings; with one kind of text left out (None) the
            loss is that of the other, whatever the weight.
        logit_scale (scalar): 1 / tau, already exponentiated.
        config: the constant weight of the long texts ([`LossConfig.at`]), and the options of both parts.
        long_hashes, short_hashes (`(B,)` integers): equal for identical texts, see [`info_nce`]; read with
            `mask_identical_captions` only.

    Returns:
        the weighted loss and its parts, scalars.

    Raises:
        `ValueError`: when both kinds of text are missing.
    """
    if long_embeds is None and short_embeds is None:
        raise ValueError("dual_text_loss got neither long nor short text embeddings; give at least one of them.")

    def one_kind(images, texts, hashes):
        hashes = hashes if config.mask_identical_captions else None
        return info_nce(
            images, texts, logit_scale, config.chunk_size, label_smoothing=config.label_smoothing, text_hashes=hashes
        )

    long_loss = None if long_embeds is None else one_kind(image_embeds, long_embeds, long_hashes)
    if short_embeds is None:
        return DualTextLoss(long_loss, long_loss, None)
    primary = image_embeds if config.pcm_rank is None else principal_components(image_embeds, config.pcm_rank)
    short_loss = one_kind(primary, short_embeds, short_hashes)
    if long_loss is None:
        return DualTextLoss(short_loss, None, short_loss)
    weight = config.long_weight
    return DualTextLoss(weight * long_loss + (1 - weight) * short_loss, long_loss, short_loss)
