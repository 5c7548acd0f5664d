"""Small scenes written by rasterio, and a tiny model to encode them with."""

from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine
from rasterio.transform import from_origin

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.train_tokenizer import train_tokenizer
from tests.conftest import LONG, SHORT, tower_configs


def write_scene(path: Path, pixels: np.ndarray, crs="EPSG:32633", transform: Affine | None = None, **profile) -> Path:
    """A GeoTIFF of (bands, lines, columns) pixels, of 10 m in UTM zone 33 unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {
        "driver": "GTiff",
        "crs": crs,
        "transform": transform or from_origin(400_000, 5_500_000, 10, 10),
        **profile,
    }
    if count == 3 and pixels.dtype == np.uint8 and profile["driver"] == "GTiff":
        profile.setdefault("photometric", "RGB")
    with rasterio.open(path, "w", height=height, width=width, count=count, dtype=pixels.dtype, **profile) as file:
        file.write(pixels)
    return path


def noise(bands: int, height: int, width: int, dtype="uint8", seed: int = 0) -> np.ndarray:
    """Blotches of random values, which differ from window to window."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((bands, height // 16 + 1, width // 16 + 1))
    values = np.kron(coarse, np.ones((16, 16)))[:, :height, :width] * 0.8 + rng.random((bands, height, width)) * 0.2
    top = {"uint8": 255, "uint16": 4000, "int16": 4000, "float32": 1, "float64": 1}[dtype]
    return (values * top).astype(dtype)


def tiny_checkpoint(folder: Path) -> Path:
    """A model of two layers that looks at 32 x 32 pixels, written into a folder."""
    from transformers import CLIPTokenizer

    train_tokenizer(LONG + SHORT, vocab_size=700).save_pretrained(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    LRSCLIPModel(LRSCLIPConfig(**tower_configs(tokenizer))).eval().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    LRSCLIPProcessor(LRSCLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder
