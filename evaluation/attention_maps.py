"""
Maps of where an image tower looks for a phrase (paper, Fig. 2), which `evaluation.attention` draws.

Method: gradient-weighted attention with roll-out over the layers, Chefer et al. 2021 ("Generic Attention-model
Explainability"), eq. (5) and (6), for the cosine similarity of image and text.

Shapes: T texts, A heads, L tokens of the image (class token first), G patches along one side.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageOps
from torch import Tensor
from transformers.utils import logging as transformers_logging

from modeling_lrsclip.encoding import embed_texts, load_encoder
from modeling_lrsclip.encoding.imagery import read_image
from modeling_lrsclip.image_processing_lrsclip import to_rgb
from modeling_lrsclip.published.registry import label_models, resolve

from .figures.retrieval import GREY, INK, Sheet
from .tasks import check_device, default_device, prepare_output


SIDE = 384  # pixels of a picture's panel before it is drawn
HEAT = colormaps["inferno"]


def attention_maps(model: Any, processor: Any, image: Image.Image, texts: Sequence[str]) -> Tensor:
    """
    Contribution of each patch of an image to its similarity with each text.

    In each layer the attention weights are multiplied by the gradient of the similarity with respect to them, negative
    products dropped, heads averaged, `M = mean(relu(dA * A))`; relevance starts as the identity and grows by
    `R += M R`. A map is the class token's row of R.

    Args:
        model: `LRSCLIPModel` or `CLIPModel`; its weights, gradients and training state are left as found. While this
            runs its image tower uses eager attention, which alone tells its weights.
        image: one image, of which the model sees the middle square.
        texts: T texts.

    Returns:
        `Tensor` (T, G, G), float32, each from 0 to 1.
    """
    text_embeds = embed_texts(model, processor, texts).to(model.device)  # (T, P)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    vision = model.vision_model
    training, attention = vision.training, vision.config._attn_implementation
    vision.eval()
    vision.config._attn_implementation = "eager"
    try:
        with torch.enable_grad():
            output = vision(pixel_values=pixel_values.to(model.dtype).requires_grad_(), output_attentions=True)
            image_embeds = F.normalize(model.visual_projection(output.pooler_output).float(), dim=-1)  # (1, P)
            maps = [
                _rollout(output.attentions, torch.autograd.grad(similarity, output.attentions, retain_graph=True))
                for similarity in (image_embeds @ text_embeds.T)[0]
            ]
    finally:
        vision.config._attn_implementation = attention
        vision.train(training)
    return torch.stack(maps).cpu()


def _rollout(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """(G, G), scaled to 0..1."""
    relevance = torch.eye(attentions[0].shape[-1], device=attentions[0].device)  # (L, L)
    for weights, gradient in zip(attentions, gradients, strict=True):
        matter = (weights * gradient).detach().float().clamp(min=0).mean(dim=1)[0]  # (1, A, L, L) -> (L, L)
        relevance = relevance + matter @ relevance
    patches = relevance[0, 1:]  # (L - 1,)
    patches = patches - patches.min()
    side = round(len(patches) ** 0.5)
    return (patches / patches.max().clamp(min=1e-12)).view(side, side)


def draw_attention(image: Image.Image, texts: Sequence[str], maps: Tensor, path: Path, label: str = "") -> Path:
    """
    Draw the image, and beside it the image under each text's map.

    Args:
        image: the image that was looked at; its middle square is drawn.
        texts: T phrases.
        maps: (T, G, G) of [`attention_maps`].
        path: PNG to write.
        label: name of the model, for the heading.

    Returns:
        `path`.
    """
    panel, gap, margin, head, foot = 2.6, 0.2, 0.35, 1.0, 0.75  # inches
    sheet = Sheet(2 * margin + (len(texts) + 1) * panel + len(texts) * gap, head + panel + foot)
    sheet.text(margin, 0.42, f"Where {label or 'the model'} looks for a phrase", 14, INK, "bold")
    sheet.text(margin, 0.7, "gradient-weighted attention of the image tower (Chefer et al. 2021)", 9.5)
    square = ImageOps.fit(to_rgb(image), (SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, np.float32) / 255
    sheet.tile(margin, head, panel, square, GREY, 0.8)
    seen = "what the model sees" + (f": {_cropped(image)}" if image.width != image.height else "")
    for line, words in enumerate(_lines(seen)):
        sheet.text(margin, head + panel + 0.22 + 0.17 * line, words, 8.5)
    for index, (text, relevance) in enumerate(zip(texts, maps, strict=True), start=1):
        heat = F.interpolate(relevance[None, None], size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)[0, 0].numpy()
        mixed = 0.45 * pixels + 0.55 * HEAT(heat)[..., :3]
        x = margin + index * (panel + gap)
        sheet.tile(x, head, panel, Image.fromarray((255 * mixed).astype(np.uint8)), GREY, 0.8)
        for line, words in enumerate(_lines(text)):
            sheet.text(x, head + panel + 0.22 + 0.17 * line, words, 8.5, INK)
    sheet.figure.savefig(path)
    return path


def _cropped(image: Image.Image) -> str:
    return f"the middle square of {image.width} x {image.height} pixels"


def _lines(text: str, width: int = 42, most: int = 3) -> list[str]:
    lines = textwrap.wrap(text, width)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][: width - 2]} …"]


def explain(options: argparse.Namespace) -> Path:
    """
    Draw what `evaluation.attention` was asked for.

    Returns:
        The picture.

    Raises:
        `ValueError`: one sentence on what is wrong with the model, the image or the folder to write to.
    """
    transformers_logging.disable_progress_bar()
    device = check_device(options.device or default_device())
    prepare_output(str(options.output.parent))
    source = resolve(options.model)
    image = to_rgb(read_image(options.image))
    encoder = load_encoder(source, device, label_models([source])[0], tokenizer=options.tokenizer)
    if not hasattr(encoder.model, "vision_model"):
        raise ValueError(f"{options.model}: attention is drawn of CLIP and LRSCLIP only.")
    maps = attention_maps(encoder.model, encoder.processor, image, options.text)
    if image.width != image.height:
        print(f"{options.image}: a model sees {_cropped(image)}; cut it to see the rest.", file=sys.stderr)
    return draw_attention(image, options.text, maps, options.output, encoder.label)
