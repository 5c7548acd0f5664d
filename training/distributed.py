"""
Processes and devices: gathering embeddings with gradient, precision, and the ways of holding a model. The only file that
talks to the process group.

W processes share a global batch of B pairs. The launch file (training/accelerate/) chooses between one process,
DistributedDataParallel, FSDP2 (no process has the whole model) and DeepSpeed ZeRO-2 (nor the whole optimizer). Weights,
gradients and the loss stay float32 under all of them and autocast does the mixed precision, so that the result is that of
one process. The 0-d `logit_scale`, which FSDP2 cannot shard, is kept whole on every process, outside of what is wrapped:
its key and its shape stay.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    compare_versions,
    is_deepspeed_available,
    parse_flag_from_env,
    set_seed,
)
from datasets.exceptions import DatasetsError


LONGEST_STEP = timedelta(minutes=30)  # that a process waits for the others while all do the same
LONGEST_ALONE = timedelta(hours=6)  # while one works for all: opens data, validates, writes, publishes
# What gloo says of processes that have ended or stand still; NCCL has an exception for it.
_LOST_PROCESS = ("Timed out waiting", "timeout", "Connection closed", "Connection reset", "monitoredBarrier")
USER_ERRORS = (ValueError, OSError, DatasetsError)  # whose message says enough
_LAUNCH_FILES = {
    DistributedType.NO: "one process or DistributedDataParallel (ddp.yaml)",
    DistributedType.FSDP: "FSDP2 (fsdp2.yaml)",
    DistributedType.DEEPSPEED: "DeepSpeed (deepspeed_zero2.yaml)",
}
Loaded = TypeVar("Loaded")


# ---------------------------------------------------------------------------------------------------------- gathering


def is_alone() -> bool:
    """Whether this is the only process of the run."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(local: torch.Tensor) -> torch.Tensor:
    """
    `local` of all processes, concatenated in rank order, without gradient.

    Args:
        local (`(B / W, ...)`): of one shape on every process.

    Returns:
        `(B, ...)`; `local` itself with one process.
    """
    if is_alone():
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def gather_with_gradient(local: torch.Tensor | None) -> torch.Tensor | None:
    """
    [`gather`], through which gradients flow back to the process that the rows came from; None stays None.

    Every process must then compute the same loss on the gathered rows. So each knows its gradient without asking the
    others: its own rows', times W, since DistributedDataParallel divides the sum over the processes by W. A parameter
    that the loss takes directly (the logit scale) has the whole gradient everywhere, which the same division of W
    equal summands leaves as it is. The result is the gradient of one process on the whole batch. (The published code
    gathers without gradient and loses part of it.)
    """
    if local is None or is_alone():
        return local
    return _Gather.apply(local)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local):
        return gather(local)

    @staticmethod
    def backward(ctx, gradient):
        share = len(gradient) // dist.get_world_size()
        first = dist.get_rank() * share
        return gradient[first : first + share] * dist.get_world_size()


def smallest_count(count: int, device: torch.device) -> int:
    """Return the smallest of the processes' counts."""
    return int(gather(torch.tensor([count], device=device)).min())


def average_gradient(parameter: torch.nn.Parameter) -> None:
    """Replace the gradient of a parameter that no wrapper reduces by the mean over the processes."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


_kept: list[dist.ProcessGroup] = []


def cpu_group() -> dist.ProcessGroup | None:
    """Make a group of all processes whose CPUs talk, past any GPU; None with one process. All must call it."""
    if is_alone():
        return None
    _kept.append(dist.new_group(backend="gloo", timeout=LONGEST_STEP))
    return _kept[-1]


def largest(number: int, group: dist.ProcessGroup | None) -> int:
    """Return the largest `number` that any process of the group of [`cpu_group`] passed."""
    if group is None:
        return number
    agreed = torch.tensor([number])
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    return int(agreed)


class LostProcessError(OSError):
    """Another process of the run has ended, or stands still."""


def explain_lost_processes(error: RuntimeError, work: str) -> LostProcessError | None:
    """
    Say in a sentence what was waited for where another process has ended or stands still.

    Args:
        error: of what all processes do together.
        work: that they were at, in words that follow "while".

    Returns:
        the error to raise instead; None where `error` is of another kind.
    """
    message = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not any(words in message for words in _LOST_PROCESS):
        return None
    return LostProcessError(
        f"Process {dist.get_rank()} waited for the others of this run, one of which has ended or stands still, while "
        f"{work} ({message}); look what it said last, end those that are left, and go on with --resume."
    )


def wait_for_all(work: str) -> None:
    """
    Wait until all processes are here, at most [`LONGEST_ALONE`]; every process must call it where one has worked for all,
    so that no other wait is longer than [`LONGEST_STEP`].

    Args:
        work: in words that follow "while".

    Raises:
        [`LostProcessError`]: naming the work.
    """
    group = _patient_group()
    if group is None:
        return
    try:
        dist.monitored_barrier(group, timeout=LONGEST_ALONE)
    except RuntimeError as error:
        if lost := explain_lost_processes(error, work):
            raise lost from error
        raise


_patient: dict[dist.ProcessGroup, dist.ProcessGroup | None] = {}


def _patient_group() -> dist.ProcessGroup | None:
    """The group for [`wait_for_all`], made once: that takes all processes itself, each of which waits [`LONGEST_STEP`]."""
    if not dist.is_initialized():
        return None
    if dist.group.WORLD not in _patient:
        _patient[dist.group.WORLD] = cpu_group()
    return _patient[dist.group.WORLD]


class MistakeError(ValueError):
    """A mistake that the first process found; all processes raise it together."""


def first_process_first(accelerator: Accelerator, load: Callable[[], Loaded]) -> Loaded:
    """
    Call `load` on each process; the others follow the first, which fetches and prepares the files that they then find.

    Args:
        accelerator: knows which process is the first.
        load: reads data or models; the same on every process.

    Returns:
        what `load` returns on this process.

    Raises:
        [`MistakeError`]: on all processes where `load` fails on the first, so that none waits for it.
    """
    loaded, failure = None, None
    _patient_group()  # before one is busy
    if accelerator.is_main_process:
        try:
            loaded = load()
        except USER_ERRORS as error:
            failure = error
    wait_for_all("the first one opened data and model")
    (message,) = broadcast_object_list([failure and str(failure)])
    if message is not None:
        raise MistakeError(message) from failure
    return loaded if accelerator.is_main_process else load()


# ------------------------------------------------------------------------------------------------------------ devices


def start_processes(precision: str, seed: int, folder: Path, trackers: Sequence[str]) -> Accelerator:
    """
    Have the processes of a run meet.

    Args:
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        seed: of all random numbers.
        folder: of the run.
        trackers: that the run is logged with, beside its own log.

    Returns:
        the accelerator that the launch file describes.

    Raises:
        `ValueError`: for a precision or a launch file that cannot be had, see [`choose_precision`], [`check_launch`].
    """
    device = PartialState(cpu=on_cpu(), timeout=LONGEST_STEP).device
    project = ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard"))
    options = {"log_with": list(trackers) or None, "project_config": project}
    accelerator = make_accelerator(choose_precision(precision, device.type), **options)
    # Taking the process group apart waits for gloo's threads with the interpreter's lock held, and such a thread may be
    # waiting for the lock to let go of a tensor: neither would go on. So it is kept while the process lives.
    if dist.is_initialized():
        _kept.append(dist.group.WORLD)
    use_all_cores(accelerator)
    set_seed(seed)
    return accelerator


def choose_precision(precision: str, device: str) -> str:
    """
    Return accelerate's name for a precision; "auto" is bf16 where that is faster than fp32: on GPUs and on CPUs with
    matrix units for it (AMX). AVX-512's bf16 multiplies no faster than its fp32 on the Intel processor it was measured
    on, so there "auto" is fp32.

    Raises:
        `ValueError`: for bf16 on a CPU that only emulates it, many times slower than fp32.
    """
    if device == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        fast_bf16 = device == "cpu" and has_bf16 and torch.cpu._is_amx_tile_supported()
        if device == "cpu" and precision == "bf16" and not has_bf16:
            raise ValueError(
                "This CPU has no bf16 arithmetic and would emulate it, many times slower than fp32; set precision to auto."
            )
    if precision == "auto":
        precision = "bf16" if fast_bf16 else "fp32"
    return "no" if precision == "fp32" else precision


def on_cpu() -> bool:
    """
    Whether the processes are to meet on the CPU: where `accelerate launch` was told so (its state does not look by
    itself this early), and where there are several of them and no GPU.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())


def use_all_cores(accelerator: Accelerator) -> None:
    """
    Share the cores among the processes of a machine without GPU: `accelerate launch` and, where it starts several,
    `torchrun` give each one thread.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or ("TORCHELASTIC_RUN_ID" in os.environ and processes > 1)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))


# ------------------------------------------------------------------------------------------------- sharded models


def check_launch(precision: str) -> None:
    """
    Check what the launch file asks for; looks at the environment only, so that it can be called before anything is
    loaded.

    Args:
        precision: the run's, by accelerate's name.

    Raises:
        `ValueError`: for what is not installed, not supported, or does not go together.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if not is_deepspeed_available():
            raise ValueError("The launch file asks for DeepSpeed, which is not installed; pip install deepspeed.")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("0", "1", "2"):
            raise ValueError(
                f"DeepSpeed's ZeRO stage is {stage}; stages up to 2 are supported, beyond it take fsdp2.yaml."
            )
    elif not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    elif os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("The launch file asks for FSDP version 1; set fsdp_version to 2, as in fsdp2.yaml.")
    elif compare_versions("torch", "<", "2.7") or compare_versions("accelerate", "<", "1.15"):
        raise ValueError(
            "FSDP2 with a parameter that is not sharded takes torch 2.7 and accelerate 1.15; pip install -U."
        )
    elif parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true; set it to false, it cannot load the 0-d logit_scale."
        )
    if precision == "fp16":
        raise ValueError(
            "precision is fp16, whose loss scaling is for one process and DDP only; set it to bf16 or fp32."
        )


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """
    Make the accelerator that the launch file describes, on a machine without GPU too, where accelerate by itself would
    quietly take DistributedDataParallel instead of FSDP2.

    Args:
        precision: the run's, by accelerate's name.
        options: of `Accelerator`.

    Raises:
        `ValueError`: see [`check_launch`].
    """
    check_launch(precision)
    accelerator = Accelerator(mixed_precision=precision, **options)
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has the whole model."""
    return accelerator.distributed_type == DistributedType.FSDP


def runs_deepspeed(accelerator: Accelerator) -> bool:
    """Whether no process has the whole optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """
    Check that this launch can read a checkpoint. Under DistributedDataParallel and FSDP2 the number of processes may be
    another one than before; the result is then equal but for rounding.

    Raises:
        `ValueError`: for one that was saved in another way, or under DeepSpeed by another number of processes.
    """
    # Folders of a checkpoint as accelerate writes it.
    ways = (("pytorch_model_fsdp_0", DistributedType.FSDP), ("pytorch_model", DistributedType.DEEPSPEED))
    saved = next((way for name, way in ways if (folder / name).is_dir()), DistributedType.NO)
    now = accelerator.distributed_type if accelerator.distributed_type in _LAUNCH_FILES else DistributedType.NO
    if saved != now:
        raise ValueError(
            f"{folder} was saved under {_LAUNCH_FILES[saved]} and this run is launched otherwise; resume it with that, or "
            "start anew from an exported model (model.init)."
        )
    processes = len(list(folder.glob("random_states_*.pkl")))
    if saved == DistributedType.DEEPSPEED and processes != accelerator.num_processes:
        raise ValueError(
            f"{folder} was saved by {processes} processes and there are {accelerator.num_processes} now, which DeepSpeed "
            f"cannot do; launch {processes}."
        )
