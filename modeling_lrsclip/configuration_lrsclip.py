# SPDX-License-Identifier: Apache-2.0
"""LRSCLIP configuration: CLIP's, with a longer text position table and the weight of the long text in the loss."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig


MOST_LAYERS = 1000  # of a tower; the largest CLIPs have fewer than 100


def check_layers(*numbers) -> None:
    """
    Check that towers can be built.

    Args:
        numbers (`int`): layers of each tower.

    Raises:
        `ValueError`: for more than `MOST_LAYERS`, which would fill the memory before the weights are looked at.
    """
    for number in numbers:
        if isinstance(number, int) and number > MOST_LAYERS:
            raise ValueError(
                f"num_hidden_layers={number} is no CLIP's; a tower may have {MOST_LAYERS}. Mend the model's config.json."
            )


@strict
class LRSCLIPTextConfig(CLIPTextConfig):
    r"""
    Text tower of LRSCLIP. Takes every argument of [`~transformers.CLIPTextConfig`] and three of its own.

    Args:
        max_position_embeddings (`int`, defaults to 248):
            Rows of the position table, so the longest text in tokens, start and end tokens included.
        kept_positions (`int`, defaults to 20):
            Provenance: the first rows, copied from CLIP unchanged. Fine-tuning keeps them frozen (paper, IV-B).
        stretch_ratio (`int`, defaults to 4):
            Provenance: how many new rows stand for each later row of CLIP's table. 1 means "not stretched": plain CLIP.
    """

    model_type = "lrsclip_text_model"
    _auto_class = "AutoConfig"  # for a tower saved alone; within a full checkpoint LRSCLIPConfig's entry stands

    max_position_embeddings: int = 248
    kept_positions: int = 20
    stretch_ratio: int = 4

    def validate_layer_count(self):
        """Part of `@strict`-powered validation, before memory is taken for the layers."""
        check_layers(self.num_hidden_layers)

    def validate_position_table(self):
        """Part of `@strict`-powered validation: the table could have come out of this stretch.

        Raises:
            `ValueError`: for a negative `kept_positions`, a `stretch_ratio` below 1, or a table length that
                `kept + (P - kept) * ratio` does not reach for any `P`.
        """
        if self.stretch_ratio < 1 or self.kept_positions < 0:
            raise ValueError(
                f"kept_positions={self.kept_positions} and stretch_ratio={self.stretch_ratio} describe no stretch; "
                "use kept_positions >= 0 and stretch_ratio >= 1 (1 for a table that was not stretched)."
            )
        if self.stretch_ratio == 1:
            return
        stretched = self.max_position_embeddings - self.kept_positions
        if stretched < 2 * self.stretch_ratio or stretched % self.stretch_ratio:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} cannot come from keeping "
                f"{self.kept_positions} positions and stretching the others by {self.stretch_ratio}; it must be "
                f"{self.kept_positions} + n * {self.stretch_ratio} with n >= 2. Set stretch_ratio=1 for a table of any length."
            )


@strict
class LRSCLIPVisionConfig(CLIPVisionConfig):
    r"""Vision tower of LRSCLIP, exactly [`~transformers.CLIPVisionConfig`]; the default is ViT-B/16."""

    model_type = "lrsclip_vision_model"
    _auto_class = "AutoConfig"

    patch_size: int | list[int] | tuple[int, int] | None = 16

    def validate_layer_count(self):
        """Part of `@strict`-powered validation, before memory is taken for the layers."""
        check_layers(self.num_hidden_layers)


@strict
class LRSCLIPConfig(CLIPConfig):
    r"""
    Configuration of [`LRSCLIPModel`]. The default is LRSCLIP ViT-B/16.

    Args:
        text_config (`dict` or [`LRSCLIPTextConfig`], *optional*): the text tower.
        vision_config (`dict` or [`LRSCLIPVisionConfig`], *optional*): the vision tower.
        projection_dim (`int`, defaults to 512):
            Width of the shared embedding space; the towers' own `projection_dim` follow it.
        long_weight (`float`, defaults to 0.8):
            Weight of the long text in the loss, omega of eq. (5); the short text has `1 - long_weight`. 0.8 is the
            best of ablation 7 (Section V-A words it the other way round).
    """

    model_type = "lrsclip"
    sub_configs = {"text_config": LRSCLIPTextConfig, "vision_config": LRSCLIPVisionConfig}  # transformers < 5.23
    sub_configs_defaults = {"text_config": LRSCLIPTextConfig, "vision_config": LRSCLIPVisionConfig}
    # Else Trainer keeps every hidden state for `compute_metrics`: about a megabyte a pair with ViT-B/16.
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output", "short_text_model_output"]

    long_weight: float = 0.8

    def __post_init__(self, **kwargs):
        for key, config_class in (("text_config", LRSCLIPTextConfig), ("vision_config", LRSCLIPVisionConfig)):
            tower = getattr(self, key)
            fields = tower.to_dict() if isinstance(tower, PreTrainedConfig) else dict(tower or {})
            # Single towers are built from the tower's config alone: it must know the width of the shared space.
            fields |= {"projection_dim": self.projection_dim, "model_type": config_class.model_type}
            if not isinstance(tower, config_class):
                setattr(self, key, config_class(**fields))
            else:
                tower.projection_dim = self.projection_dim
        # CLIPConfig of transformers 5.17 would turn the towers into CLIPTextConfig and CLIPVisionConfig: step over it.
        super(CLIPConfig, self).__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "LRSCLIPConfig | tuple[LRSCLIPConfig, dict]":
        """
        Read the fields of a `config.json`.

        Raises:
            `ValueError`: for those of another model, and of a CLIP whose table was never stretched.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        positions = (config_dict.get("text_config") or {}).get("max_position_embeddings", 77)
        if model_type == CLIPConfig.model_type and positions == 77:
            raise ValueError(
                "This is a CLIP of 77 text positions; LRSCLIPModel.from_clip(NAME_OR_FOLDER) stretches it, "
                "from_pretrained loads what was stretched before."
            )
        if model_type not in (CLIPConfig.model_type, cls.model_type):
            loaders = "LRSCLIPModel loads lrsclip, and from_clip takes a clip"
            raise ValueError(f"This is a model of type {model_type}; {loaders}.")
        return super().from_dict(config_dict, **kwargs)

    def validate_long_weight(self):
        """Part of `@strict`-powered validation.

        Raises:
            `ValueError`: for a `long_weight` outside [0, 1].
        """
        if not 0.0 <= self.long_weight <= 1.0:
            raise ValueError(
                f"long_weight={self.long_weight} is not a weight; it must lie in [0, 1] (0.8 in the paper: "
                "0.8 * long text + 0.2 * short text)."
            )


__all__ = ["LRSCLIPConfig", "LRSCLIPTextConfig", "LRSCLIPVisionConfig"]
