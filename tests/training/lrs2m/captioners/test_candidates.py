"""The caption that fits best, and fits in every turn, is chosen."""

import pytest
import torch

from modeling_lrsclip.encoding import embed_images, embed_texts, load_encoder
from training.lrs2m.captioners.candidates import CandidateChooser, best_candidate, stable_scores


def test_similarity_and_stability_by_hand():
    similarities = torch.tensor([[0.30, 0.34, 0.20], [0.30, 0.22, 0.20]])  # (turns, candidates)
    # Means 0.30, 0.28, 0.20; deviations 0, 0.06, 0.
    assert torch.allclose(stable_scores(similarities), torch.tensor([0.30, 0.22, 0.20]))
    assert torch.allclose(stable_scores(similarities, 0.0), torch.tensor([0.30, 0.28, 0.20]))
    best_upright = torch.tensor([[0.30, 0.40], [0.30, 0.24]])
    assert stable_scores(best_upright, 0.0).argmax() == 1 and stable_scores(best_upright, 1.0).argmax() == 0


@pytest.mark.parametrize("turns", [1, 4])
def test_of_equal_candidates_the_first_is_chosen_on_every_processor(turns):
    images = torch.nn.functional.normalize(torch.randn(turns, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    best = torch.nn.functional.normalize(images.mean(dim=0), dim=0).double()
    worse = -best
    last_bits = best * (1 + 1e-15)  # a product that rounds the second of two equal captions up
    assert best_candidate(images, torch.stack([worse, best, last_bits, worse])) == 1
    assert best_candidate(images, torch.stack([last_bits, best])) == 0


@pytest.mark.parametrize("rotations", [1, 2, 4])
def test_a_checkpoint_chooses(tiny_checkpoint, images, long_texts, short_texts, rotations):
    chooser = CandidateChooser(str(tiny_checkpoint), rotations=rotations, device="cpu")
    encoder, texts = load_encoder(str(tiny_checkpoint)), long_texts + short_texts
    candidates = embed_texts(encoder.model, encoder.processor, texts)
    chosen = []
    for image in images:
        turned = [image.rotate(90 * quarter, expand=True) for quarter in range(rotations)]
        similarities = embed_images(encoder.model, encoder.processor, turned) @ candidates.T
        expected = similarities.mean(0) - similarities.std(0, unbiased=False)
        chosen.append(chooser(image, texts))
        assert chosen[-1] == expected.argmax()
    assert chooser(images[0], [texts[0], texts[0]]) == 0  # of equals, the first


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="nothing-here"):
        CandidateChooser(str(tmp_path / "nothing-here"), device="cpu")
