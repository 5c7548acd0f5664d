# SPDX-License-Identifier: Apache-2.0
"""Pixels as the published code prepares them, without torchvision: short side bicubic, centre crop, CLIP's mean and std."""

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A PIL image of any mode as RGB.

    Modes of more than 8 bits (`I;16`, `I`, `F`), which PIL would clip to white, are scaled linearly so that their own
    smallest and largest value become 0 and 255; a constant image becomes black. Transparency is dropped, palettes are
    looked up, CMYK is converted: these three are PIL's own `convert("RGB")`.

    Args:
        image (`PIL.Image.Image`): width x height, any mode.

    Returns:
        `PIL.Image.Image`: mode `RGB`, same size.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)  # (H, W)
        finite = np.isfinite(values)
        low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
        scaled = (np.where(finite, values, low) - low) * (255.0 / (high - low) if high > low else 0.0)
        image = Image.fromarray(np.rint(scaled).astype(np.uint8))
    return image.convert("RGB")


class LRSCLIPImageProcessor(CLIPImageProcessorPil):
    r"""
    CLIP's image processor on PIL, equal to the published preprocessing (`MitsuiChen14/LRSCLIP`, `model/longclip.py`,
    `_transform`: torchvision `Resize` and `CenterCrop` on a PIL image) to 1e-6, odd sizes included.

    DIFFERS: the published code converts to RGB after cropping, this one before resizing, so that palette images are
    interpolated in colour rather than by nearest index.
    """

    def convert_to_rgb(self, image, **kwargs):
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(image))  # (H, W, 3) uint8
        return super().convert_to_rgb(image, **kwargs)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Crops `(C, H, W)` as torchvision does: the offset is rounded half to even (transformers' CLIP rounds down)."""
        if not size.height or not size.width:
            raise ValueError(
                f"crop_size={dict(size)} must give a height and a width in pixels, for example 224 and 224."
            )
        spare_height, spare_width = image.shape[1] - size.height, image.shape[2] - size.width
        if spare_height < 0 or spare_width < 0:  # only with a resize smaller than the crop: pad with zeros
            return super().center_crop(image, size, **kwargs)
        top, left = round(spare_height / 2), round(spare_width / 2)
        return image[:, top : top + size.height, left : left + size.width]


__all__ = ["LRSCLIPImageProcessor"]
