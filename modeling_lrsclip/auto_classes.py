# SPDX-License-Identifier: Apache-2.0
"""The public classes, made known to the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPTokenizer,
)

# From its own module: without torchvision, `transformers.AutoImageProcessor` is a stub that raises in 5.17.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_lrsclip import LRSCLIPConfig, LRSCLIPTextConfig, LRSCLIPVisionConfig
from .image_processing_lrsclip import LRSCLIPImageProcessor
from .modeling_lrsclip import (
    LRSCLIPModel,
    LRSCLIPOutput,
    LRSCLIPTextModelWithProjection,
    LRSCLIPVisionModelWithProjection,
)
from .position_stretching import stretch_position_embedding
from .processing_lrsclip import LRSCLIPProcessor


# Known here (next lines) and, in a process that cannot import this package, through the `auto_map` that
# `register_for_auto_class` has `save_pretrained` write beside a copy of the code.
AutoConfig.register("lrsclip", LRSCLIPConfig)
AutoConfig.register("lrsclip_text_model", LRSCLIPTextConfig)
AutoConfig.register("lrsclip_vision_model", LRSCLIPVisionConfig)
AutoModel.register(LRSCLIPConfig, LRSCLIPModel)
AutoModel.register(LRSCLIPTextConfig, LRSCLIPTextModelWithProjection)
AutoModel.register(LRSCLIPVisionConfig, LRSCLIPVisionModelWithProjection)
AutoModelForZeroShotImageClassification.register(LRSCLIPConfig, LRSCLIPModel)
AutoProcessor.register(LRSCLIPConfig, LRSCLIPProcessor)
AutoImageProcessor.register(LRSCLIPConfig, LRSCLIPImageProcessor)
AutoTokenizer.register(LRSCLIPConfig, fast_tokenizer_class=CLIPTokenizer)

LRSCLIPConfig.register_for_auto_class()
LRSCLIPModel.register_for_auto_class("AutoModel")
LRSCLIPProcessor.register_for_auto_class()
LRSCLIPImageProcessor.register_for_auto_class()

__all__ = [
    "LRSCLIPConfig",
    "LRSCLIPImageProcessor",
    "LRSCLIPModel",
    "LRSCLIPOutput",
    "LRSCLIPProcessor",
    "LRSCLIPTextConfig",
    "LRSCLIPTextModelWithProjection",
    "LRSCLIPVisionConfig",
    "LRSCLIPVisionModelWithProjection",
    "stretch_position_embedding",
]
