"""
How fast semantic localization is, against the published loop, which cuts a scene up, encodes its windows one at a time
and averages pixel by pixel again for every query.

    python -m tests.speed.localization [--published DIR] [--side 2000] [--queries 4] [--dtype bf16]

Random weights of ViT-B/16 with 248 text positions and a drawn scene; both sides take the same weights, preprocessing,
scene and queries, from the scene's file to the four measures. `--published` is a checkout of
`xiaoyuan1996/SemanticLocalizationMetrics`, whose `split_image`, `generate_heatmap` and `SLM` are run as they are (with
scikit-image and scipy installed), with our encoder in the place of theirs; without it, `PublishedLoop` below does the
same work step by step. Neither keeps gradients. Ours in float32 must give the same map where it goes through JPEG too.
"""

import argparse
import importlib.util
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from evaluation.benchmarks.scene_mosaics import draw_mosaic
from evaluation.localization import localization_metrics, similarity_map
from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.train_tokenizer import train_tokenizer


SIZES = (256, 512, 768)
TILES = 8  # drawn scenes along each side
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
LEVELS = 2  # of 255 by which a pixel may differ: similarities are rounded to float32 in other orders


class SingleEncoder:
    """Encodes one window or text at a time, a text padded to the whole table, as the published encoders do."""

    def __init__(self, model: LRSCLIPModel, processor: LRSCLIPProcessor):
        self.model, self.processor = model, processor

    def image_encoder(self, model: None, path: str) -> np.ndarray:
        pixels = self.processor(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output)[0].numpy()

    def text_encoder(self, model: None, vocabulary: None, text: str) -> np.ndarray:
        ids = self.processor(text=[text], padding="max_length", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return normalize(self.model.get_text_features(input_ids=ids).pooler_output)[0].numpy()

    def cosine_sim(self, first: np.ndarray, second: np.ndarray) -> np.floating:
        return np.mean(first / np.linalg.norm(first) * (second / np.linalg.norm(second)))


class PublishedLoop:
    """What the published loop does for a query, in its order: crops to JPEG, one window at a time, pixel by pixel."""

    def __init__(self, encoder: SingleEncoder):
        self.encoder = encoder

    def locate(self, scene_file: str, text: str, regions: list, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
        self._cut(scene_file, folder)
        query = self.encoder.text_encoder(None, None, text)
        scene = cv2.imread(scene_file)
        total, count = np.zeros(scene.shape[:2]), np.zeros(scene.shape[:2])
        for name in os.listdir(folder):
            path = folder / name
            score = self.encoder.cosine_sim(query, self.encoder.image_encoder(None, path))
            top, bottom, left, right = map(int, path.stem.split("_"))
            total[top:bottom, left:right] += score
            count[top:bottom, left:right] += 1
            path.unlink()
        for row in range(total.shape[0]):
            for column in range(total.shape[1]):
                total[row, column] = total[row, column] / count[row, column]
        total -= total.min()
        heat = cv2.medianBlur(np.uint8(255 * (total / total.max())), 251)
        colors = cv2.applyColorMap(heat, cv2.COLORMAP_JET)
        for name, picture in (("m", heat), ("h", colors), ("a", cv2.addWeighted(scene, 0.7, colors, 0.3, 0))):
            cv2.imwrite(str(folder / f"{name}.jpg"), picture)
        heat = cv2.imread(str(folder / "m.jpg"), cv2.IMREAD_GRAYSCALE)
        for _ in range(2):  # the peaks are looked for twice there, for Ras and for Rda
            measures = localization_metrics(heat, regions)
        return heat, measures

    def _cut(self, scene_file: str, folder: Path) -> None:
        folder.mkdir()
        scene = cv2.imread(scene_file)
        height, width = scene.shape[:2]
        for side in SIZES:
            for start in (0, side // 2):
                for left in (min(x, width - side) for x in range(start, width, side)):
                    for top in (min(y, height - side) for y in range(start, height, side)):
                        crop = scene[top : top + side, left : left + side]
                        crop = cv2.resize(crop, (256, 256), interpolation=cv2.INTER_CUBIC)
                        cv2.imwrite(str(folder / f"{top}_{top + side}_{left}_{left + side}.jpg"), crop)


class PublishedCheckout:
    """The checkout's own functions with our encoder; its model, vocabulary and log are left out."""

    def __init__(self, checkout: Path, encoder: SingleEncoder):
        for name, attribute, value in (
            ("model_encoder", "Encoder", lambda model: encoder),
            ("model_init", "model_init", None),
        ):
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, value)
        sys.path[:0] = [str(checkout / "predict"), str(checkout)]
        spec = importlib.util.spec_from_file_location("generate_selo", checkout / "predict" / "generate_selo.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        quiet = logging.getLogger("published")
        quiet.disabled = True
        self.module.model = self.module.vocab = None
        self.module.logger = quiet
        self.measures = self.module.SLM()
        self.measures.logger = quiet

    def locate(self, scene_file: str, text: str, regions: list, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
        folder.mkdir()
        files = [str(folder / f"{name}.jpg") for name in ("h", "a", "m")]
        self.module.split_image(scene_file, list(SIZES), str(folder))
        self.module.generate_heatmap(scene_file, text, *files, str(folder))
        measures = self.measures.evaluate(files[2], regions)
        measures = {name.split()[1]: float(value) for name, value in measures.items()}
        return cv2.imread(files[2], cv2.IMREAD_GRAYSCALE), measures


def build(layers: int) -> tuple[LRSCLIPModel, LRSCLIPProcessor]:
    """ViT-B/16 with random weights; the tokenizer's size does not matter for the time."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a white plane beside two green houses"] * 3, vocab_size=600)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = special | {"num_hidden_layers": layers}
    vision = {"patch_size": 16, "num_hidden_layers": layers}
    model = LRSCLIPModel(LRSCLIPConfig(text_config=text, vision_config=vision)).eval()
    return model, LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer)


def check(ours: np.ndarray, theirs: list[tuple[np.ndarray, dict[str, float]]], regions: list[list]) -> None:
    for our_heat, (heat, measures), polygons in zip(ours, theirs, regions, strict=True):
        assert np.abs(our_heat.astype(int) - heat).max() <= LEVELS, "the maps differ"
        for name, value in localization_metrics(heat, polygons).items():
            assert abs(value - measures[name]) < 1e-6, f"{name} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of xiaoyuan1996/SemanticLocalizationMetrics")
    parser.add_argument("--side", type=int, default=2000, help="of the scene, pixels")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12, help="of both towers; fewer for a quick try")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of our towers; the published ones take fp32")
    options = parser.parse_args()
    model, processor = build(options.layers)
    encoder = SingleEncoder(model, processor)
    published = PublishedCheckout(options.published, encoder) if options.published else PublishedLoop(encoder)
    image, _, drawn = draw_mosaic(random.Random(0), TILES, options.side // TILES)
    queries = [drawn[index % len(drawn)] for index in range(options.queries)]
    texts, regions = [query.text for query in queries], [query.polygons for query in queries]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        scene_file = str(Path(folder) / "scene.png")
        image.save(scene_file)
        for number in range(options.rounds):
            start = time.perf_counter()
            theirs = [
                published.locate(scene_file, text, polygons, Path(folder) / f"{number}_{index}")
                for index, (text, polygons) in enumerate(zip(texts, regions, strict=True))
            ]
            middle = time.perf_counter()
            with Image.open(scene_file) as scene:
                speed = {"batch_size": options.batch_size, "dtype": DTYPES[options.dtype]}
                maps = similarity_map(model, processor, scene, texts, **speed)
            for heat, polygons in zip(maps, regions, strict=True):
                localization_metrics(heat, polygons)
            end = time.perf_counter()
            ratios.append((middle - start) / (end - middle))
            print(
                f"{image.width} x {image.height} pixels, {len(texts)} queries: published {middle - start:.1f} s, ours "
                f"({options.dtype}) {end - middle:.1f} s, {ratios[-1]:.2f}x",
                flush=True,
            )
    check(similarity_map(model, processor, image, texts, reference_io=True), theirs, regions)
    print(f"median {statistics.median(ratios):.2f}x; the maps through JPEG are the same")


if __name__ == "__main__":
    main()
