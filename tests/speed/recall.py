"""
Time and memory of recall at 1, 5 and 10 in both directions, against CLIP_benchmark's way: the whole matrix of scores,
and for each k the best k as one-hot rows.

    python -m tests.speed.recall [--published DIR] [--texts 100000] [--images 20000] [--width 512] [--way ours]

Random unit rows, five texts an image. Each way runs in a process of its own; the peak is what the process held beyond
the embeddings. `--published` is a checkout of `LAION-AI/CLIP_benchmark`, whose `recall_at_k` and `batchify` are run as
they are; without it, `recall_at_k` below does the same work. The figures must be the same.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from evaluation.retrieval import KS, retrieval_recall


BATCH = 64  # of CLIP_benchmark's command line


def embeddings(texts: int, images: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(M, D), (N, D), (N,): each text stands near its image, about as far as to be found half of the time."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = normalize(torch.randn(images, width, generator=generator))
    owners = torch.arange(texts) % images
    noise = normalize(torch.randn(texts, width, generator=generator))
    return image_embeds, normalize(image_embeds[owners] + 5 * noise), owners


def recall_at_k(scores: Tensor, positive_pairs: Tensor, k: int) -> Tensor:
    """(B,) share of the right candidates among the best k, by way of (B, k, candidates) one-hot rows."""
    hits = one_hot(scores.topk(k, dim=1)[1], num_classes=scores.shape[1])
    right = (hits * positive_pairs[:, None]).sum(dim=(1, 2))
    return right / positive_pairs.sum(dim=1)


def batchify(function: Callable, scores: Tensor, pairs: Tensor, size: int, device: str, k: int) -> Tensor:
    starts = range(0, len(scores), size)
    return torch.cat([function(scores[start : start + size], pairs[start : start + size], k=k) for start in starts])


def full_matrix(checkout: str | None) -> Callable[[Tensor, Tensor, Tensor], dict[str, float]]:
    """CLIP_benchmark's way, a function as [`~evaluation.retrieval.retrieval_recall`]."""
    at_k, batches = recall_at_k, batchify
    if checkout:
        path = Path(checkout) / "clip_benchmark" / "metrics" / "zeroshot_retrieval.py"
        spec = importlib.util.spec_from_file_location("zeroshot_retrieval", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        at_k, batches = module.recall_at_k, module.batchify

    def recall(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
        scores = texts @ images.t()
        pairs = torch.zeros_like(scores, dtype=bool)
        pairs[torch.arange(len(scores)), owners] = True
        figures = {}
        for direction, *both in (("text_to_image", scores, pairs), ("image_to_text", scores.T, pairs.T)):
            for k in KS:
                hits = batches(at_k, *both, BATCH, "cpu", k=k) > 0
                figures[f"{direction}_R@{k}"] = 100 * hits.double().mean().item()
        return figures

    return recall


def measure(way: str, options: argparse.Namespace) -> dict:
    """Seconds, peak bytes and figures of one way, in this process."""
    inputs = embeddings(options.texts, options.images, options.width)
    recall = retrieval_recall if way == "ours" else full_matrix(options.published)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, worked = time.perf_counter(), time.process_time()
    metrics = recall(*inputs)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    metrics.pop("mR", None)
    return {"seconds": seconds, "worked": worked, "peak": peak * 1024, "more": (peak - before) * 1024} | metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", help="checkout of LAION-AI/CLIP_benchmark")
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--way", choices=("ours", "theirs"), help="only one of them")
    parser.add_argument("--json", action="store_true", help="measure --way here and print JSON")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(measure(options.way, options)))
        return
    results = {}
    for way in [options.way] if options.way else ["ours", "theirs"]:
        command = [sys.executable, "-m", "tests.speed.recall", *sys.argv[1:], "--way", way, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{way}: ended with status {done.returncode} (-9: out of memory) {done.stderr[-300:]}")
            continue
        results[way] = stats = json.loads(done.stdout)
        print(
            f"{way}: {stats.pop('seconds'):.1f} s ({stats.pop('worked'):.1f} processor seconds), peak "
            f"{stats.pop('peak') / 2**30:.2f} GiB, of it {stats.pop('more') / 2**30:.2f} GiB beside the embeddings",
            flush=True,
        )
    if len(results) == 2:
        for name, value in results["ours"].items():
            assert abs(value - results["theirs"][name]) < 0.01, f"{name}: {value}, {results['theirs'][name]}"
        print("the figures are the same: " + ", ".join(f"{name} {value:.2f}" for name, value in stats.items()))


if __name__ == "__main__":
    main()
