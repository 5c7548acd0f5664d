# SPDX-License-Identifier: Apache-2.0
"""Pixels as the published code prepares them, without torchvision: short side bicubic, centre crop, CLIP's mean and std."""

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A PIL image of any mode as RGB.

    Modes of more than 8 bits (`I;16`, `I`, `F`), which PIL would clip to white, are stretched as [`to_eight_bits`] does.
    Transparency is dropped, palettes are looked up, CMYK is converted: these three are PIL's own `convert("RGB")`.

    Args:
        image (`PIL.Image.Image`): width x height, any mode.

    Returns:
        `PIL.Image.Image`: mode `RGB`, same size.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_stretch(np.asarray(image)))
    return image.convert("RGB")


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """
    Pixel values of any type on the scale 0 to 255.

    Values within 0 and 255 stay as they are, unless they are floating point within 0 and 1: those are multiplied by 255.
    Anything else (16-bit counts, reflectances times 10,000) is stretched channel by channel: the 2nd percentile becomes 0
    and the 98th 255, as `modeling_lrsclip.encoding.rasters` renders such files.

    Args:
        values (`np.ndarray`): shape `(C, H, W)`.

    Returns:
        `np.ndarray`: shape `(C, H, W)`, uint8, or `values` themselves.

    Raises:
        `ValueError`: for floating point below 0, which may be normalized already.
    """
    if values.dtype == np.uint8 or not values.size:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    low, high = np.nanmin(values), np.nanmax(values)
    if values.dtype.kind == "f" and low < 0:
        raise ValueError(
            f"The images' values lie between {low:g} and {high:g}; give 0 to 255 or 0 to 1, or, for images that are "
            "normalized already, do_rescale=False and do_normalize=False."
        )
    if values.dtype.kind == "f" and high <= 1:
        return np.rint(np.nan_to_num(values, nan=0.0) * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return values
    return np.stack([_stretch(channel) for channel in values])


def _stretch(values: np.ndarray) -> np.ndarray:
    """`(H, W)` uint8: 0 at the 2nd percentile of the finite values, 255 at the 98th; 0 where they are all equal."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], (2.0, 98.0)) if finite.any() else (0.0, 0.0)
    high = high if high > low else low + 1
    levels = np.clip((np.where(finite, values, low) - low) * (255.0 / (high - low)), 0, 255)
    return np.floor(levels + 0.5).astype(np.uint8)


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

    def _preprocess(self, images: list[np.ndarray], *args, do_rescale: bool, **kwargs):
        """DIFFERS from CLIP: values of 0 to 1 or of 16 bits are put on the scale 0 to 255 first, instead of black or white."""
        images = [to_eight_bits(image) for image in images] if do_rescale else images
        return super()._preprocess(images, *args, do_rescale=do_rescale, **kwargs)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Crops `(C, H, W)` as torchvision does: the offset is rounded half to even (transformers' CLIP rounds down)."""
        if not size.height or not size.width:
            sides = "a height and a width in pixels, for example 224 and 224"
            raise ValueError(f"crop_size={dict(size)} must give {sides}.")
        spare_height, spare_width = image.shape[1] - size.height, image.shape[2] - size.width
        if spare_height < 0 or spare_width < 0:  # only with a resize smaller than the crop: pad with zeros
            return super().center_crop(image, size, **kwargs)
        top, left = round(spare_height / 2), round(spare_width / 2)
        return image[:, top : top + size.height, left : left + size.width]


__all__ = ["LRSCLIPImageProcessor"]
