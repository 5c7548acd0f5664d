"""
Low-rank adapters (Hu et al. 2021, "LoRA") on both towers, merged into the weights when a model is saved.

GeoRSCLIP tried this beside full fine-tuning (Zhang et al. 2023, "RS5M and GeoRSCLIP"). The adapters take the place of
the weight matrices; trained in full beside them are the logit scale and, in a stretched model, the text position table
above its kept rows: the rows in between were interpolated and never trained, and a low-rank change of the table would
move the kept rows too.
"""

from importlib.util import find_spec

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from modeling_lrsclip import LRSCLIPModel


# Of a layer of either tower, by module names of transformers' CLIP.
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGETS = (*ATTENTION, "fc1", "fc2", "visual_projection", "text_projection")


@dataclass(config=ConfigDict(extra="forbid"))
class LoRAConfig:
    rank: int = Field(16, ge=1)  # of each adapter
    alpha: float = Field(32.0, gt=0)  # the adapter's part is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapters' inputs
    targets: list[str] = Field(default_factory=lambda: list(ATTENTION))  # module names, among TARGETS

    def __post_init__(self):
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"model.lora.targets names {', '.join(unknown)}; choose among {', '.join(TARGETS)}")
        if not self.targets:
            raise ValueError(
                f"model.lora.targets is empty; choose among {', '.join(TARGETS)}, or leave model.lora out"
            )


def add_adapters(model: LRSCLIPModel, config: LoRAConfig) -> None:
    """
    Puts adapters into `model`, in place, and freezes all the rest but the logit scale and a stretched position table.

    Raises:
        `ValueError`: where peft is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError("model.lora is set and peft is not installed; pip install peft.")
    from peft import LoraConfig, inject_adapter_in_model

    settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(LoraConfig(target_modules=list(config.targets), **settings), model)
    model.logit_scale.requires_grad_(True)
    if model.config.text_config.stretch_ratio != 1:
        model.text_model.embeddings.position_embedding.weight.requires_grad_(True)


def has_adapters(model: LRSCLIPModel) -> bool:
    return hasattr(model, "peft_config")


def merged(model: LRSCLIPModel, state_dict: dict[str, torch.Tensor]) -> LRSCLIPModel:
    """
    A new model of ordinary CLIP weights on the CPU: those that `state_dict` adapts, with their adapters' part added.

    Args:
        model: with adapters, as it is trained; left as it is, since to merge and to unmerge rounds.
        state_dict: its weights, whole.
    """
    from peft import get_peft_model

    bare = LRSCLIPModel._from_config(model.config, dtype=torch.float32)
    adapted = get_peft_model(bare, model.peft_config["default"])
    adapted.base_model.model.load_state_dict(state_dict)
    return adapted.merge_and_unload()
