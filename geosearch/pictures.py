"""Pictures of an index's scenes, made as the model saw them: thumbnails, overviews, and an image to search with."""

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
from affine import Affine
from PIL import Image

from modeling_lrsclip.encoding.imagery import ImageError
from modeling_lrsclip.encoding.rasters import Raster, Rendering, fill_nothing

from .footprints import pixel_corners, to_lon_lat
from .index_store import Index
from .plan import WindowOptions


BACKGROUND = (238, 241, 244)  # of maps: what an overview shows where a scene has nothing
LONGEST_PICTURE = 4096  # pixels of the longer side that are ever shown


class ScenePictures:
    """
    The scenes of an index, opened when a picture of them is asked for.

    Args:
        index: knows how its scenes were cut, which bands were taken and how they were stretched.
    """

    def __init__(self, index: Index):
        self.index = index
        self.options = WindowOptions.from_dict(index.metadata["windows"])

    @property
    def scenes(self) -> list[str]:
        """Paths, sorted."""
        return sorted(self.index.metadata["sources"])

    def facts(self, scene: str) -> dict[str, Any]:
        """`width` and `height` in pixels, `crs`, `transform`, … of a scene."""
        return self.index.metadata["sources"][scene]

    def open(self, scene: str) -> Raster:
        """
        A scene's raster with the bands and the stretch that it was indexed with.

        Raises:
            [`~modeling_lrsclip.encoding.rasters.RasterError`]: for a file that cannot be used (any more).
        """
        raster = self.options.open(scene)
        raster.rendering = self._rendering(scene)
        return raster

    def _rendering(self, scene: str) -> Rendering:
        stored = self.facts(scene)["rendering"].items()
        return Rendering(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored})

    def picture(
        self, scene: str, pixel_box: tuple[int, int, int, int] | None = None, longest: int = 256
    ) -> Image.Image | None:
        """
        A part of a scene.

        Args:
            scene: path.
            pixel_box: left, top, width, height, cut at the scene's edges; None: the whole scene, from an overview.
            longest: most pixels of the picture's longer side; a smaller part is not enlarged.

        Returns:
            RGB image; None where the scene cannot be read (any more).
        """
        facts = self.facts(scene)
        left, top, width, height = pixel_box or (0, 0, facts["width"], facts["height"])
        right, bottom = min(left + width, facts["width"]), min(top + height, facts["height"])
        left, top = max(0, left), max(0, top)
        width, height = right - left, bottom - top
        factor = min(1.0, min(longest, LONGEST_PICTURE) / max(width, height))
        shape = (max(1, round(height * factor)), max(1, round(width * factor)))
        try:
            with self.open(scene) as raster:
                rgb, valid = raster.read(left, top, width, height, shape)
        except ImageError:
            return None
        if pixel_box is None:
            rgb[~valid] = BACKGROUND
            return Image.fromarray(rgb)
        return Image.fromarray(fill_nothing(rgb, valid))

    def corners(self, scene: str, pixel_box: tuple[int, int, int, int] | None = None) -> np.ndarray:
        """
        Corners of a part of a scene: upper left, upper right, lower right and lower left corner.

        Returns:
            `(4, 2)` longitudes and latitudes; longitudes go on beyond 180 rather than jump. Pixels for a scene without
            coordinates.
        """
        facts = self.facts(scene)
        box = pixel_box or (0, 0, facts["width"], facts["height"])
        if facts["crs"] is None:
            return pixel_corners(np.array([box]), Affine.identity())[0]
        corners = pixel_corners(np.array([box]), Affine(*facts["transform"]))[0]  # (4, 2)
        lon, lat = _to_lon_lat(facts["crs"])(*corners.T)
        return np.stack([lon[0] + (lon - lon[0] + 180) % 360 - 180, lat], axis=-1)

    def example(self, path: str | Path) -> Image.Image:
        """
        An image to search with, as the model would have seen it in the index: a chip that lies on an indexed scene is
        stretched to the scene's levels, any other to its own.

        Raises:
            [`~modeling_lrsclip.encoding.imagery.ImageError`]: for a file that cannot be used.
        """
        with self.options.open(str(path)) as raster:
            if (scene := self._scene_below(raster)) is not None:
                raster.rendering = self._rendering(scene)
            factor = min(1.0, LONGEST_PICTURE / max(raster.width, raster.height))
            shape = (max(1, round(raster.height * factor)), max(1, round(raster.width * factor)))
            rgb, valid = raster.read(0, 0, raster.width, raster.height, shape if factor < 1 else None)
        return Image.fromarray(fill_nothing(rgb, valid))

    def _scene_below(self, raster: Raster) -> str | None:
        """A stretched scene with the same bands that has the middle of a stretched raster inside; None: there is none."""
        dataset = raster.dataset
        if raster.rendering.low is None or dataset.crs is None:
            return None
        middle = dataset.transform @ (dataset.width / 2, dataset.height / 2)
        for scene in self.scenes:
            facts, rendering = self.facts(scene), self._rendering(scene)
            if facts["crs"] is None or rendering.low is None or rendering.bands != raster.bands:
                continue
            between = pyproj.Transformer.from_crs(dataset.crs.to_wkt(), facts["crs"], always_xy=True)
            x, y = between.transform(*middle)
            if np.isfinite(x):
                column, row = ~Affine(*facts["transform"]) @ (x, y)
                if 0 <= column < facts["width"] and 0 <= row < facts["height"]:
                    return scene
        return None


_to_lon_lat = lru_cache(maxsize=64)(to_lon_lat)


def data_uri(image: Image.Image, quality: int | None = 82) -> str:
    """An image within a page: JPEG of a quality from 1 to 95, or PNG for None."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=quality)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
