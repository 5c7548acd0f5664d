# SPDX-License-Identifier: Apache-2.0
"""
LRSCLIP: a CLIP that reads 248 text tokens and learns from a long and a short caption of each image.

Only what differs from `transformers.CLIPModel` is written here; state-dict keys are the same, so
`CLIPModel.from_pretrained` reads these checkpoints too.

Shapes: B images, N texts, L tokens, P projection width.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, image_text_contrastive_loss
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_lrsclip import LRSCLIPConfig, LRSCLIPTextConfig, LRSCLIPVisionConfig, check_layers
from .position_stretching import stretch_position_embedding


# Published CLIP configurations carry `eos_token_id: 2`, which in transformers stands for "the largest id of the row".
_LEGACY_EOS_TOKEN_ID = 2


@dataclass
class LRSCLIPOutput(ModelOutput):
    """
    Output of [`LRSCLIPModel`]; a field whose input was not given is None.

    Args:
        loss (scalar): `long_weight * long_loss + (1 - long_weight) * short_loss` (eq. 5), with `return_loss=True`;
            with one kind of text, that one's loss.
        long_loss, short_loss (scalar): symmetric InfoNCE (eq. 1) of the images with the long and the short texts.
        logits_per_image (`(B, N)`): cosine similarity of images and long texts, times `logit_scale.exp()`.
        logits_per_text (`(N, B)`): its transpose.
        text_embeds, short_text_embeds (`(N, P)`): unit embeddings of the long and the short texts.
        image_embeds (`(B, P)`): unit embeddings of the images.
        text_model_output, short_text_model_output, vision_model_output (`BaseModelOutputWithPooling`): the towers'
            outputs, `pooler_output` projected but not normalized.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    long_loss: torch.Tensor | None = None
    short_loss: torch.Tensor | None = None
    short_text_embeds: torch.Tensor | None = None
    short_text_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


def _check_text(input_ids: torch.Tensor | None, config: LRSCLIPTextConfig, argument: str = "input_ids") -> None:
    """
    Raises `ValueError` for rows that the text tower would read wrongly in silence. The look at the values is left
    out while compiling or exporting; shapes are always checked.
    """
    if input_ids is None or input_ids.ndim != 2:
        got = "None" if input_ids is None else f"shape {tuple(input_ids.shape)}"
        raise ValueError(f"{argument} is {got}; it must be a (texts, tokens) matrix of token ids.")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"{argument} has {input_ids.shape[1]} tokens a row, the position table holds "
            f"{config.max_position_embeddings}; truncate (LRSCLIPProcessor does) or stretch the model further "
            "(LRSCLIPModel.from_clip with a larger stretch_ratio)."
        )
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or config.eos_token_id == _LEGACY_EOS_TOKEN_ID:
        return
    lacking = ~(input_ids == config.eos_token_id).any(dim=-1)  # (N,)
    if lacking.any():
        rows = lacking.nonzero().flatten().tolist()
        raise ValueError(
            f"{len(rows)} of {len(lacking)} rows of {argument} lack the end-of-text token {config.eos_token_id} where "
            f"the text tower pools (first row: {rows[0]}): the tokenizer is another model's, or ids were cut by hand "
            "without putting it back as the last one."
        )


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Rows of `(N, P)` at length 1, by the very operations of `CLIPModel`, so that results are equal to the bit."""
    if torch.is_autocast_enabled(embeds.device.type):
        embeds = embeds.float()  # bf16 keeps 3 digits, too few for similarities times a logit scale of 100
    return embeds / embeds.pow(2).sum(dim=-1, keepdim=True).pow(0.5)


class _CLIPInitialization:
    """Initialization of weights that a checkpoint lacks, or of a model from scratch, as CLIP's."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # In custom code, transformers leaves modules without parameters of their own (attention, MLP, projections) out
        # of `_init_weights`, lest it overwrite what was loaded; CLIP's spares loaded weights by itself.
        return False

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CLIPModel):  # CLIP forgets it: missing in a checkpoint, it was whatever memory held
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class LRSCLIPModel(_CLIPInitialization, CLIPModel):
    r"""
    CLIP with a position table for long texts, trained on long and short captions.

    With `stretch_ratio=1` it is `CLIPModel`. `get_text_features` and `get_image_features` are CLIP's: they return an
    output whose `pooler_output` is the projected embedding, not normalized.
    """

    config: LRSCLIPConfig
    base_model_prefix = "lrsclip"

    @classmethod
    def from_clip(
        cls,
        name_or_path_or_model: "str | os.PathLike | CLIPModel",
        *,
        kept_positions: int = 20,
        stretch_ratio: int = 4,
        **kwargs,
    ) -> "LRSCLIPModel":
        """
        A CLIP checkpoint with its text position table stretched (knowledge preserved stretching, Section IV-B).

        Args:
            name_or_path_or_model: Hub id, folder, or a `CLIPModel`, which is left as it is.
            kept_positions (`int`, defaults to 20): first rows of the table that stay as they are.
            stretch_ratio (`int`, defaults to 4): rows that stand for each later one: 77 positions become 248.
                1 takes the checkpoint over unstretched.
            kwargs: for `CLIPModel.from_pretrained` (`dtype`, `revision`, `cache_dir`, ...).

        Returns:
            `LRSCLIPModel`: in the type, on the device and in the training state of the checkpoint.

        Raises:
            `ValueError`: for a checkpoint that was stretched before, or numbers that its table does not allow.
        """
        clip = name_or_path_or_model
        if not isinstance(clip, CLIPModel):
            fields = PreTrainedConfig.get_config_dict(clip, **kwargs)[0]
            towers = (fields.get(name) or {} for name in ("text_config", "vision_config"))
            check_layers(*(tower.get("num_hidden_layers") for tower in towers))
            if fields.get("model_type") not in (CLIPConfig.model_type, LRSCLIPConfig.model_type):
                raise ValueError(
                    f"{clip} is {fields.get('model_type') or 'no'} model in HuggingFace format; from_clip takes a CLIP. A "
                    "checkpoint file or open_clip folder is made one by python -m modeling_lrsclip.convert FILE OUT."
                )
            loader = cls if fields.get("model_type") == LRSCLIPConfig.model_type else CLIPModel
            clip = loader.from_pretrained(clip, **kwargs)
        already = getattr(clip.config.text_config, "stretch_ratio", 1)
        if already != 1 and stretch_ratio != 1:
            raise ValueError(
                f"This checkpoint was stretched by {already} before, to {clip.config.text_config.max_position_embeddings}"
                " positions; start from the CLIP it came from, or load it with LRSCLIPModel.from_pretrained."
            )

        state_dict = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        table = "text_model.embeddings.position_embedding.weight"
        text_config = clip.config.text_config.to_dict()
        if already == 1:
            text_config |= {"kept_positions": kept_positions, "stretch_ratio": stretch_ratio}
        if stretch_ratio != 1:
            state_dict[table] = stretch_position_embedding(state_dict[table], kept_positions, stretch_ratio)
        text_config["max_position_embeddings"] = state_dict[table].shape[0]
        if text_config["eos_token_id"] == _LEGACY_EOS_TOKEN_ID:
            # CLIP's tokenizers put start and end of text last in the vocabulary.
            last = text_config["vocab_size"] - 1
            text_config |= {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}

        fields = clip.config.to_dict() | {"text_config": text_config, "architectures": [cls.__name__]}
        for key in ("model_type", "transformers_version", "dtype", "_name_or_path"):
            fields.pop(key, None)
        config = LRSCLIPConfig(**fields)
        config._attn_implementation = clip.config._attn_implementation
        model = cls(config).to(dtype=clip.dtype, device=clip.device)
        model.load_state_dict(state_dict)
        return model.train(clip.training)

    def save_pretrained(self, *args, **kwargs):
        # `register_for_auto_class` remembers one Auto class per model; this one answers to two.
        names = {"AutoModel", "AutoModelForZeroShotImageClassification", self._auto_class} - {None}
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | {
            name: f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}" for name in sorted(names)
        }
        super().save_pretrained(*args, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        _check_text(input_ids, self.config.text_config)
        return super().get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        short_input_ids: torch.LongTensor | None = None,
        short_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LRSCLIPOutput:
        """
        Any of images, long texts and short texts may be left out; what needs them is then None in the output.

        Args:
            input_ids (`(N, L)`): token ids of the long texts (or of whatever one kind of text is at hand).
            pixel_values (`(B, 3, H, W)`): images.
            attention_mask (`(N, L)`): 1 for tokens, 0 for padding; without effect on the embeddings, since the tower
                is causal and pools at the first end-of-text token.
            return_loss (`bool`): also the loss, with `config.long_weight`; B and N must then be equal.
            short_input_ids, short_attention_mask (`(N, L_short)`): the short texts of the same images.

        Returns:
            [`LRSCLIPOutput`], or a tuple of its fields with `return_dict=False`.

        Raises:
            `ValueError`: for texts longer than the position table, rows without end-of-text, no input at all, or
                `return_loss` with missing inputs or batch sizes that differ.
        """
        if input_ids is None and pixel_values is None and short_input_ids is None:
            raise ValueError("The model got no input: give at least one of pixel_values, input_ids, short_input_ids.")
        if return_loss:
            _check_pairs(pixel_values, input_ids, short_input_ids)
        vision_output = text_output = short_text_output = None
        image_embeds = text_embeds = short_text_embeds = logits_per_text = None
        if pixel_values is not None:
            vision_output = self.get_image_features(
                pixel_values=pixel_values,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
                **kwargs,
            )
            image_embeds = _unit(vision_output.pooler_output)  # (B, P)
        if input_ids is not None:
            text_output = self.get_text_features(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                return_dict=True,
                **kwargs,
            )
            text_embeds = _unit(text_output.pooler_output)  # (N, P)
        if short_input_ids is not None:
            _check_text(short_input_ids, self.config.text_config, "short_input_ids")
            short_text_output = self.get_text_features(
                input_ids=short_input_ids, attention_mask=short_attention_mask, return_dict=True, **kwargs
            )
            short_text_embeds = _unit(short_text_output.pooler_output)  # (N, P)
        if image_embeds is not None and text_embeds is not None:
            logits_per_text = self._logits(text_embeds, image_embeds)  # (N, B)

        loss = long_loss = short_loss = None
        if return_loss and text_embeds is not None:
            loss = long_loss = image_text_contrastive_loss(logits_per_text.float())
        if return_loss and short_text_embeds is not None:
            loss = short_loss = image_text_contrastive_loss(self._logits(short_text_embeds, image_embeds).float())
        if long_loss is not None and short_loss is not None:
            loss = self.config.long_weight * long_loss + (1 - self.config.long_weight) * short_loss  # eq. (5)

        return LRSCLIPOutput(
            loss=loss,
            logits_per_image=None if logits_per_text is None else logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_output,
            vision_model_output=vision_output,
            long_loss=long_loss,
            short_loss=short_loss,
            short_text_embeds=short_text_embeds,
            short_text_model_output=short_text_output,
        )

    def _logits(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        with torch.autocast(text_embeds.device.type, enabled=False):
            similarity = torch.matmul(text_embeds, image_embeds.t().to(text_embeds.device))  # (N, B)
            return similarity * self.logit_scale.exp().to(text_embeds.device)


def _check_pairs(pixel_values, input_ids, short_input_ids) -> None:
    inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "short_input_ids": short_input_ids}
    sizes = {name: len(value) for name, value in inputs.items() if value is not None}
    if pixel_values is None or len(sizes) < 2:
        raise ValueError(
            f"return_loss=True got only {', '.join(sizes)}; a contrastive loss takes pixel_values and at least one of "
            "input_ids (long texts) and short_input_ids (short texts)."
        )
    if any(size != sizes["pixel_values"] for size in sizes.values()):  # a set would have every size compiled anew
        counts = ", ".join(f"{count} {name}" for name, count in sizes.items())
        advice = "every image needs its own text, so give equally many of each"
        raise ValueError(f"return_loss=True got {counts}; {advice}.")


class LRSCLIPTextModelWithProjection(_CLIPInitialization, CLIPTextModelWithProjection):
    r"""The text tower with its projection; loads from a full checkpoint. `text_embeds` are not normalized, as in CLIP."""

    config: LRSCLIPTextConfig
    _auto_class = "AutoModel"  # a tower saved alone carries the code and an `auto_map` too
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"]

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | CLIPTextModelOutput:
        _check_text(input_ids, self.config)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )


class LRSCLIPVisionModelWithProjection(_CLIPInitialization, CLIPVisionModelWithProjection):
    r"""The vision tower with its projection; loads from a full checkpoint. `image_embeds` are not normalized, as in CLIP."""

    config: LRSCLIPVisionConfig
    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


__all__ = ["LRSCLIPModel", "LRSCLIPOutput", "LRSCLIPTextModelWithProjection", "LRSCLIPVisionModelWithProjection"]
