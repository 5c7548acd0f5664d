"""
Text-image retrieval: ranks, recall and the tasks ZCRL (long texts) and ZCRS (short texts).

Shapes: M images, N texts, D width of the shared space.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from modeling_lrsclip.encoding.model_inputs import cut_tokens, encode_texts, share_truncated, token_lengths
from modeling_lrsclip.encoding.ties import SCORE_TIE, best_first

from .benchmarks.retrieval_data import RetrievalData, find_sources, load_retrieval
from .bootstrap import KS


BLOCK_BYTES = 16 * 2**20  # of scores held at once; larger blocks leave the cache of a CPU
TOKEN_BIN = 10  # tokens a bar of the histogram of text lengths
LAST_BAR = 2000  # tokens from which on all texts are in the histogram's last bar
LONGEST_EXAMPLE = 3000  # characters of a text that the gallery shows
EXAMPLES, SHOWN_IMAGES = 4, 5  # queries of the gallery, and images shown for each


# -------------------------------------------------------------------------------------------------------------- ranks


class RetrievalRanks(NamedTuple):
    """Numbers of wrong candidates that score at least as well as the right one: 0 is a hit at the first place."""

    text_to_image: Tensor  # (N,) int64, per text
    image_to_text: Tensor  # (M,) int64, per image: rank of the best of its own texts


def retrieval_ranks(
    image_embeds: Any, text_embeds: Any, text_to_image: Any, block_bytes: int = BLOCK_BYTES
) -> RetrievalRanks:
    """
    Ranks of the right candidates by dot product, without the full (N, M) matrix of scores.

    Ties count against the model: a wrong candidate with the very score of the right one stands before it. An image's
    own further texts never count against it. Scores are summed in float64 and tie within `SCORE_TIE`, so that equal
    embeddings tie wherever they stand in a block, on every processor, and the result does not depend on the block's size.

    Args:
        image_embeds: (M, D) tensor or array, unit rows.
        text_embeds: (N, D) tensor or array, unit rows.
        text_to_image: (N,) integers, index of the image that text j describes; every image needs a text.
        block_bytes: memory for the scores of one block of texts.

    Returns:
        [`RetrievalRanks`] of the N texts and the M images.

    Raises:
        `ValueError`: for shapes that do not fit, values that are not finite, indices out of range, an image
            without a text.
    """
    images, texts = check_embeddings({"image_embeds": image_embeds, "text_embeds": text_embeds})
    own_image = check_indices("text_to_image", text_to_image, len(texts), len(images), "text", "image")
    bare = (torch.bincount(own_image, minlength=len(images)) == 0).nonzero().flatten()
    if len(bare):
        raise ValueError(f"{len(bare)} of {len(images)} images have no text in text_to_image, first: image {bare[0]}.")
    images, own_image = images.double(), own_image.to(images.device)
    size = max(1, block_bytes // (8 * len(images)))
    blocks = [slice(start, start + size) for start in range(0, len(texts), size)]
    right = torch.cat([(texts[rows].double() * images[own_image[rows]]).sum(dim=1) for rows in blocks])  # (N,)
    best_right = torch.full((len(images),), -math.inf, dtype=right.dtype, device=images.device)
    best_right.scatter_reduce_(0, own_image, right, "amax")  # (M,) score of each image with the best of its texts
    text_ranks, image_ranks = [], torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for rows in blocks:
        scores = texts[rows].double() @ images.T  # (block, M)
        scores.scatter_(1, own_image[rows, None], -math.inf)  # the right pairs do not compete
        text_ranks.append((scores >= right[rows, None] - SCORE_TIE).sum(dim=1))  # (block,)
        image_ranks += (scores >= best_right - SCORE_TIE).sum(dim=0)  # (M,)
    return RetrievalRanks(torch.cat(text_ranks).cpu(), image_ranks.cpu())


def recall_at(ranks: Tensor, k: int) -> float:
    """Percent of the ranks that are below `k`."""
    return 100 * (ranks < k).sum().item() / len(ranks)


def recall_from_ranks(ranks: RetrievalRanks, ks: Sequence[int] = KS) -> dict[str, float]:
    """`text_to_image_R@k` and `image_to_text_R@k` for every k, and `mR`, their mean; all in percent."""
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"ks={ks!r} must be positive whole numbers, for example {KS}.")
    recall = {f"text_to_image_R@{k}": recall_at(ranks.text_to_image, k) for k in ks}
    recall |= {f"image_to_text_R@{k}": recall_at(ranks.image_to_text, k) for k in ks}
    return recall | {"mR": sum(recall.values()) / len(recall)}


def retrieval_recall(
    image_embeds: Any, text_embeds: Any, text_to_image: Any, ks: Sequence[int] = KS
) -> dict[str, float]:
    """
    Recall at k in both directions (paper, V-B 1). Image to text counts a hit if any of the image's texts is among the
    first k. Equal to `LAION-AI/CLIP_benchmark` (`metrics/zeroshot_retrieval.py`) where there are no ties; ties count
    against the model here, while there the order of the rows decides.

    Args:
        image_embeds: (M, D) tensor or array, unit rows.
        text_embeds: (N, D) tensor or array, unit rows.
        text_to_image: (N,) integers, index of the image that text j describes.
        ks: places that count as a hit.

    Returns:
        `dict`: `text_to_image_R@k`, `image_to_text_R@k` for every k, and `mR`, the mean of them all, in percent.

    Raises:
        `ValueError`: as [`retrieval_ranks`].
    """
    return recall_from_ranks(retrieval_ranks(image_embeds, text_embeds, text_to_image), ks)


def check_embeddings(embeds: dict[str, Any], least: Sequence[int] = (1, 1)) -> tuple[Tensor, ...]:
    """
    Return embeddings as tensors on the device of the first, after a look at their shapes and values.

    Args:
        embeds: (n, D) tensors or arrays by the name that an error calls them.
        least: rows that each must have.

    Returns:
        (n, D) each, in the order given.

    Raises:
        `ValueError`: for other shapes, unequal widths, and values that are not finite.
    """
    tensors = [torch.as_tensor(value) for value in embeds.values()]
    for name, value, rows in zip(embeds, tensors, least, strict=True):
        if value.ndim != 2 or len(value) < rows:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted (n, D) with n of at least {rows}.")
        if not value.isfinite().all():
            bad = (~value.isfinite().all(dim=1)).nonzero().flatten()
            raise ValueError(f"{name} has NaN or infinite values in {len(bad)} of {len(value)} rows, first: {bad[0]}.")
    names, widths = list(embeds), [value.shape[1] for value in tensors]
    if len(set(widths)) > 1:
        raise ValueError(f"{names[0]} are {widths[0]} wide, {names[1]} {widths[1]}; must be equal.")
    return tuple(value.to(tensors[0].device) for value in tensors)


def check_indices(name: str, indices: Any, count: int, choices: int, item: str, choice: str) -> Tensor:
    """
    Return indices of what each item belongs to as a tensor, after a look at their number, type and range.

    Args:
        name: the argument, for the error.
        indices: (count,) integers, tensor or array.
        count: items.
        choices: what there is to belong to; an index is from 0 to `choices - 1`.
        item, choice: one of the items and of the choices, for the error: `text` and `image`.

    Returns:
        (count,) int64.

    Raises:
        `ValueError`: for another shape, another type, or an index out of range.
    """
    values = torch.as_tensor(indices)
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {count} {choice} indices, one {'an' if item[0] in 'aeiou' else 'a'} {item}; got shape "
            f"{tuple(values.shape)} of {str(values.dtype).removeprefix('torch.')}."
        )
    outside = ((values < 0) | (values >= choices)).nonzero().flatten()
    if len(outside):
        plural = f"{choice}es" if choice.endswith("s") else f"{choice}s"
        raise ValueError(
            f"{name}[{outside[0]}] is {values[outside[0]]}; with {choices} {plural} it must be from 0 to {choices - 1}."
        )
    return values.long()


def evaluate_retrieval(
    model: Any,
    processor: Any,
    images: Any,
    texts: Sequence[str],
    text_to_image: Sequence[int],
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """
    Recall of a model in one call, for validation while it trains; the model's training state is left as found.

    Args:
        images: M PIL images, or their (M, D) unit embeddings.
        texts: N texts, or their (N, D) unit embeddings.
        text_to_image: (N,) index of the image that text j describes.

    Returns:
        `dict`: as [`retrieval_recall`].
    """
    if not isinstance(images, Tensor):
        images = embed_images(model, processor, images, batch_size, dtype)
    if not isinstance(texts, Tensor):
        texts = embed_texts(model, processor, texts, batch_size, dtype=dtype)
    return retrieval_recall(images, texts, text_to_image)


# -------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class RetrievalTask:
    """Retrieval: loads texts of one kind with their images, and measures a model on them."""

    text_column: str  # `long_text` or `short_text`
    tokens_kept: Sequence[int] = ()  # text lengths for the curve of recall, in tokens; none: no curve
    columns: Mapping[str, str] | None = None  # names of the user's own, see [`load_retrieval`]

    def find_sources(self, path: str) -> list[str]:
        return find_sources(path, self.text_column, self.columns)

    def load(self, source: str, allow_missing: int = 0) -> RetrievalData:
        return load_retrieval(source, self.text_column, allow_missing, self.columns)

    def evaluate(self, encoder: Encoder, data: RetrievalData) -> dict[str, Any]:
        """
        Measures one model.

        Returns:
            `dict`: ready for JSON: `metrics`, `share_truncated` (0 to 1), `tokens`, `ranks`, `curve`, `examples`, ….
        """
        image_embeds, image_seconds = encoder.images(data.images)  # (M, D)
        rows = encode_texts(encoder.processor, data.texts)
        text_embeds, text_seconds = encoder.texts(rows)  # (N, D)
        ranks = retrieval_ranks(image_embeds, text_embeds, data.text_to_image)
        lengths = token_lengths(encoder.processor, data.texts)
        histogram = torch.bincount(torch.tensor(lengths).clamp(max=LAST_BAR) // TOKEN_BIN).tolist()
        result = {
            "metrics": recall_from_ranks(ranks),
            "images": len(data.images),
            "texts": len(data.texts),
            "data": data.describe(),
            "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths), "histogram": histogram},
            "share_truncated": share_truncated(lengths, encoder.positions),
            "seconds": {"images": image_seconds, "texts": text_seconds},
            "images_sha256": data.images.content_hash,
            "texts_sha256": data.texts_hash,
            "image_of_text": list(data.text_to_image),
            "ranks": {"text_to_image": ranks.text_to_image.tolist(), "image_to_text": ranks.image_to_text.tolist()},
            "examples": _examples(encoder, image_embeds, text_embeds, data, ranks),
        }
        if self.tokens_kept:
            result["curve"] = tokens_curve(encoder, data, rows, image_embeds, text_embeds, self.tokens_kept)
        return result


def tokens_curve(
    encoder: Encoder,
    data: RetrievalData,
    rows: Sequence[list[int]],
    image_embeds: Tensor,
    text_embeds: Tensor,
    tokens_kept: Sequence[int],
) -> list[dict[str, float]]:
    """
    Recall when only the first tokens of each text are kept (paper, Fig. 3): token ids are cut, end-of-text put back.

    Args:
        rows: N token rows, as long as the tokenizer lets them be.
        image_embeds, text_embeds: (M, D), (N, D) embeddings with all the tokens the model takes.
        tokens_kept: lengths, start and end tokens included; those beyond the model's positions are left out, its
            number of positions is always the last point.

    Returns:
        `list` of `{"tokens": …, "text_to_image_R@1": …, …}`, by rising length.
    """
    curve = []
    for kept in sorted({kept for kept in tokens_kept if kept < encoder.positions} | {encoder.positions}):
        changed = [index for index, row in enumerate(rows) if len(row) > kept]
        embeds = text_embeds
        if changed and kept < encoder.positions:
            embeds = text_embeds.clone()
            embeds[changed] = encoder.texts(cut_tokens([rows[index] for index in changed], kept)).embeds
        curve.append({"tokens": kept} | retrieval_recall(image_embeds, embeds, data.text_to_image))
    return curve


def spread_evenly(count: int) -> list[int]:
    """Indices of a few queries, `EXAMPLES` at most, spread evenly over all."""
    shown = min(EXAMPLES, count)
    return [int((position + 0.5) * count / shown) for position in range(shown)]


def shorten(text: str) -> str:
    """Return the text as the gallery shows it: a word of a million characters takes minutes to draw."""
    return text if len(text) <= LONGEST_EXAMPLE else f"{text[:LONGEST_EXAMPLE]} …"


def _examples(
    encoder: Encoder, image_embeds: Tensor, text_embeds: Tensor, data: RetrievalData, ranks: RetrievalRanks
) -> list[dict[str, Any]]:
    """Queries spread evenly over the texts, not picked, with the images found for each: what the gallery shows."""
    indices = spread_evenly(len(data.texts))
    scores = (text_embeds[indices].double() @ image_embeds.double().T).numpy()  # (count, M)
    nearest = [best_first(row)[:SHOWN_IMAGES] for row in scores]
    examples = []
    for position, index in enumerate(indices):
        text, rank = shorten(data.texts[index]), ranks.text_to_image[index].item()
        lengths = [length - 2 for length in token_lengths(encoder.processor, text.split())]  # BPE keeps to words
        up_to_word = list(itertools.accumulate(lengths))
        example = {"text": text, "word_tokens": up_to_word, "image": data.text_to_image[index], "rank": rank}
        examples.append(example | {"found": nearest[position].tolist()})
    return examples
