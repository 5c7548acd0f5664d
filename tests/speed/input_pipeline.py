"""
How fast images get from tars to batches, and what two million pairs cost.

    python -m tests.speed.input_pipeline [--published DIR] [--side 512 1024] [--workers 2] [--rounds 3]
    python -m tests.speed.input_pipeline --pairs 2000000 [--format parquet tar jsonl] [--folder DIR] [--workers 2]

The first command makes 64 tars of JPEG tiles under RS5M's names and keys and reads them with both loaders in turn, into
batches of 224 x 224 pixels; images/s of wall time and of CPU time (of all processes), the ratio is the median of the
rounds. `--published` is a checkout of `om-ai-lab/RS5M`, whose `dataloader.py:get_wds_loader` is run as it is; without
it, the same pipeline is built from the `webdataset` package, which must be installed. Its transform is CLIP's, of Pillow
and torch. Ours also tokenizes the captions, which RS5M's loader does not.

The second command writes so many pairs of 4 x 4 pixels, and tells how long a fresh process takes from opening them to
its first batch of 512 for a model of 32 x 32 pixels, how fast it goes on, and the memory that it and its workers hold.
"""

import argparse
import importlib
import importlib.util
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from modeling_lrsclip import LRSCLIPImageProcessor, LRSCLIPProcessor
from modeling_lrsclip.train_tokenizer import train_tokenizer
from training.data.batches import Collator
from training.data.pairs import CaptionedImages, DataConfig, load_pairs
from training.data.visiting_order import VisitSampler


TARS = [f"{subset}-train-{number:04d}.tar" for subset in ("pub11", "rs3") for number in range(32)]  # as in RS5M
LONG = (
    "A grey road runs from the left edge to the right edge, and three red cars are parked beside row {0} of houses. "
    * 5
)
SHORT = "A road and {0} houses."
MEAN, STD = [torch.tensor(values).view(3, 1, 1) for values in (
    [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
)]  # fmt: skip


def make_processor(side: int = 224) -> LRSCLIPProcessor:
    texts = [text.format(number) for number in range(100) for text in (LONG, SHORT)]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LRSCLIPProcessor(LRSCLIPImageProcessor(**size), train_tokenizer(texts, vocab_size=1000))


def jpeg(side: int, rng: np.random.Generator) -> bytes:
    """A tile of fields and grain, at the bytes per pixel of an aerial photograph."""
    fields = Image.fromarray(rng.integers(0, 255, (side // 32, side // 32, 3), dtype=np.uint8)).resize((side, side))
    grain = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    stored = io.BytesIO()
    Image.blend(fields, grain, 0.5).save(stored, "jpeg", quality=90)
    return stored.getvalue()


def write_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, side: int, each: int) -> int:
    """RS5M's 64 tars with `each` tiles; returns the mean bytes of a tile."""
    rng, total = np.random.default_rng(0), 0
    for name in TARS:
        with tarfile.open(folder / name, "w") as tar:
            for number in range(each):
                content = jpeg(side, rng)
                total += len(content)
                write_member(tar, f"{number:08d}.img_content", content)
                write_member(tar, f"{number:08d}.img_name", f"{number}.jpg".encode())
                write_member(tar, f"{number:08d}.caption", LONG.format(number).encode())
    return total // (len(TARS) * each)


def clip_transform(image: Image.Image) -> torch.Tensor:
    """CLIP's preprocessing (openai/CLIP clip/clip.py `_transform`) without torchvision; (3, 224, 224)."""
    scale = 224 / min(image.size)
    image = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    left, top = (round((length - 224) / 2) for length in image.size)
    image = image.crop((left, top, left + 224, top + 224)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return (pixels - MEAN) / STD


def their_loader(published: Path | None, folder: Path, workers: int, batch: int) -> Iterable:
    """RS5M's loader of the tars in `folder`."""
    if published is None:
        import webdataset

        def decode(key, value):
            if key.endswith(".img_content"):
                return clip_transform(Image.open(io.BytesIO(value)))
            return value.decode() if key.endswith((".img_name", ".caption")) else value

        urls = [str(folder / name) for name in TARS]
        rows = webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode(decode)
        return DataLoader(rows, num_workers=workers, batch_size=batch)
    for name in (
        "clip",
        "torchvision",
        "torchvision.utils",
        "torchvision.transforms",
    ):  # imported there, not used here
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(dict.fromkeys(("save_image", "ToTensor", "Compose")))
    spec = importlib.util.spec_from_file_location("rs5m_dataloader", published / "dataloader.py")
    module = importlib.util.module_from_spec(spec)
    most = Image.MAX_IMAGE_PIXELS
    spec.loader.exec_module(module)
    Image.MAX_IMAGE_PIXELS = most
    return module.get_wds_loader(str(folder), str(folder), workers, batch, 1000, clip_transform)[0]


def our_loader(config: DataConfig, processor: LRSCLIPProcessor, batch: int, steps: int) -> DataLoader:
    pairs = load_pairs(config, ["long", "short"])
    data = CaptionedImages(pairs, config, seed=0, size=224)
    return DataLoader(
        data,
        batch_sampler=VisitSampler(pairs.order(0), batch, steps),
        collate_fn=Collator(processor),
        num_workers=config.workers,
        prefetch_factor=config.prefetch_factor if config.workers else None,
    )


def measure(loader: Iterable, images_of: Callable) -> tuple[float, float]:
    """Images a second, of wall time and of CPU time of this process and its ended workers."""
    before, start, images = cpu_seconds(), time.perf_counter(), 0
    for batch in loader:
        images += len(images_of(batch))
    wall = time.perf_counter() - start
    del batch, loader
    return images / wall, images / (cpu_seconds() - before)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times.ru_utime + times.ru_stime for times in used)


def compare(arguments: argparse.Namespace, side: int, processor: LRSCLIPProcessor) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, batch = Path(name), 32
        each = 16 if side <= 512 else 8
        stored = write_tars(folder, side, each)
        images = each * len(TARS)
        print(f"{images} tiles of {side} x {side} pixels, {stored // 1024} KiB each; {arguments.workers} workers")
        source = {"path": str(folder), "columns": {"long": "caption", "short": "caption"}}
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            theirs = their_loader(arguments.published, folder, arguments.workers, batch)
            rates.setdefault("RS5M's loader", []).append(measure(theirs, lambda items: items["img_content"]))
            for margin in (None, 2.0, 1.0):
                config = DataConfig(train=[source], streaming=True, workers=arguments.workers, jpeg_margin=margin)
                ours = our_loader(config, processor, batch, images // batch)
                label = f"data.jpeg_margin={'null' if margin is None else margin:}"
                rates.setdefault(label, []).append(measure(ours, lambda items: items["pixel_values"]))
        base = rates["RS5M's loader"]
        for label, measured in rates.items():
            wall, cpu = (statistics.median(values) for values in zip(*measured))
            ratios = [[ours[kind] / theirs[kind] for ours, theirs in zip(measured, base)] for kind in (0, 1)]
            speedups = " and ".join(f"{statistics.median(ratio):.2f}x" for ratio in ratios)
            print(f"  {label:24s} {wall:7.1f} images/s   {cpu:7.1f} images per CPU second   {speedups}")


def write_pairs(folder: Path, form: str, count: int) -> DataConfig:
    """`count` pairs of 4 x 4 pixels; written once and found again."""
    stored = io.BytesIO()
    Image.new("RGB", (4, 4), "green").save(stored, "png")
    image, folder = stored.getvalue(), folder / f"{form}-{count}"
    shard = 50_000
    if not folder.exists():
        folder.mkdir(parents=True)
        for first in range(0, count, shard):
            numbers = range(first, min(first + shard, count))
            texts = {"long_text": [LONG.format(n) for n in numbers], "short_text": [SHORT.format(n) for n in numbers]}
            name = f"train-{first // shard:05d}"
            if form == "parquet":
                table = pa.table({"image": [{"bytes": image, "path": None}] * len(numbers)} | texts)
                pq.write_table(table, folder / f"{name}.parquet", row_group_size=1000)
            elif form == "tar":
                with tarfile.open(folder / f"{name}.tar", "w") as tar:
                    for number, long, short in zip(numbers, *texts.values()):
                        write_member(tar, f"{number:08d}.png", image)
                        fields = {"long_text": long, "short_text": short}
                        write_member(tar, f"{number:08d}.json", json.dumps(fields).encode())
            else:
                (folder / "tile.png").write_bytes(image)
                with (folder / "captions.jsonl").open("a") as file:
                    for long, short in zip(*texts.values()):
                        file.write(json.dumps({"image": "tile.png", "long_text": long, "short_text": short}) + "\n")
    return DataConfig(train=str(folder / "captions.jsonl" if form == "jsonl" else folder), streaming=True)


def open_and_read(form: str, count: int, arguments: argparse.Namespace) -> None:
    """In a process of its own: a line of what it takes."""
    processor, parent = make_processor(32), psutil.Process()
    config = write_pairs(arguments.folder, form, count)
    config.workers = arguments.workers
    before, start = own_memory(parent), time.perf_counter()
    loader = our_loader(config, processor, 512, arguments.steps)
    opened = time.perf_counter() - start
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    start, seen, held = time.perf_counter(), 0, []
    for batch in batches:
        seen += len(batch["ids"])
        held.append(sum(own_memory(process) for process in (parent, *parent.children())) - before)
    rate = seen / (time.perf_counter() - start)
    early, late = (max(half) / 2**20 for half in (held[: len(held) // 2], held[len(held) // 2 :]))
    print(
        f"{form:8s}{len(loader.dataset):10,d}{opened:9.1f} s{first:12.1f} s{rate:12.0f}{early:11.0f} MiB{late:8.0f} MiB"
    )


def own_memory(process: psutil.Process) -> int:
    """Bytes of a process' share of what is no file (Linux); pages shared with others are divided among them."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def scale(arguments: argparse.Namespace) -> None:
    print("             rows       open   first batch   samples/s   memory beyond the start, first and second half")
    for form in arguments.format:
        for count in sorted({arguments.pairs // 20, arguments.pairs}):
            write_pairs(arguments.folder, form, count)
            environment = os.environ | {"LRSCLIP_CACHE": tempfile.mkdtemp(dir=arguments.folder)}
            for _ in range(1 if form == "parquet" else 2):  # the second time with the index of the first
                options = ["--folder", str(arguments.folder), "--workers", str(arguments.workers), "--steps"]
                command = [
                    sys.executable,
                    "-m",
                    "tests.speed.input_pipeline",
                    "--one",
                    form,
                    "--pairs",
                    str(count),
                ]
                subprocess.run([*command, *options, str(arguments.steps)], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of om-ai-lab/RS5M")
    parser.add_argument("--side", type=int, nargs="+", default=[512, 1024], help="pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="measure start-up and memory (Linux) on so many instead")
    parser.add_argument(
        "--format", nargs="+", choices=["parquet", "tar", "jsonl"], default=["parquet", "tar", "jsonl"]
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pairs", help="for --pairs")
    parser.add_argument("--steps", type=int, default=60, help="of 512, for --pairs")
    parser.add_argument("--one", choices=["parquet", "tar", "jsonl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        open_and_read(arguments.one, arguments.pairs, arguments)
        return
    if arguments.pairs:
        scale(arguments)
        return
    processor = make_processor()
    for side in arguments.side:
        compare(arguments, side, processor)


if __name__ == "__main__":
    main()
