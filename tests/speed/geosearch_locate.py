"""
How well and how fast `geosearch locate` finds what a text describes, beside the published procedure (SeLo v1).

    python -m tests.speed.geosearch_locate --model runs/demo/lrsclip/final [--mosaics 15] [--seed 4] [--windows 256 384 256,512]

Both sides get the same drawn landscapes (`evaluation.benchmarks.scene_mosaics`), texts and model; the seconds of both
include the texts. Ours reads vectors that were encoded once, which is timed apart. Rsu, Ras (lower is better), Rda and Rmi
are SeLo's measures; AP is the average precision of the map's cells against the described regions, every eighth pixel.
Choose a window on other landscapes (another `--seed`) than those whose figures are reported.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from evaluation.benchmarks.scene_mosaics import write_mosaics
from evaluation.localization import localization_metrics, similarity_map
from geosearch.index import IndexJob, build_index
from geosearch.index_store import open_index
from geosearch.locate import similarity_map as indexed_map
from geosearch.windows import WindowSize
from modeling_lrsclip.encoding import Encoder, embed_texts, load_encoder


MEASURES = ("Rsu", "Ras", "Rda", "Rmi")
EVERY = 8  # pixels between the cells of average precision


def as_levels(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`(H, W)` similarities as a map of `shape`, 0 to 255, as SeLo makes it of its windows."""
    values = cv2.resize(values, shape[::-1], interpolation=cv2.INTER_LINEAR)
    values = values - values.min()
    return (255 * values / max(values.max(), 1e-6)).astype(np.uint8)


def average_precision(heat: np.ndarray, polygons: list) -> float:
    """Area below the curve of precision against recall of a map's cells, cells of one level together."""
    wanted = np.zeros(heat.shape, np.uint8)
    for polygon in polygons:
        cv2.fillPoly(wanted, [np.array(polygon, np.int32)], 1)
    scores, wanted = heat[::EVERY, ::EVERY].ravel().astype(int), wanted[::EVERY, ::EVERY].ravel()
    order = np.argsort(-scores, kind="stable")
    scores, wanted = scores[order], wanted[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each level
    hits = np.cumsum(wanted)[last]
    return float((hits / (last + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])


def published(root: Path, queries: Sequence[dict], encoder: Encoder) -> list[np.ndarray]:
    """Maps of SeLo v1, scene by scene."""
    maps = {}
    for image in dict.fromkeys(query["image"] for query in queries):
        texts = [query["text"] for query in queries if query["image"] == image]
        with Image.open(root / image) as scene:
            heats = similarity_map(encoder.model, encoder.processor, scene.convert("RGB"), texts)
        maps |= {(image, text): heat for text, heat in zip(texts, heats, strict=True)}
    return [maps[query["image"], query["text"]] for query in queries]


def indexed(root: Path, folder: Path, queries: Sequence[dict], encoder: Encoder) -> list[np.ndarray]:
    """Maps over an index."""
    index = open_index(folder)
    texts = embed_texts(encoder.model, encoder.processor, [query["text"] for query in queries]).numpy()
    return [indexed_map(index, vector, query["image"]).values for vector, query in zip(texts, queries, strict=True)]


def report(name: str, heats: Sequence[np.ndarray], queries: Sequence[dict], seconds: float, first: float) -> None:
    figures = [localization_metrics(heat, query["polygons"]) for heat, query in zip(heats, queries, strict=True)]
    means = [np.mean([figure[measure] for figure in figures]) for measure in MEASURES]
    means.append(np.mean([average_precision(heat, query["polygons"]) for heat, query in zip(heats, queries)]))
    print(f"{name:24s}" + "".join(f"{mean:8.3f}" for mean in means) + f"{seconds:10.1f} s{first:10.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, such as that of make demo")
    parser.add_argument("--mosaics", type=int, default=15, help="landscapes; 15 have about as many queries as AIR-SLT")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--windows", nargs="+", default=["256"], help="as of geosearch index --window")
    options = parser.parse_args()
    encoder = load_encoder(options.model)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_mosaics(root, options.mosaics, seed=options.seed)
        queries = [json.loads(line) for line in (root / "localization.jsonl").read_text().splitlines()]
        with Image.open(root / queries[0]["image"]) as scene:
            shape = scene.size[::-1]
        print(f"{len(queries)} queries on {options.mosaics} landscapes of {shape[1]} x {shape[0]} pixels")
        print(" " * 24 + "".join(f"{name:>8s}" for name in (*MEASURES, "AP")) + f"{'queries':>12s}{'indexing':>12s}")
        started = time.perf_counter()
        heats = published(root, queries, encoder)
        report("SeLo v1", heats, queries, time.perf_counter() - started, 0.0)
        for number, windows in enumerate(options.windows):
            output = root / f"index-{number}"
            sizes = tuple(map(WindowSize.parse, windows.split(",")))
            started = time.perf_counter()
            build_index(IndexJob([str(root / "mosaics")], output, options.model, {"sizes": sizes}, device="cpu"))
            first, started = time.perf_counter() - started, time.perf_counter()
            maps = indexed(root, output, queries, encoder)
            seconds = time.perf_counter() - started
            report(f"windows of {windows}", [as_levels(heat, shape) for heat in maps], queries, seconds, first)


if __name__ == "__main__":
    main()
