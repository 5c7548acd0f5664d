"""
`geosearch index`: scenes to an index, resumable at any moment.

Blocks of windows are encoded one after the other and written as files below INDEX/blocks; a run that was killed finds
them there and goes on. When all are there, they are united into the parts of the index.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from modeling_lrsclip.encoding.encoder import Encoder, embed_batches, load_encoder
from modeling_lrsclip.encoding.towers import image_batch_size
from modeling_lrsclip.files.atomic import PARTIAL, replace_text, replacing
from modeling_lrsclip.published.registry import resolve

from .block_reader import Block, BlockReader
from .footprints import footprints
from .index_store import (
    METADATA,
    PARTS,
    IndexProblem,
    finish_publishing,
    now,
    open_index,
    publish,
    row_schema,
    row_table,
)
from .plan import Plan, PlannedScene, WindowOptions, make_plan
from .scenes import content_hash, find_scenes
from .windows import WindowSize


BLOCKS, SHARDS, SKIPPED, LOCK = "blocks", "shards", "skipped.jsonl", ".lock"
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class IndexJob:
    """
    One `geosearch index` command.

    Attributes:
        scenes: files, folders, patterns, STAC documents, tables ([`~geosearch.scenes.find_scenes`]).
        output: folder of the index; made, or added to.
        model: folder, Hub id or checkpoint file; None: the one that the index was made with.
        options: fields of [`~geosearch.plan.WindowOptions`] that were given; the others are those of the index, or defaults.
        device: where the model runs, for example `cpu` or `cuda:0`; None: a GPU where there is one.
        dtype: of the towers: `float32`, `bfloat16`, `float16`; None: float16 on a GPU, float32 on a CPU.
        batch_size: windows encoded at once, at most.
        readers: threads that read ahead; None: by the number of cores.
        max_skipped: scenes that may be unreadable before the run stops.
        drop_missing: take out the windows of scenes that are no longer on disk.
        asset: key of the asset to take from STAC items.
        tokenizer: for a checkpoint file that comes without one.
    """

    scenes: Sequence[str]
    output: Path
    model: str | None = None
    options: dict[str, Any] | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 64
    readers: int | None = None
    max_skipped: int = 100
    drop_missing: bool = False
    asset: str | None = None
    tokenizer: str | None = None

    def load_encoder(self) -> Encoder:
        """The model, on its device."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or ("float16" if device.startswith("cuda") else "float32")
        given = self.model or self._metadata().get("model", {}).get("id")
        if given is None:
            raise ValueError(f"{self.output} is a new index: name the --model that its windows are encoded with.")
        options = {"batch_size": self.batch_size, "dtype": DTYPES[dtype]}
        return load_encoder(resolve(given), device, tokenizer=self.tokenizer, **options)

    def plan(self, encoder: Encoder) -> Plan:
        """
        Return what is to be done, compared with the index as it is.

        Raises:
            `ValueError`: for arguments that do not fit each other or the index.
        """
        index = self._metadata()
        found = find_scenes(self.scenes, self.asset)
        model = describe_model(encoder)
        options = self._options(index, encoder)
        if index:
            open_index(self.output).check_model(model["weights_sha256"])
            model = index["model"]
        plan = make_plan(found, options, model, index or None)
        plan.dropped = plan.gone if self.drop_missing else []
        return plan

    def _metadata(self) -> dict[str, Any]:
        return open_index(self.output).metadata if (self.output / METADATA).is_file() else {}

    def _options(self, index: dict[str, Any], encoder: Encoder) -> WindowOptions:
        given = {name: value for name, value in (self.options or {}).items() if value is not None}
        if not index:
            given.setdefault("sizes", (WindowSize(encoder.model.config.vision_config.image_size),))
            return WindowOptions(**given)
        known = WindowOptions.from_dict(index["windows"])
        asked = WindowOptions(**{**{name: getattr(known, name) for name in known.__dataclass_fields__}, **given})
        if asked != known:
            before, after = known.to_dict(), asked.to_dict()
            names = [name for name in before if before[name] != after[name]]
            told = ", ".join(f"{name} {before[name]} and not {after[name]}" for name in names)
            raise IndexProblem(f"{self.output} was made with {told}: leave the option out, or use another --output.")
        return known


def describe_model(encoder: Encoder) -> dict[str, Any]:
    """Return what identifies a model in `index.json`."""
    path = os.path.abspath(encoder.path) if os.path.exists(encoder.path) else encoder.path
    known = encoder.describe()
    return {
        "id": path,
        "weights_sha256": known["weights_sha256"],
        "dimensions": encoder.model.config.projection_dim,
        **{name: known[name] for name in ("model_class", "image_processor", "dtype")},
    }


def build_index(job: IndexJob) -> dict[str, Any]:
    """
    Does a whole `geosearch index` command in this process.

    Returns:
        Content of `index.json`, with `encoded`: windows encoded by this run, and `seconds` that took.

    Raises:
        `ValueError`: one sentence for what cannot be done; finished blocks stay for the next run.
    """
    with locked(job.output):
        finish_publishing(job.output)
        encoder = job.load_encoder()
        plan = job.plan(encoder)
        tell_plan(plan)
        check_skipped(plan.skipped, job.max_skipped, job.output)
        encoded = encode_blocks(plan, plan.blocks(), job, encoder, job.output / BLOCKS)
        content = finish_index(job.output, plan, [job.output / BLOCKS])
        return {**content, **encoded}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Keeps other processes from writing into a folder; the system lets go when this one dies.

    Raises:
        `ValueError`: where another is writing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is not a folder: name another --output.") from error
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{folder} is being written by another process: wait for it, or use another --output."
        ) from error
    try:
        for path in (*folder.glob(f".*.{PARTIAL}"), *folder.glob(".*.next")):  # of a process that was killed
            path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def tell_plan(plan: Plan) -> None:
    """Says on standard error what was found."""
    windows = sum(scene.windows for scene in plan.scenes)
    new = len(plan.scenes) - len(plan.changed)
    parts = [
        f"{new} new scenes",
        f"{len(plan.changed)} changed",
        f"{len(plan.sources) - len(plan.changed)} in the index",
    ]
    _tell(f"{', '.join(parts)}: {windows:,} windows to encode")
    if plan.gone:
        fate = "are taken out" if plan.dropped else "stay in it (--drop-missing takes them out)"
        _tell(f"{len(plan.gone)} scenes of the index are no longer on disk and {fate}: {_few(plan.gone)}")
    if plan.skipped:
        _tell(
            f"{len(plan.skipped)} cannot be indexed and are named in {SKIPPED}; the first: {plan.skipped[0]['reason']}"
        )
    if plan.coordinates == "pixels":
        _tell("no scene has coordinates: places are told in pixels")


def _few(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- encoding


def encode_blocks(
    plan: Plan, blocks: Sequence[tuple[PlannedScene, int]], job: IndexJob, encoder: Encoder, folder: Path
) -> dict[str, Any]:
    """
    Encodes the blocks that have no file in `folder` yet.

    Args:
        plan: they belong to.
        blocks: scene and number of each, those of one scene together.
        job: for its `batch_size`, `readers` and `max_skipped`.
        encoder: the model.
        folder: of the blocks' files.

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
    readers = job.readers or (max(2, min(16, cores - 1)) if on_gpu else max(1, min(4, cores)))
    batch_size = image_batch_size(encoder.model, job.batch_size)
    reader = BlockReader(plan.options, encoder.processor.image_processor, batch_size, readers, pin=on_gpu)
    started, encoded = time.perf_counter(), 0
    with Progress(blocks, missing, plan.options) as progress, _BlockWriter(plan, folder, job.max_skipped) as writer:

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
            told = [{"scene": scene, "reason": reason} for scene, reason in self._unreadable.items()]
            check_skipped([*self.plan.skipped, *told], self.max_skipped, None)
        while self._waiting:  # a kill loses the block in hand and at most the one before it
            self._waiting.pop(0).result()
        self._waiting.append(self._submit(block))
        return True

    def _submit(self, block: Block) -> Future:
        return self._pool.submit(write_block, block, self.plan.model["dimensions"], self.folder)


def write_block(block: Block, dimensions: int, folder: Path) -> None:
    """
    Writes a block's rows and, in the file's metadata, what else came of it; it is on disk before it has its name.

    Args:
        block: whose windows are all encoded.
        dimensions: D, of a vector.
        folder: of the index or shard.
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
    time_taken = pa.scalar(facts.timestamp).cast(row_schema(1).field("timestamp").type) if facts.timestamp else None
    table = row_table(
        facts.path,
        boxes,
        np.full(len(boxes), block.scale),
        outlines,
        middles,
        vectors,
        gsd=facts.gsd,
        crs=facts.crs,
        timestamp=time_taken and time_taken.as_py(),
    )
    came = {
        "scene": facts.path,
        "rows": len(boxes),
        "empty": block.empty,
        "unreadable": unreadable,
        "reason": reason,
        "rendering": block.rendering.to_dict() if block.rendering else None,
        "sha256": content_hash(facts.files) if block.number == 0 else None,
    }
    with replacing(folder / block.scene.block_name(block.number)) as growing:
        pq.write_table(table.replace_schema_metadata({"block": json.dumps(came)}), growing, compression="none")


class Progress:
    """Windows done, how many a second, and the time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(
        self,
        blocks: Sequence[tuple[PlannedScene, int]],
        missing: Sequence[tuple[PlannedScene, int]],
        options: WindowOptions,
    ):
        total, before = self._count(blocks, options), 0
        if len(missing) < len(blocks):
            before = total - self._count(missing, options)
        self.total, self.before, self.done = total, before, before
        self._bar = tqdm(total=total, initial=before, desc="indexing", unit=" windows", disable=None, smoothing=0.05)
        self._started = self._told = time.monotonic()

    @staticmethod
    def _count(blocks: Iterable[tuple[PlannedScene, int]], options: WindowOptions) -> int:
        """Windows of blocks; a whole scene's are counted without looking at its blocks."""
        numbers: dict[str, tuple[PlannedScene, list[int]]] = {}
        for scene, number in blocks:
            numbers.setdefault(scene.key, (scene, []))[1].append(number)
        count = 0
        for scene, some in numbers.values():
            # Blocks are of about one size; the estimate is made exact when all of a scene are meant.
            count += scene.windows if len(some) == scene.blocks else round(scene.windows * len(some) / scene.blocks)
        return count

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
            _tell(f"{self.done:,} of {self.total:,} windows, {rate:,.1f} a second, {left / 60:.1f} minutes left")


# -------------------------------------------------------------------------------------------------------- finishing


def finish_index(output: Path, plan: Plan, folders: Sequence[Path]) -> dict[str, Any]:
    """
    Unites encoded blocks with the index as it was, and takes the blocks away.

    Args:
        output: folder of the index.
        plan: all of whose blocks are there.
        folders: with the blocks' files.

    Returns:
        Content of `index.json`.

    Raises:
        `ValueError`: where no window came of any scene.
    """
    files, missing = {}, 0
    for scene, number in plan.blocks():
        name = scene.block_name(number)
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        missing += path is None
        files[name] = path
    if missing:
        raise ValueError(f"{missing} of {len(files)} blocks of {output} are not encoded: run geosearch index again.")
    before = open_index(output).metadata if (output / METADATA).is_file() else {}
    if before and (before["model"]["weights_sha256"], before["windows"]) != (
        plan.model["weights_sha256"],
        plan.options.to_dict(),
    ):
        raise IndexProblem(f"{output} holds windows of another model or form than these blocks: merge them elsewhere.")
    kept = {
        path: plan.sources.get(path, facts)
        for path, facts in before.get("sources", {}).items()
        if path not in plan.dropped
    }
    sources, skipped = _collect(plan, files.values(), kept)
    write_skipped(output, skipped)
    if before and sources == before["sources"]:
        content = before
    else:
        if not any(facts["windows"] for facts in sources.values()):
            raise ValueError(
                f"no window of {len(plan.scenes)} scenes can be indexed; the last: {skipped[-1]['reason']}"
            )
        content = publish(
            output,
            [*(output / PARTS / part["name"] for part in before.get("parts", [])), *files.values()],
            {**_metadata(plan, before), "sources": dict(sorted(sources.items()))},
            # Rows of scenes that were encoded come from their blocks alone.
            replaced=[path for path, facts in sources.items() if facts is not kept.get(path)],
        )
    for folder in folders:
        if folder.is_relative_to(output):
            shutil.rmtree(folder, ignore_errors=True)
    return content


def _collect(plan: Plan, files: Iterable[Path], kept: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts of all sources by path, the `kept` ones included, and all that was skipped, from what the blocks say."""
    came: dict[str, dict[str, Any]] = {}
    for path in files:
        block = json.loads(pq.read_schema(path).metadata[b"block"])
        scene = came.setdefault(block["scene"], {"windows": 0, "empty": 0, "unreadable": 0})
        scene["windows"] += block["rows"]
        for name in ("empty", "unreadable"):
            scene[name] += block[name]
        for name in ("reason", "rendering", "sha256"):
            scene[name] = scene.get(name) or block[name]
    sources, skipped = dict(kept), list(plan.skipped)
    for scene in plan.scenes:
        facts, result = scene.facts, came[scene.facts.path]
        reason = result.pop("reason")
        if result["unreadable"]:
            skipped.append({"scene": facts.path, "reason": reason, "windows": result["unreadable"]})
            if not result["windows"]:
                continue  # tried again by the next run; of a scene that was fine before, the windows of then stay
        elif not result["windows"]:
            reason = (
                f"{facts.path} holds too little: more than {plan.options.max_empty:.0%} of every window is nothing."
            )
            skipped.append({"scene": facts.path, "reason": reason, "windows": result["empty"]})
        sources[facts.path] = {
            "files": [list(file) for file in facts.files],
            "width": facts.width,
            "height": facts.height,
            "crs": facts.crs,
            "transform": list(facts.transform),
            "gsd": facts.gsd,
            "timestamp": facts.timestamp,
            **result,
        }
    return sources, skipped


def _metadata(plan: Plan, before: dict[str, Any]) -> dict[str, Any]:
    moment = now()
    return {
        "created": before.get("created", moment),
        "updated": moment,
        "model": plan.model,
        "windows": plan.options.to_dict(),
        "coordinates": plan.coordinates,
        "preprocessing": {
            "format": "text",
            "expression": "bands to 8-bit RGB as in sources[scene].rendering; nothing filled with the window's mean "
            "colour; then the model's image processor",
        },
        "software": {name: version(name) for name in ("torch", "transformers", "rasterio", "pyarrow")},
    }


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
