"""Batches of a step, read by processes of their own: how many read, how their batches come over, and what ends a wait."""

import contextlib
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import active_children
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, get_worker_info

from modeling_lrsclip import LRSCLIPProcessor
from modeling_lrsclip.encoding.model_inputs import PixelBatcher

from ..signals import leave_signals_to_the_parent, limited
from .pairs import INPUT_IDS, CaptionedImages
from .sources import DataConfig
from .visiting_order import VisitSampler


MOST_WORKERS = 8  # processes that read images, unless data.workers says more
LONGEST_READ = 1500  # seconds that a step waits for its batch; less than for other processes, which would be blamed
_LATE = 20  # seconds more for torch to say so by itself, which it does not where a reader stops within a batch
# How torch's messages begin where the processes that read have ended, hang, or have no file descriptors left.
_LOST_WORKERS = ("DataLoader ", "Pin memory thread ", "Too many open files")


def count_workers(config: DataConfig, device: str) -> int:
    """
    Number of processes that read images for one training process: `data.workers`, else on a GPU the machine's cores shared among
    its training processes, one left for each, at most `MOST_WORKERS`; on a CPU none, since training needs the cores.
    """
    if config.workers is not None:
        return config.workers
    if device == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class Collator:
    """
    Items to model inputs: `pixel_values` (B, 3, H, W), `input_ids` (B, L), `short_input_ids` (B, L_short); beside them
    `ids`, the rows' names, and `skipped`, the rows left out. Where no usable row was found, only these and `fault`.
    """

    def __init__(self, processor: LRSCLIPProcessor):
        self.processor, self.pixels = processor, PixelBatcher(processor.image_processor)

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        batch = {"ids": [item["id"] for item in items], "skipped": [row for item in items for row in item["skipped"]]}
        if faults := [item["fault"] for item in items if "fault" in item]:
            return batch | {"fault": faults[0]}
        batch["pixel_values"] = self.pixels([item["image"] for item in items])
        for kind, name in INPUT_IDS.items():
            if f"{kind}_text" in items[0]:
                # No attention mask: what stands after end-of-text cannot reach it in a causal tower.
                ids = map(torch.tensor, self.processor.encode_text([item[f"{kind}_text"] for item in items]))
                filler = self.processor.tokenizer.pad_token_id
                batch[name] = pad_sequence(list(ids), batch_first=True, padding_value=filler)
        if get_worker_info() is None:
            return batch
        return {name: _sendable(value) if torch.is_tensor(value) else value for name, value in batch.items()}


def _sendable(tensor: torch.Tensor) -> torch.Tensor | np.ndarray:
    """
    The tensor in shared memory, of which another process is told the name only; where /dev/shm is full or no file can
    be opened, an array, which is written through a pipe. Left to torch, the first would be tried when nobody can answer.
    """
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError):
        return tensor.numpy()


def load_batches(
    images: CaptionedImages, processor: LRSCLIPProcessor, visits: VisitSampler, device: torch.device
) -> Iterator[dict[str, Any]]:
    """
    Load the batches of a process, read by processes of their own where `data.workers` says so.

    Args:
        images: the rows to train on.
        processor: makes their pixels and token ids.
        visits: which rows each step takes; it gives each process its share and resumes by itself, so that the result
            needs no `accelerator.prepare`.
        device: that the batches are for.

    Yields:
        what [`Collator`] returns, on the CPU.

    Raises:
        `RuntimeError`: where the processes that read are lost, see [`explain_lost_workers`].
    """
    workers, warned = count_workers(images.config, device.type), False
    # Whatever ends the run: the exit would wait for one that stands still.
    Finalize(None, _kill_readers, exitpriority=1)
    loader = DataLoader(
        images,
        batch_sampler=visits,
        collate_fn=Collator(processor),
        num_workers=workers,
        worker_init_fn=_start_worker,
        # Its own: it draws a seed, which the random numbers of a resumed run must not notice.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        **({"prefetch_factor": images.config.prefetch_factor, "timeout": LONGEST_READ} if workers else {}),
    )
    for batch in _without_hanging(loader, images, visits.start + 1):
        piped = {name: torch.from_numpy(value) for name, value in batch.items() if isinstance(value, np.ndarray)}
        if piped and not warned:
            warned = True
            warnings.warn(
                "There is no shared memory left for batches (/dev/shm is full, or ulimit -n is low), so they come through "
                "pipes, which is slower; give it room (docker run --shm-size 8g).",
                stacklevel=2,
            )
        yield batch | piped


def _without_hanging(loader: DataLoader, images: CaptionedImages, step: int) -> Iterator[dict[str, Any]]:
    """The loader's batches from this step on; the wait for each is limited."""
    batches = iter(loader)
    for number in itertools.count(step):
        with limited(LONGEST_READ + _LATE, lambda: _no_batch(images, number, "a read hangs")):  # noqa: B023 (is now)
            try:
                batch = next(batches, None)
            except (OSError, EOFError) as error:
                if not loader.num_workers or str(error).startswith("Caught "):  # by the reader, which goes on
                    raise
                raise RuntimeError(f"DataLoader worker is gone: {error}") from error
        if batch is None:
            return
        yield batch


def _no_batch(images: CaptionedImages, step: int, reason: str) -> str:
    sources = ", ".join(sorted(images.pairs.locations)[:3])
    return (
        f"The processes that read {sources} have ended, or sent no batch for step {step} in {LONGEST_READ} s ({reason}). "
        "Look at the memory, /dev/shm and ulimit -n of this machine, set data.workers lower or to 0, and go on with "
        "--resume."
    )


def _start_worker(_worker: int) -> None:
    leave_signals_to_the_parent()
    # By default what cannot be sent is printed and dropped, and the other side waits for it.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, _batch: Any) -> None:
    print(f"A batch could not be sent to the training process: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _kill_readers() -> None:
    for process in active_children():
        process.kill()  # they ignore SIGTERM


def explain_lost_workers(error: RuntimeError, images: CaptionedImages, step: int) -> OSError | None:
    """
    Say in a sentence that the processes that read data have ended or hang, and end those that are left.

    Args:
        error: of a training step.
        images: that they read.
        step: whose batch was waited for.

    Returns:
        the error to raise instead; None where `error` is of another kind.
    """
    message = " ".join(str(error).split())
    if not message.startswith(_LOST_WORKERS):
        return None
    with contextlib.suppress(AttributeError, ValueError):  # on Windows; outside of the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for those killed now
    _kill_readers()
    return OSError(_no_batch(images, step, message))
