"""Small scenes written by rasterio, a tiny model to encode them with, and indexes of rows in memory."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import torch
from affine import Affine
from rasterio.transform import from_origin

from geosearch.index_store import Index, open_index
from geosearch.index_writer import publish
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


def write_index(folder: str | Path, tables: Iterable[pa.Table], metadata: dict[str, Any]) -> Index:
    """
    Writes a whole index from tables in memory, in place of one that is there.

    Args:
        folder: is made.
        tables: with the columns of [`~geosearch.index_store.row_schema`].
        metadata: as in [`~geosearch.index_writer.publish`].

    Returns:
        The index, opened.
    """
    folder = Path(folder)
    staging = folder / ".given"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    files = []
    for number, table in enumerate(tables):
        files.append(staging / f"{number:05d}.parquet")
        pq.write_table(table, files[-1])
    publish(folder, files, metadata)
    shutil.rmtree(staging)
    return open_index(folder)
