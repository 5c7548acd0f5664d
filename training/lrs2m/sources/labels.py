"""Labels of images: from their class, a column of objects, COCO boxes, segmentation masks, vector files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.benchmarks.class_names import derive_wording
from modeling_lrsclip.encoding.imagery import ImageError, open_image

from ..data_row import Record
from ..recipe import LabelsConfig, resolve
from .anchors import Box, Label
from .geography import UnreadableVectors, image_bounds, read_vectors
from .images import Skip


_BOX_FIELDS = ("x0", "y0", "x1", "y1")
_LABEL_FIELDS = ("label", "kind", "class", "class_name", "category", "name")


class LabelReader:
    """
    Labels of one image after another.

    Raises:
        `ValueError`: for a path that is not there or a file of another kind.
    """

    def __init__(self, config: LabelsConfig, root: Path):
        self.config = config
        self.path = resolve(config.path, root) if config.path else None
        if config.kind not in ("class_name", "objects") and (self.path is None or not self.path.exists()):
            raise ValueError(f"labels.path {config.path} does not exist; labels of kind {config.kind} need it.")
        if config.kind == "masks" and not config.names:
            raise ValueError("labels of kind masks need labels.names: mask value or #rrggbb -> name.")
        self._coco = read_coco(self.path) if config.kind == "coco" else {}
        self._whole = None  # one vector file for all images, read once
        if config.kind in ("geojson", "shapefile") and self.path.is_file():
            self._whole = read_vectors(self.path, config)

    def of(self, record: Record, size: tuple[int, int]) -> list[Label]:
        """
        The labels of an image.

        Args:
            size: width and height in pixels.

        Raises:
            `Skip`: where its labels are missing, garbled or none.
        """
        reading: dict[str, Callable[[Record, tuple[int, int]], list[Label]]] = {
            "class_name": lambda record, _: [Label(record.class_name)] if record.class_name else [],
            "objects": self._objects,
            "coco": self._boxes,
            "masks": self._mask,
            "geojson": self._vectors,
            "shapefile": self._vectors,
        }
        labels = []
        for label in reading[self.config.kind](record, size):
            left, top, right, bottom = label.box or (0, 0, 1, 1)
            name = derive_wording(self.config.names.get(label.name, label.name) or "")
            if name and (right - left) * (bottom - top) >= self.config.min_share:
                labels.append(Label(name, label.box))
        if not labels:
            raise Skip("no labels", f"{record.image_key} has no labels")
        return labels

    def _objects(self, record: Record, size: tuple[int, int]) -> list[Label]:
        stored = record.labels
        if isinstance(stored, str):
            try:
                stored = json.loads(stored)
            except json.JSONDecodeError as error:
                raise Skip("labels unreadable", str(error)) from error
        labels = []
        for item in stored or []:
            if not isinstance(item, dict):
                raise Skip("labels unreadable", f"an object is {item!r}; it needs a label and a box")
            name = next((item[field] for field in (self.config.field, *_LABEL_FIELDS) if item.get(field)), None)
            if name is None:
                raise Skip("labels unreadable", f"an object has no label, only {', '.join(item)}")
            if self.config.attribute and item.get(self.config.attribute):
                name = f"{item[self.config.attribute]} {name}"
            labels.append(Label(str(name), _object_box(item, size)))
        return labels

    def _boxes(self, record: Record, size: tuple[int, int]) -> list[Label]:
        key = record.image_key if record.image_key in self._coco else record.image_key.rpartition("/")[2]
        if key not in self._coco:
            raise Skip("labels missing", f"the COCO file has no image {record.image_key}")
        return [Label(name, _scaled(box, size)) for name, box in self._coco[key]]

    def _mask(self, record: Record, size: tuple[int, int]) -> list[Label]:
        path = _own_file(self.path, record, (".png", ".tif", ".tiff", ".bmp"))
        if path is None:
            raise Skip("labels missing", f"no mask named {Path(record.image_key).stem} in {self.path.name}")
        try:
            mask = np.array(open_image(path, rendered=False))
        except ImageError as error:
            raise Skip("labels unreadable", f"mask {path.name}: {error.reason}") from error
        return mask_labels(mask, self.config.names, self.config.min_share)

    def _vectors(self, record: Record, size: tuple[int, int]) -> list[Label]:
        bounds, crs = (record.bounds, None) if record.bounds else image_bounds(record.image) or (None, None)
        if self._whole is not None:
            if bounds is None:
                raise Skip("no geographic reference", f"{record.image_key} has no bounds, world file or GeoTIFF tags")
            return self._whole.within(bounds, crs)
        path = _own_file(self.path, record, (".geojson", ".json") if self.config.kind == "geojson" else (".shp",))
        if path is None:
            raise Skip("labels missing", f"no {self.config.kind} named {Path(record.image_key).stem}")
        try:
            vectors = read_vectors(path, self.config)
        except UnreadableVectors as error:  # of this image alone; a file for all of them was read at the start
            raise Skip("labels unreadable", str(error)) from error
        # A file of the image's own without a geographic reference is in its pixels, y downwards.
        return vectors.within(bounds or (0, size[1], size[0], 0), crs)


def read_coco(path: Path) -> dict[str, list[tuple[str, Box]]]:
    """
    Read category name and pixel box (x0, y0, x1, y1) of every annotation, by image file name.

    Raises:
        `ValueError`: for a file that is no COCO file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in document["categories"]}
        files = {image["id"]: image["file_name"] for image in document["images"]}
        boxes: dict[str, list[tuple[str, Box]]] = {name: [] for name in files.values()}
        for annotation in document["annotations"]:
            x, y, width, height = annotation["bbox"]
            named_box = (names[annotation["category_id"]], (x, y, x + width, y + height))
            boxes[files[annotation["image_id"]]].append(named_box)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a COCO file with images, categories and boxes: {error!r:.200}") from error
    return boxes


def mask_labels(mask: np.ndarray, names: dict[str, str], min_share: float) -> list[Label]:
    """
    A label for every connected region of a mask.

    Args:
        mask: (H, W) class numbers or (H, W, 3) colours.
        names: number or `#rrggbb` -> name; what is not among them is background.
        min_share: of the image's area, at least.

    Returns:
        Labels with boxes (left, top, right, bottom) as shares of the image's sides, class by class.
    """
    import cv2

    labels = []
    for value, name in names.items():
        if not name:
            continue
        if value.startswith("#"):
            if mask.ndim != 3:
                raise ValueError(f"labels.names has the colour {value}, the masks hold class numbers; name those.")
            colour = [int(value[start : start + 2], 16) for start in (1, 3, 5)]
            region = (mask[..., :3] == colour).all(axis=-1)  # (H, W)
        else:
            if mask.ndim != 2:
                raise ValueError(
                    f"labels.names has the number {value}, the masks hold colours; write them as #rrggbb."
                )
            region = mask == int(value)
        count, _, statistics, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
        height, width = region.shape
        for x, y, wide, high, area in statistics[1:count]:
            if area >= max(1, min_share * height * width):
                labels.append(Label(name, (x / width, y / height, (x + wide) / width, (y + high) / height)))
    return labels


def _own_file(folder: Path, record: Record, suffixes: tuple[str, ...]) -> Path | None:
    """The file of the image's stem, in the folder itself or below it at the image's own place."""
    key = Path(record.image_key)
    for stem in (folder / key.with_suffix("").as_posix(), folder / key.stem):
        for suffix in suffixes:
            if (path := stem.with_name(stem.name + suffix)).is_file():
                return path
    return None


def _object_box(item: dict[str, Any], size: tuple[int, int]) -> Box | None:
    if all(field in item for field in _BOX_FIELDS):
        return _scaled(tuple(float(item[field]) for field in _BOX_FIELDS), size)
    if item.get("bbox") is not None:  # COCO's x, y, width, height
        x, y, width, height = map(float, item["bbox"])
        return _scaled((x, y, x + width, y + height), size)
    return None


def _scaled(box: Box, size: tuple[int, int]) -> Box:
    width, height = size
    x0, y0, x1, y1 = box
    return tuple(min(1.0, max(0.0, edge)) for edge in (x0 / width, y0 / height, x1 / width, y1 / height))
