"""
The texts of a step: cut into groups of like length, so that work grows with real tokens, and hashed to find equal ones.

Shapes: n texts (long and short ones together), L tokens.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad


# What a further group costs beside its tokens, in tokens of a text tower of width 512, forward and backward. On a CPU
# measured (75 to 90: kernels, small matrices, a gradient of the whole token table); on a GPU estimated from some 500
# kernels of 5 microseconds each at 300 TFLOP/s.
CPU_GROUP_COST, GPU_GROUP_COST = 80, 3000


class TextGroups(NamedTuple):
    """Token ids in groups `(n_g, L_g)`, whose rows one after the other, taken at `order` `(n,)`, are the n texts."""

    groups: list[torch.Tensor]
    order: torch.Tensor


def group_cost(device: torch.device, width: int) -> int:
    """Cost of a further group, in tokens of a text tower of that width: tokens cost as the width squared."""
    return round((CPU_GROUP_COST if device.type == "cpu" else GPU_GROUP_COST) * (512 / width) ** 2)


def as_they_come(matrices: list[torch.Tensor]) -> TextGroups:
    """Make each `(N, L)` matrix of token ids one group."""
    return TextGroups(matrices, torch.arange(sum(map(len, matrices))))


def group_by_length(
    matrices: list[torch.Tensor], end_of_text: int, *, rows: int | None = None, cost: int = 0, most: int | None = None
) -> TextGroups:
    """
    Group the texts of all matrices, longest first, each group padded to its longest text only. Texts of different matrices (long and short ones) share a group where their lengths meet.

    Args:
        matrices (`(N, L)` each): token ids; what follows the first end of text is dropped.
        end_of_text (`int`): its id.
        rows (`int`, *optional*): texts a group, the last one may have fewer; the number of groups is then the same for
            any texts. Without it, groups are cut where padded tokens + `cost` x groups are fewest.
        cost (`int`): what a group costs beside its tokens, in tokens.
        most (`int`, *optional*): groups at most; those whose texts are padded least by it are put together.

    Returns:
        the groups, and where in them each text is.
    """
    width = max(matrix.shape[1] for matrix in matrices)
    ids = torch.cat([pad(matrix, (0, width - matrix.shape[1]), value=end_of_text) for matrix in matrices])  # (n, L)
    lengths, by_length = token_lengths(ids, end_of_text).sort(descending=True, stable=True)
    cuts = list(range(rows, len(ids), rows)) if rows else _cheapest_cuts(lengths.numpy(), cost)
    while most is not None and len(cuts) >= most:
        starts, ends = [0, *cuts[:-1]], [*cuts[1:], len(ids)]
        padded = [
            (end - at) * int(lengths[start] - lengths[at]) for start, at, end in zip(starts, cuts, ends, strict=True)
        ]
        del cuts[padded.index(min(padded))]
    groups = [
        ids[texts][:, :longest]
        for texts, longest in zip(by_length.tensor_split(cuts), lengths[[0, *cuts]].tolist(), strict=True)
    ]
    return TextGroups(groups, by_length.argsort())


def token_lengths(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Count the tokens of each row `(n, L)` up to its first end of text; 1 for a row without, which the model refuses."""
    return (ids == end_of_text).int().argmax(dim=1) + 1


def _cheapest_cuts(lengths: np.ndarray, cost: int) -> list[int]:
    """Find where to cut rows of descending `lengths` `(n,)` so that padded tokens + `cost` x groups are fewest."""
    # Equal lengths stay together: bounds are the rows where the length changes, K + 1 of them.
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)]])
    longest = lengths[bounds[:-1]]  # (K,) of a group that starts there
    least, start = np.zeros(len(bounds), dtype=np.int64), np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        costs = least[:end] + (bounds[end] - bounds[:end]) * longest[:end] + cost  # by the start of the last group
        start[end] = costs.argmin()
        least[end] = costs[start[end]]
    cuts, end = [], start[-1]
    while end > 0:
        cuts.append(int(bounds[end]))
        end = start[end]
    return cuts[::-1]


def text_hashes(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Hash each row of token ids `(n, L)` up to its end of text; `(n,)` int64, whatever the padding and the process."""
    lengths = token_lengths(ids, end_of_text).tolist()
    digests = [
        hashlib.blake2b(row[:length].tobytes(), digest_size=8).digest() for row, length in zip(ids.numpy(), lengths)
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())


def share_of_identical(hashes: torch.Tensor) -> torch.Tensor:
    """Share, from 0 to 1, of texts that occur more than once, by their hashes `(n,)`; a scalar."""
    ordered = hashes.sort().values
    like_next = pad(ordered[1:] == ordered[:-1], (1, 1))  # (n + 1,)
    return (like_next[1:] | like_next[:-1]).float().mean()
