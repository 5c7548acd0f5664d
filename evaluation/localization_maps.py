"""
Maps of where a large scene shows what a text describes: the similarities of its windows to the text, averaged over each
pixel (semantic localization, SeLo).

Shapes: H, W pixels of the scene, N windows, Q queries, D width of the shared space. Source: `xiaoyuan1996/SemanticLocalizationMetrics`, `predict/
generate_selo.py` (v1) and `generate_selo_v2.py` (v2).
"""

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modeling_lrsclip.encoding import Embeddings, Encoder
from modeling_lrsclip.encoding.model_inputs import encode_texts
from modeling_lrsclip.encoding.ties import best_first
from modeling_lrsclip.files.hashing import bytes_sha256


WINDOW_PIXELS = 256  # every window is resized to this side before the model's own preprocessing
MEDIAN_SIDE = 251  # of the filter over a map of v1, pixels
GAUSSIAN_SIDE = 255  # of the filter over a map of v2, pixels; OpenCV derives its deviation, 38.6
KEPT_SHARE = 0.15  # of the windows that v2 looks at more closely
NEAR_SIZES = (64, 128)  # half sides of the windows that v2 puts around each point of those, pixels
SHUFFLES = 4  # of a query's words, for v2
FLAT = 1e-6  # a spread of similarities that is only float32 rounding


class Window(NamedTuple):
    """A rectangle of the scene in pixels; bottom and right are the first outside."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Protocol:
    """The way a map is made: `v1` averages windows of several sizes, `v2` looks again around the best of one size."""

    name: str
    windows: tuple[int, ...]  # sides in pixels

    def __post_init__(self):
        if self.name not in ("v1", "v2"):
            raise ValueError(f"protocol {self.name!r} is not known; use v1 or v2.")
        if not self.windows or any(not isinstance(side, int) or side < 2 for side in self.windows):
            raise ValueError(f"windows={self.windows!r} must be whole numbers of pixels, at least 2.")
        if self.name == "v2" and len(self.windows) > 1:
            raise ValueError(f"protocol v2 starts from windows of one size, got {self.windows!r}.")

    def check_size(self, height: int, width: int) -> None:
        """Raises a `ValueError` for a scene that is smaller than a window."""
        side = max(self.windows)
        if min(height, width) < side:
            raise ValueError(
                f"the scene of {width} x {height} pixels is smaller than a window of {side}; protocol {self.name} "
                f"takes scenes of at least {side} x {side}."
            )


PROTOCOLS = {"v1": Protocol("v1", (256, 512, 768)), "v2": Protocol("v2", (512,))}


def choose_protocol(protocol: str | Protocol) -> Protocol:
    """Return the protocol of this name; one that is a [`Protocol`] already is returned as it is."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not known; use {' or '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]


# -------------------------------------------------------------------------------------------------------------- windows


def grid_windows(height: int, width: int, protocol: Protocol) -> list[Window]:
    """
    All windows of a scene, column by column: a grid of each size, and for v1 another one half a window on. A window that
    would reach beyond the right or lower edge is moved back inside; one that stands there already is left out, as the
    published code's file names did.

    Args:
        height, width: of the scene in pixels.
        protocol: sizes of the windows, and their version.

    Returns:
        The windows, in the order of the published loop.
    """
    protocol.check_size(height, width)
    windows = []
    for side in protocol.windows:
        for start in (0, side - side // 2) if protocol.name == "v1" else (0,):
            for left in range(start, width, side):
                for top in range(start, height, side):
                    top_inside, left_inside = min(top, height - side), min(left, width - side)
                    windows.append(Window(top_inside, top_inside + side, left_inside, left_inside + side))
    return list(dict.fromkeys(windows))


def best_windows(scores: np.ndarray) -> np.ndarray:
    """
    Indices of the windows that v2 looks at more closely, by rising score: the best 15 % and one more, of equal ones the
    last.
    """
    last_first = len(scores) - 1 - best_first(scores[::-1])
    return last_first[int(len(scores) * KEPT_SHARE) :: -1]


def near_windows(window: Window, height: int, width: int) -> list[Window]:
    """
    The windows of 128 and 256 pixels that v2 puts around nine points of a window: its corners, its middle and the
    points half way between. At the upper and left edge they are moved inside, at the others cut off.

    Args:
        window: one of those of 512 pixels.
        height, width: of the scene in pixels.

    Returns:
        The smaller windows around it.
    """
    side = window.bottom - window.top
    points = [(row * side // 4, column * side // 4) for row, column in ((0, 0), (0, 4), (4, 0), (4, 4))]
    points += [(row * side // 4, column * side // 4) for row in (1, 3) for column in (1, 3)]
    points.append((side // 2, side // 2))
    windows = []
    for down, right in points:
        for half in NEAR_SIZES:
            top, left = max(window.top + down - half, 0), max(window.left + right - half, 0)
            windows.append(Window(top, min(top + 2 * half, height), left, min(left + 2 * half, width)))
    return list(dict.fromkeys(windows))


class SceneWindows(Sequence[Image.Image]):
    """
    Windows of a scene as the images that a model gets, cut out when they are asked for.

    Args:
        scene: (H, W, 3) uint8, RGB.
        windows: where they are.
        reference_io: each window goes through a JPEG file, as in the published code.
    """

    def __init__(self, scene: np.ndarray, windows: Sequence[Window], reference_io: bool = False):
        self.scene, self.windows, self.reference_io = scene, list(windows), reference_io

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            part = SceneWindows(self.scene, self.windows[index], self.reference_io)
            part.__dict__["scene_hash"] = self.scene_hash  # of the same pixels: not to be read again
            return part
        top, bottom, left, right = self.windows[index]
        size = (WINDOW_PIXELS, WINDOW_PIXELS)
        pixels = cv2.resize(self.scene[top:bottom, left:right], size, interpolation=cv2.INTER_CUBIC)
        if not self.reference_io:
            return Image.fromarray(pixels)
        _, content = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        return Image.open(io.BytesIO(content)).convert("RGB")

    @cached_property
    def scene_hash(self) -> str:
        return bytes_sha256(np.ascontiguousarray(self.scene))

    @property
    def content_hash(self) -> str:
        """SHA-256 over the scene's pixels, the windows and what is done to them."""
        made_by = (self.scene.shape, self.windows, WINDOW_PIXELS, self.reference_io, cv2.__version__)
        return bytes_sha256(repr((self.scene_hash, made_by)))


# ----------------------------------------------------------------------------------------------------------------- maps


def probability_map(
    height: int, width: int, windows: Sequence[Window], scores: np.ndarray, protocol: Protocol, reference_io: bool
) -> np.ndarray:
    """
    The map of one query: mean score of the windows over each pixel (0 where there is none), stretched to 0..255,
    smoothed by a median filter (v1) or a Gaussian (v2).

    DIFFERS: where all scores are equal, the published code divides by zero; here the map is 0 everywhere.

    Args:
        height, width: pixels of the scene.
        windows, scores: N windows and their (N,) similarities to the query.
        protocol: decides the filter.
        reference_io: the map goes through a JPEG file, as in the published code.

    Returns:
        (H, W) uint8.
    """
    means, heights, widths = mean_scores(height, width, windows, scores)
    means = means - means.min()
    spread = means.max()
    levels = (255 * (means / spread) if spread > FLAT else np.zeros_like(means)).astype(np.uint8)
    heat = np.repeat(np.repeat(levels, heights, axis=0), widths, axis=1)  # (H, W)
    if protocol.name == "v1":
        heat = cv2.medianBlur(heat, MEDIAN_SIDE)
    else:
        heat = cv2.GaussianBlur(heat, (GAUSSIAN_SIDE, GAUSSIAN_SIDE), 0)
    if reference_io:
        heat = cv2.imdecode(cv2.imencode(".jpg", heat)[1], cv2.IMREAD_GRAYSCALE)
    return heat


def mean_scores(
    height: int, width: int, windows: Sequence[Window], scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Mean score of the windows over each pixel, without visiting pixels: the edges of the windows cut the scene into
    cells (a hundred along each side), within which all pixels have the same mean.

    Args:
        height, width: pixels of the scene.
        windows, scores: N windows and their (N,) scores.

    Returns:
        (rows, columns) float64 means of the cells, 0 where there is no window; the heights (rows,) and widths
        (columns,) of the cells in pixels.
    """
    boxes = np.array(windows)  # (N, 4)
    rows = np.unique(np.concatenate([boxes[:, :2].ravel(), [0, height]]))
    columns = np.unique(np.concatenate([boxes[:, 2:].ravel(), [0, width]]))
    tops, bottoms = np.searchsorted(rows, boxes[:, 0]), np.searchsorted(rows, boxes[:, 1])
    lefts, rights = np.searchsorted(columns, boxes[:, 2]), np.searchsorted(columns, boxes[:, 3])
    total = np.zeros((len(rows) - 1, len(columns) - 1))
    count = np.zeros(total.shape, np.int64)
    for top, bottom, left, right, score in zip(tops, bottoms, lefts, rights, scores, strict=True):
        total[top:bottom, left:right] += score
        count[top:bottom, left:right] += 1
    return total / np.maximum(count, 1), np.diff(rows), np.diff(columns)


# -------------------------------------------------------------------------------------------------------- with a model


def query_embeddings(encoder: Encoder, texts: Sequence[str], protocol: Protocol) -> Embeddings:
    """
    Unit embeddings of queries: for v1 of the texts, for v2 the mean over the text and four shuffles of its words.

    DIFFERS: the published code shuffles by chance; here a text always gets the same shuffles.

    Args:
        encoder: the model.
        texts (sequence of Q `str`).
        protocol: `v1` or `v2`.

    Returns:
        (Q, D) embeddings and the seconds that encoding took.
    """
    rows = encode_texts(encoder.processor, texts)
    if protocol.name == "v1":
        return encoder.texts(rows)
    shuffled = []
    for text in texts:
        generator = np.random.default_rng(int(bytes_sha256(text)[:16], 16))
        shuffled += [" ".join(generator.permutation(text.split())) for _ in range(SHUFFLES)]
    shuffled_embeds, shuffled_seconds = encoder.texts(encode_texts(encoder.processor, shuffled))  # (Q * 4, D)
    embeds, seconds = encoder.texts(rows)  # (Q, D)
    total = embeds + shuffled_embeds.view(len(embeds), SHUFFLES, embeds.shape[1]).sum(dim=1)
    return Embeddings(F.normalize(total, dim=1), seconds + shuffled_seconds)


@dataclass
class Locator:
    """Makes the maps of one scene after the other; counts windows and seconds."""

    encoder: Encoder
    protocol: Protocol
    reference_io: bool = False
    windows: int = 0  # encoded so far
    seconds: float = 0.0  # that encoding them took, when it was done
    waited: float = 0.0  # seconds for them here: less where embeddings were kept

    def maps(self, scene: np.ndarray, queries: Tensor) -> Iterator[np.ndarray]:
        """
        The map of each query over a scene, one at a time: a map of 100 megapixels takes as many bytes.

        Args:
            scene: (H, W, 3) uint8, RGB.
            queries: (Q, D) unit embeddings.

        Yields:
            (H, W) uint8, Q times.
        """
        height, width = scene.shape[:2]
        windows = grid_windows(height, width, self.protocol)
        scores = self._scores(SceneWindows(scene, windows, self.reference_io), queries)  # (Q, N)
        if self.protocol.name == "v1":
            for row in scores:
                yield probability_map(height, width, windows, row, self.protocol, self.reference_io)
            return
        kept = [best_windows(row) for row in scores]
        near = [
            list(dict.fromkeys(window for index in indices for window in near_windows(windows[index], height, width)))
            for indices in kept
        ]
        union = list(dict.fromkeys(window for close in near for window in close))  # several queries share windows
        index_of = {window: index for index, window in enumerate(union)}
        near_scores = self._scores(SceneWindows(scene, union, self.reference_io), queries)
        for query, (indices, close) in enumerate(zip(kept, near, strict=True)):
            seen = [windows[index] for index in indices] + close
            near_indices = [index_of[window] for window in close]
            values = np.concatenate([scores[query, indices], near_scores[query, near_indices]])
            yield probability_map(height, width, seen, values, self.protocol, self.reference_io)

    def _scores(self, windows: SceneWindows, queries: Tensor) -> np.ndarray:
        """(Q, N) cosine similarities, float64."""
        started = time.perf_counter()
        embeds, seconds = self.encoder.images(windows)  # (N, D)
        self.windows += len(windows)
        self.seconds += seconds
        self.waited += time.perf_counter() - started
        return (queries.double() @ embeds.double().T).numpy()
