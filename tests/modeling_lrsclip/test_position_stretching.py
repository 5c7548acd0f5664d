"""`stretch_position_embedding` against the published formula, written out position by position."""

import pytest
import torch

from modeling_lrsclip import stretch_position_embedding


def slow_reference(weight: torch.Tensor, kept: int, ratio: int) -> torch.Tensor:
    """Row by row, in Python: new row `kept + ratio * i + j` lies j / ratio of the way from row i to row i + 1."""
    positions = weight.shape[0]
    rows = [weight[p] for p in range(kept)]
    for p in range(kept, positions):
        slope = weight[p + 1] - weight[p] if p + 1 < positions else weight[p] - weight[p - 1]
        rows += [weight[p] + slope * j / ratio for j in range(ratio)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("positions", "kept", "ratio", "length"),
    [
        (77, 20, 4, 248),
        (77, 20, 5, 305),
        (77, 10, 7, 479),
        (77, 0, 2, 154),
        (77, 75, 3, 81),
        (32, 8, 4, 104),
        (77, 20, 1, 77),
    ],
)
def test_equals_the_formula(positions, kept, ratio, length):
    weight = torch.randn(positions, 6, generator=torch.Generator().manual_seed(0))
    stretched = stretch_position_embedding(weight, kept, ratio)
    assert stretched.shape == (length, 6)
    torch.testing.assert_close(stretched, slow_reference(weight, kept, ratio), atol=1e-6, rtol=1e-6)
    assert torch.equal(stretched[:kept], weight[:kept])
    assert torch.equal(stretched[kept::ratio], weight[kept:])  # CLIP's own rows are all still there


def test_77_positions_become_those_of_the_paper():
    """The published numbers are what is done where none is given."""
    weight = torch.randn(77, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stretch_position_embedding(weight), stretch_position_embedding(weight, 20, 4))


def test_the_last_block_extrapolates():
    weight = torch.arange(77.0)[:, None]  # a straight line stays straight past its end
    stretched = stretch_position_embedding(weight)
    assert stretched[-4:, 0].tolist() == [76.0, 76.25, 76.5, 76.75]


def test_ratio_one_is_a_copy():
    weight = torch.randn(77, 4)
    stretched = stretch_position_embedding(weight, stretch_ratio=1)
    assert torch.equal(stretched, weight) and stretched.data_ptr() != weight.data_ptr()


def test_half_precision_is_computed_in_float32():
    weight = torch.randn(77, 4)
    stretched = stretch_position_embedding(weight.bfloat16())
    assert stretched.dtype == torch.bfloat16
    assert torch.equal(stretched, stretch_position_embedding(weight.bfloat16().float()).bfloat16())


@pytest.mark.parametrize(
    ("weight", "kept", "ratio", "message"),
    [
        (torch.zeros(77), 20, 4, "shape \\(77,\\)"),
        (torch.zeros(77, 4, dtype=torch.long), 20, 4, "int64"),
        (torch.zeros(77, 4), 76, 4, "from 0 to 75"),
        (torch.zeros(77, 4), -1, 4, "from 0 to 75"),
        (torch.zeros(77, 4), 20, 0, "at least 1"),
        (torch.zeros(77, 4), 20, 2.5, "whole number"),
    ],
)
def test_impossible_values(weight, kept, ratio, message):
    with pytest.raises(ValueError, match=message):
        stretch_position_embedding(weight, kept, ratio)
