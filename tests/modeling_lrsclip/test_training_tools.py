"""transformers.Trainer on the three-input batch and PEFT adapters, beside a stock CLIP where it can do the same."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import AutoModel, AutoProcessor, CLIPModel, Trainer, TrainingArguments, default_data_collator

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor


class Pairs(Dataset):
    """Rows of an image with its long and its short caption, as they come from a data set."""

    def __init__(self, images, long_texts, short_texts):
        self.rows = [
            {"image": image, "long": long, "short": short}
            for image, long, short in zip(images, long_texts, short_texts, strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Collator:
    """Rows -> model inputs; `return_loss` asks the model for its loss, as transformers' CLIP example does."""

    def __init__(self, processor, short: bool = True, return_loss: bool = True):
        self.processor, self.short, self.return_loss = processor, short, return_loss

    def __call__(self, rows):
        texts = {"text": [row["long"] for row in rows]}
        if self.short:
            texts["short_text"] = [row["short"] for row in rows]
        batch = self.processor(images=[row["image"] for row in rows], return_tensors="pt", **texts)
        return {**batch, "return_loss": True} if self.return_loss else dict(batch)


@pytest.fixture
def inputs(tiny_processor, long_texts, short_texts, images):
    return tiny_processor(text=long_texts, short_text=short_texts, images=images, return_tensors="pt")


@pytest.fixture
def make_trainer(tiny_processor, images, long_texts, short_texts, tmp_path):
    pairs = Pairs(images, long_texts, short_texts)

    def make(model, collator=None, compute_metrics=None, **arguments):
        defaults = {
            "output_dir": str(tmp_path / "runs"),
            "max_steps": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "remove_unused_columns": False,  # the collator wants captions and images, not the model's arguments
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return Trainer(
            model=model,
            args=TrainingArguments(**defaults | arguments),
            data_collator=collator or Collator(tiny_processor),
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=tiny_processor,
            compute_metrics=compute_metrics,
        )

    return make


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestTrainer:
    def test_learns_evaluates_and_its_checkpoint_reloads(self, tiny_model, make_trainer, inputs, tmp_path):
        with torch.no_grad():
            start = tiny_model(**inputs, return_loss=True).loss.item()
        trainer = make_trainer(tiny_model, save_steps=4)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(start, rel=1e-5)  # long and short, weighted by eq. (5)
        evaluated = trainer.evaluate()["eval_loss"]
        assert evaluated < 0.8 * start
        with torch.no_grad():
            expected = trainer.model.eval()(**inputs, return_loss=True)
        assert evaluated == pytest.approx(expected.loss.item(), rel=1e-5)

        folder = tmp_path / "runs" / "checkpoint-8"
        again = AutoModel.from_pretrained(folder)
        assert type(again) is LRSCLIPModel and "auto_map" in json.loads((folder / "config.json").read_text())
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert CLIPModel.from_pretrained(folder).config.text_config.max_position_embeddings == 248
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is LRSCLIPProcessor and processor.tokenizer.model_max_length == 248

    def test_resumed_equals_uninterrupted(self, tiny_model, make_trainer, tmp_path):
        start = copy.deepcopy(tiny_model)
        make_trainer(tiny_model, max_steps=4, save_steps=2).train()
        trainer = make_trainer(copy.deepcopy(start), max_steps=4, save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, tiny_model.state_dict()[name], atol=1e-6, rtol=1e-5)
            assert not torch.equal(tensor, start.state_dict()[name]), name

    def test_on_long_texts_alone_it_is_clip(self, tiny_clip, make_trainer, tiny_processor, short_texts, images):
        ours = LRSCLIPModel.from_clip(tiny_clip, stretch_ratio=1)
        collator = Collator(tiny_processor, short=False)
        runs = []
        for model in (ours, tiny_clip):
            trainer = make_trainer(
                model, collator, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2
            )
            trainer.train()
            runs.append(losses(trainer) + [trainer.evaluate()["eval_loss"]])
        assert runs[0] == pytest.approx(runs[1], rel=1e-6)

    def test_compute_metrics_sees_the_embeddings(self, tiny_model, make_trainer, inputs):
        seen = {}

        def accuracy(prediction) -> dict[str, float]:
            arrays = prediction.predictions  # both logits, text and image embeddings, both losses, short embeddings
            seen.update(logits=arrays[0], short=arrays[-1], shapes=[array.shape for array in arrays])
            return {"accuracy": (arrays[0].argmax(axis=1) == range(4)).mean()}

        metrics = make_trainer(tiny_model, compute_metrics=accuracy).evaluate()
        assert {"eval_loss", "eval_accuracy"} <= set(metrics)
        with torch.no_grad():
            expected = tiny_model.eval()(**inputs)
        close = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(torch.from_numpy(seen["logits"]), expected.logits_per_image, **close)
        torch.testing.assert_close(torch.from_numpy(seen["short"]), expected.short_text_embeds, **close)
        assert seen["shapes"] == [(4, 4), (4, 4), (4, 24), (4, 24), (), (), (4, 24)]  # and no hidden states

    def test_columns_that_the_model_does_not_take_are_dropped(self, tiny_model, make_trainer, inputs):
        rows = [{name: tensor[i] for name, tensor in inputs.items()} | {"source": f"tile {i}"} for i in range(4)]
        seen = []

        def collate(batch):
            seen.extend(set(row) for row in batch)
            return {**default_data_collator(batch), "return_loss": True}

        trainer = make_trainer(tiny_model, collate, remove_unused_columns=True)
        trainer.eval_dataset = rows
        with torch.no_grad():
            expected = tiny_model(**inputs, return_loss=True).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert seen == [set(inputs)] * 4

    def test_without_return_loss_it_says_so_as_with_clip(self, tiny_model, tiny_clip, make_trainer, tiny_processor):
        for model, short in ((tiny_model, True), (LRSCLIPModel.from_clip(tiny_clip), False)):
            trainer = make_trainer(model, Collator(tiny_processor, short, return_loss=False), max_steps=1)
            with pytest.raises(ValueError, match="did not return a loss"):
                trainer.train()

    @pytest.mark.parametrize(
        "arguments",
        [
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"torch_compile": True, "torch_compile_backend": "eager"},
        ],
        ids=["gradient checkpointing", "torch.compile"],
    )
    def test_the_same_step_in_other_ways(self, tiny_model, make_trainer, arguments):
        other_model = copy.deepcopy(
            tiny_model
        )  # accelerate marks a model as prepared and leaves it alone from then on
        plain = make_trainer(tiny_model, max_steps=2, optim="sgd")
        plain.train()
        torch._dynamo.reset()
        counters.clear()
        other = make_trainer(other_model, max_steps=2, optim="sgd", **arguments)
        other.train()
        assert bool(counters["frames"]) == ("torch_compile" in arguments) and not counters["graph_break"]
        assert losses(other) == pytest.approx(losses(plain), rel=1e-4)
        for name, tensor in other_model.state_dict().items():
            torch.testing.assert_close(tensor, tiny_model.state_dict()[name], atol=1e-5, rtol=1e-4)


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def trained_adapter(folder, inputs, steps: int = 2):
    """A LoRA adapter on the checkpoint in `folder`, after some steps on the four pairs; returns (model, losses)."""
    adapted = lora(AutoModel.from_pretrained(folder))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = adapted(**inputs, return_loss=True).loss
        loss.backward()
        values.append(loss.item())
        optimizer.step()
    return adapted.eval(), values


class TestPEFT:
    def test_trains_saves_reloads_and_merges(self, tiny_model, tiny_checkpoint, inputs, tmp_path):
        torch.manual_seed(0)
        adapted, values = trained_adapter(tiny_checkpoint, inputs)
        assert values[-1] < values[0]
        trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert len(trainable) == 2 * 2 * 2 * 2  # towers, layers, projections, A and B
        frozen = adapted.get_base_model().state_dict()
        for name, tensor in tiny_model.state_dict().items():
            base = name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
            assert torch.equal(frozen[base], tensor), name

        with torch.no_grad():
            expected = adapted(**inputs, return_loss=True)
            before = tiny_model(**inputs)
        adapted.save_pretrained(tmp_path / "adapter")
        for loaded in (
            PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_checkpoint), tmp_path / "adapter"),
            AutoModel.from_pretrained(tmp_path / "adapter"),  # transformers follows the adapter to its base
        ):
            got = loaded.eval()(**inputs, return_loss=True)
            for field in ("loss", "image_embeds", "text_embeds", "short_text_embeds"):
                torch.testing.assert_close(got[field], expected[field], atol=1e-6, rtol=1e-5)
                assert field == "loss" or (got[field] - before[field]).abs().max() > 1e-3

        merged = adapted.merge_and_unload()
        assert type(merged) is LRSCLIPModel
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModel.from_pretrained(tmp_path / "merged")
        assert type(again) is LRSCLIPModel and list(again.state_dict()) == list(tiny_model.state_dict())
        torch.testing.assert_close(again(**inputs).text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-5)
        auto_map = json.loads((tmp_path / "merged" / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification"}
        assert (tmp_path / "merged" / "modeling_lrsclip.py").exists()

    def test_the_features_of_an_adapted_model(self, tiny_checkpoint, inputs):
        adapted, _ = trained_adapter(tiny_checkpoint, inputs, steps=1)
        with torch.no_grad():
            whole = adapted(**inputs)
            text = adapted.get_text_features(inputs["input_ids"]).pooler_output
            image = adapted.get_image_features(inputs["pixel_values"]).pooler_output
        torch.testing.assert_close(text, whole.text_model_output.pooler_output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(image, whole.vision_model_output.pooler_output, atol=1e-5, rtol=1e-5)

    def test_auto_peft_model(self, tiny_checkpoint, inputs, tmp_path):
        """PEFT imports a base class from packages it knows, transformers among them; ours has to be named to it."""
        lora(AutoModel.from_pretrained(tiny_checkpoint)).save_pretrained(tmp_path / "adapter")
        model = AutoPeftModel.from_pretrained(
            tmp_path / "adapter", import_allowlist=["modeling_lrsclip.modeling_lrsclip"]
        )
        assert type(model.get_base_model()) is LRSCLIPModel

    def test_with_the_trainer(self, tiny_checkpoint, make_trainer, inputs, tmp_path):
        torch.manual_seed(0)
        trainer = make_trainer(lora(AutoModel.from_pretrained(tiny_checkpoint)), max_steps=3, learning_rate=1e-2)
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0]
        checkpoint = tmp_path / "runs" / "checkpoint-3"
        assert not (checkpoint / "model.safetensors").exists()
        base = AutoModel.from_pretrained(tiny_checkpoint)
        loaded = PeftModel.from_pretrained(base, checkpoint).eval()
        with torch.no_grad():
            loss = loaded(**inputs, return_loss=True).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
