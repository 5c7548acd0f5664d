"""Recall of held-out pairs, by which a run knows its best model."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import Image

from evaluation.retrieval import evaluate_retrieval
from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.encoding import embed_images
from modeling_lrsclip.encoding.imagery import read_image

from .data.pairs import Pairs, check_row
from .data.rows import Row, text_list
from .data.skipped import SkippedFile, check_share, skipped_row
from .data.sources import DataConfig


class Validation:
    """
    Recall of held-out pairs, long and short texts each by themselves; rows that cannot be used are left out, named and
    capped as in training.

    Args:
        config: the `data` section.
        folder: of the run, where unusable rows are named.
        processor: of the model to come.
        pairs: held out.
        precision: of the arithmetic, by accelerate's name.
    """

    def __init__(self, config: DataConfig, folder: Path, processor: LRSCLIPProcessor, pairs: Pairs, precision: str):
        self.config, self.folder, self.processor, self.pairs = config, folder, processor, pairs
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.rows = min(len(pairs), config.validation_pairs or len(pairs))

    def __call__(self, model: LRSCLIPModel) -> dict[str, float]:
        """Measure recall in percent: `long_…` and `short_…`, as far as there are such texts, and their mean `mR`."""
        usable: list[Row] = []
        images = self._images(usable)
        image_embeds = embed_images(model, self.processor, images, dtype=self.dtype)  # (M, P), once for both texts
        numbers = {}
        for kind in self.pairs.kinds:
            texts_of_images = [text_list(getattr(row, kind)) for row in usable]
            pairs = [(text, index) for index, texts in enumerate(texts_of_images) for text in texts]
            texts, owners = map(list, zip(*pairs))
            recall = evaluate_retrieval(model, self.processor, image_embeds, texts, owners, dtype=self.dtype)
            numbers |= {f"{kind}_{name}": value for name, value in recall.items()}
        means = [value for name, value in numbers.items() if name.endswith("_mR")]
        return numbers | {"mR": statistics.fmean(means)}

    def _images(self, usable: list[Row]) -> Iterator[Image]:
        """The images that can be used; each one's row is appended to `usable`."""
        skipped = []
        for number in range(self.rows):
            row = self.pairs.read([number])[0]
            try:
                check_row(row, self.pairs.kinds)
                image = read_image(row.image)
            except ValueError as error:
                skipped.append(skipped_row(row, self.pairs.location(number), error))
                continue
            usable.append(row)
            yield image
        if skipped:
            SkippedFile(self.folder).add(skipped)
            check_share(len(skipped), self.rows, self.config.max_skipped_fraction, skipped[-1])
