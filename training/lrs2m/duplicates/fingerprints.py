"""
Fingerprints of images: what is left of one after JPEG, another size, a turn or a crop, in a kilobyte.

N images, S = 32 pixels a side of a thumbnail, K = 8 frequencies a direction, P = 25 parts of an image.
"""

import cv2
import numpy as np
from PIL import Image

from modeling_lrsclip.image_processing_lrsclip import to_rgb


SIDE, LOW = 32, 8
# Parts of an image as (start, length) of its rows and of its columns, every pair of them; the first is the whole. A
# crop that keeps 80 % or more of each side lies close enough to one of them to be a candidate.
WINDOWS = ((0.0, 1.0), (0.0, 0.87), (0.065, 0.87), (0.13, 0.87), (0.1, 0.8))
PARTS = tuple((rows, columns) for rows in WINDOWS for columns in WINDOWS)
# (transposed, rows reversed, columns reversed), in this order, and what that is called.
TURNS = {
    "": (False, False, False),
    "mirrored left to right": (False, False, True),
    "mirrored top to bottom": (False, True, False),
    "turned by 180": (False, True, True),
    "mirrored along the diagonal": (True, False, False),
    "turned by 90 clockwise": (True, False, True),
    "turned by 90 counterclockwise": (True, True, False),
    "mirrored along the other diagonal": (True, True, True),
}
# Low frequencies that are 0 of an image with stripes or a mirror axis come out as up to 0.06, in another way for every
# processor and number of thumbnails; a frequency this little above the median does not count as above it.
NOISE = 0.25
FLAT = 1.5  # grey levels of deviation below which a thumbnail shows noise rather than the image
FAR = 0.6  # correlation at whole pixels below which a pair is not looked at closer
SMALLEST = 0.76  # share of a side that a crop keeps, where placements are tried


def thumbnail(image: Image.Image) -> np.ndarray:
    """(S, S) uint8 grey levels, as `imagehash.phash` sees an image."""
    image = image if image.mode in ("L", "RGB") else to_rgb(image)
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def is_flat(thumb: np.ndarray) -> bool:
    """An image without anything in it to compare: calm water, no-data."""
    return float(thumb.std()) < FLAT


def turned(thumb: np.ndarray) -> np.ndarray:
    """(8, S, S): the thumbnail in all `TURNS`."""
    made = []
    for transposed, rows, columns in TURNS.values():
        one = thumb.T if transposed else thumb
        made.append(one[:: -1 if rows else 1, :: -1 if columns else 1])
    return np.stack(made)


def coefficients(thumbs: np.ndarray) -> np.ndarray:
    """
    Low frequencies of every part of every thumbnail.

    Args:
        thumbs (N, S, S).

    Returns:
        (N, P, K * K) float32: DCT-II of each of the `PARTS`, drawn out to S pixels by linear interpolation.
    """
    thumbs = thumbs.astype(np.float32)
    rows = np.tensordot(thumbs, _BASES, axes=([1], [2]))  # (N, S columns, W, K)
    both = np.tensordot(rows, _BASES, axes=([1], [2]))  # (N, W, K, W, K)
    return both.transpose(0, 1, 3, 2, 4).reshape(len(thumbs), len(PARTS), LOW * LOW)


def hashes(coefficients: np.ndarray) -> np.ndarray:
    """
    64-bit perceptual hashes: which low frequencies are above their median. Of whole images they are the numbers that
    `imagehash.phash` writes in hexadecimal, but for frequencies within `NOISE` of the median.

    Args:
        coefficients (…, K * K).

    Returns:
        (…) uint64.
    """
    return np.packbits(margins(coefficients) > 0, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def margins(coefficients: np.ndarray) -> np.ndarray:
    """By how much low frequencies (…, K * K) are above the median and `NOISE`: positive where a hash has a 1."""
    return coefficients - (np.median(coefficients, axis=-1, keepdims=True) + NOISE)


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of low frequencies (…, K * K) without the mean grey: a quick look before [`correlation`]."""
    one, other = one[..., 1:], other[..., 1:]
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / np.maximum(norms, 1e-6)


def correlation(whole: np.ndarray, part: np.ndarray, part_index: int) -> float:
    """
    Correlation of `part` laid over `whole` near one of the `PARTS`.

    Args:
        whole, part (S, S): thumbnails.
        part_index: index in `PARTS`.

    Returns:
        `float`: the highest normalised correlation, -1 to 1, of the sizes and offsets tried: sides around those of the
        part, `SMALLEST` to 1, by whole pixels of the thumbnail first; where that comes to `FAR` or more, by half
        pixels around the best.
    """
    lengths = [_lengths(length) for _, length in PARTS[part_index]]
    sizes = {(high, wide) for high in lengths[0] for wide in lengths[1] if abs(high - wide) <= 4}
    best, (high, wide) = _lay(whole, part, sizes)
    if best < FAR:
        return best
    large = cv2.resize(whole.astype(np.float32), (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_CUBIC)
    high, wide = 2 * high, 2 * wide
    for step in (2, 1):
        near = {(high + step * down, wide + step * right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
        near = {size for size in near if min(size) >= 2 * SIDE * SMALLEST and max(size) <= 2 * SIDE}
        best, (high, wide) = _lay(large, part, near)
    return best


def _lay(whole: np.ndarray, part: np.ndarray, sizes: set[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
    """The best correlation of `part`, drawn to each of the sizes (high, wide), anywhere on `whole`; and its size."""
    whole, part = whole.astype(np.float32), part.astype(np.float32)
    tried = []
    for high, wide in sorted(sizes, reverse=True):
        drawn = cv2.resize(part, (wide, high), interpolation=cv2.INTER_CUBIC)
        tried.append((float(cv2.matchTemplate(whole, drawn, cv2.TM_CCOEFF_NORMED).max()), (high, wide)))
    return max(tried)


def _lengths(length: float) -> list[int]:
    """Sides to try first, in pixels of the thumbnail: down from the whole, or around that of a part."""
    nominal, smallest = round(SIDE * length), int(np.ceil(SIDE * SMALLEST))
    steps = (0, -2, -4, -6) if length == 1 else (-2, 0, 2)
    return sorted({min(SIDE, max(smallest, nominal + step)) for step in steps})


def _basis(start: float, length: float) -> np.ndarray:
    """(K, S): from S pixels to K frequencies of the window, which is sampled at S places by linear interpolation."""
    points = np.clip((start + length * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5, 0, SIDE - 1)
    left = np.minimum(points.astype(int), SIDE - 2)
    sampled = np.zeros((SIDE, SIDE))
    sampled[np.arange(SIDE), left] = 1 - (points - left)
    sampled[np.arange(SIDE), left + 1] = points - left
    frequencies = np.cos(np.pi * np.outer(np.arange(LOW), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
    return frequencies @ sampled


_BASES = np.stack([_basis(*window) for window in WINDOWS]).astype(np.float32)  # (W, K, S)
