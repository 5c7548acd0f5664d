"""Small scenes written by rasterio."""

from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.transform import from_origin


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
