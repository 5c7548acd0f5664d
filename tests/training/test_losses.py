"""The loss against sums written out pair by pair, its gradients, and the weights of eq. (5)."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from training.losses import dual_text_loss, info_nce


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def slow_info_nce(images, texts, scale):
    """Eq. (1), term by term."""
    total = 0.0
    for i in range(len(images)):
        row = [math.exp(scale * float(images[i] @ texts[j])) for j in range(len(texts))]
        column = [math.exp(scale * float(texts[i] @ images[j])) for j in range(len(images))]
        total += math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    return -total / (2 * len(images))


def test_equals_the_sum_of_eq_1():
    images, texts = unit(7, 5), unit(7, 5, seed=1)
    got = info_nce(images, texts, torch.tensor(14.3))
    assert got.item() == pytest.approx(slow_info_nce(images, texts, 14.3), rel=1e-5)


def test_known_values():
    pairs = torch.eye(4)
    assert info_nce(pairs, pairs, torch.tensor(1000.0)).item() == pytest.approx(0.0)
    same = torch.ones(4, 2) / math.sqrt(2)  # nothing to tell apart
    assert info_nce(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(4), rel=1e-5)


def test_gradients_by_finite_differences():
    images, texts = unit(5, 3), unit(5, 3, seed=1)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    inputs = [images.clone().requires_grad_(), texts.clone().requires_grad_(), scale]
    info_nce(*inputs).backward()
    step = 1e-3  # the loss is computed in float32
    for value in inputs:
        flat, gradient = value.detach().reshape(-1), value.grad.reshape(-1)
        for position in range(flat.numel()):
            losses = []
            for sign in (1, -1):
                moved = [other.detach().clone() for other in inputs]
                which = next(k for k, other in enumerate(inputs) if other is value)
                moved[which].reshape(-1)[position] += sign * step
                losses.append(slow_info_nce(moved[0], moved[1], float(moved[2])))
            assert gradient[position].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=2e-4)


def test_half_precision_is_computed_in_float32():
    images, texts = unit(6, 8).bfloat16(), unit(6, 8, seed=1).bfloat16()
    assert torch.equal(
        info_nce(images, texts, torch.tensor(20.0)), info_nce(images.float(), texts.float(), torch.tensor(20.0))
    )


@pytest.mark.parametrize("weight", [0.0, 0.8, 1.0])
def test_dual_loss_weighs_long_against_short(weight):
    images, long, short = unit(6, 4).float(), unit(6, 4, seed=1).float(), unit(6, 4, seed=2).float()
    scale = torch.tensor(9.0)
    losses = dual_text_loss(images, long, short, scale, weight)
    assert losses.long_loss == info_nce(images, long, scale) and losses.short_loss == info_nce(images, short, scale)
    torch.testing.assert_close(losses.loss, weight * losses.long_loss + (1 - weight) * losses.short_loss)


def test_one_kind_of_text():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    scale = torch.tensor(9.0)
    assert dual_text_loss(images, texts, None, scale).loss == info_nce(images, texts, scale)
    assert dual_text_loss(images, None, texts, scale).loss == info_nce(images, texts, scale)


def test_errors():
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(5, 4\)"):
        info_nce(unit(6, 4), unit(5, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match="neither long nor short"):
        dual_text_loss(unit(6, 4), None, None, torch.tensor(1.0))
