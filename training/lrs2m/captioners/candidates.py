"""The best of several candidate captions of an image, by a CLIP's similarity and its stability when the image turns."""

import threading
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts, load_encoder
from modeling_lrsclip.encoding.ties import best_first
from modeling_lrsclip.published.registry import resolve


_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def stable_scores(similarities: Tensor, stability: float = 1.0) -> Tensor:
    """
    Scores of candidate captions. An overhead image has no upright: a caption that fits should fit however it is turned.

    After RS5M (Zhang et al., arXiv:2306.11300), which ranks captions by similarity and by its deviation over rotated
    copies of the image. DIFFERS: one score in place of two rankings, so that one candidate is left.

    Args:
        similarities (R, N): cosine of each of R turns of an image and N candidates.
        stability: weight of the deviation.

    Returns:
        (N,): mean over the turns minus `stability` times the standard deviation.
    """
    return similarities.mean(dim=0) - stability * similarities.std(dim=0, unbiased=False)


def best_candidate(images: Tensor, candidates: Tensor, stability: float = 1.0) -> int:
    """
    Index of the candidate with the best [`stable_scores`]; of equal candidates the first, on every processor.

    Args:
        images: (R, D) unit embeddings of the turns of an image.
        candidates: (N, D) unit embeddings of its candidate captions.
        stability: weight of the deviation over the turns.

    Returns:
        `int`, 0 to N - 1.
    """
    similarities = images.double() @ candidates.double().T  # (R, N)
    return int(best_first(stable_scores(similarities, stability).numpy())[0])


class CandidateChooser:
    """
    Chooses among candidate captions; may be called from several threads.

    Args:
        model: CLIP or LRSCLIP: folder, Hub id, published checkpoint file or name, as `evaluation.run --model` takes
            it. What a candidate says beyond the model's positions does not count: prefer one of 248.
        rotations: quarter turns to look at, 1 (none) to 4.
        stability: as in [`stable_scores`].
        device: where the model runs; by default a GPU where there is one.

    Raises:
        `ValueError`: for a model that cannot be loaded.
    """

    def __init__(self, model: str | Encoder, rotations: int = 4, stability: float = 1.0, device: str | None = None):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = model if isinstance(model, Encoder) else load_encoder(resolve(model), device)
        self.rotations, self.stability = rotations, stability
        self._lock = threading.Lock()

    def __call__(self, image: Image.Image, texts: Sequence[str]) -> int:
        """Index of the best of `texts` for an image; of equal ones, the first."""
        turned = [image if turn is None else image.transpose(turn) for turn in _TURNS[: self.rotations]]
        model, processor = self.encoder.model, self.encoder.processor
        with self._lock:
            images = embed_images(model, processor, turned)  # (R, D)
            candidates = embed_texts(model, processor, list(texts))  # (N, D)
        return best_candidate(images, candidates, self.stability)
