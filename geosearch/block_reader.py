"""
Windows of scenes as batches of the model's input, read ahead by threads while the model works.

Shapes: B windows of a batch, H, W the model's input.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_lrsclip.encoding.model_inputs import PixelBatcher
from modeling_lrsclip.encoding.rasters import Raster, RasterError, Rendering, fill_nothing

from .plan import Blocks, PlannedScene, WindowOptions
from .windows import BLOCK_COLUMNS, block_of


LARGEST_SIDE = 2048  # pixels of a window that is read one for one; of larger ones GDAL averages down to half of this
AHEAD_BYTES = 256 * 2**20  # of the model's input that is kept ready


@dataclass
class Block:
    """A block on its way: what came of its windows."""

    scene: PlannedScene
    number: int
    scale: float = 0.0
    boxes: list[np.ndarray] = field(default_factory=list)  # (4,) of each window that goes to the model
    empty: int = 0  # windows left out because too much of them is nothing
    unreadable: int = 0
    reason: str | None = None  # of the first unreadable one
    complete: bool = False  # all windows were handed out
    rendering: Rendering | None = None
    embeddings: list[np.ndarray] = field(default_factory=list)

    @property
    def windows(self) -> int:
        """Windows looked at so far."""
        return len(self.boxes) + self.empty + self.unreadable

    @property
    def done(self) -> bool:
        """Whether every window that was handed out has its embedding."""
        return self.complete and sum(map(len, self.embeddings)) == len(self.boxes)


class BlockReader:
    """
    Reads blocks in order, a line of windows at a time.

    Args:
        options: how scenes are cut and rendered.
        image_processor: the model's.
        batch_size: windows of a batch at most. A batch never reaches into another block, so that what is computed does
            not depend on which blocks are done already.
        threads: that read, stretch and resize.
        pin: in page-locked memory, from where a GPU fetches faster.
    """

    def __init__(self, options: WindowOptions, image_processor: Any, batch_size: int, threads: int, pin: bool):
        self.options, self.batch_size, self.threads, self.pin = options, batch_size, threads, pin
        self.prepare = PixelBatcher(image_processor)
        self._local = threading.local()
        self._rendering: tuple[str, Rendering] | None = None  # of the scene opened last, by its path
        self._lock = threading.Lock()

    def batches(self, blocks: Blocks, finish: Callable[[Block], None]) -> Iterator[tuple[Block, Tensor]]:
        """
        Batches of all blocks, in order.

        Args:
            blocks: scene and number of each.
            finish: called with a block all of whose windows are handed out; its embeddings may be there already, or come
                later.

        Yields:
            The block, and `pixel_values` (B, 3, H, W) float32.
        """
        held: list[Tensor] = []  # windows of the block in hand that make no batch yet
        for block, last, line in self._read_ahead(blocks):
            block.boxes += line.boxes
            block.empty, block.unreadable = block.empty + line.empty, block.unreadable + line.unreadable
            block.reason, block.rendering = block.reason or line.reason, block.rendering or line.rendering
            block.complete = last
            held += [line.pixels] if line.boxes else []
            pixels = torch.cat(held) if held else torch.empty(0)
            while len(pixels) >= self.batch_size or (last and len(pixels)):
                batch, pixels = pixels[: self.batch_size], pixels[self.batch_size :]
                yield block, batch.pin_memory() if self.pin else batch
            held = [pixels] if len(pixels) else []
            if last:
                finish(block)

    def _read_ahead(self, blocks: Blocks) -> Iterator[tuple[Block, bool, "_Line"]]:
        """Lines of windows in order, read by threads; with each its block and whether it is the last one of it."""
        crop = self.prepare.processor.crop_size
        line_bytes = BLOCK_COLUMNS * 3 * 4 * crop["height"] * crop["width"]
        ahead = min(max(2, AHEAD_BYTES // line_bytes), 4 * self.threads)
        waiting: deque = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="read") as pool:
            try:
                for block, last, boxes in self._lines(blocks):
                    waiting.append((block, last, pool.submit(self._read_line, block.scene, boxes)))
                    if len(waiting) > ahead:
                        block, last, future = waiting.popleft()
                        yield block, last, future.result()
                while waiting:
                    block, last, future = waiting.popleft()
                    yield block, last, future.result()
            finally:
                for *_, future in waiting:
                    future.cancel()

    def _lines(self, blocks: Blocks) -> Iterator[tuple[Block, bool, np.ndarray]]:
        grids, known = [], None
        for scene, number in blocks:
            if scene is not known:
                grids, known = scene.grids(self.options), scene
            grid, boxes = block_of(grids, number)
            block = Block(scene, number, grid.scale)
            for index, line in enumerate(boxes):
                yield block, index == len(boxes) - 1, line

    def _read_line(self, scene: PlannedScene, boxes: np.ndarray) -> "_Line":
        """
        Windows side by side, read at once; where a piece of them is damaged, one by one.

        Args:
            boxes: (windows, 4), all with the same top and size.
        """
        line = _Line()
        try:
            raster = self._raster(scene)
            line.rendering = raster.rendering
            left, top, width, height = boxes[0].tolist()
            if max(width, height) > LARGEST_SIDE:
                raise RasterError("read one by one")
            whole = raster.read(left, top, int(boxes[-1, 0]) + width - left, height)
        except RasterError as error:
            raster, whole = self._local.__dict__.get("raster"), None
            if line.rendering is None:  # the file cannot even be opened, or nothing of it be read
                line.unreadable, line.reason = len(boxes), str(error)
                return line
        images = []
        for box in boxes:
            try:
                if whole is None:
                    rgb, valid = self._window(raster, box)
                else:
                    start, width = int(box[0] - boxes[0, 0]), int(box[2])
                    rgb, valid = (np.ascontiguousarray(part[:, start : start + width]) for part in whole)
            except RasterError as error:
                line.unreadable, line.reason = line.unreadable + 1, line.reason or str(error)
                continue
            if 1 - valid.mean() > self.options.max_empty or not valid.any():
                line.empty += 1
                continue
            line.boxes.append(box)
            images.append(_square(Image.fromarray(fill_nothing(rgb, valid))))
        if images:
            line.pixels = self.prepare(images)  # (windows, 3, H, W)
        return line

    def _window(self, raster: Raster, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, top, width, height = box.tolist()
        factor, large = 2 * max(width, height) / LARGEST_SIDE, max(width, height) > LARGEST_SIDE
        shape = (max(1, round(height / factor)), max(1, round(width / factor))) if large else None
        return raster.read(left, top, width, height, shape)

    def _raster(self, scene: PlannedScene) -> Raster:
        """This thread's own handle of a scene; all of them stretch it alike."""
        if self._local.__dict__.get("path") != scene.facts.path:
            if "raster" in self._local.__dict__:
                self._local.raster.close()
                del self._local.raster, self._local.path
            raster = self.options.open(scene.facts.path)
            if (raster.width, raster.height) != (scene.facts.width, scene.facts.height):
                raster.close()
                raise RasterError(f"{scene.facts.path} changed its size while it was read; run the command again.")
            with self._lock:
                if self._rendering is None or self._rendering[0] != scene.facts.path:
                    self._rendering = scene.facts.path, raster.rendering
                raster.rendering = self._rendering[1]
            self._local.path, self._local.raster = scene.facts.path, raster
        return self._local.raster


@dataclass
class _Line:
    """Windows side by side, as they were read."""

    boxes: list[np.ndarray] = field(default_factory=list)  # of the windows in `pixels`
    pixels: Tensor | None = None
    empty: int = 0
    unreadable: int = 0
    reason: str | None = None
    rendering: Rendering | None = None


def _square(image: Image.Image) -> Image.Image:
    """A window in metres of a scene whose pixels are not square becomes square: the model's middle would cut it."""
    if image.width == image.height:
        return image
    side = max(image.size)
    return image.resize((side, side), Image.Resampling.BICUBIC)
