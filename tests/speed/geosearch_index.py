"""
How fast scenes are indexed, against encoding the same windows from memory; and how much memory a large scene takes.

    python -m tests.speed.geosearch_index rate [--side 1568] [--rounds 3] [--patch 32] [--device cpu] [--dtype float32]
    python -m tests.speed.geosearch_index memory [--side 20000] [--window 224]

`rate`: random weights of ViT-B; a GeoTIFF of four 16-bit bands in compressed tiles. One side indexes it (reading,
stretching, resizing, encoding and writing the blocks), the other embeds the same windows as a list of decoded images;
they take turns, and the ratio is the median of the rounds; that of the processor time of all threads, memory over file,
stands beside it. `memory`: the highest resident memory of a whole
`geosearch index` of a scene written for it, the start of the process included.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from rasterio.windows import Window

from geosearch.block_encoder import encode_blocks
from geosearch.index import BLOCKS, DTYPES, IndexJob
from geosearch.windows import WindowSize
from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.encoding import embed_images
from modeling_lrsclip.train_tokenizer import train_tokenizer
from tests.geosearch.small_scenes import tiny_checkpoint


def draw_scene(path: Path, side: int) -> None:
    """Four bands of 16 bits with blotches, tile by tile: the whole is never in memory."""
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 4, "dtype": "uint16", "nodata": 0}
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1}
    geo = {"crs": "EPSG:32633", "transform": from_origin(400_000, 5_500_000, 0.5, 0.5), "bigtiff": "IF_SAFER"}
    rng = np.random.default_rng(0)
    drawn = [
        np.kron(rng.integers(1, 3000, (4, 32, 32), dtype=np.uint16), np.ones((16, 16), np.uint16)) for _ in range(16)
    ]
    drawn = [tile + rng.integers(0, 60, tile.shape, np.uint16) for tile in drawn]
    with rasterio.open(path, "w", **profile, **tiles, **geo) as file:
        for number, (top, left) in enumerate(itertools.product(range(0, side, 512), repeat=2)):
            height, width = min(512, side - top), min(512, side - left)
            tile = drawn[number * 7 % 16][:, :height, :width]
            file.write(tile, window=Window(left, top, width, height))


def write_model(folder: Path, patch: int) -> None:
    """Random weights of ViT-B, with a tokenizer of a few words."""
    text = {"vocab_size": 600, "num_hidden_layers": 1}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    tokenizer = train_tokenizer(["a river", "two white tanks beside a road"], vocab_size=600)
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text["vocab_size"] = len(tokenizer)
    config = LRSCLIPConfig(text_config=text, vision_config=vision | {"image_size": 224, "patch_size": patch})
    torch.manual_seed(0)
    LRSCLIPModel(config).save_pretrained(folder)
    LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer).save_pretrained(folder)


def measure_rate(options: argparse.Namespace, folder: Path) -> dict:
    """Windows a second from the file and from memory, in turns."""
    draw_scene(folder / "scene.tif", options.side)
    write_model(folder / "model", options.patch)
    job = IndexJob(
        [str(folder / "scene.tif")],
        folder / "index",
        str(folder / "model"),
        {"sizes": (WindowSize(options.window),)},
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
    )
    encoder = job.load_encoder()
    plan = job.plan(encoder)
    images = windows_in_memory(plan)
    rates: dict[str, list[float]] = {"from the file": [], "from memory": []}
    costs: list[float] = []
    for number in range(options.rounds + 1):  # the first is for warming up
        begun = time.process_time()
        came = encode_blocks(plan, plan.blocks(), encoder, folder / str(number) / BLOCKS)
        between, started = time.process_time(), time.perf_counter()
        embed_images(
            encoder.model,
            encoder.processor,
            images,
            options.batch_size,
            DTYPES[options.dtype],
            workers=options.workers,
        )
        seconds = time.perf_counter() - started
        assert came["encoded"] == len(images)
        if number:
            rates["from the file"].append(came["encoded"] / came["seconds"])
            rates["from memory"].append(len(images) / seconds)
            costs.append((time.process_time() - between) / (between - begun))
    ratios = [file / memory for file, memory in zip(*rates.values())]
    return {
        "windows": len(images),
        **{name: round(statistics.median(values), 2) for name, values in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "processor_time_ratio": round(
            statistics.median(costs), 3
        ),  # where other programs take turns, this is steadier
    }


def windows_in_memory(plan) -> list[Image.Image]:
    """All windows of the plan's scenes as images, read beforehand."""
    images = []
    for scene in plan.scenes:
        with plan.options.open(scene.facts.path) as raster:
            for grid in scene.grids(plan.options):
                for number in range(grid.blocks):
                    for box in grid.block(number).reshape(-1, 4).tolist():
                        images.append(Image.fromarray(raster.read(*box)[0]))
    return images


def measure_memory(options: argparse.Namespace, folder: Path) -> dict:
    """Highest resident memory in MB of a whole command."""
    draw_scene(folder / "scene.tif", options.side)
    if options.patch:
        write_model(folder / "model", options.patch)
    else:
        tiny_checkpoint(folder / "model")
    command = [sys.executable, "-m", "geosearch", "index", str(folder / "scene.tif"), "--model", str(folder / "model")]
    command += ["--output", str(folder / "index"), "--window", str(options.window), "--device", "cpu"]
    started = time.perf_counter()
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    size = os.path.getsize(folder / "scene.tif") / 2**20
    seconds = time.perf_counter() - started
    return {
        "peak_MB": round(peak),
        "file_MB": round(size),
        "seconds": round(seconds, 1),
        "report": report.split(": ")[-1],
    }


def main() -> None:
    """Prints what was measured as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.speed.geosearch_index", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("what", choices=("rate", "memory"))
    parser.add_argument("--side", type=int, help="of the scene in pixels (1568; memory: 20000)")
    parser.add_argument("--window", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patch", type=int, help="of ViT-B (rate: 32; memory: none, a model of two layers)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that resize the windows in memory")
    options = parser.parse_args()
    options.side = options.side or (1568 if options.what == "rate" else 20_000)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "rate":
            options.patch = options.patch or 32
            print(json.dumps(measure_rate(options, Path(folder))))
        else:
            print(json.dumps(measure_memory(options, Path(folder))))


if __name__ == "__main__":
    main()
