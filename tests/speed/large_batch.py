"""
Memory and time of what lets a batch grow far beyond memory: the chunked loss, and a training step by cached gradients.

    python -m tests.speed.large_batch loss [--pairs 16384] [--width 512] [--chunk 1024] [--rounds 3]
    python -m tests.speed.large_batch step [--pairs 512] [--micro 16] [--limit 8] [--layers 12]

`loss`: forward and backward of the dense and of the chunked InfoNCE in turn, each in a process of its own; memory is what
they add to the process, the time ratio the median of the rounds. Losses and gradients must agree to 1e-5.

`step`: one optimizer step (SGD with momentum) of a ViT-B/16 with random weights, float32, captions of 100 +- 30 and
25 +- 8 tokens. Memory is that of the whole process. The plain step is measured at small batches and continued to the
whole one along a line; then both steps are made with the process held to `--limit` GB: by the system's allocator
(RLIMIT_DATA), which refuses the plain one.

Times are of this machine with what else it is doing; set OMP_NUM_THREADS to the number of free cores.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


ROOT = Path(__file__).parents[2]
GB = 10**9
SMALL_BATCHES = (8, 16, 32)  # at which the plain step is measured


def peak_memory() -> int:
    """Bytes: the most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------- what runs in a process of its own


def measure_loss(pairs: int, width: int, chunk: int | None, folder: str) -> dict:
    """Seconds and bytes of one forward and backward pass; the loss and gradients go to `folder`."""
    import torch
    from torch.nn.functional import normalize

    from training.losses import info_nce

    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(pairs, width, generator=generator), dim=-1)
    texts = normalize(images + 0.08 * torch.randn(pairs, width, generator=generator), dim=-1)
    inputs = [images.requires_grad_(), texts.requires_grad_(), torch.tensor(30.0, requires_grad=True)]
    few = [images[:64], texts[:64], inputs[2]]
    torch.autograd.grad(info_nce(*few, chunk and 16), few)  # the first call loads libraries
    before, start = peak_memory(), time.perf_counter()
    loss = info_nce(*inputs, chunk)
    gradients = torch.autograd.grad(loss, inputs)
    seconds, peak = time.perf_counter() - start, peak_memory() - before
    for name, value in zip(("loss", "images", "texts", "scale"), (loss.detach(), *gradients)):
        np.save(Path(folder) / f"{name}.npy", value.numpy())
    return {"seconds": seconds, "bytes": peak}


def measure_step(pairs: int, micro: int | None, limit: float | None, layers: int, folder: str) -> dict:
    """Seconds and bytes of one optimizer step, and its loss or, held to `limit` GB, the allocator's refusal."""
    import torch
    from accelerate import Accelerator

    from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel
    from training.config import LoopConfig, TrainConfig
    from training.data.pairs import DataConfig
    from training.loop import Trainer

    torch.manual_seed(0)
    towers = {"text_config": {"num_hidden_layers": layers}}
    towers["vision_config"] = {"num_hidden_layers": layers, "patch_size": 16}
    model = LRSCLIPModel(LRSCLIPConfig(**towers))
    loop = LoopConfig(batch_size=pairs, micro_batch_size=micro)
    config = TrainConfig(output_dir=folder, data=DataConfig(train="random"), loop=loop)
    trainer = Trainer(Accelerator(cpu=True), model, None, range(pairs), config)
    batch = {"pixel_values": torch.randn(pairs, 3, 224, 224)}
    for name, mean, deviation in (("input_ids", 100, 30), ("short_input_ids", 25, 8)):
        lengths = (mean + deviation * torch.randn(pairs)).round().clamp(4, 248).int().tolist()
        batch[name] = torch.full((pairs, max(lengths)), model.config.text_config.eos_token_id)
        for row, length in zip(batch[name], lengths):
            row[: length - 1] = torch.randint(400, 40000, (length - 1,))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GB), int(limit * GB)))
    start = time.perf_counter()
    try:
        losses, _ = trainer.step(batch)
        outcome = f"loss {losses.loss.item():.6f}"
    except (RuntimeError, MemoryError) as error:
        if limit is None:
            raise
        outcome = f"refused: {str(error).splitlines()[0][-80:]}"
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory(), "outcome": outcome}


# ----------------------------------------------------------------------------------------------------- the two tables


def in_a_process(what: str, **arguments) -> dict:
    """What `measure_loss` or `measure_step` returns in a fresh process (this one stays small: see getrusage(2))."""
    command = [sys.executable, "-m", "tests.speed.large_batch", "measure", what, json.dumps(arguments)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def compare_losses(pairs: int, width: int, chunk: int, rounds: int) -> None:
    chunks, taken = (None, chunk), {None: [], chunk: []}
    with tempfile.TemporaryDirectory() as folder:
        folders = {size: Path(folder) / str(size) for size in chunks}
        for _ in range(rounds):
            for size in chunks:
                folders[size].mkdir(exist_ok=True)
                arguments = {"pairs": pairs, "width": width, "chunk": size, "folder": str(folders[size])}
                taken[size].append(in_a_process("loss", **arguments))
        different = {
            path.stem: float(np.abs(np.load(path) - np.load(folders[chunk] / path.name)).max())
            for path in sorted(folders[None].iterdir())
        }
    print(f"InfoNCE of {pairs} pairs, width {width}, float32, forward and backward")
    print(f"{'':24s} {'memory':>10s} {'seconds':>9s}")
    memory = {size: statistics.median(one["bytes"] for one in taken[size]) for size in chunks}
    for size, title in ((None, "dense"), (chunk, f"chunks of {chunk} rows")):
        seconds = statistics.median(one["seconds"] for one in taken[size])
        print(f"{title:24s} {memory[size] / GB:7.2f} GB {seconds:9.2f}")
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(taken[None], taken[chunk]))
    print(f"chunked: {memory[None] / memory[chunk]:.1f}x less memory at {ratio:.2f}x the time ({rounds} rounds)")
    print("largest differences: " + ", ".join(f"{name} {value:.1e}" for name, value in different.items()))
    if max(different.values()) > 1e-5:
        raise SystemExit("the chunked loss or its gradients differ from the dense ones by more than 1e-5")


def compare_steps(pairs: int, micro: int, limit: float, layers: int) -> None:
    print(
        f"A training step of ViT-B/16 ({layers} layers) at a batch of {pairs}, captions of 100 and 25 tokens, float32"
    )
    print(f"{'':40s} {'memory':>11s} {'seconds':>9s}")

    def row(title: str, taken: dict) -> None:
        print(f"{title:40s} {taken['bytes'] / GB:8.2f} GB {taken['seconds']:9.1f}  {taken['outcome']}", flush=True)

    def measure(size: int, micro_batch_size: int | None, held_to: float | None) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"pairs": size, "micro": micro_batch_size, "limit": held_to, "layers": layers}
            return in_a_process("step", **arguments, folder=folder)

    small = [size for size in SMALL_BATCHES if size < pairs]
    taken = [measure(size, None, None) for size in small]
    for size, one in zip(small, taken):
        row(f"plain, batch {size}", one)
    slope, fixed = np.polyfit(small, [one["bytes"] for one in taken], 1)
    print(f"{f'plain, batch {pairs}, along that line':40s} {(fixed + slope * pairs) / GB:8.2f} GB")
    row(f"plain, held to {limit:g} GB", measure(pairs, None, limit))
    row(f"cached, {micro} pairs at a time, held to {limit:g} GB", measure(pairs, micro, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    loss = tables.add_parser("loss")
    loss.add_argument("--pairs", type=int, default=16384)
    loss.add_argument("--width", type=int, default=512)
    loss.add_argument("--chunk", type=int, default=1024)
    loss.add_argument("--rounds", type=int, default=3)
    step = tables.add_parser("step")
    step.add_argument("--pairs", type=int, default=512)
    step.add_argument("--micro", type=int, default=16)
    step.add_argument("--limit", type=float, default=8.0, help="GB")
    step.add_argument("--layers", type=int, default=12)
    measure = tables.add_parser("measure", help="one measurement, printed as JSON; the tables start these")
    measure.add_argument("what", choices=["loss", "step"])
    measure.add_argument("arguments", type=json.loads)
    options = vars(parser.parse_args())
    table = options.pop("table")
    if table == "measure":
        measured = {"loss": measure_loss, "step": measure_step}[options["what"]]
        print(json.dumps(measured(**options["arguments"])))
    else:
        {"loss": compare_losses, "step": compare_steps}[table](**options)


if __name__ == "__main__":
    main()
