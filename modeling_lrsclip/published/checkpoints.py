# SPDX-License-Identifier: Apache-2.0
"""Published CLIP checkpoints as a configuration and the tensors of `CLIPModel`: one file, or a HuggingFace folder."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CLIPModel, PreTrainedConfig

from ..configuration_lrsclip import LRSCLIPConfig, check_layers
from ..files.documents import first_line
from ..modeling_lrsclip import LRSCLIPModel
from .checkpoint_files import list_some, read_published_file
from .state_dict_keys import KEPT_BY_MASK, RATIO_OF_TWO_TABLES, Architecture, rename_published


QUICK_GELU, GELU, ANY = "quick_gelu", "gelu", "any"
ACTIVATIONS = (QUICK_GELU, GELU)
_HEAD_WIDTH = 64  # of OpenAI's and Long-CLIP's code, always
# mlfoundations/open_clip model_configs: these vision towers, by width, have wider heads; its text heads are 64 wide.
_OPEN_CLIP_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


@dataclass(frozen=True)
class Preset:
    """Settings by which published code runs its checkpoints, where the files do not say."""

    activations: dict[str, str]  # architecture, such as ViT-B/32, or ANY -> activation
    source: str  # repository and file that say so
    head_widths: dict[int, int] = field(default_factory=dict)  # vision width -> head width, where it is not 64


# `pretrained="openai"` of open_clip meant QuickGELU under any model name up to version 2.28; since 2.29 (commit 84f7d2f,
# October 2024) the same line runs the model's GELU and warns.
PRESETS = {
    "openai": Preset({ANY: QUICK_GELU}, "openai/CLIP clip/model.py"),
    "long-clip": Preset({ANY: QUICK_GELU}, "beichenzbc/Long-CLIP model/model_longclip.py"),
    "lrsclip": Preset({ANY: QUICK_GELU}, "MitsuiChen14/LRSCLIP and DGTRS model/model_longclip.py"),
    # So evaluated, and trained so (ChenDelong1999/ITRA's default). The lines in its README leave `pretrained` out, and
    # run GELU on the same weights.
    "remoteclip": Preset(
        {"ViT-B/32": QUICK_GELU, "ViT-L/14": QUICK_GELU}, "ChenDelong1999/RemoteCLIP retrieval.py, open_clip <= 2.28"
    ),
    # Its published code does not load the ViT-L/14.
    "georsclip": Preset(
        {"ViT-B/32": QUICK_GELU, "ViT-H/14": GELU},
        "om-ai-lab/RS5M inference/inference.py, open_clip <= 2.28",
        _OPEN_CLIP_HEAD_WIDTHS,
    ),
    "skyclip": Preset(
        {"ViT-B/32": GELU, "ViT-L/14": QUICK_GELU}, "wangzhecheng/SkyScript cross_modal_retrieval.ipynb"
    ),
    # --force-quick-gelu of every line of its README.
    "farslip": Preset({ANY: QUICK_GELU}, "NJU-LHRS/FarSLIP README.md, open_clip/model.py"),
    "open-clip": Preset(
        {ANY: GELU}, "mlfoundations/open_clip model_configs without -quickgelu", _OPEN_CLIP_HEAD_WIDTHS
    ),
    "vit-h-14": Preset(
        {"ViT-H/14": GELU}, "mlfoundations/open_clip model_configs/ViT-H-14.json", _OPEN_CLIP_HEAD_WIDTHS
    ),
}


@dataclass
class PublishedCheckpoint:
    """A checkpoint in terms of `CLIPModel`."""

    config: LRSCLIPConfig
    tensors: dict[str, torch.Tensor]  # all the keys of CLIPModel
    notes: list[str]  # what was found and what was decided, a line each


def read_published_checkpoint(
    path: str | Path, *, preset: str | None = None, activation: str | None = None, heads: tuple[int, int] | None = None
) -> PublishedCheckpoint:
    """
    Reads a checkpoint file of LRSCLIP, Long-CLIP, OpenAI's CLIP or open_clip; every key is used, or the call fails.

    The architecture is the tensors'. They do not tell the activation and the head counts: a file with two position
    tables is run by the published code with QuickGELU and heads 64 wide, a TorchScript archive holds the activation in
    its code, for everything else `preset` or `activation` is needed.

    Args:
        path (`str` or `Path`): see [`read_published_file`].
        preset (`str`, *optional*): key of `PRESETS`: activation and heads as that published code runs them.
        activation (`str`, *optional*): `quick_gelu` or `gelu`; goes before the preset's.
        heads (`tuple[int, int]`, *optional*): attention heads of the vision and of the text tower.

    Returns:
        Configuration and weights under the names of `LRSCLIPModel`, and how they were stored.

    Raises:
        `ValueError`: as [`read_published_file`] and [`rename_published`]; for tensors of a wrong shape or type, and
            for an activation or head count that nothing decides or that contradicts the file.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; there are {', '.join(ACTIVATIONS)}.")
    file = read_published_file(path)
    tensors, architecture = rename_published(file.tensors, path)
    hidden_act, why_activation = _choose_activation(architecture, file.activation, preset, activation, path)
    is_archive = file.activation is not None
    (vision_heads, text_heads), why_heads = _choose_heads(architecture, is_archive, preset, heads, path)
    config = _configure(architecture, hidden_act, vision_heads, text_heads)
    _check_tensors(config, tensors, path)
    notes = [
        f"{file.form}: {architecture}",
        f"activation {hidden_act}: {why_activation}",
        f"heads {vision_heads} (vision) and {text_heads} (text): {why_heads}",
    ]
    if architecture.two_tables:
        first = f"positions 0-{KEPT_BY_MASK - 1} from positional_embedding"
        notes.append(f"{first}, the others from positional_embedding_res")
    return PublishedCheckpoint(config, tensors, notes)


def read_pretrained(source: str) -> PublishedCheckpoint:
    """
    Reads a CLIP or LRSCLIP in HuggingFace format, folder or Hub id; its configuration says everything.

    Raises:
        `ValueError`: for a model of another type, and weights that are missing, left over or of a wrong shape.
        `OSError`: for a source that is neither a model folder nor a Hub id within reach.
    """
    try:
        fields = PreTrainedConfig.get_config_dict(source)[0]
    except OSError as error:
        reason = first_line(error).rstrip(".")
        raise OSError(f"There is no model {source} here, and the Hub gives none ({reason}).") from None
    model_type, classes = fields.get("model_type"), {"clip": CLIPModel, "lrsclip": LRSCLIPModel}
    if model_type not in classes:
        taken = "clip and lrsclip, and checkpoint files"
        raise ValueError(f"{source} holds a model of type {model_type}; convert takes {taken}.")
    check_layers(*((fields.get(tower) or {}).get("num_hidden_layers") for tower in ("text_config", "vision_config")))
    model, loaded = classes[model_type].from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
    unknown = loaded["unexpected_keys"]
    missing = [*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])]
    if unknown or missing:
        raise ValueError(
            f"{source} does not fit its config.json: {len(unknown)} of its keys have no place ({list_some(unknown, len(unknown))}), "
            f"{len(missing)} weights are missing or of another shape ({list_some(missing, len(missing))})."
        )
    return PublishedCheckpoint(model.config, model.state_dict(), [f"HuggingFace format, model type {model_type}"])


def _choose_activation(
    architecture: Architecture, in_code: str | None, preset: str | None, activation: str | None, path
) -> tuple[str, str]:
    """The activation, and on whose word."""
    by_preset = None
    if preset is not None:
        by_name = PRESETS[preset].activations
        by_preset = by_name.get(architecture.name, by_name.get(ANY))
    if in_code is not None:
        wanted = activation or by_preset
        if wanted not in (None, in_code):
            raise ValueError(f"{path} computes {in_code} in its own code; {wanted} contradicts it, leave that out.")
        return in_code, "the code in the archive"
    if activation is not None:
        return activation, "as given"
    if by_preset is not None:
        return by_preset, f"preset {preset}, {PRESETS[preset].source}"
    if preset is not None:
        raise ValueError(
            f"preset {preset} covers {', '.join(PRESETS[preset].activations)} ({PRESETS[preset].source}), and {path} "
            f"is a {architecture.name}; give --activation {QUICK_GELU} for weights that began as OpenAI's, or {GELU}."
        )
    if architecture.two_tables:
        return QUICK_GELU, f"two position tables, {PRESETS['lrsclip'].source}"
    raise ValueError(
        f"{path} does not say which activation it was trained with, and the other one spoils its embeddings silently; "
        f"give --preset {{{','.join(PRESETS)}}} for where it comes from, or --activation {{{','.join(ACTIVATIONS)}}}."
    )


def _choose_heads(
    architecture: Architecture, is_archive: bool, preset: str | None, heads: tuple[int, int] | None, path
) -> tuple[tuple[int, int], str]:
    """Attention heads of the vision and the text tower, and on whose word."""
    widths = (architecture.vision_width, architecture.text_width)
    if heads is not None:
        if any(count < 1 or width % count for width, count in zip(widths, heads)):
            raise ValueError(f"heads {tuple(heads)} do not divide the widths {widths} of the towers of {path}.")
        return tuple(heads), "as given"
    head_width, why = _HEAD_WIDTH, f"each {_HEAD_WIDTH} wide, as in all published towers of these widths"
    if preset is not None:
        head_width = PRESETS[preset].head_widths.get(architecture.vision_width, _HEAD_WIDTH)
        why = f"{head_width} and {_HEAD_WIDTH} wide, preset {preset}"
    elif architecture.two_tables or is_archive:
        why = f"each {_HEAD_WIDTH} wide, {PRESETS['lrsclip' if architecture.two_tables else 'openai'].source}"
    elif architecture.vision_width in _OPEN_CLIP_HEAD_WIDTHS:
        raise ValueError(
            f"{path} is a {architecture.name}, which has heads {_OPEN_CLIP_HEAD_WIDTHS[architecture.vision_width]} wide "
            f"in open_clip and {_HEAD_WIDTH} wide by OpenAI's rule; give --preset or --heads VISION TEXT."
        )
    if any(width % divisor for width, divisor in zip(widths, (head_width, _HEAD_WIDTH))):
        raise ValueError(
            f"{path} has towers of widths {widths}, not multiples of the usual heads ({head_width} and {_HEAD_WIDTH} "
            "wide); give --heads VISION TEXT."
        )
    return (widths[0] // head_width, widths[1] // _HEAD_WIDTH), why


def _configure(architecture: Architecture, activation: str, vision_heads: int, text_heads: int) -> LRSCLIPConfig:
    text = {
        "hidden_size": architecture.text_width,
        "intermediate_size": architecture.text_feed_forward,
        "num_hidden_layers": architecture.text_layers,
        "num_attention_heads": text_heads,
        "max_position_embeddings": architecture.positions,
        "vocab_size": architecture.vocabulary,
        # The published code pools at the largest id of a row: end of text is the last of the vocabulary.
        "bos_token_id": architecture.vocabulary - 2,
        "eos_token_id": architecture.vocabulary - 1,
        "pad_token_id": architecture.vocabulary - 1,
        "hidden_act": activation,
        "kept_positions": KEPT_BY_MASK,
        "stretch_ratio": RATIO_OF_TWO_TABLES if architecture.two_tables else 1,
    }
    vision = {
        "hidden_size": architecture.vision_width,
        "intermediate_size": architecture.vision_feed_forward,
        "num_hidden_layers": architecture.vision_layers,
        "num_attention_heads": vision_heads,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "hidden_act": activation,
    }
    return LRSCLIPConfig(text_config=text, vision_config=vision, projection_dim=architecture.projection)


def _check_tensors(config: LRSCLIPConfig, tensors: dict[str, torch.Tensor], path) -> None:
    with torch.device("meta"):
        expected = LRSCLIPModel(config).state_dict()
    assert expected.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, the other tensors make it "
                f"{tuple(expected[name].shape)} of floating point; it is damaged or quantized."
            )
