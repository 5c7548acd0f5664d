"""What a run computes on and in which precision."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env


def choose_precision(precision: str, device: str) -> str:
    """
    accelerate's name for it; "auto" is bf16 where that is faster than fp32: on GPUs and on CPUs with matrix units for it
    (AMX). AVX-512's bf16 multiplies no faster than its fp32 on the Intel processor it was measured on, so there "auto" is
    fp32.

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
    `accelerate launch` and, where it starts several, `torchrun` give a process one thread; without a GPU the processes
    share the cores instead.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or ("TORCHELASTIC_RUN_ID" in os.environ and processes > 1)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
