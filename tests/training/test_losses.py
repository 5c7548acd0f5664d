"""The loss against sums written out pair by pair, its gradients, its options, and the weights of eq. (5)."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from training.config import Curriculum, LossConfig
from training.losses import dual_text_loss, info_nce, principal_components


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def slow_info_nce(images, texts, scale, label_smoothing=0.0, captions=None):
    """Eq. (1), term by term, in float64."""
    pairs = range(len(images))
    total = 0.0
    for i in pairs:
        candidates = [j for j in pairs if captions is None or j == i or captions[j] != captions[i]]
        for one, others in ((images[i], texts), (texts[i], images)):
            logits = {j: scale * float(one @ others[j]) for j in candidates}
            log_sum = math.log(sum(math.exp(logit) for logit in logits.values()))
            smoothed = sum(logits.values()) / len(logits)
            total += (1 - label_smoothing) * (logits[i] - log_sum) + label_smoothing * (smoothed - log_sum)
    return -total / (2 * len(images))


def gradients(loss_of, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    loss = loss_of(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def test_equals_the_sum_of_eq_1():
    images, texts = unit(7, 5), unit(7, 5, seed=1)
    got = info_nce(images, texts, torch.tensor(14.3))
    assert got.item() == pytest.approx(slow_info_nce(images, texts, 14.3), rel=1e-5)


def test_known_values():
    pairs = torch.eye(4)
    assert info_nce(pairs, pairs, torch.tensor(1000.0)).item() == pytest.approx(0.0)
    same = torch.ones(4, 2) / math.sqrt(2)  # nothing to tell apart
    assert info_nce(same, same, torch.tensor(50.0)).item() == pytest.approx(math.log(4), rel=1e-5)


CAPTIONS = torch.tensor([4, 1, 2, 2, 3, 2, -5, 4, 6])


class TestOptions:
    @pytest.mark.parametrize("captions", [None, CAPTIONS])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("chunk_size", [None, 1, 4, 9, 50])
    def test_value_and_gradients(self, chunk_size, label_smoothing, captions):
        images, texts, scale = unit(9, 5), unit(9, 5, seed=1), torch.tensor(14.3, dtype=torch.float64)

        def loss_of(*inputs):
            return info_nce(*inputs, chunk_size, label_smoothing=label_smoothing, text_hashes=captions)

        expected = slow_info_nce(images, texts, 14.3, label_smoothing, captions)
        assert loss_of(images, texts, scale).item() == pytest.approx(expected, rel=1e-12)
        inputs = [value.requires_grad_() for value in (images, texts, scale)]
        assert torch.autograd.gradcheck(loss_of, inputs)

    def test_chunked_equals_dense_in_float32(self):
        images = unit(300, 64).float()
        texts = normalize(images + 0.1 * unit(300, 64, seed=1).float(), dim=-1)
        scale = torch.tensor(100.0)
        loss, dense = gradients(info_nce, images, texts, scale)
        for chunk_size in (7, 100, 300):
            chunked_loss, chunked = gradients(
                lambda *inputs: info_nce(*inputs, chunk_size),  # noqa: B023
                images,
                texts,
                scale,
            )
            torch.testing.assert_close(chunked_loss, loss, atol=1e-5, rtol=1e-5)
            for got, expected in zip(chunked, dense):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_logits_that_overflow_exp(self):
        images, texts = unit(6, 4).float(), unit(6, 4, seed=1).float()
        for scale in (1e4, 1e-3):
            loss, dense = gradients(info_nce, images, texts, torch.tensor(scale))
            chunked_loss, chunked = gradients(lambda *inputs: info_nce(*inputs, 2), images, texts, torch.tensor(scale))
            torch.testing.assert_close(chunked_loss, loss)
            for got, expected in zip(chunked, dense):
                torch.testing.assert_close(got, expected)

    def test_a_column_whose_first_chunk_is_all_excluded(self):
        images, texts, captions = unit(3, 4), unit(3, 4, seed=1), torch.tensor([0, 0, 1])
        got = info_nce(images, texts, torch.tensor(9.0), 1, text_hashes=captions)
        assert got.item() == pytest.approx(slow_info_nce(images, texts, 9.0, captions=captions), rel=1e-12)

    def test_identical_captions_are_no_negatives(self):
        images, text = unit(4, 6).float(), unit(1, 6, seed=1).float().expand(4, 6)
        all_alike = torch.zeros(4, dtype=torch.int64)
        assert info_nce(images, text, torch.tensor(30.0), text_hashes=all_alike).item() == 0.0
        assert info_nce(images, text, torch.tensor(30.0)).item() > 0.5

    def test_memory_grows_with_the_chunk(self):
        sizes = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                sizes.extend(value.numel() for value in [out] if isinstance(value, torch.Tensor))
                return out

        with Sizes():
            gradients(lambda *inputs: info_nce(*inputs, 16), unit(256, 8), unit(256, 8), torch.tensor(9.0))
        assert max(sizes) <= 2 * 16 * 256

    @pytest.mark.parametrize("chunk_size", [None, 4])
    def test_autocast_changes_nothing(self, chunk_size):
        inputs = [unit(9, 5).float(), unit(9, 5, seed=1).float(), torch.tensor(20.0)]
        inputs = [value.requires_grad_() for value in inputs]
        losses = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                losses.append(info_nce(*inputs, chunk_size))
        assert losses[0] == losses[1]
        outside, inside = (torch.autograd.grad(loss, inputs) for loss in losses)
        assert all(torch.equal(a, b) for a, b in zip(outside, inside))


def svd_rebuilt(x, rank):
    """The components as Long-CLIP computes them, differentiated by autograd."""
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    kept = directions[:rank].T
    return (x - mean) @ kept @ kept.T + mean


class TestPrincipalComponents:
    @pytest.mark.parametrize(("rows", "rank"), [(40, 1), (40, 4), (40, 11), (8, 3)])
    def test_equals_the_singular_vectors_and_their_gradient(self, rows, rank):
        x, weights = unit(rows, 12), unit(rows, 12, seed=1)
        value, (gradient,) = gradients(lambda x: (principal_components(x, rank) * weights).sum(), x)
        expected, (theirs,) = gradients(lambda x: (svd_rebuilt(x, rank) * weights).sum(), x)
        torch.testing.assert_close(principal_components(x, rank), svd_rebuilt(x, rank))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, theirs)
        assert torch.autograd.gradcheck(lambda x: principal_components(x, rank), x.requires_grad_())

    @pytest.mark.parametrize("scale", [1e-5, 1e5])
    def test_gradient_is_the_same_at_every_scale(self, scale):
        x, weights = unit(20, 12), unit(20, 12, seed=1)
        both = [gradients(lambda x: (principal_components(x, 4) * weights).sum(), x * s)[1][0] for s in (1, scale)]
        torch.testing.assert_close(*both)

    def test_no_fewer_components_than_there_are(self):
        x, weights = unit(5, 12).float(), unit(5, 12, seed=1).float()
        for rank in (4, 12, 32):
            _, (gradient,) = gradients(lambda x: (principal_components(x, rank) * weights).sum(), x)  # noqa: B023
            torch.testing.assert_close(principal_components(x, rank), x)
            torch.testing.assert_close(gradient, weights)
        assert principal_components(x, 2).dtype == torch.float32

    def test_gradient_is_finite_for_equal_variances(self):
        x = torch.eye(8, 12, dtype=torch.float64)
        weights = unit(8, 12)
        _, (gradient,) = gradients(lambda x: (principal_components(x, 3) * weights).sum(), x)
        assert gradient.isfinite().all()
        _, (theirs,) = gradients(lambda x: (svd_rebuilt(x, 3) * weights).sum(), x)
        assert not theirs.isfinite().all()
        same = torch.ones(6, 4, dtype=torch.float64)
        _, (gradient,) = gradients(lambda x: principal_components(x, 2).sum(), same)
        torch.testing.assert_close(gradient, torch.ones_like(same))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"shape \(6,\) and rank 2"):
            principal_components(torch.ones(6), 2)
        with pytest.raises(ValueError, match="rank 0; give"):
            principal_components(unit(6, 4), 0)


def test_half_precision_is_computed_in_float32():
    images, texts = unit(6, 8).bfloat16(), unit(6, 8, seed=1).bfloat16()
    assert torch.equal(
        info_nce(images, texts, torch.tensor(20.0)), info_nce(images.float(), texts.float(), torch.tensor(20.0))
    )


@pytest.mark.parametrize("weight", [0.0, 0.8, 1.0])
def test_dual_loss_weighs_long_against_short(weight):
    images, long, short = unit(6, 4).float(), unit(6, 4, seed=1).float(), unit(6, 4, seed=2).float()
    scale = torch.tensor(9.0)
    losses = dual_text_loss(images, long, short, scale, LossConfig(long_weight=weight))
    assert losses.long_loss == info_nce(images, long, scale) and losses.short_loss == info_nce(images, short, scale)
    torch.testing.assert_close(losses.loss, weight * losses.long_loss + (1 - weight) * losses.short_loss)


def test_a_curriculum_moves_along_half_a_cosine():
    """At hand-counted points: 0.9 for a fifth of the run, then down to 0.1, where the last two fifths stay."""
    curriculum = Curriculum(start=0.9, end=0.1, start_share=0.2, end_share=0.4)
    expected = {0: 0.9, 0.19: 0.9, 0.2: 0.9, 0.3: 0.5 + 0.4 * 0.5**0.5, 0.4: 0.5, 0.6: 0.1, 0.8: 0.1, 1: 0.1}
    for share, weight in expected.items():
        assert curriculum.at(share) == pytest.approx(weight), share
    weights = [Curriculum(start=0.2, end=0.98).at(step / 50) for step in range(51)]
    assert weights == sorted(weights) and weights[0] == 0.2 and weights[-1] == 0.98
    jump = Curriculum(start=1, end=0, start_share=0.5, end_share=0.5)
    assert [jump.at(share) for share in (0, 0.49, 0.5, 1)] == [1, 1, 0, 0]
    assert Curriculum(start=0.3, end=0.7, start_share=0, end_share=0).at(0) == 0.3


def test_the_loss_of_a_moment_has_its_weight():
    images, long, short, scale = unit(6, 4), unit(6, 4, seed=1), unit(6, 4, seed=2), torch.tensor(9.0)
    config = LossConfig(long_weight={"start": 0.9, "end": 0.1}, chunk_size=4)
    assert isinstance(config.long_weight, Curriculum) and config.kinds == ["long", "short"]
    for share, weight in ((0.0, 0.9), (0.5, 0.5), (1.0, 0.1)):
        now = config.at(share)
        assert now.chunk_size == 4 and now.long_weight == pytest.approx(weight)
        losses = dual_text_loss(images, long, short, scale, now)
        torch.testing.assert_close(losses.loss, weight * losses.long_loss + (1 - weight) * losses.short_loss)
    constant = LossConfig(long_weight=0.3)
    assert constant.at(0.7) is constant
    assert LossConfig(long_weight={"start": 1, "end": 1}).kinds == ["long"]
    assert LossConfig(long_weight={"start": 1, "end": 0}).kinds == ["long", "short"]


def test_dual_loss_reads_its_options():
    images, long, short, scale = unit(6, 4), unit(6, 4, seed=1), unit(6, 4, seed=2), torch.tensor(9.0)
    long_captions, short_captions = torch.tensor([0, 1, 2, 3, 4, 4]), torch.tensor([0, 0, 0, 1, 2, 3])
    config = LossConfig(pcm_rank=2, label_smoothing=0.1, mask_identical_captions=True, chunk_size=4)
    losses = dual_text_loss(images, long, short, scale, config, long_captions, short_captions)
    primary = svd_rebuilt(images, 2)
    assert losses.long_loss.item() == pytest.approx(slow_info_nce(images, long, 9.0, 0.1, long_captions))
    assert losses.short_loss.item() == pytest.approx(slow_info_nce(primary, short, 9.0, 0.1, short_captions))
    unmasked = dual_text_loss(images, long, short, scale, LossConfig(), long_captions, short_captions)
    assert unmasked.short_loss == info_nce(images, short, scale)


def test_one_kind_of_text():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    scale = torch.tensor(9.0)
    assert dual_text_loss(images, texts, None, scale, LossConfig()).loss == info_nce(images, texts, scale)
    assert dual_text_loss(images, None, texts, scale, LossConfig()).loss == info_nce(images, texts, scale)


def test_errors():
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(5, 4\)"):
        info_nce(unit(6, 4), unit(5, 4), torch.tensor(1.0))
    with pytest.raises(ValueError, match="chunk_size is 0; give 1 row or more"):
        info_nce(unit(6, 4), unit(6, 4), torch.tensor(1.0), 0)
    with pytest.raises(ValueError, match="neither long nor short"):
        dual_text_loss(unit(6, 4), None, None, torch.tensor(1.0), LossConfig())
    with pytest.raises(ValueError, match="leaves one of the two texts out"):
        LossConfig(short_text="first_sentence", long_weight=1.0)
