# SPDX-License-Identifier: Apache-2.0
"""Knowledge preserved stretching (KPS): CLIP's text position table made longer, its first rows untouched."""

import torch


def stretch_position_embedding(weight: torch.Tensor, kept_positions: int = 20, stretch_ratio: int = 4) -> torch.Tensor:
    """
    Keeps the first rows of a position table and interpolates the others to `stretch_ratio` times as many.

    New row `kept + ratio * i + j` is `(1 - j / ratio) * weight[kept + i] + (j / ratio) * weight[kept + i + 1]`; past
    the last row the slope of the last two rows goes on. 77 rows become 20 + 57 * 4 = 248.

    DIFFERS: eq. (4) of the paper read literally would put row 5 at position 20; this is what the published code does
    (MitsuiChen14/LRSCLIP, `model/longclip.py`, `load_from_clip`), which made the published checkpoints.

    Args:
        weight (`torch.Tensor` of shape `(P, D)`): the table, floating point.
        kept_positions (`int`, defaults to 20): rows copied as they are, 0 to `P - 2`.
        stretch_ratio (`int`, defaults to 4): new rows for each later row; 1 returns a copy of the table.

    Returns:
        `torch.Tensor` of shape `(kept + (P - kept) * ratio, D)`, same dtype and device, computed in at least float32.

    Raises:
        `ValueError`: for a table that is not a floating-point matrix, or numbers outside the ranges above.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"The position table has shape {tuple(weight.shape)} and dtype {weight.dtype}; "
            "it must be a floating-point matrix of shape (positions, width)."
        )
    positions = weight.shape[0]
    if not isinstance(stretch_ratio, int) or stretch_ratio < 1:
        raise ValueError(f"stretch_ratio={stretch_ratio!r} must be a whole number of at least 1 (4 in the paper).")
    if not isinstance(kept_positions, int) or not 0 <= kept_positions <= positions - 2:
        raise ValueError(
            f"kept_positions={kept_positions!r} must be a whole number from 0 to {positions - 2}: interpolating a "
            f"table of {positions} positions takes at least two rows that are not kept (20 in the paper)."
        )

    table = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    kept, rest = table[:kept_positions], table[kept_positions:]  # (K, D), (R, D)
    following = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])  # (R, D), the last one extrapolated
    fraction = torch.arange(stretch_ratio, device=table.device, dtype=table.dtype) / stretch_ratio  # (ratio,)
    fraction = fraction[None, :, None]
    stretched = (1 - fraction) * rest[:, None] + fraction * following[:, None]  # (R, ratio, D)
    return torch.cat([kept, stretched.flatten(0, 1)]).to(weight.dtype)
