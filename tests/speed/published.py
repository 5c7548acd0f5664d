"""The published LRSCLIP model code, run as it is, with the weights of one of our models."""

import importlib.util
from pathlib import Path

import torch

from modeling_lrsclip import LRSCLIPModel


LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def published_model(checkout: Path, model: LRSCLIPModel) -> torch.nn.Module:
    """
    `model/model_longclip.py`'s CLIP of a checkout of `MitsuiChen14/LRSCLIP` with the weights of `model`, in float32.
    Its two position tables, which it masks and adds, are both ours.
    """
    spec = importlib.util.spec_from_file_location("model_longclip", checkout / "model" / "model_longclip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text, vision = model.config.text_config, model.config.vision_config
    image_tower = (vision.image_size, vision.num_hidden_layers, vision.hidden_size, vision.patch_size)
    text_tower = (text.max_position_embeddings, text.vocab_size, text.hidden_size, text.num_attention_heads)
    theirs = module.CLIP(
        model.config.projection_dim, *image_tower, *text_tower, text.num_hidden_layers, load_from_clip=False
    )
    theirs.load_state_dict(published_weights(model))
    return theirs


def published_weights(model: LRSCLIPModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    table = state["text_model.embeddings.position_embedding.weight"]
    weights = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": table,
        "positional_embedding_res": table,
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for kind in ("weight", "bias"):
        weights |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in norms.items()}
    for theirs, ours, layers in (
        ("transformer.resblocks", "text_model.encoder.layers", model.text_model.encoder.layers),
        ("visual.transformer.resblocks", "vision_model.encoder.layers", model.vision_model.encoder.layers),
    ):
        for layer in range(len(layers)):
            for kind in ("weight", "bias"):
                weights |= {
                    f"{theirs}.{layer}.{a}.{kind}": state[f"{ours}.{layer}.{b}.{kind}"] for a, b in LAYER_NAMES.items()
                }
                parts = [state[f"{ours}.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                weights[f"{theirs}.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return weights
