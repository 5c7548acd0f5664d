"""Beside stock CLIP: towers split over devices, recompilation, tokenized data sets in Trainer, adapters as remote code."""

import os
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import infer_auto_device_map
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from modeling_lrsclip import LRSCLIPModel
from tests import processes
from tests.conftest import tower_configs


TEXTS = ("input_ids", "short_input_ids")


@pytest.fixture
def inputs(tiny_processor, long_texts, short_texts, images):
    return tiny_processor(text=long_texts, short_text=short_texts, images=images, return_tensors="pt")


@pytest.fixture
def stock_clip(tiny_model, tiny_tokenizer) -> CLIPModel:
    """The same weights in a stock CLIP of 248 positions."""
    clip = CLIPModel(CLIPConfig(**tower_configs(tiny_tokenizer, max_position_embeddings=248))).eval()
    clip.load_state_dict(tiny_model.state_dict())
    return clip


def test_a_device_map_splits_towers_but_no_layer_where_clips_does(tiny_model, stock_clip, inputs, tmp_path):
    maps = []
    for name, model in (("ours", tiny_model), ("stock", stock_clip)):
        whole = list(model._no_split_modules)
        maps.append(infer_auto_device_map(model, {"cpu": "200KB", "disk": "1GB"}, no_split_module_classes=whole))
        model.save_pretrained(tmp_path / name)
    assert maps[0] == maps[1] and {"cpu", "disk"} <= set(maps[0].values())
    split = [name for name in maps[0] if name.startswith("text_model.encoder.layers.")]
    assert split and all(name.count(".") == 3 for name in split)  # between the layers of a tower, not within one

    offloaded = LRSCLIPModel.from_pretrained(
        tmp_path / "ours", device_map=dict(maps[0]), offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"cpu", "meta"}
    with torch.no_grad():
        got, expected = offloaded(**inputs, return_loss=True), tiny_model(**inputs, return_loss=True)
    for field in ("loss", "logits_per_image", "short_text_embeds"):
        torch.testing.assert_close(got[field], expected[field], atol=1e-6, rtol=1e-6)
    offloaded.save_pretrained(tmp_path / "again", max_shard_size="50KB")  # collects what lies on the disk
    again = LRSCLIPModel.from_pretrained(tmp_path / "again")
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def ids_of(length: int, rows: int, eos_token_id: int) -> torch.Tensor:
    ids = torch.arange(rows * length).reshape(rows, length) % (eos_token_id - 1)
    ids[:, -1] = eos_token_id
    return ids


def test_compiled_anew_as_often_as_clip(tiny_model, stock_clip):
    """Nothing marked as dynamic: the compiler learns in two steps that the length and the number of texts vary."""
    counts = []
    for model in (tiny_model, stock_clip):
        torch._dynamo.reset()
        counter = CompileCounter()
        fast = torch.compile(model.get_text_features, fullgraph=True, backend=counter)
        for length, rows in ((20, 4), (100, 4), (33, 3), (248, 5), (77, 7)):
            ids = ids_of(length, rows, tiny_model.config.text_config.eos_token_id)
            expected = model.get_text_features(ids).pooler_output
            torch.testing.assert_close(fast(input_ids=ids).pooler_output, expected, atol=1e-6, rtol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [3, 3]


def test_trainer_keeps_the_three_inputs_of_a_tokenized_data_set(tiny_model, tiny_tokenizer, inputs, tmp_path):
    """With `remove_unused_columns` left on, what `forward` names reaches the collator: the short texts, too."""
    table = {
        name: [
            row[row != tiny_tokenizer.pad_token_id].tolist() + [tiny_tokenizer.eos_token_id] for row in inputs[name]
        ]
        for name in TEXTS
    }
    table |= {"pixel_values": inputs["pixel_values"].tolist(), "file_name": [f"{row}.png" for row in range(4)]}
    columns = []

    def collate(rows):
        columns.append(sorted(rows[0]))
        batch = {"pixel_values": torch.tensor([row["pixel_values"] for row in rows]), "return_loss": True}
        for name in TEXTS:
            padded = tiny_tokenizer.pad({"input_ids": [row[name] for row in rows]}, return_tensors="pt")
            batch |= {name.replace("input_ids", key): value for key, value in padded.items()}
        return batch

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(tiny_model, arguments, collate, eval_dataset=datasets.Dataset.from_dict(table))
    with torch.no_grad():
        expected = tiny_model(**inputs, return_loss=True).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert columns == [["input_ids", "pixel_values", "short_input_ids"]]


SCRIPT = """
import sys
sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
import torch
from peft import PeftModel
from transformers import AutoModel

base, adapter, out = sys.argv[1:]
inputs = torch.load(out + "/inputs.pt")
models = {
    "followed": AutoModel.from_pretrained(adapter, trust_remote_code=True),
    "wrapped": PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), adapter),
}
merged = PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), adapter).merge_and_unload()
merged.save_pretrained(out + "/merged", max_shard_size="50KB")
models["merged"] = AutoModel.from_pretrained(out + "/merged", trust_remote_code=True)
logits = {}
for name, model in models.items():
    assert any(type(module).__module__.startswith("transformers_modules.") for module in model.modules()), name
    with torch.no_grad():
        logits[name] = model.eval()(**inputs).logits_per_image
torch.save(logits, out + "/logits.pt")
"""


def test_an_adapter_without_the_package(tiny_model, tiny_checkpoint, inputs, tmp_path):
    tiny_model.save_pretrained(tiny_checkpoint, max_shard_size="50KB")
    assert Path(tiny_checkpoint, "model.safetensors.index.json").exists()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(LRSCLIPModel.from_pretrained(tiny_checkpoint), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected, before = adapted(**inputs).logits_per_image, tiny_model(**inputs).logits_per_image
    assert (expected - before).abs().max() > 1e-2

    out = tmp_path / "out"
    out.mkdir()
    torch.save(dict(inputs), out / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder) for folder in (tiny_checkpoint, tmp_path / "adapter", out)]
    done = processes.run([sys.executable, "-c", SCRIPT, *arguments], cwd=out, env=environment)
    assert done.returncode == 0, done.stderr
    logits = torch.load(out / "logits.pt")
    for name in ("followed", "wrapped", "merged"):
        torch.testing.assert_close(logits[name], expected, atol=1e-4, rtol=1e-5)
