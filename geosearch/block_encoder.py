"""
Encoding of blocks: windows through the model into one file a block, which a killed run finds and goes on from.

Shapes: D width of the shared space.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from modeling_lrsclip.encoding import Encoder
from modeling_lrsclip.encoding.embedding import embed_batches, image_batch_size
from modeling_lrsclip.files.atomic import replace_text, replacing

from .block_reader import Block, BlockReader
from .footprints import footprints
from .index_store import row_schema, row_table
from .plan import Blocks, Plan
from .scenes import content_hash


SKIPPED = "skipped.jsonl"
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal


def encode_blocks(
    plan: Plan,
    blocks: Blocks,
    encoder: Encoder,
    folder: Path,
    readers: int | None = None,
    max_skipped: int = 100,
) -> dict[str, Any]:
    """
    Encodes the blocks that have no file in `folder` yet.

    Args:
        plan: they belong to.
        blocks: scene and number of each, those of one scene together.
        encoder: the model, with its `batch_size` and `dtype`.
        folder: of the blocks' files.
        readers: threads that read ahead; None: by the number of cores.
        max_skipped: scenes that may be unreadable, those that the plan names included.

    Returns:
        `encoded`: windows encoded now; `seconds`: from the first to the last.

    Raises:
        `ValueError`: when too many scenes turn out to be unreadable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    missing = [(scene, number) for scene, number in blocks if scene.block_name(number) not in there]
    on_gpu = encoder.model.device.type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    readers = readers or (max(2, min(16, cores - 1)) if on_gpu else max(1, min(4, cores)))
    batch_size = image_batch_size(encoder.model, encoder.batch_size)
    reader = BlockReader(plan.options, encoder.processor.image_processor, batch_size, readers, pin=on_gpu)
    started, encoded = time.perf_counter(), 0
    with Progress(blocks, missing) as progress, _BlockWriter(plan, folder, max_skipped) as writer:

        def finish(block: Block) -> None:
            if block.done and writer.write(block):
                progress.advance(block.windows)

        waiting: list[Block] = []

        def pixels() -> Iterator[Tensor]:
            for block, batch in reader.batches(missing, finish):
                waiting.append(block)
                yield batch

        for embeddings in embed_batches(encoder.model, encoder.processor, pixels(), encoder.dtype):
            block = waiting.pop(0)
            block.embeddings.append(embeddings.numpy())
            encoded += len(embeddings)
            finish(block)
    return {"encoded": encoded, "seconds": time.perf_counter() - started}


class _BlockWriter:
    """Writes blocks in a thread of its own, each in one step; as a context manager it waits for the last one."""

    def __init__(self, plan: Plan, folder: Path, max_skipped: int):
        self.plan, self.folder, self.max_skipped = plan, folder, max_skipped
        self._pool, self._waiting = ThreadPoolExecutor(1, thread_name_prefix="write"), []
        self._unreadable: dict[str, str] = {}
        self._written: set[tuple[str, int]] = set()

    def __enter__(self) -> "_BlockWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            while self._waiting:
                self._waiting.pop(0).result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def write(self, block: Block) -> bool:
        """Takes a finished block; False for one that it has taken already."""
        identity = block.scene.key, block.number
        if identity in self._written:
            return False
        self._written.add(identity)
        if block.unreadable:
            self._unreadable.setdefault(block.scene.facts.path, block.reason)
            unreadable = [{"scene": scene, "reason": reason} for scene, reason in self._unreadable.items()]
            check_skipped([*self.plan.skipped, *unreadable], self.max_skipped, None)
        while self._waiting:  # a kill loses the block in hand and at most the one before it
            self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(write_block, block, self.plan.model["dimensions"], self.folder))
        return True


def write_block(block: Block, dimensions: int, folder: Path) -> None:
    """
    Writes a block's rows and, in the file's metadata, what else came of it; it is on disk before it has its name.

    Args:
        block: whose windows are all encoded.
        dimensions: D, of a vector.
        folder: of the blocks' files.
    """
    facts = block.scene.facts
    boxes = np.array(block.boxes, dtype=np.int64).reshape(-1, 4)
    reason, unreadable = block.reason, block.unreadable
    try:
        outlines, middles = footprints(boxes, facts.affine, facts.crs)
    except ValueError as error:  # windows that lie on no place of the Earth
        reason, unreadable = reason or f"{facts.path}: {error}.", unreadable + len(boxes)
        boxes, (outlines, middles) = boxes[:0], footprints(boxes[:0], facts.affine, facts.crs)
    vectors = np.concatenate([*block.embeddings, np.zeros((0, dimensions), np.float32)])[: len(boxes)]
    moment = row_schema(1).field("timestamp").type
    taken = pa.scalar(facts.timestamp).cast(moment).as_py() if facts.timestamp else None
    scene, scales = {"gsd": facts.gsd, "crs": facts.crs, "timestamp": taken}, np.full(len(boxes), block.scale)
    table = row_table(facts.path, boxes, scales, outlines, middles, vectors, **scene)
    came = {"scene": facts.path, "rows": len(boxes), "empty": block.empty, "unreadable": unreadable, "reason": reason}
    came["rendering"] = block.rendering.to_dict() if block.rendering else None
    came["sha256"] = content_hash(facts.files) if block.number == 0 else None
    with replacing(folder / block.scene.block_name(block.number)) as growing:
        pq.write_table(table.replace_schema_metadata({"block": json.dumps(came)}), growing, compression="none")


class Progress:
    """Windows done, how many a second, and the time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, blocks: Blocks, missing: Blocks):
        total = self._count(blocks)
        before = total - self._count(missing) if len(missing) < len(blocks) else 0
        self.total, self.before, self.done = total, before, before
        self._bar = tqdm(total=total, initial=before, desc="indexing", unit=" windows", disable=None, smoothing=0.05)
        self._started = self._told = time.monotonic()

    @staticmethod
    def _count(blocks: Blocks) -> int:
        """Windows of blocks; a whole scene's are counted without looking at its blocks."""
        scenes = {scene.key: scene for scene, _ in blocks}
        counts = Counter(scene.key for scene, _ in blocks)
        # Blocks are of about one size; the estimate is exact where all of a scene are meant.
        return sum(round(scenes[key].windows * count / scenes[key].blocks) for key, count in counts.items())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def advance(self, windows: int) -> None:
        """Counts windows that are written or left out."""
        self.done += windows
        self._bar.update(windows)
        moment = time.monotonic()
        if self._bar.disable and moment - self._told > LOG_SECONDS:
            self._told = moment
            rate = (self.done - self.before) / (moment - self._started)
            left = max(0, self.total - self.done) / max(rate, 1e-9)
            tell(f"{self.done:,} of {self.total:,} windows, {rate:,.1f} a second, {left / 60:.1f} minutes left")


def write_skipped(output: Path, skipped: Sequence[dict[str, Any]]) -> None:
    """Names in INDEX/skipped.jsonl what could not be indexed, one a line."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
    replace_text(output / SKIPPED, "".join(lines))


def check_skipped(skipped: Sequence[dict[str, Any]], max_skipped: int, output: Path | None) -> None:
    """
    Ends a run that leaves too much out.

    Args:
        skipped: `scene` and `reason` of each.
        max_skipped: how many there may be.
        output: folder of the index, where they are named first; None: nowhere.

    Raises:
        `ValueError`: naming the last one.
    """
    if output is not None:
        write_skipped(output, skipped)
    if len(skipped) > max_skipped:
        raise ValueError(
            f"{len(skipped)} scenes cannot be read, more than --max-skipped {max_skipped} allows; the last one: "
            f"{skipped[-1]['reason']} What is encoded stays; mend the scenes or raise --max-skipped, and run again."
        )


def tell(text: str) -> None:
    """Prints a line on standard error."""
    print(text, file=sys.stderr, flush=True)
