"""
transformers' own test suites on stock CLIP and on LRSCLIP: each `LRSCLIP*` class is the stock class above it with
other classes filled in. Not named `test_*.py`, so that only `run.py`, which sets up `hf_tests`, has it collected.

The archive does not hold transformers' own test file for CLIP, which switches off what makes no sense for it (word
embeddings of an image tower, hidden states of a model of two towers). Here nothing is switched off: those tests fail,
and they fail for CLIP and LRSCLIP alike.
"""

import unittest

import torch
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from hf_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from hf_tests.test_processing_common import ProcessorTesterMixin
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_lrsclip import (
    LRSCLIPConfig,
    LRSCLIPImageProcessor,
    LRSCLIPModel,
    LRSCLIPProcessor,
    LRSCLIPTextConfig,
    LRSCLIPTextModelWithProjection,
    LRSCLIPVisionConfig,
    LRSCLIPVisionModelWithProjection,
)
from modeling_lrsclip.train_tokenizer import train_tokenizer


BATCH = 8  # at least 7: the mixin fills smaller batches up with random tokens, rows without an end of text
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EOS = 1  # low: the mixin clamps ids to a smaller vocabulary; and not 2, which stands for "the largest id of the row"


def text_inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Random ids `(BATCH, tokens)` with an end of text in every row, here and there, and masked from there on."""
    input_ids = ids_tensor([BATCH, tokens], 90) + 3
    rows = torch.arange(BATCH, device=input_ids.device)
    ends = tokens - 1 - 2 * (rows % 3)  # (BATCH,); never the last but one, where the mixin writes ids of its own
    input_ids[rows, ends] = EOS
    mask = torch.arange(tokens, device=input_ids.device) <= ends[:, None]  # (BATCH, tokens)
    return {"input_ids": input_ids, "attention_mask": mask.long()}


class ModelTester:
    """What the mixins ask about a model: sizes, a tiny configuration and inputs for it."""

    batch_size = BATCH
    is_training = False  # a single tower has no loss
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    fields: dict = {}

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class TextTester(ModelTester):
    seq_length = 9
    fields = WIDTH | {"vocab_size": 99, "projection_dim": 24}
    fields |= {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS}

    def inputs(self):
        return text_inputs(self.seq_length)


class VisionTester(ModelTester):
    image_size, patch_size = 32, 8
    seq_length = 17
    fields = WIDTH | {"image_size": image_size, "patch_size": patch_size, "projection_dim": 24}

    def inputs(self):
        return {"pixel_values": floats_tensor([BATCH, 3, self.image_size, self.image_size])}


class DualTester(ModelTester):
    is_training = True
    fields = {"text_config": TextTester.fields, "vision_config": VisionTester.fields, "projection_dim": 24}
    fields |= {"logit_scale_init_value": 0.1}  # a factor of 1: the mixin's tolerances are meant for numbers near 1

    def __init__(self, config_class):
        super().__init__(config_class)
        towers = config_class().text_config, config_class().vision_config
        self.text_model_tester, self.vision_model_tester = TextTester(type(towers[0])), VisionTester(type(towers[1]))

    def inputs(self):
        return self.text_model_tester.inputs() | self.vision_model_tester.inputs() | {"return_loss": True}


class DualTextTester(DualTester):
    """A long and a short text for each image."""

    def inputs(self):
        short = {f"short_{name}": tensor for name, tensor in text_inputs(tokens=6).items()}
        return super().inputs() | short


class CLIPText(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CLIPTextModel, CLIPTextModelWithProjection)
    model_tester_class, config_class, config_fields = TextTester, CLIPTextConfig, {"hidden_size": 96}
    has_text_modality = True
    test_can_init_all_missing_weights_before_2023 = True  # else skipped for a model as old as CLIP

    def setUp(self):
        self.model_tester = self.model_tester_class(self.config_class)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=self.has_text_modality, **self.config_fields
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class LRSCLIPText(CLIPText):
    all_model_classes = (CLIPTextModel, LRSCLIPTextModelWithProjection)
    config_class = LRSCLIPTextConfig


class CLIPVision(CLIPText):
    all_model_classes = (CLIPVisionModel, CLIPVisionModelWithProjection)
    model_tester_class, config_class = VisionTester, CLIPVisionConfig
    has_text_modality = False


class LRSCLIPVision(CLIPVision):
    all_model_classes = (CLIPVisionModel, LRSCLIPVisionModelWithProjection)
    config_class = LRSCLIPVisionConfig


class CLIPDual(CLIPText):
    all_model_classes = (CLIPModel,)
    model_tester_class, config_class, config_fields = DualTester, CLIPConfig, {"projection_dim": 37}
    has_text_modality = False
    _is_composite = True
    additional_model_inputs = ["pixel_values"]


class LRSCLIPDual(CLIPDual):
    all_model_classes = (LRSCLIPModel,)
    model_tester_class, config_class = DualTextTester, LRSCLIPConfig


class CLIPProcessing(ProcessorTesterMixin, unittest.TestCase):
    processor_class, image_processor_class = CLIPProcessor, CLIPImageProcessorPil

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer(["lower newer", "upper older longer string"], vocab_size=600)

    @classmethod
    def _setup_image_processor(cls):
        return cls.image_processor_class()


class LRSCLIPProcessing(CLIPProcessing):
    processor_class, image_processor_class = LRSCLIPProcessor, LRSCLIPImageProcessor


class PixelTester(ImageProcessingTester):
    """What the mixin asks about an image processor."""

    def __init__(self):
        self.batch_size, self.num_channels, self.min_resolution, self.max_resolution = 7, 3, 30, 80
        self.crop_size = {"height": 18, "width": 18}

    def prepare_image_processor_dict(self):
        return {"size": {"shortest_edge": 20}, "crop_size": self.crop_size, "do_convert_rgb": True}


class CLIPPixels(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"pil": CLIPImageProcessorPil}
    image_processor_dict = PixelTester().prepare_image_processor_dict()

    def setUp(self):
        self.image_processor_tester = PixelTester()


class LRSCLIPPixels(CLIPPixels):
    image_processing_classes = {"pil": LRSCLIPImageProcessor}
