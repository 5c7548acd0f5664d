"""Rows of the data set from what the pipeline wrote: texts, their provenance and their lengths."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .checks.labels import label_scores
from .data_row import VERIFY_COLUMNS, Row, schema
from .pipeline import Written
from .recipe import Recipe, SourceConfig, resolve
from .routes import Text, Writer


# Columns taken as they are.
OF_RECORDS = ("id", "image_key", "short_texts", "class_name", "longitude", "latitude", "gsd")


class TokenCounter:
    """
    CLIP's tokens of texts, start and end included, as the processor counts them.

    Raises:
        `ValueError`: for a tokenizer that is not there.
    """

    def __init__(self, name: str, root: Path):
        from transformers import AutoTokenizer

        from modeling_lrsclip import auto_classes  # noqa: F401  # for the tokenizer of an LRSCLIP
        from modeling_lrsclip.processing_lrsclip import clean_text

        self.clean, path = clean_text, resolve(name, root)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
            self.tokenizer.backend_tokenizer.no_truncation()
            self.tokenizer.backend_tokenizer.no_padding()
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {name} is neither a folder nor a tokenizer of the Hub in reach.") from error

    def count(self, texts: Iterable[str]) -> list[int]:
        rows = self.tokenizer.backend_tokenizer.encode_batch_fast([self.clean(text) for text in texts])
        return [len(row) for row in rows]

    def count_one(self, text: str) -> int:
        return len(self.tokenizer.backend_tokenizer.encode(self.clean(text)))


class RowMaker:
    """Rows of one source."""

    def __init__(self, recipe: Recipe, source: SourceConfig, writer: Writer, counter: TokenCounter):
        self.recipe, self.source, self.writer, self.counter = recipe, source, writer, counter
        self.embed = (source.images or recipe.images) == "embed"

    def rows(self, batch: list[Written]) -> Iterator[Row]:
        if not batch:
            return
        long_tokens = self._tokens([one.long for one in batch])
        short_tokens = self._tokens([one.short for one in batch])
        for one, long_count, short_count in zip(batch, long_tokens, short_tokens, strict=True):
            row = self._row(one) | {"long_tokens": long_count, "short_tokens": short_count}
            yield {name: row[name] for name in schema().names}  # in one order, however a shard stores it

    def _tokens(self, texts: list[Text]) -> list[int]:
        """CLIP tokens of each text: those that its check has counted, the others counted together."""
        counted = iter(self.counter.count(text.text for text in texts if text.tokens is None))
        return [next(counted) if text.tokens is None else text.tokens for text in texts]

    def _row(self, one: Written) -> Row:
        record, picture = one.item.record, one.item.picture
        image = {"bytes": picture.content, "path": f"{record.id}{picture.suffix}"} if self.embed else None
        texts = {"long": one.long, "short": one.short}
        sampling = {which: text.sampling for which, text in texts.items() if text.sampling}
        scores = label_scores(one.long.text, one.item.labels, self.writer.classes)
        # As a parquet file keeps them, whatever the format of this one.
        precision, recall = (None if score is None else float(np.float32(score)) for score in scores)
        return {
            **{name: getattr(record, name) for name in OF_RECORDS},
            "image": image,
            "source": self.source.name,
            "licence": self.source.licence,
            "route": self.source.route,
            **{f"{which}_{name}": value for which, text in texts.items() for name, value in _columns(text).items()},
            "sampling": json.dumps(sampling) if sampling else None,
            "seed": self.recipe.seed,
            "short_words": len(one.short.text.split()),
            "image_sha256": picture.sha256,
            "width": picture.size[0],
            "height": picture.size[1],
            "anchors": self.writer.anchors(one.item),
            "label_precision": precision,
            "label_recall": recall,
            **dict.fromkeys(VERIFY_COLUMNS),
            "warnings": [f"{which}: {name}" for which, text in texts.items() for name in text.warnings],
        }


def _columns(text: Text) -> dict[str, Any]:
    prompt, prompt_hash = (text.prompt.id, text.prompt.hash) if text.prompt else (None, None)
    return {"text": text.text, "captioner": text.captioner, "prompt": prompt, "prompt_hash": prompt_hash}
