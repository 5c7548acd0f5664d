# SPDX-License-Identifier: Apache-2.0
"""
The state dict of a published CLIP under the names of `transformers.CLIPModel`, and the architecture it describes.

Shapes: D width of a tower, P text positions, E width of the shared space, F width of the feed-forward layers.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from .checkpoint_files import list_some


Tensors = dict[str, torch.Tensor]  # a state dict

# openai/CLIP clip/model.py -> transformers models/clip/modeling_clip.py
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TEXT_TABLE = "text_model.embeddings.position_embedding.weight"
_OUTSIDE_BLOCKS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": _TEXT_TABLE,
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection", "visual.proj"}  # x @ proj there, a Linear here
_SECOND_TABLE = "positional_embedding_res"
# Not weights: what an OpenAI archive says of itself, and buffers that older versions saved.
_STATEMENTS = {"input_resolution": "image_size", "context_length": "positions", "vocab_size": "vocabulary"}
_BUFFERS = {"attn_mask", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
# NJU-LHRS/FarSLIP open_clip/model.py saves them: 1 for rows that are read from the first and from the second table.
_MASKS = ("mask1", "mask2")

# MitsuiChen14/LRSCLIP model/model_longclip.py (mask1, mask2) and model/longclip.py (load_from_clip)
KEPT_BY_MASK, RATIO_OF_TWO_TABLES = 20, 4
_LETTERS = {384: "S", 512: "M", 768: "B", 1024: "L", 1280: "H", 1408: "g", 1664: "bigG"}  # open_clip, by vision width


@dataclass(frozen=True)
class Architecture:
    """Sizes that the tensors tell; the head counts and the activation are not in them."""

    vision_width: int
    vision_layers: int
    vision_feed_forward: int
    patch_size: int  # pixels
    image_size: int  # pixels
    text_width: int
    text_layers: int
    text_feed_forward: int
    positions: int
    vocabulary: int
    projection: int
    two_tables: bool  # positional_embedding and positional_embedding_res: Long-CLIP's way of training the later rows

    @property
    def name(self) -> str:
        """`ViT-B/32` and the like; `ViT 12 x 64 /8` for a vision tower of unusual width."""
        letter = _LETTERS.get(self.vision_width)
        size = f"-{letter}" if letter else f" {self.vision_layers} x {self.vision_width} "
        return f"ViT{size}/{self.patch_size}"

    def __str__(self) -> str:
        return (
            f"{self.name} at {self.image_size} px, vision {self.vision_layers} layers x {self.vision_width}, text "
            f"{self.text_layers} x {self.text_width}, {self.positions} positions, projection {self.projection}"
        )


def rename_published(tensors: dict[str, Any], path) -> tuple[Tensors, Architecture]:
    """
    Every tensor under its name in `CLIPModel`: fused q, k, v rows apart, projections transposed, two position tables
    made one.

    Args:
        tensors (`dict`): a state dict with OpenAI's names (the text tower's also after `text.`) or transformers'. It
            is emptied on the way, so that a tensor and its parts are not held twice.
        path: the file, for messages.

    Raises:
        `ValueError`: for a ResNet, keys without a place or places without a key (both are listed), and tensors that
            contradict each other.
    """
    if any(key.startswith(("visual.layer1.", "visual.attnpool.")) for key in tensors):
        raise ValueError(f"{path} is a CLIP with a ResNet image tower; LRSCLIP and CLIPModel have ViT towers only.")
    count, first = len(tensors), list_some(tensors)
    targets: Tensors = {}
    statements: dict[str, int] = {}
    second_table, masks, unknown = None, {}, []
    for key in list(tensors):
        value, name = tensors.pop(key), key.removeprefix("text.")
        if name in _STATEMENTS:
            statements[name] = int(value)
        elif name == _SECOND_TABLE:
            second_table = value
        elif name in _MASKS:
            masks[name] = torch.as_tensor(value)
        elif name == "logit_bias" and not torch.count_nonzero(torch.as_tensor(value)):
            continue  # trained with a sigmoid loss, and of no effect at zero
        elif name not in _BUFFERS:
            renamed = _rename(name, value) if isinstance(value, torch.Tensor) else {}
            if not renamed or renamed.keys() & targets.keys():
                unknown.append(key)
            targets |= renamed
    layers = {tower: _count_layers(targets, tower) for tower in _TOWERS.values()}
    expected = _expected_keys(layers)
    unknown += targets.keys() - expected
    if not targets.keys() & expected:
        raise ValueError(f"{path} is not a CLIP checkpoint: none of its {count} keys ({first}) is known.")
    missing = expected - targets.keys()
    if unknown or missing:
        raise ValueError(
            f"{path} is not a CLIP that can be converted: {len(unknown)} of its keys have no place "
            f"({list_some(unknown, len(unknown))}), {len(missing)} weights of CLIPModel are missing "
            f"({list_some(missing, len(missing))})."
        )
    _check_masks(masks, path)
    if second_table is not None:
        targets[_TEXT_TABLE] = _one_table(targets[_TEXT_TABLE], second_table, path)
    architecture = _read_architecture(targets, layers, second_table is not None, path)
    for name, stated in statements.items():
        derived = getattr(architecture, _STATEMENTS[name])
        if stated != derived:
            raise ValueError(f"{path} says {name} {stated}, its tensors make that {derived}; it is damaged.")
    return targets, architecture


def restore_published(tensors: Tensors) -> Tensors:
    """
    The way back of [`rename_published`]: a state dict with OpenAI's names, which open_clip reads, and one position table.

    Args:
        tensors (`dict`): all the weights of a `CLIPModel` under its names.

    Returns:
        `dict`: contiguous tensors; q, k and v joined, projections as `x @ proj` takes them.
    """
    published = {}
    for theirs, ours in _OUTSIDE_BLOCKS.items():
        published[theirs] = (tensors[ours].t() if theirs in _TRANSPOSED else tensors[ours]).contiguous()
    for theirs, tower in _TOWERS.items():
        for number in range(_count_layers(tensors, tower)):
            start, block = f"{tower}.encoder.layers.{number}.", f"{theirs}.resblocks.{number}."
            for kind in ("weight", "bias"):
                rows = [tensors[f"{start}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                published[f"{block}attn.in_proj_{kind}"] = torch.cat(rows)
                for part, ours in _BLOCK.items():
                    published[f"{block}{part}.{kind}"] = tensors[f"{start}{ours}.{kind}"].contiguous()
    return published


def _rename(name: str, value: torch.Tensor) -> Tensors:
    """The tensors that one becomes; none for an unknown name."""
    if name.startswith(("text_model.", "vision_model.", "text_projection.", "visual_projection.")):
        return {name: value}
    if name in _OUTSIDE_BLOCKS:
        if name in _TRANSPOSED and value.ndim == 2:
            value = value.t().contiguous()  # (E, D)
        if name == "logit_scale" and value.numel() == 1:
            value = value.reshape(())
        return {_OUTSIDE_BLOCKS[name]: value}
    block = re.fullmatch(r"(visual\.transformer|transformer)\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    if block is None:
        return {}
    tower, number, part, kind = block.groups()
    start = f"{_TOWERS[tower]}.encoder.layers.{int(number)}."
    if part == "attn.in_proj" and name.endswith(f"in_proj_{kind}") and value.ndim and len(value) % 3 == 0:
        # (3 D, D) or (3 D,); copies, so that the whole is not kept for the sake of a part.
        return {f"{start}self_attn.{letter}_proj.{kind}": rows.clone() for letter, rows in zip("qkv", value.chunk(3))}
    if part in _BLOCK and name.endswith(f".{kind}"):
        return {f"{start}{_BLOCK[part]}.{kind}": value}
    return {}


def _count_layers(targets: Tensors, tower: str) -> int:
    numbers = {int(name.split(".")[3]) for name in targets if re.match(rf"{tower}\.encoder\.layers\.\d+\.", name)}
    return max(numbers, default=-1) + 1


def _expected_keys(layers: dict[str, int]) -> set[str]:
    parts = [*_BLOCK.values(), *(f"self_attn.{letter}_proj" for letter in "qkv")]
    blocks = {
        f"{tower}.encoder.layers.{number}.{part}.{kind}"
        for tower, count in layers.items()
        for number in range(count)
        for part in parts
        for kind in ("weight", "bias")
    }
    return blocks | set(_OUTSIDE_BLOCKS.values())


def _check_masks(masks: Tensors, path) -> None:
    """The masks of the two tables must say what [`_one_table`] does."""
    for name, mask in masks.items():
        first = torch.arange(mask.numel()) < KEPT_BY_MASK
        if not torch.equal(mask.flatten() != 0, first if name == _MASKS[0] else ~first):
            raise ValueError(
                f"{path} takes its position tables apart elsewhere than after row {KEPT_BY_MASK} ({name}); only that "
                "division, of all published models, can be converted."
            )


def _one_table(first: torch.Tensor, second: torch.Tensor, path) -> torch.Tensor:
    """`(P, D)` and `(P, D)`: rows below 20 of the first, the others of the second, which is what the masks add up to."""
    rows = len(first) - KEPT_BY_MASK if first.ndim == 2 else 0
    if first.shape != second.shape or rows < 2 * RATIO_OF_TWO_TABLES or rows % RATIO_OF_TWO_TABLES:
        raise ValueError(
            f"{path} has position tables of shapes {tuple(first.shape)} and {tuple(second.shape)}; they must be equal, "
            f"of {KEPT_BY_MASK} + n * {RATIO_OF_TWO_TABLES} rows (248 in the published code)."
        )
    return torch.cat([first[:KEPT_BY_MASK], second[KEPT_BY_MASK:].to(first.dtype)])


def _read_architecture(targets: Tensors, layers: dict[str, int], two_tables: bool, path) -> Architecture:
    def shape(name: str, dimensions: int) -> torch.Size:
        if targets[name].ndim != dimensions:
            shapes = f"{name} has shape {tuple(targets[name].shape)}, not {dimensions} dimensions"
            raise ValueError(f"{path}: {shapes}; it is damaged.")
        return targets[name].shape

    vocabulary, text_width = shape("text_model.embeddings.token_embedding.weight", 2)
    vision_width, _, _, patch_size = shape("vision_model.embeddings.patch_embedding.weight", 4)
    patches = shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    grid = math.isqrt(max(patches, 0))
    if grid * grid != patches or not patches:
        raise ValueError(f"{path} has {patches} image positions besides the class token; a square grid is needed.")
    return Architecture(
        vision_width=vision_width,
        vision_layers=layers["vision_model"],
        vision_feed_forward=shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch_size,
        image_size=grid * patch_size,
        text_width=text_width,
        text_layers=layers["text_model"],
        text_feed_forward=shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        positions=shape(_TEXT_TABLE, 2)[0],
        vocabulary=vocabulary,
        projection=shape("visual_projection.weight", 2)[0],
        two_tables=two_tables,
    )
