"""What users do with a CLIPModel works with LRSCLIPModel: shards, dtypes, devices, compile, export, pipelines."""

import json
import os
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    pipeline,
)

from modeling_lrsclip import LRSCLIPModel, LRSCLIPTextModelWithProjection, LRSCLIPVisionModelWithProjection
from modeling_lrsclip.processing_lrsclip import clean_text
from tests import processes


TOWERS = ("text_model", "vision_model")
LABELS = ["storage tank", "Runway", "sandy beach"]


@pytest.fixture
def inputs(tiny_processor, long_texts, short_texts, images):
    return tiny_processor(text=long_texts, short_text=short_texts, images=images, return_tensors="pt")


@pytest.fixture
def clip_inputs(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture
def clip_checkpoint(tiny_checkpoint, tmp_path):
    """The same weights and the same 248 positions as a stock CLIP saves them."""
    CLIPModel.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "tiny-clip")
    return tmp_path / "tiny-clip"


def assert_same_weights(model, expected) -> None:
    state_dict = model.state_dict()
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state_dict[name], tensor), name


class TestShards:
    def test_every_reader_puts_them_together(self, tiny_model, tmp_path, clip_inputs):
        tiny_model.save_pretrained(tmp_path, max_shard_size="50KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
        assert set(index.values()) == {shard.name for shard in shards} and set(index) == set(tiny_model.state_dict())
        expected = tiny_model(**clip_inputs).logits_per_image
        for auto_class in (AutoModel, AutoModelForZeroShotImageClassification, LRSCLIPModel, CLIPModel):
            model = auto_class.from_pretrained(tmp_path)
            assert_same_weights(model, tiny_model.state_dict())
            assert torch.equal(model(**clip_inputs).logits_per_image, expected)
        for tower_class in (LRSCLIPTextModelWithProjection, LRSCLIPVisionModelWithProjection):
            tower = tower_class.from_pretrained(tmp_path)
            assert_same_weights(tower, {name: tiny_model.state_dict()[name] for name in tower.state_dict()})

    def test_the_same_files_as_clip_writes(self, tiny_checkpoint, clip_checkpoint, tmp_path):
        AutoModel.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "ours", max_shard_size="50KB")
        CLIPModel.from_pretrained(clip_checkpoint).save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
        index = "model.safetensors.index.json"
        assert (tmp_path / "ours" / index).read_text() == (tmp_path / "theirs" / index).read_text()


class TestDtype:
    def test_on_load_and_kept_on_save(self, tiny_checkpoint, clip_checkpoint, tmp_path):
        for folder in (tiny_checkpoint, clip_checkpoint):
            half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
            assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
            saved = tmp_path / f"half-{folder.name}"
            half.save_pretrained(saved)
            config = json.loads((saved / "config.json").read_text())
            assert config["dtype"] == "bfloat16"
            for kwargs, dtype in (
                ({}, torch.bfloat16),
                ({"dtype": "auto"}, torch.bfloat16),
                ({"dtype": torch.float32}, torch.float32),
                ({"dtype": "float16"}, torch.float16),
            ):
                again = AutoModel.from_pretrained(saved, **kwargs)
                assert {tensor.dtype for tensor in again.parameters()} == {dtype}, (folder.name, kwargs)
            assert_same_weights(AutoModel.from_pretrained(saved), half.state_dict())
        assert CLIPModel.from_pretrained(tmp_path / "half-tiny-lrsclip").dtype == torch.bfloat16

    def test_half_precision_embeds_as_clip_does(self, tiny_checkpoint, clip_checkpoint, clip_inputs):
        pixels = clip_inputs["pixel_values"].to(torch.bfloat16)
        outputs = [
            AutoModel.from_pretrained(folder, dtype=torch.bfloat16)(**clip_inputs | {"pixel_values": pixels})
            for folder in (tiny_checkpoint, clip_checkpoint)
        ]
        assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)


class TestDevices:
    SPLIT = {"text_model": "cpu", "vision_model": "disk", "visual_projection": "disk", "text_projection": "cpu"}

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}, SPLIT | {"logit_scale": "cpu"}])
    def test_device_map(self, tiny_model, tiny_checkpoint, clip_checkpoint, clip_inputs, tmp_path, device_map):
        expected = tiny_model(**clip_inputs).logits_per_image
        placed = []
        for folder in (tiny_checkpoint, clip_checkpoint):
            model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
            with torch.no_grad():
                got = model(**clip_inputs).logits_per_image
            torch.testing.assert_close(
                got.cpu(), expected, atol=1e-4, rtol=1e-4
            )  # "auto" takes a GPU where there is one
            placed.append((getattr(model, "hf_device_map", None), [p.device.type for p in model.parameters()]))
        assert placed[0] == placed[1]
        assert ("meta" in placed[0][1]) == (isinstance(device_map, dict) and "disk" in device_map.values())


def compiled(function, **kwargs):
    """`function` compiled in one graph (a break raises), and the counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(function, fullgraph=True, backend=counter, **kwargs), counter


def token_ids(tiny_model, rows: int, length: int) -> torch.Tensor:
    """Random `(rows, length)` whose last token ends the text."""
    eos_token_id = tiny_model.config.text_config.eos_token_id
    ids = torch.randint(0, eos_token_id - 1, (rows, length), generator=torch.Generator().manual_seed(length))
    ids[:, -1] = eos_token_id
    return ids


class TestCompile:
    @pytest.mark.parametrize("kind", ["features", "tower", "stock CLIP"])
    def test_text_tower_once_for_every_length(self, tiny_model, tiny_checkpoint, kind):
        call = {
            "features": tiny_model.get_text_features,
            "tower": LRSCLIPTextModelWithProjection.from_pretrained(tiny_checkpoint),
            "stock CLIP": CLIPModel.from_pretrained(tiny_checkpoint).get_text_features,
        }[kind]
        fast, counter = compiled(call, dynamic=True)
        for rows, length in ((4, 20), (3, 100), (5, 248)):
            ids = token_ids(tiny_model, rows, length)
            for kwargs in ({}, {"attention_mask": torch.ones_like(ids)}):
                got, expected = (function(input_ids=ids, **kwargs) for function in (fast, call))
                name = "text_embeds" if kind == "tower" else "pooler_output"
                torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-5)
        assert counter.frame_count == 2  # with and without a mask

    @pytest.mark.parametrize("kind", ["features", "tower", "stock CLIP"])
    def test_vision_tower_once_for_every_batch_size(self, tiny_model, tiny_checkpoint, inputs, kind):
        call = {
            "features": tiny_model.get_image_features,
            "tower": LRSCLIPVisionModelWithProjection.from_pretrained(tiny_checkpoint),
            "stock CLIP": CLIPModel.from_pretrained(tiny_checkpoint).get_image_features,
        }[kind]
        fast, counter = compiled(call, dynamic=True)
        for rows in (4, 3, 2):
            pixels = inputs["pixel_values"][:rows].clone()  # a view would be a reason to compile again
            name = "image_embeds" if kind == "tower" else "pooler_output"
            got, expected = (function(pixel_values=pixels)[name] for function in (fast, call))
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        assert counter.frame_count == 1

    def test_whole_model_with_loss_and_gradients(self, tiny_model, inputs):
        fast, counter = compiled(tiny_model, dynamic=True)
        for rows in (4, 3):
            batch = {name: tensor[:rows].clone() for name, tensor in inputs.items()}
            gradients = []
            for model in (tiny_model, fast):
                tiny_model.zero_grad()
                loss = model(**batch, return_loss=True).loss
                loss.backward()
                gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in tiny_model.parameters())])
            for plain, quick in zip(*gradients):
                torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 1

    def test_shapes_are_checked_and_values_are_not(self, tiny_model):
        fast, _ = compiled(tiny_model.get_text_features)
        ids = token_ids(tiny_model, 2, 20)
        ids[1] = 5  # no end of text
        with pytest.raises(ValueError, match="1 of 2 rows of input_ids lack the end-of-text token"):
            tiny_model.get_text_features(ids)
        assert fast(ids).pooler_output.shape == (2, 24)
        with pytest.raises(
            Exception, match="300 tokens a row"
        ):  # the compiler wraps the ValueError in a class of its own
            fast(token_ids(tiny_model, 2, 300))


class TestExport:
    @pytest.mark.parametrize("tower_class", [LRSCLIPTextModelWithProjection, CLIPTextModelWithProjection])
    def test_text_tower(self, tiny_model, tiny_checkpoint, inputs, tmp_path, tower_class):
        tower = tower_class.from_pretrained(tiny_checkpoint).eval()
        example = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        free = {0: Dim("texts", max=256), 1: Dim("tokens", max=248)}
        exported = torch.export.export(tower, (), example, dynamic_shapes=dict.fromkeys(example, free))
        torch.export.save(exported, tmp_path / "text.pt2")
        loaded = torch.export.load(tmp_path / "text.pt2").module()
        short = {"input_ids": inputs["short_input_ids"][:3], "attention_mask": inputs["short_attention_mask"][:3]}
        ids = token_ids(tiny_model, 5, 248)
        for batch in (example, short, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            torch.testing.assert_close(loaded(**batch).text_embeds, tower(**batch).text_embeds, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("tower_class", [LRSCLIPVisionModelWithProjection, CLIPVisionModelWithProjection])
    def test_vision_tower(self, tiny_checkpoint, inputs, tmp_path, tower_class):
        tower = tower_class.from_pretrained(tiny_checkpoint).eval()
        example = {"pixel_values": inputs["pixel_values"]}
        free = {"pixel_values": {0: Dim("images", max=256)}}
        exported = torch.export.export(tower, (), example, dynamic_shapes=free)
        torch.export.save(exported, tmp_path / "vision.pt2")
        loaded = torch.export.load(tmp_path / "vision.pt2").module()
        for rows in (1, 3, 4):
            pixels = inputs["pixel_values"][:rows]
            torch.testing.assert_close(
                loaded(pixel_values=pixels).image_embeds, tower(pixels).image_embeds, atol=1e-6, rtol=1e-5
            )


class TestPipelines:
    def test_zero_shot_equals_the_processor_and_the_model(self, tiny_model, tiny_checkpoint, tiny_processor, images):
        classify = pipeline("zero-shot-image-classification", model=str(tiny_checkpoint))
        assert type(classify.model) is LRSCLIPModel
        template = "An aerial photo of a {}."
        texts = [template.format(label) for label in LABELS]
        with torch.no_grad():
            logits = tiny_model(**tiny_processor(text=texts, images=images, return_tensors="pt")).logits_per_image
        results = classify(images, candidate_labels=LABELS, hypothesis_template=template, batch_size=1)
        for result, expected in zip(results, logits.softmax(dim=-1), strict=True):  # (4 images, 3 labels)
            scores = {row["label"]: row["score"] for row in result}
            torch.testing.assert_close(torch.tensor([scores[label] for label in LABELS]), expected)
            assert [row["score"] for row in result] == sorted(scores.values(), reverse=True)

    def test_zero_shot_takes_labels_as_they_are(self, tiny_checkpoint, tiny_processor, images):
        """The pipeline calls the tokenizer, not the processor: labels with curly quotes are to be cleaned before."""
        classify = pipeline("zero-shot-image-classification", model=str(tiny_checkpoint))
        label = "the town\u2019s road &amp; field"
        cleaned = clean_text(label)
        assert cleaned == "the town's road & field"
        seen = []
        classify.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        classify(images[0], candidate_labels=[cleaned, "field"], hypothesis_template="{}")
        expected = tiny_processor(text=[label, "field"], return_tensors="pt")["input_ids"]
        assert torch.equal(seen[0]["input_ids"], expected)

    def test_image_features_are_the_unit_embeddings(self, tiny_model, tiny_checkpoint, tiny_processor, images):
        extract = pipeline("image-feature-extraction", model=str(tiny_checkpoint))
        with torch.no_grad():
            expected = tiny_model(**tiny_processor(images=images, return_tensors="pt")).image_embeds  # (4, 24)
        for kwargs in ({}, {"batch_size": 3}):
            got = extract(images, return_tensors=True, **kwargs)
            torch.testing.assert_close(torch.cat(got), expected, atol=1e-6, rtol=1e-5)
        assert torch.tensor(extract(images[0])).shape == (1, 24)

    def test_where_clip_itself_stops(self, clip_checkpoint, tiny_processor, images):
        tiny_processor.save_pretrained(clip_checkpoint)
        with pytest.raises(ValueError, match="input_ids"):
            pipeline("image-feature-extraction", model=str(clip_checkpoint))(images[0])


SCRIPT = """
import sys
sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, pipeline

text, vision, whole, out = sys.argv[1:]
remote = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(text, **remote).max_position_embeddings == 248
assert AutoConfig.from_pretrained(vision, **remote).model_type == "lrsclip_vision_model"
inputs = torch.load(out + "/inputs.pt")
outputs = {}
for name, folder in (("text", text), ("vision", vision)):
    tower = AutoModel.from_pretrained(folder, **remote).eval()
    assert tower.__class__.__module__.startswith("transformers_modules."), tower.__class__
    with torch.no_grad():
        outputs[name] = tower(inputs[name])[0]
    tower.save_pretrained(f"{out}/{name}")  # and what came as remote code goes on as such
    assert torch.equal(AutoModel.from_pretrained(f"{out}/{name}", **remote)(inputs[name])[0], outputs[name])
image = Image.new("RGB", (50, 40), "teal")
features = pipeline("image-feature-extraction", model=whole, **remote)(image, return_tensors=True)
assert features.shape == (1, 24) and abs(features.norm().item() - 1) < 1e-5
scores = pipeline("zero-shot-image-classification", model=whole, **remote)(image, candidate_labels=["sea", "land"])
assert {row["label"] for row in scores} == {"sea", "land"}
torch.save(outputs, out + "/outputs.pt")
"""


def test_towers_and_pipelines_without_the_package(tiny_model, tiny_checkpoint, inputs, tmp_path):
    folders = {"text": tmp_path / "text-tower", "vision": tmp_path / "vision-tower"}
    classes = {"text": LRSCLIPTextModelWithProjection, "vision": LRSCLIPVisionModelWithProjection}
    for name, folder in folders.items():
        classes[name].from_pretrained(tiny_checkpoint).save_pretrained(folder)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        config_name = f"configuration_lrsclip.LRSCLIP{name.title()}Config"
        assert auto_map == {"AutoConfig": config_name, "AutoModel": f"modeling_lrsclip.{classes[name].__name__}"}
    out = tmp_path / "out"
    out.mkdir()
    torch.save({"text": inputs["input_ids"], "vision": inputs["pixel_values"]}, out / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder) for folder in (*folders.values(), tiny_checkpoint, out)]
    done = processes.run([sys.executable, "-c", SCRIPT, *arguments], cwd=out, env=environment)
    assert done.returncode == 0, done.stderr
    got = torch.load(out / "outputs.pt")
    with torch.no_grad():
        expected = tiny_model(**inputs)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got["text"], expected.text_model_output.pooler_output, **close)
    torch.testing.assert_close(got["vision"], expected.vision_model_output.pooler_output, **close)


def test_a_full_checkpoint_saved_after_a_tower_keeps_its_own_auto_map(tiny_model, tmp_path):
    LRSCLIPTextModelWithProjection(tiny_model.config.text_config).save_pretrained(tmp_path / "tower")
    tiny_model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_lrsclip.LRSCLIPConfig"
    assert config["auto_map"]["AutoModel"] == "modeling_lrsclip.LRSCLIPModel"
    assert CLIPModel.from_pretrained(tmp_path / "whole").config.text_config.max_position_embeddings == 248
