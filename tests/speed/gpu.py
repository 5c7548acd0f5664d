"""
Training steps on a GPU: samples a second, share of the GPU's peak, memory, by model, batch and compilation.

    python -m tests.speed.gpu [--models b16 l14] [--batches 64 128 256 512] [--compile off on]
        [--micro 64] [--steps 10] [--output gpu.json]

Random weights and pixels, captions of 100 +- 30 and 25 +- 8 tokens, bf16 autocast over float32 weights, SGD with momentum:
`Trainer.step` as `training.train` runs it. The first steps (compilation, autotuning) are not counted. The share of the
peak (MFU) is the matrix-multiply operations of a step, counted by torch on its first 16 pairs, over its seconds and the
bf16 peak measured by one large product; the datasheet's figure, where known, is printed beside. The second forward pass
of cached gradients (`--micro N` adds them, N pairs at a time) is not counted: MFU is of the work that the batch needs.
A batch beyond the GPU's memory is said and ends that row of batches.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel

from .training import build_batch, our_step


# Towers of CLIP's published sizes.
MODELS = {
    "b32": {"vision_config": {"patch_size": 32}},
    "b16": {"vision_config": {"patch_size": 16}},
    "l14": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        "projection_dim": 768,
    },
}
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16
WARM_UP = 3  # steps
COUNTED = 16  # pairs


def measured_peak(size: int = 8192) -> float:
    """Operations a second of one large bf16 product."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds = []
    for _ in range(20):
        start.record()
        left @ right
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * size**3 / min(seconds)


def count_operations(name: str, batch: dict[str, torch.Tensor]) -> int:
    """Matrix-multiply operations of a step; compiled layers hide them, so an uncompiled model is counted."""
    with tempfile.TemporaryDirectory() as folder:
        step = our_step(build(name), batch, folder, dtype="bf16", compiled=False, device="cuda")
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def build(name: str) -> LRSCLIPModel:
    torch.manual_seed(0)
    return LRSCLIPModel(LRSCLIPConfig(**MODELS[name]))


def measure(name: str, pairs: int, compiled: bool, micro: int | None, steps: int) -> dict:
    """
    Seconds, bytes and operations of a step.

    Raises:
        `torch.OutOfMemoryError`: for a batch that the GPU does not hold.
    """
    torch.cuda.empty_cache()
    batch = build_batch(pairs, LRSCLIPConfig(**MODELS[name]))
    few = {kind: values[:COUNTED] for kind, values in batch.items()}
    operations = count_operations(name, few) / len(few["pixel_values"]) * pairs
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        step = our_step(
            build(name), batch, folder, dtype="bf16", compiled=compiled, device="cuda", micro_batch_size=micro
        )
        for _ in range(WARM_UP):
            step()
        seconds = []
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    taken = statistics.median(seconds)
    return {
        "model": name,
        "batch": pairs,
        "compile": compiled,
        "micro_batch_size": micro,
        "samples_per_second": pairs / taken,
        "seconds": taken,
        "operations": operations,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["b16", "l14"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--micro", type=int, help="pairs at a time, for cached gradients as well")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; tests.speed.training measures a step on a CPU")
    device, peak = torch.cuda.get_device_name(), measured_peak()
    known = next((f"{rate / 1e12:.0f}" for part, rate in DATASHEET.items() if part in device), "unknown")
    print(f"{device}: {peak / 1e12:.0f} TFLOP/s bf16 in one product, datasheet {known}; torch {torch.__version__}")
    print(f"{'':34s} {'samples/s':>10s} {'MFU':>6s} {'memory':>10s}")
    rows = []
    micro_batches = [None, options.micro] if options.micro else [None]
    for name, compiled, micro in itertools.product(options.models, options.compile, micro_batches):
        for pairs in options.batches:
            title = f"{name} batch {pairs}" + (" compiled" if compiled == "on" else "")
            title += f" micro {micro}" if micro else ""
            try:
                row = measure(name, pairs, compiled == "on", micro, options.steps)
            except torch.OutOfMemoryError:
                print(f"{title:34s} does not fit")
                break
            row["mfu"] = row["operations"] / row["seconds"] / peak
            rows.append(row)
            rate, memory = row["samples_per_second"], row["peak_bytes"] / 1e9
            print(f"{title:34s} {rate:10.1f} {row['mfu']:6.1%} {memory:7.1f} GB", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"device": device, "peak": peak, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
