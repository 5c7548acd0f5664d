"""A saved folder works in a process that cannot import this package, through `trust_remote_code=True`."""

import json
import os
import sys

import torch

from tests import processes


SCRIPT = """
import sys
sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
import torch
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor,
                          AutoTokenizer)
# `transformers.AutoImageProcessor` is a stub without torchvision in 5.17
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, out = sys.argv[1:]
remote = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(folder, **remote).text_config.max_position_embeddings == 248
processor = AutoProcessor.from_pretrained(folder, **remote)
assert type(AutoImageProcessor.from_pretrained(folder, **remote)) is type(processor.image_processor)
assert AutoTokenizer.from_pretrained(folder, **remote).model_max_length == 248
inputs = processor(text=["a road \u2019s end " * 30], short_text=["a road"], images=Image.new("RGB", (50, 40), "teal"),
                   return_tensors="pt")
outputs = []
for auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
    model = auto_class.from_pretrained(folder, **remote).eval()
    assert model.__class__.__module__.startswith("transformers_modules."), model.__class__
    with torch.no_grad():
        output = model(**inputs, return_loss=True)
    outputs.append((output.logits_per_image, output.short_text_embeds, output.image_embeds))
assert all(torch.equal(a, b) for a, b in zip(*outputs))
model.save_pretrained(out)   # and what came as remote code goes on as such
processor.save_pretrained(out)
torch.save((dict(inputs), outputs[0], dict(model.named_parameters()), dict(model.named_buffers())), out + "/outputs.pt")
"""


def run(folder, out, tmp_path):
    out.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / f"modules-{out.name}"), "HF_HUB_OFFLINE": "1"}
    done = processes.run([sys.executable, "-c", SCRIPT, str(folder), str(out)], cwd=out, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(out / "outputs.pt", weights_only=False)


def test_without_the_package(tiny_checkpoint, tiny_model, tmp_path):
    names = {path.name for path in tiny_checkpoint.iterdir()}
    assert {"configuration_lrsclip.py", "modeling_lrsclip.py", "position_stretching.py"} <= names
    assert {"image_processing_lrsclip.py", "processing_lrsclip.py", "model.safetensors", "tokenizer.json"} <= names
    auto_map = json.loads((tiny_checkpoint / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification"}

    inputs, (logits, short_embeds, image_embeds), parameters, buffers = run(
        tiny_checkpoint, tmp_path / "once", tmp_path
    )
    for name, tensor in tiny_model.named_parameters():
        assert torch.equal(tensor, parameters[name]), name
    for name, tensor in tiny_model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    with torch.no_grad():
        expected = tiny_model(**inputs)
    # Another process may place its tensors otherwise, and the last bit of a matrix product depends on alignment.
    close = {"atol": 1e-5, "rtol": 1e-6}
    torch.testing.assert_close(expected.logits_per_image, logits, **close)
    torch.testing.assert_close(expected.short_text_embeds, short_embeds, **close)
    torch.testing.assert_close(expected.image_embeds, image_embeds, **close)

    again = run(tmp_path / "once", tmp_path / "twice", tmp_path)  # saved from remote code, loaded as remote code
    torch.testing.assert_close(again[1][0], logits, **close)
