"""
Scores that count as equal. A matrix product gives equal columns different last bits, depending on the processor, the
shape and the number of threads, so ties are decided within a tolerance and then by index.
"""

import numpy as np


# Two scores of unit embeddings, summed in float64, tie when they are no further apart: the step of float32 below 1.
# Equal embeddings come within 1e-15 of each other, whatever the processor.
SCORE_TIE = 2.0**-24
# The embeddings of equal images may themselves differ by 1e-7 where one was encoded in a smaller batch.
EMBEDDING_TIE = 1e-6


def best_first(scores: np.ndarray, tie: float = EMBEDDING_TIE) -> np.ndarray:
    """
    Indices by falling score; of equal scores the lower index comes first, on every processor.

    Args:
        scores: (N,) similarities.
        tie: neighbours in the order that are no further apart count as equal.

    Returns:
        (N,) int64.
    """
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, kind="stable")
    group = np.concatenate([np.zeros(min(1, len(order)), int), np.cumsum(-np.diff(scores[order]) > tie)])
    return order[np.lexsort((order, group))]
