# SPDX-License-Identifier: Apache-2.0
"""An LRSCLIP back in open_clip's form: a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..configuration_lrsclip import LRSCLIPConfig
from ..modeling_lrsclip import LRSCLIPModel
from ..processing_lrsclip import LRSCLIPProcessor
from .state_dict_keys import Tensors, restore_published


# mlfoundations/open_clip src/open_clip/constants.py
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def open_clip_config(config: LRSCLIPConfig, processor: LRSCLIPProcessor) -> dict[str, Any]:
    """
    The content of `open_clip_config.json`: architecture and preprocessing.

    Raises:
        `ValueError`: for an activation, or a ratio of widths in the text tower, that open_clip has no field for.
    """
    text, vision, image = config.text_config, config.vision_config, processor.image_processor
    activations = {text.hidden_act, vision.hidden_act}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(f"open_clip runs both towers with quick_gelu or with gelu; this model has {activations}.")
    if text.intermediate_size != 4 * text.hidden_size:
        raise ValueError(
            f"open_clip's text towers have feed-forward layers of four times their width; this one has "
            f"{text.intermediate_size} at {text.hidden_size}."
        )
    model = {
        "embed_dim": config.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
    }
    preprocess = {"mean": image.image_mean, "std": image.image_std}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def write_open_clip(skeleton: LRSCLIPModel, tensors: Tensors, processor: LRSCLIPProcessor, folder: Path) -> None:
    """
    Writes weights under OpenAI's names and the configuration; open_clip brings the tokenizer, which cleans texts.

    Args:
        skeleton (`LRSCLIPModel`): configuration; its weights are not looked at.
        tensors (`dict`): the weights.
        processor (`LRSCLIPProcessor`): whose mean and std are kept.
        folder (`Path`): exists; two files are put there.

    Raises:
        `ValueError`: as [`open_clip_config`].
    """
    described = open_clip_config(skeleton.config, processor)
    save_file(restore_published(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
