"""
Windows that a scene is cut into, and the blocks that they are encoded in. Geometry only: no file is read.

A scale is one size of window. Its windows stand on a grid, a share of their side apart; the last column and line of
windows are moved inside, so that every pixel is covered. A block is a rectangle of neighbouring windows of one scale: the
unit that is encoded, stored and shared out at once. All of it follows from the scene's size and the options alone.

Shapes: N windows; a pixel box is (left, top, width, height).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling_lrsclip.encoding.imagery import MIN_SIDE


BLOCK_WINDOWS, BLOCK_COLUMNS = 512, 32  # windows of a block, and at most side by side
STRIP_PIXELS = 2**24  # of the pixels that a line of windows of a block covers; what one read takes
MAX_WINDOWS = 100_000_000  # of one scene; more is a broken header or the wrong unit


@dataclass(frozen=True)
class WindowSize:
    """Side of a window in pixels of the scene or in metres on the ground."""

    length: float
    metres: bool = False

    @classmethod
    def parse(cls, text: str) -> "WindowSize":
        """
        `224` (pixels) or `500m`.

        Raises:
            `ValueError`: for anything else.
        """
        number = text.strip().lower()
        metres = number.endswith("m")
        try:
            length = float(number.removesuffix("m")) if metres else int(number)
        except ValueError as error:
            sides = "pixels (224) or metres (500m), commas between several"
            raise ValueError(f"window {text!r}: write {sides}.") from error
        if not (math.isfinite(length) and length > 0) or (not metres and length < MIN_SIDE):
            raise ValueError(f"window {text!r}: the side must be at least {MIN_SIDE} pixels, or more than 0 metres.")
        return cls(length, metres)

    def __str__(self) -> str:
        return f"{self.length:g}m" if self.metres else f"{self.length:g}"


@dataclass(frozen=True)
class Grid:
    """
    Windows of one scale in one scene.

    Attributes:
        scale: nominal side in pixels; a scene smaller than that has smaller windows.
        width, height: of each window in pixels.
        lefts, tops: first columns and lines of the windows; each left with each top is a window.
    """

    scale: float
    width: int
    height: int
    lefts: np.ndarray
    tops: np.ndarray

    def __len__(self) -> int:
        return len(self.lefts) * len(self.tops)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Lines and columns of windows in a block."""
        step = int(self.lefts[1] - self.lefts[0]) if len(self.lefts) > 1 else 1
        affordable = (STRIP_PIXELS // self.height - self.width) // max(1, step) + 1
        columns = max(1, min(BLOCK_COLUMNS, affordable, len(self.lefts)))
        return max(1, BLOCK_WINDOWS // columns), columns

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        lines, columns = self.block_shape
        return -(-len(self.tops) // lines) * -(-len(self.lefts) // columns)

    def block(self, number: int) -> np.ndarray:
        """Pixel boxes of a block, `(lines, columns, 4)` int64; windows of a line have the same top."""
        lines, columns = self.block_shape
        line, column = divmod(number, -(-len(self.lefts) // columns))
        tops = self.tops[line * lines : (line + 1) * lines]
        lefts = self.lefts[column * columns : (column + 1) * columns]
        boxes = np.empty((len(tops), len(lefts), 4), dtype=np.int64)
        boxes[..., 0], boxes[..., 1] = lefts[None], tops[:, None]
        boxes[..., 2], boxes[..., 3] = self.width, self.height
        return boxes


def window_starts(length: int, side: int, step: int) -> np.ndarray:
    """
    First pixels of windows along one side of a scene: every `step` pixels, and the last one ends with the scene.

    Args:
        length, side, step: pixels of the scene, of a window and between windows; `side <= length`, `step <= side`.

    Returns:
        Rising int64 array.
    """
    last = length - side
    starts = np.arange(0, last + 1, step, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def scene_grids(
    width: int,
    height: int,
    sizes: Sequence[WindowSize],
    stride: float = 0.5,
    pixel_size: tuple[float, float] | None = None,
) -> list[Grid]:
    """
    Windows of all scales in a scene. Windows in pixels are square in pixels; windows in metres are square on the ground.
    In a scene that is smaller than a window, the window shrinks to the largest of its form that fits; a scale whose
    windows are then those of another is left out.

    Args:
        width, height: of the scene in pixels.
        sizes: of the windows.
        stride: step between windows as a share of their side, above 0 and at most 1.
        pixel_size: metres of a pixel to the right and downwards; None: not known.

    Returns:
        A grid for each scale that is left.

    Raises:
        `ValueError`: for a scene that is too small, windows in metres without a pixel size, windows of less than
            `MIN_SIDE` pixels or more than `MAX_WINDOWS` of them.
    """
    if not 0 < stride <= 1:
        share = "a share of their side, above 0 and at most 1"
        raise ValueError(f"stride {stride:g}: the step between windows is {share}.")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"it has {width} x {height} pixels, and the short side needs {MIN_SIDE}")
    grids: dict[tuple[int, int], Grid] = {}
    for size in sizes:
        if size.metres and pixel_size is None:
            raise ValueError(f"it has no coordinates, so windows of {size} cannot be cut: give --window in pixels")
        across, down = (size.length / metres for metres in pixel_size) if size.metres else (size.length,) * 2
        shrink = min(1.0, width / across, height / down)
        sides = round(across * shrink), round(down * shrink)
        if min(sides) < MIN_SIDE:
            pixels = f"{sides[0]} x {sides[1]} pixels"
            raise ValueError(f"windows of {size} would have {pixels}, fewer than {MIN_SIDE} a side")
        if sides in grids:
            continue
        steps = [max(1, round(side * stride)) for side in sides]
        count = math.prod(-(-(length - side) // step) + 1 for length, side, step in zip((width, height), sides, steps))
        if count > MAX_WINDOWS:  # before the starts alone fill the memory
            raise ValueError(
                f"its {width} x {height} pixels would make {count:,} windows of {size}, more than the {MAX_WINDOWS:,} of "
                f"one scene: give a larger --window, or cut the scene up"
            )
        lefts, tops = map(window_starts, (width, height), sides, steps)
        grids[sides] = Grid(math.sqrt(across * down), *sides, lefts, tops)
    return list(grids.values())


def block_of(grids: Sequence[Grid], number: int) -> tuple[Grid, np.ndarray]:
    """
    The block of a scene with this number, counted through its scales.

    Returns:
        Its grid, and its pixel boxes, `(lines, columns, 4)`.
    """
    for grid in grids:
        if number < grid.blocks:
            return grid, grid.block(number)
        number -= grid.blocks
    raise IndexError(f"the scene has {sum(grid.blocks for grid in grids)} blocks")
