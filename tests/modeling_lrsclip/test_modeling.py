"""The model: CLIP where it is CLIP, the dual-text loss where it is not, and clear errors."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from modeling_lrsclip import (
    LRSCLIPConfig,
    LRSCLIPModel,
    LRSCLIPTextModelWithProjection,
    LRSCLIPVisionModelWithProjection,
    stretch_position_embedding,
)
from tests.conftest import tower_configs


TABLE = "text_model.embeddings.position_embedding.weight"


@pytest.fixture
def inputs(tiny_processor, long_texts, short_texts, images):
    return tiny_processor(text=long_texts, short_text=short_texts, images=images, return_tensors="pt")


@pytest.fixture
def clip_inputs(tiny_processor, short_texts, images):
    return tiny_processor(text=short_texts, images=images, return_tensors="pt")


class TestIsCLIP:
    def test_outputs_loss_and_gradients_are_equal_to_the_bit(self, tiny_clip, clip_inputs):
        model = LRSCLIPModel.from_clip(tiny_clip, stretch_ratio=1)
        expected, got = tiny_clip(**clip_inputs, return_loss=True), model(**clip_inputs, return_loss=True)
        for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            assert torch.equal(got[name], expected[name]), name
        assert torch.equal(got.text_model_output.last_hidden_state, expected.text_model_output.last_hidden_state)
        expected.loss.backward()
        got.loss.backward()
        theirs = dict(tiny_clip.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, theirs[name].grad), name

    def test_features_are_equal(self, tiny_clip, clip_inputs):
        model = LRSCLIPModel.from_clip(tiny_clip, stretch_ratio=1)
        ids = {"input_ids": clip_inputs["input_ids"]}
        assert torch.equal(
            model.get_text_features(**ids).pooler_output, tiny_clip.get_text_features(**ids).pooler_output
        )
        pixels = {"pixel_values": clip_inputs["pixel_values"]}
        assert torch.equal(
            model.get_image_features(**pixels).pooler_output, tiny_clip.get_image_features(**pixels).pooler_output
        )

    def test_state_dict_keys_are_clips(self, tiny_clip, tiny_model):
        assert list(tiny_clip.state_dict()) == list(tiny_model.state_dict())

    def test_weights_from_scratch_are_equal(self, tiny_model):
        config = tiny_model.config
        for ours, theirs, part in (
            (LRSCLIPModel, CLIPModel, config),
            (LRSCLIPTextModelWithProjection, CLIPTextModelWithProjection, config.text_config),
            (LRSCLIPVisionModelWithProjection, CLIPVisionModelWithProjection, config.vision_config),
        ):
            torch.manual_seed(1)
            got = ours(part).state_dict()
            torch.manual_seed(1)
            for name, expected in theirs(part).state_dict().items():
                assert torch.equal(got[name], expected), (ours, name)

    def test_weights_that_a_checkpoint_lacks_begin_as_from_scratch(self, tiny_model):
        attention = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
        kept = {
            name: value for name, value in tiny_model.state_dict().items() if name not in (attention, "logit_scale")
        }
        model = LRSCLIPModel.from_pretrained(None, config=copy.deepcopy(tiny_model.config), state_dict=dict(kept))
        got = model.state_dict()
        assert all(torch.equal(got[name], value) for name, value in kept.items())
        assert got["logit_scale"].item() == pytest.approx(tiny_model.config.logit_scale_init_value)
        assert got[attention].std() == pytest.approx(32**-0.5 * 4**-0.5, rel=0.1)  # width 32, 2 * 2 layers


class TestForward:
    def test_everything_at_once(self, tiny_model, inputs):
        output = tiny_model(**inputs, return_loss=True)
        scale = tiny_model.logit_scale.exp()
        targets = torch.arange(4)
        for loss, texts in ((output.long_loss, output.text_embeds), (output.short_loss, output.short_text_embeds)):
            logits = scale * output.image_embeds @ texts.T
            expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
            torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(output.loss, 0.8 * output.long_loss + 0.2 * output.short_loss)
        torch.testing.assert_close(output.logits_per_text, scale * output.text_embeds @ output.image_embeds.T)
        assert torch.equal(output.logits_per_image, output.logits_per_text.T)
        for embeds in (output.image_embeds, output.text_embeds, output.short_text_embeds):
            assert embeds.shape == (4, 24)
            torch.testing.assert_close(embeds.norm(dim=1), torch.ones(4))
        assert isinstance(output.to_tuple()[5], tuple)

    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_long_weight_of_the_config(self, tiny_model, inputs, weight):
        tiny_model.config.long_weight = weight
        output = tiny_model(**inputs, return_loss=True)
        torch.testing.assert_close(output.loss, weight * output.long_loss + (1 - weight) * output.short_loss)

    def test_gradients_of_the_weighted_loss(self, tiny_model, inputs):
        def gradients(field):
            tiny_model.zero_grad()
            tiny_model(**inputs, return_loss=True)[field].backward()
            return {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}

        both, long, short = gradients("loss"), gradients("long_loss"), gradients("short_loss")
        for name, gradient in both.items():
            torch.testing.assert_close(gradient, 0.8 * long[name] + 0.2 * short[name], atol=1e-5, rtol=1e-4)
        assert both["logit_scale"] != 0 and both[TABLE].abs().sum() > 0

    def test_parts(self, tiny_model, inputs):
        whole = tiny_model(**inputs)
        assert whole.loss is None and whole.long_loss is None
        image = tiny_model(pixel_values=inputs["pixel_values"])
        assert torch.equal(image.image_embeds, whole.image_embeds)
        assert image.text_embeds is None and image.logits_per_image is None and image.text_model_output is None
        text = tiny_model(input_ids=inputs["input_ids"])
        assert torch.equal(text.text_embeds, whole.text_embeds) and text.image_embeds is None
        short = tiny_model(short_input_ids=inputs["short_input_ids"])
        assert torch.equal(short.short_text_embeds, whole.short_text_embeds) and short.text_embeds is None
        only_short = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        output = tiny_model(**only_short, return_loss=True)
        assert output.loss is output.short_loss and output.long_loss is None

    def test_return_dict_false(self, tiny_model, inputs):
        output = tiny_model(**inputs, return_loss=True, return_dict=False)
        assert isinstance(output, tuple) and torch.equal(output[0], tiny_model(**inputs, return_loss=True).loss)

    def test_zero_shot_takes_any_number_of_texts(self, tiny_model, inputs):
        output = tiny_model(input_ids=inputs["input_ids"][:3], pixel_values=inputs["pixel_values"])
        assert output.logits_per_image.shape == (4, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_never_matters(tiny_model, tiny_processor, short_texts, attention):
    tiny_model.set_attn_implementation(attention)
    longest = tiny_processor(text=short_texts, return_tensors="pt")
    expected = tiny_model.get_text_features(**longest).pooler_output
    for length in (77, 248):
        padded = tiny_processor(text=short_texts, padding="max_length", max_length=length, return_tensors="pt")
        assert padded["input_ids"].shape[1] == length
        for inputs in (padded, {"input_ids": padded["input_ids"]}):
            got = tiny_model.get_text_features(**inputs).pooler_output
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_eager_equals_sdpa(tiny_model, inputs):
    tiny_model.set_attn_implementation("eager")
    eager = tiny_model(**inputs, return_loss=True)
    tiny_model.set_attn_implementation("sdpa")
    sdpa = tiny_model(**inputs, return_loss=True)
    torch.testing.assert_close(eager.loss, sdpa.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager.text_embeds, sdpa.text_embeds, atol=1e-5, rtol=1e-5)


def test_what_stands_past_77_tokens_is_read(tiny_model, tiny_processor):
    start = "a road and a field " * 20
    rows = tiny_processor(text=[start + "near two tanks", start + "near a blue pond"], return_tensors="pt")
    assert 77 < rows["input_ids"].shape[1] <= 248
    embeds = tiny_model(input_ids=rows["input_ids"]).text_embeds
    assert (embeds[0] - embeds[1]).abs().max() > 1e-4


def test_a_caption_of_400_tokens(tiny_model, tiny_processor, caplog):
    text = "tank " * 400
    inputs = tiny_processor(text=[text], return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 248)
    assert tiny_model(**inputs).text_embeds.isfinite().all()
    with pytest.raises(ValueError, match="leave truncation on"):
        tiny_processor(text=[text], truncation=False)


class TestErrors:
    def test_longer_than_the_table(self, tiny_model):
        with pytest.raises(ValueError, match="300 tokens a row.*248"):
            tiny_model.get_text_features(torch.zeros(2, 300, dtype=torch.long))

    def test_row_without_end_of_text(self, tiny_model, inputs):
        ids = inputs["input_ids"].clone()
        ids[2] = 5
        for call in (
            lambda: tiny_model(input_ids=ids),
            lambda: tiny_model(short_input_ids=ids),
            lambda: tiny_model.get_text_features(ids),
            lambda: LRSCLIPTextModelWithProjection(tiny_model.config.text_config)(ids),
        ):
            with pytest.raises(ValueError, match="1 of 4 rows .* lack the end-of-text token .*first row: 2"):
                call()

    def test_batch_sizes_differ(self, tiny_model, inputs):
        inputs["pixel_values"] = inputs["pixel_values"][:3]
        with pytest.raises(ValueError, match="3 pixel_values, 4 input_ids, 4 short_input_ids"):
            tiny_model(**inputs, return_loss=True)

    def test_nothing_given(self, tiny_model, inputs):
        with pytest.raises(ValueError, match="no input"):
            tiny_model()
        with pytest.raises(ValueError, match="got only input_ids"):
            tiny_model(input_ids=inputs["input_ids"], return_loss=True)

    def test_ids_of_a_wrong_shape(self, tiny_model):
        with pytest.raises(ValueError, match="matrix of token ids"):
            tiny_model.get_text_features(torch.zeros(5, dtype=torch.long))


class TestFromCLIP:
    def test_stretches_the_table_and_nothing_else(self, tiny_clip):
        before = copy.deepcopy(tiny_clip.state_dict())
        model = LRSCLIPModel.from_clip(tiny_clip)
        text_config = model.config.text_config
        assert (text_config.max_position_embeddings, text_config.kept_positions, text_config.stretch_ratio) == (
            248,
            20,
            4,
        )
        for name, tensor in model.state_dict().items():
            expected = stretch_position_embedding(before[name]) if name == TABLE else before[name]
            assert torch.equal(tensor, expected), name
            assert tensor.data_ptr() != tiny_clip.state_dict()[name].data_ptr(), name
        assert torch.equal(tiny_clip.state_dict()[TABLE], before[TABLE])

    def test_short_texts_keep_their_embedding(self, tiny_clip, clip_inputs):
        assert clip_inputs["input_ids"].shape[1] <= 20  # the kept positions
        model = LRSCLIPModel.from_clip(tiny_clip)
        assert torch.equal(model(**clip_inputs).text_embeds, tiny_clip(**clip_inputs).text_embeds)

    def test_from_a_folder_with_other_numbers(self, tiny_clip, tmp_path):
        tiny_clip.save_pretrained(tmp_path)
        model = LRSCLIPModel.from_clip(tmp_path, kept_positions=10, stretch_ratio=7, dtype=torch.bfloat16)
        assert model.config.text_config.max_position_embeddings == 479 and model.dtype == torch.bfloat16

    def test_legacy_end_of_text(self, tiny_tokenizer, clip_inputs):
        configs = tower_configs(tiny_tokenizer, max_position_embeddings=77, stretch_ratio=1)
        configs["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        legacy = LRSCLIPModel(LRSCLIPConfig(**configs)).eval()
        model = LRSCLIPModel.from_clip(legacy, stretch_ratio=1)
        assert model.config.text_config.eos_token_id == tiny_tokenizer.eos_token_id
        assert torch.equal(model(**clip_inputs).text_embeds, legacy(**clip_inputs).text_embeds)

    def test_not_twice(self, tiny_clip):
        stretched = LRSCLIPModel.from_clip(tiny_clip)
        with pytest.raises(ValueError, match="stretched by 4 before, to 248"):
            LRSCLIPModel.from_clip(stretched)


class TestSaveAndLoad:
    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForZeroShotImageClassification, LRSCLIPModel])
    def test_every_tensor_is_equal(self, tiny_model, tiny_checkpoint, inputs, auto_class):
        again = auto_class.from_pretrained(tiny_checkpoint)
        assert type(again) is LRSCLIPModel
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(tiny_model, kind)())
            ours = dict(getattr(again, kind)())
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                assert torch.equal(tensor, theirs[name]), name
        assert torch.equal(again(**inputs, return_loss=True).loss, tiny_model(**inputs, return_loss=True).loss)

    def test_plain_clip_reads_it(self, tiny_model, tiny_checkpoint, inputs):
        clip = CLIPModel.from_pretrained(tiny_checkpoint)
        ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        assert clip.config.text_config.max_position_embeddings == 248
        output = clip(pixel_values=inputs["pixel_values"], **ids)
        assert torch.equal(
            output.logits_per_image, tiny_model(pixel_values=inputs["pixel_values"], **ids).logits_per_image
        )

    def test_single_towers(self, tiny_model, tiny_checkpoint, inputs):
        text = LRSCLIPTextModelWithProjection.from_pretrained(tiny_checkpoint).eval()
        vision = LRSCLIPVisionModelWithProjection.from_pretrained(tiny_checkpoint).eval()
        whole = tiny_model(**inputs)
        got = text(inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
        assert torch.equal(got, whole.text_model_output.pooler_output)
        got = vision(inputs["pixel_values"]).image_embeds
        assert torch.equal(got, whole.vision_model_output.pooler_output)

    def test_a_saved_tower(self, tiny_checkpoint, tmp_path):
        for tower_class in (LRSCLIPTextModelWithProjection, LRSCLIPVisionModelWithProjection):
            tower = tower_class.from_pretrained(tiny_checkpoint)
            tower.save_pretrained(tmp_path / tower_class.__name__)
            loaded = AutoModel.from_pretrained(tmp_path / tower_class.__name__)
            assert type(loaded) is tower_class
            assert all(torch.equal(loaded.state_dict()[name], value) for name, value in tower.state_dict().items())

    def test_dtype(self, tiny_checkpoint, inputs):
        model = AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
        output = model(**inputs.to(torch.bfloat16), return_loss=True)
        assert output.text_embeds.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
        reference = AutoModel.from_pretrained(tiny_checkpoint)(**inputs.to(torch.float32))
        torch.testing.assert_close(output.text_embeds.float(), reference.text_embeds, atol=0.03, rtol=0)


def test_autocast_computes_similarities_in_float32(tiny_model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model(**inputs)
    assert output.text_embeds.dtype == output.logits_per_text.dtype == torch.float32
    expected = tiny_model.logit_scale.exp() * output.text_embeds @ output.image_embeds.T
    torch.testing.assert_close(output.logits_per_text, expected)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, inputs):
    def gradients():
        tiny_model.zero_grad()
        tiny_model(**inputs, return_loss=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}

    tiny_model.train()
    plain = gradients()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    assert tiny_model.text_model.encoder.layers[0].gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-5)


def test_checks_on_values_stay_out_of_an_export(tiny_model, inputs):
    exported = torch.export.export(tiny_model, (), {"input_ids": inputs["input_ids"]}, strict=False)
    got = exported.module()(input_ids=inputs["input_ids"]).text_embeds
    torch.testing.assert_close(got, tiny_model(input_ids=inputs["input_ids"]).text_embeds)
