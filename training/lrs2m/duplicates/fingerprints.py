"""
Fingerprints of images: what is left of one after JPEG, another size, a turn, a crop or a frame, in a kilobyte.

N images, S = 32 pixels a side of a thumbnail, K = 8 frequencies a direction, P = 25 parts of an image.
"""

import contextlib

import cv2
import numpy as np
from PIL import Image


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
BLACK, WHITE = 4, 251  # grey levels from which on a pixel may be a border or no-data
NEARLY_BLACK, NEARLY_WHITE = 24, 231  # beside a border, after JPEG
BLANK_LINE, NEARLY_BLANK_LINE = 0.99, 0.8  # share of such pixels in a row or column of a border, and at its rim
LEAST_CONTENT = 0.25  # of a side, that a border leaves
SHARP = (
    0.7  # share of the nearly black or white of a region that is black or white, if it ends sharply, as no-data does
)
MASK_SIDE = 128  # pixels, at which no-data in the corners is looked for
HOPELESS = 0.18  # correlation below which two thumbnails are not moved to fit
FARTHEST = 5.0  # pixels of the thumbnail by which an alignment may move a corner
FREQUENCIES = np.hypot(*np.divmod(np.arange(LOW * LOW), LOW)).astype(np.float32)  # (K * K,)
_STEPS = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 5, 1e-3)  # of an alignment


def thumbnail(image: Image.Image) -> np.ndarray:
    """(S, S) uint8 grey levels, as `imagehash.phash` sees the image once its black or white border is cut off."""
    if image.mode not in ("L", "RGB"):
        from modeling_lrsclip.image_processing_lrsclip import to_rgb  # transformers, which few images need

        image = to_rgb(image)
    grey = without_border(image.convert("L"))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def without_border(grey: Image.Image) -> Image.Image:
    """
    The part of a grey image inside its black or white border; black or white that still touches an edge, such as the
    corners of a turned scene, becomes the mean of the rest. Images without either come back as they are.
    """
    pixels = np.asarray(grey)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    for blank, kind in ((edges <= BLACK, "black"), (edges >= WHITE, "white")):
        if blank.mean() < 0.05:
            continue
        black = kind == "black"
        mask, near = (pixels <= BLACK, pixels <= NEARLY_BLACK) if black else (pixels >= WHITE, pixels >= NEARLY_WHITE)
        top, bottom = _content(mask.mean(axis=1), near.mean(axis=1))
        left, right = _content(mask[top:bottom].mean(axis=0), near[top:bottom].mean(axis=0))
        if bottom - top < LEAST_CONTENT * len(mask) or right - left < LEAST_CONTENT * mask.shape[1]:
            continue
        grey = grey.crop((left, top, right, bottom))
        pixels = _filled(np.asarray(grey), mask[top:bottom, left:right], near[top:bottom, left:right])
        grey = Image.fromarray(pixels)
    return grey


def _content(blank: np.ndarray, nearly: np.ndarray) -> tuple[int, int]:
    """
    First line inside a border and the one after the last; 0, 0 where all are blank.

    Args:
        blank, nearly (n,): share of blank pixels of each line, and of those that JPEG may have made of them.

    Returns:
        Indices. Lines that are nearly blank go with a border beside them, a few at most.
    """
    inside = np.flatnonzero(blank < BLANK_LINE)
    if not len(inside):
        return 0, 0
    first, last = int(inside[0]), int(inside[-1]) + 1
    few = max(1, len(blank) // 50)
    ahead, behind = nearly[first : first + few], nearly[last - few : last][::-1]
    if first:
        first += int(np.argmin(np.append(ahead >= NEARLY_BLANK_LINE, False)))
    if last < len(blank):
        last -= int(np.argmin(np.append(behind >= NEARLY_BLANK_LINE, False)))
    return first, last


def _filled(pixels: np.ndarray, mask: np.ndarray, near: np.ndarray) -> np.ndarray:
    """
    A grey image whose masked regions at its edges, where they are large, have the mean of the other pixels. A region that
    fades into the image, such as an overexposed beach, is none.

    Args:
        pixels (H, W): grey levels.
        mask, near (H, W): pixels that are blank, and those that JPEG may have made of them.
    """
    scale = min(1.0, MASK_SIDE / max(mask.shape))
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    blank, nearly = (cv2.resize(one.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for one in (mask, near))
    count, labels = cv2.connectedComponents(nearly, connectivity=4)
    at_edges = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    areas, blanks = (np.bincount(labels.ravel(), weights, minlength=count) for weights in (None, blank.ravel()))
    sharp = blanks >= np.maximum(0.02 * labels.size, SHARP * areas)
    large = [label for label in at_edges if label and sharp[label]]
    share = areas[large].sum() / labels.size
    if not large or share > 1 - LEAST_CONTENT:
        return pixels
    region = np.isin(labels, large).astype(np.uint8)
    grown = cv2.dilate(region, np.ones((3, 3), np.uint8))  # what resampling mixed with it
    region = cv2.resize(grown, mask.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    filled = pixels.copy()
    filled[region] = round(float(pixels[~region].mean())) if not region.all() else 0
    return filled


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
    bases = _BASES.reshape(-1, SIDE)  # (W * K, S)
    columns = thumbs.astype(np.float32).reshape(-1, SIDE) @ bases.T  # (N * S rows, W * K)
    both = bases @ columns.reshape(len(thumbs), SIDE, -1)  # (N, W * K, W * K)
    windows = both.reshape(len(thumbs), len(WINDOWS), LOW, len(WINDOWS), LOW)
    return windows.transpose(0, 1, 3, 2, 4).reshape(len(thumbs), len(PARTS), LOW * LOW)


def hashes(coefficients: np.ndarray) -> np.ndarray:
    """
    64-bit perceptual hashes: which low frequencies are above their median. Of whole images they are the numbers that
    `imagehash.phash` writes in hexadecimal, but for frequencies within `NOISE` of the median.

    Args:
        coefficients (…, K * K).

    Returns:
        (…) uint64.
    """
    return pack(margins(coefficients))


def margins(coefficients: np.ndarray) -> np.ndarray:
    """By how much low frequencies (…, K * K) are above the median and `NOISE`: positive where a hash has a 1."""
    half = LOW * LOW // 2
    middle = np.sort(coefficients, axis=-1)[..., half - 1 : half + 1]  # four times as fast as median
    return coefficients - (middle.mean(axis=-1, keepdims=True) + NOISE)


def pack(margins: np.ndarray) -> np.ndarray:
    """(…) uint64: the hashes of (…, K * K) margins."""
    return np.packbits(margins > 0, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def profile(coefficients: np.ndarray) -> np.ndarray:
    """
    Low frequencies for comparison by their cosine: each weighted by its frequency, as an image's fall off with it, and
    none above a limit, so that a caption or a seam does not decide.

    Args:
        coefficients (…, K * K).

    Returns:
        (…, K * K - 1) float32 of unit length.
    """
    weighted = coefficients[..., 1:] * FREQUENCIES[1:]
    middle = np.sort(np.abs(weighted), axis=-1)[..., LOW * LOW // 2 - 1, None]
    limit = 2 * middle + NOISE
    clipped = np.clip(weighted / limit, -1, 1)
    return clipped / np.maximum(np.linalg.norm(clipped, axis=-1, keepdims=True), 1e-6)


def part_profiles(thumbs: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """
    [`profile`] of one part of each thumbnail.

    Args:
        thumbs (N, S, S): of as many images.
        parts (N,): indices in `PARTS`.

    Returns:
        (N, K * K - 1) float32.
    """
    rows, columns = np.divmod(parts, len(WINDOWS))
    low = _BASES[rows] @ thumbs.astype(np.float32) @ _BASES[columns].transpose(0, 2, 1)  # (N, K, K)
    return profile(low.reshape(len(thumbs), LOW * LOW))


def align(whole: np.ndarray, part: np.ndarray, part_index: int) -> tuple[float, float]:
    """
    How much of `part` is seen in `whole` near one of the `PARTS`, after it was moved, stretched, turned and sheared a
    little to fit as well as it can (`cv2.findTransformECC`; Evangelidis and Psarakis, 2008).

    Args:
        whole, part (S, S): thumbnails.
        part_index: index in `PARTS`.

    Returns:
        The correlation, -1 to 1, of both without their coarse shades and with evened contrasts, so that light, contrast
        and a caption in one place count little; and the share of a side of `whole` that `part` covers.
    """
    whole, part = whole.astype(np.float32), part.astype(np.float32)
    (top, high), (left, wide) = PARTS[part_index]
    start = np.array(
        [[wide, 0, (left + wide / SIDE / 2) * SIDE - 0.5], [0, high, (top + high / SIDE / 2) * SIDE - 0.5]], np.float32
    )
    details = _details(part)
    fits = [(_fit(whole, details, start), start)]
    if fits[0][0] < HOPELESS:
        return fits[0][0], float(np.sqrt(wide * high))
    with contextlib.suppress(cv2.error):  # two images that have nothing in common
        _, moved = cv2.findTransformECC(part, whole, start.copy(), cv2.MOTION_AFFINE, _STEPS, None, 5)
        if np.abs((moved - start) @ _CORNERS).max() <= FARTHEST:
            fits.append((_fit(whole, details, moved), moved))
    correlation, matrix = max(fits, key=lambda fit: round(fit[0], 3))  # of nearly equal ones that which is not moved
    return correlation, float(np.sqrt(abs(np.linalg.det(matrix[:, :2].astype(np.float64)))))


def _fit(whole: np.ndarray, details: np.ndarray, matrix: np.ndarray) -> float:
    """Correlation of the details (S, S, 2) of a part and of what `matrix` (2, 3), from its pixels to those of `whole`, lays on it."""
    inverse = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(whole, matrix, (SIDE, SIDE), flags=inverse, borderMode=cv2.BORDER_REFLECT)
    nearest = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    shared = cv2.warpAffine(np.ones_like(whole), matrix, (SIDE, SIDE), flags=nearest)[..., None]
    one, other = _details(laid) * shared, details * shared
    shared, *energies = (np.einsum("rcd,rcd->d", *pair) for pair in ((one, other), (one, one), (other, other)))
    return float((shared / np.sqrt(energies[0] * energies[1] + 1e-6)).mean())


def _details(thumb: np.ndarray) -> np.ndarray:
    """(S, S, 2): a thumbnail, sharp and soft, without its coarse shades and with contrasts evened out."""
    both = np.dstack([thumb, cv2.GaussianBlur(thumb, (0, 0), 0.7)])
    fine = both - cv2.GaussianBlur(both, (0, 0), 3.0)
    return fine / (np.sqrt(cv2.GaussianBlur(fine * fine, (0, 0), 3.0)) + FLAT)


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
_CORNERS = np.array([[0, SIDE, 0, SIDE], [0, 0, SIDE, SIDE], [1, 1, 1, 1]], np.float32)
