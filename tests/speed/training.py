"""
One training step against the published model code, and where its time goes.

    python -m tests.speed.training [--published DIR] [--batch 32] [--rounds 3] [--dtype bf16] [--compile]
        [--profile]

ViT-B/16 with random weights, captions of 100 +- 30 and 25 +- 8 tokens; both sides take the same weights, pixels and
captions in turn: forward, both losses, backward, SGD with momentum. `--published` is a checkout of
`MitsuiChen14/LRSCLIP`, whose `forward` of `model/model_longclip.py` is run as it is in float32, all texts padded to 248,
in a process group of one; without it, plain `CLIPModel` at 248 takes its place. `--trimmed` is plain `CLIPModel` padded to
the longest text of each kind. The first losses must agree to 1e-4 in float32 (later ones differ: the published code gathers
without gradient and takes half the step).

The share of the peak: matrix-multiply operations of the step (counted by torch while it runs) over its seconds, beside
what one large matrix multiplication of the same type reaches here.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel
from training.config import LoopConfig, TrainConfig
from training.data.pairs import DataConfig
from training.loop import Trainer

from .published import published_model


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPTIONS = {"input_ids": (100, 30), "short_input_ids": (25, 8)}  # mean and deviation of the tokens
LONG_WEIGHT = 0.8
# Of the profile, what an operation's name begins with; the first that fits.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "aten::linear", "onednn"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "softmax, norms": ("aten::native_layer_norm", "aten::_softmax", "aten::_log_softmax"),
    "convolution": ("aten::convolution", "aten::mkldnn_conv", "aten::_conv", "aten::slow_conv", "aten::thnn_conv"),
    "optimizer": ("aten::_fused_sgd", "aten::_fused_adam"),
    "embedding tables": ("aten::embedding",),
    "copies, casts": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_"),
    "compiled kernels": ("torch-compiled", "graph_", "triton", "inductor"),
}

Step = Callable[[], float]


def build_model(layers: int, patch: int = 16) -> LRSCLIPModel:
    torch.manual_seed(0)
    towers = {"text_config": {"num_hidden_layers": layers}}
    towers["vision_config"] = {"num_hidden_layers": layers, "patch_size": patch}
    return LRSCLIPModel(LRSCLIPConfig(**towers))


def build_batch(pairs: int, config: LRSCLIPConfig) -> dict[str, torch.Tensor]:
    """Pixels, and token ids of mixed lengths, padded to the longest of each kind with the end of text."""
    generator, side = torch.Generator().manual_seed(1), config.vision_config.image_size
    batch = {"pixel_values": torch.randn(pairs, 3, side, side, generator=generator)}
    for name, (mean, deviation) in CAPTIONS.items():
        lengths = mean + deviation * torch.randn(pairs, generator=generator)
        lengths = lengths.round().clamp(4, config.text_config.max_position_embeddings).int().tolist()
        batch[name] = torch.full((pairs, max(lengths)), config.text_config.eos_token_id)
        for row, length in zip(batch[name], lengths):
            row[: length - 1] = torch.randint(400, 40000, (length - 1,), generator=generator)
    return batch


def our_step(
    model: LRSCLIPModel,
    batch: dict[str, torch.Tensor],
    folder: str,
    *,
    dtype: str,
    compiled: bool,
    device: str = "cpu",
    micro_batch_size: int | None = None,
) -> Step:
    """`Trainer.step` as `training.train` runs it."""
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if dtype == "fp32" else dtype)
    loop = LoopConfig(batch_size=len(batch["pixel_values"]), compile=compiled, micro_batch_size=micro_batch_size)
    config = TrainConfig(output_dir=folder, data=DataConfig(train="random"), loop=loop)
    trainer = Trainer(accelerator, model, None, range(loop.batch_size), config)
    trainer.embedder.train()
    return lambda: trainer.step(batch)[0].loss.item()


def other_step(model: torch.nn.Module, losses: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Step:
    """The plain loop around the losses of long and short texts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-4, momentum=0.9, dampening=0.1)

    def step() -> float:
        long, short = losses()
        loss = LONG_WEIGHT * long + (1 - LONG_WEIGHT) * short
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def published_step(checkout: Path, model: LRSCLIPModel, batch: dict[str, torch.Tensor]) -> Step:
    if not dist.is_initialized():  # the published forward gathers
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    theirs = published_model(checkout, model)
    long, short = (padded_to_the_table(batch[name], model.config, padding=0) for name in CAPTIONS)
    return other_step(theirs, lambda: theirs(batch["pixel_values"], long, short, 0))


def clip_step(model: LRSCLIPModel, batch: dict[str, torch.Tensor], trimmed: bool, dtype: str = "fp32") -> Step:
    """Plain transformers: one forward of images, long and short texts, padded to the table or to the longest."""
    texts = {
        name: batch[name]
        if trimmed
        else padded_to_the_table(batch[name], model.config, model.config.text_config.eos_token_id)
        for name in CAPTIONS
    }
    cast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        with cast:
            output = model(pixel_values=batch["pixel_values"], **texts, return_loss=True)
        return output.long_loss, output.short_loss

    return other_step(model, losses)


def padded_to_the_table(ids: torch.Tensor, config: LRSCLIPConfig, padding: int) -> torch.Tensor:
    """`(B, L)` -> `(B, 248)`, what follows the first end of text being `padding`."""
    text = config.text_config
    after = (ids == text.eos_token_id).int().cumsum(dim=1) > 1
    width = text.max_position_embeddings - ids.shape[1]
    return torch.nn.functional.pad(ids.masked_fill(after, padding), (0, width), value=padding)


def peak(dtype: torch.dtype, size: int = 4096) -> float:
    """Operations a second of one large matrix product."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    left @ right
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def first_step(step: Step) -> tuple[float, int]:
    """Its loss, and its matrix-multiply operations."""
    with FlopCounterMode(display=False) as counter:
        loss = step()
    return loss, counter.get_total_flops()


def print_profile(step: Step) -> None:
    """Share of a step's processor time by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    totals = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.0)
    rest = {}
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), None)
        if kind is None:
            rest[event.key] = event.self_cpu_time_total
        totals[kind or "elementwise and the rest"] += event.self_cpu_time_total
    whole = sum(totals.values())
    for kind, taken in sorted(totals.items(), key=lambda pair: -pair[1]):
        print(f"  {kind:28s} {taken / whole:6.1%}")
    most = sorted(rest.items(), key=lambda pair: -pair[1])[:6]
    print("  of the rest: " + ", ".join(f"{name} {taken / whole:.1%}" for name, taken in most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of MitsuiChen14/LRSCLIP")
    parser.add_argument("--trimmed", action="store_true", help="against plain CLIPModel, padding trimmed, same type")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="of each tower; fewer for a quick try")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of ours; the published side takes fp32")
    parser.add_argument("--compile", action="store_true", help="loop.compile of ours")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")
    options = parser.parse_args()

    model = build_model(options.layers)
    batch = build_batch(options.batch, model.config)
    if options.published:
        name, other = "the published code", published_step(options.published, model, batch)
    else:
        name = f"plain CLIPModel {'trimmed' if options.trimmed else 'at 248'}"
        dtype = options.dtype if options.trimmed else "fp32"
        other = clip_step(build_model(options.layers), batch, options.trimmed, dtype)
    with tempfile.TemporaryDirectory() as folder:
        ours = our_step(model, batch, folder, dtype=options.dtype, compiled=options.compile)
        compare(options, name, {name: other, "ours": ours})
        if options.profile:
            print_profile(ours)


def compare(options: argparse.Namespace, name: str, steps: dict[str, Step]) -> None:
    losses, counted = zip(*map(first_step, steps.values()))
    counted = dict(zip(steps, counted))
    if abs(losses[0] - losses[1]) > (1e-4 if options.dtype == "fp32" else 0.05):
        raise SystemExit(f"the first losses differ: {losses[0]:.6f} of {name}, {losses[1]:.6f} of ours")
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(options.rounds):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    rates = {dtype: peak(DTYPES[dtype]) for dtype in {"fp32", options.dtype}}
    for side, taken in seconds.items():
        step, dtype = statistics.median(taken), options.dtype if side == "ours" else "fp32"
        rate = counted[side] / step
        print(
            f"{side}: {options.batch / step:.2f} samples/s, {step:.2f} s a step, {counted[side] / 1e12:.2f} T operations, "
            f"{rate / 1e12:.3f} of {rates[dtype] / 1e12:.3f} TFLOP/s in {dtype} ({rate / rates[dtype]:.0%})"
        )
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name]))
    print(f"ours in {options.dtype}: {ratio:.2f}x the samples/s of {name} (median of {options.rounds} rounds)")


if __name__ == "__main__":
    main()
