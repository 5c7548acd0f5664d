"""Of equal scores the first comes first, whatever a processor makes of their last bits."""

import numpy as np
import pytest

from modeling_lrsclip.encoding.ties import EMBEDDING_TIE, best_first


@pytest.mark.parametrize("noise", [0.0, 2.0**-52, 1e-7])
def test_equal_scores_stand_by_index(noise):
    scores = np.repeat([0.25, 0.5, 0.5, 0.25, 0.75, 0.25], 3) + noise * np.tile([0, 1, -1], 6)
    assert best_first(scores).tolist() == [12, 13, 14, *range(3, 9), *range(3), *range(9, 12), *range(15, 18)]


def test_scores_that_differ_stand_by_score():
    scores = np.random.default_rng(0).permutation(np.arange(200)) * 2 * EMBEDDING_TIE
    assert best_first(scores).tolist() == np.argsort(-scores).tolist()
    assert best_first(np.array([])).tolist() == [] and best_first(np.array([0.5], np.float32)).tolist() == [0]
