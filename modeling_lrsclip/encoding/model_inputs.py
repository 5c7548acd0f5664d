"""
Texts and images to what a model takes in: rows of token ids, counted, cut, each once, hashed; and batches of pixel values,
prepared by worker processes where asked for.

Shapes: N texts, B images of a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..files.hashing import json_sha256
from ..image_processing_lrsclip import LRSCLIPImageProcessor, to_rgb


# -------------------------------------------------------------------------------------------------------------- texts


def encode_texts(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    """
    Token ids of texts, cleaned and without padding, start and end tokens included, cut at the tokenizer's length.

    Args:
        processor: an `LRSCLIPProcessor`, or any CLIP processor with a `tokenizer`.
        texts (sequence of N `str`).

    Returns:
        N rows of at most `tokenizer.model_max_length` ids.

    Raises:
        `ValueError`: for a single string in place of a sequence, or an entry that is not a string.
    """
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "encode_text"):
        return processor.encode_text(texts)
    return cut_tokens(_whole_rows(processor, texts), processor.tokenizer.model_max_length)


def token_lengths(processor: Any, texts: Sequence[str]) -> list[int]:
    """Numbers of tokens of whole texts, before anything is cut, start and end tokens included."""
    texts = _check_texts(texts)
    if not texts:
        return []
    if hasattr(processor, "count_tokens"):
        return processor.count_tokens(texts)
    return [len(row) for row in _whole_rows(processor, texts)]


def _whole_rows(processor: Any, texts: list[str]) -> list[list[int]]:
    """Token ids by a stock CLIP processor's tokenizer, uncut."""
    return processor.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: write [text].")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}] is {type(text).__name__} ({text!r:.60}); every text must be a string.")
    return texts


def cut_tokens(rows: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """
    Return rows of at most `max_tokens` ids: the first `max_tokens - 1`, and end-of-text put back as the last, as every
    CLIP tokenizer truncates. A row that is short enough is returned as it is.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}, must be at least 2: the start and the end token count.")
    return [row if len(row) <= max_tokens else row[: max_tokens - 1] + row[-1:] for row in rows]


def share_truncated(lengths: Sequence[int], max_tokens: int) -> float:
    """Share, from 0 to 1, of texts of these lengths ([`token_lengths`]) that are longer than `max_tokens` and lose their end."""
    return sum(length > max_tokens for length in lengths) / max(len(lengths), 1)


def text_positions(model: Any) -> int:
    """Number of tokens, start and end included, that the model's text position table holds: 77 or 248."""
    return model.config.text_config.max_position_embeddings


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Each row once, by falling length (what fails, fails first), and for every row given its index among those."""
    unique = sorted(dict.fromkeys(map(tuple, rows)), key=len, reverse=True)
    index_of = {row: index for index, row in enumerate(unique)}
    return unique, [index_of[tuple(row)] for row in rows]


def hash_rows(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 over token rows."""
    return json_sha256([list(row) for row in rows])


# ------------------------------------------------------------------------------------------------------------- images


class PixelBatcher:
    """
    Images to `pixel_values`, bit for bit as the image processor makes them, in about half of its time: resizes and crops
    in Pillow and looks the normalized values of the 256 levels up, where the processor turns every image into an array,
    a Pillow image, and an array of floats again. A processor with other steps than LRSCLIP's is called as it is.

    Args:
        processor: a model's image processor.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return `pixel_values` (B, 3, H, W) float32 of B images of any mode."""
        if self.levels is None or not all(isinstance(image, Image.Image) for image in images):
            return self.processor(images, return_tensors="pt")["pixel_values"]
        crop = self.processor.crop_size
        pixels = torch.empty(len(images), 3, crop["height"], crop["width"])
        for image, values in zip(images, pixels.numpy()):
            levels = np.asarray(self._cut(to_rgb(image)))  # (H, W, 3) uint8
            for channel, table in enumerate(self.levels):
                np.take(table, levels[..., channel], out=values[channel], mode="clip")
        return pixels

    def _cut(self, image: Image.Image) -> Image.Image:
        """The short side resized, the middle cropped; offsets as the processor's `center_crop` rounds them."""
        edge, crop = self.processor.size["shortest_edge"], self.processor.crop_size
        width, height = image.size
        short, long = min(width, height), max(width, height)
        other = int(edge * long / short)
        size = (edge, other) if width <= height else (other, edge)
        image = image.resize(size, resample=Image.Resampling(int(self.processor.resample)))
        left, top = round((size[0] - crop["width"]) / 2), round((size[1] - crop["height"]) / 2)
        return image.crop((left, top, left + crop["width"], top + crop["height"]))

    @cached_property
    def levels(self) -> np.ndarray | None:
        """Values (3, 256) float32 that the processor makes of each channel's levels 0 to 255; None: it has to be called."""
        processor = self.processor
        steps = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
        size, crop = dict(processor.size), processor.crop_size
        plain = type(processor) is LRSCLIPImageProcessor and all(getattr(processor, step) for step in steps)
        if not plain or not size.get("shortest_edge") or size["shortest_edge"] < max(crop["height"], crop["width"]):
            return None
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
        return processor([image], **options)["pixel_values"].reshape(3, 256).astype(np.float32)


class _PixelBatches(Dataset):
    """Batch i of the model's input; an image that cannot be read gives the error itself, which crosses processes."""

    def __init__(self, prepare: PixelBatcher, images: Sequence[Any], size: int):
        self.prepare, self.images, self.size = prepare, images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, number: int) -> Tensor | ValueError:
        try:
            return self.prepare(list(self.images[number * self.size : (number + 1) * self.size]))  # (B, 3, H, W)
        except ValueError as error:
            return error


def pixel_batches(
    prepare: PixelBatcher, images: Sequence[Any], size: int, workers: int, pin: bool = False
) -> Iterable[Callable[[], Tensor]]:
    """
    Functions that return the batches of `pixel_values`, in order; they raise what reading the images raised.

    Args:
        prepare: makes `pixel_values` of a list of images.
        images: can be cut into slices, as a list can.
        size: images a batch.
        workers: processes that prepare batches ahead; 0: each is prepared when its function is called.
        pin: in page-locked memory, from where a GPU fetches them faster; with workers only.

    Returns:
        A function a batch, that returns (B, 3, H, W) float32.
    """
    batches = _PixelBatches(prepare, images, size)
    if not workers:
        return [partial(_checked, batches, number) for number in range(len(batches))]
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin)
    return (partial(_checked, [batch], 0) for batch in loader)


def _checked(batches: Any, number: int) -> Tensor:
    batch = batches[number]
    if isinstance(batch, ValueError):
        raise batch
    return batch
