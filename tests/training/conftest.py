"""A handful of captioned pictures and the arguments of a run on them that takes a second."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from modeling_lrsclip import LRSCLIPImageProcessor, LRSCLIPProcessor
from tests.conftest import tower_configs


COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "brown", "orange", "purple", "pink", "teal"]


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory):
    """12 pictures and captions.jsonl."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    rows = []
    for index, colour in enumerate(COLOURS):
        pixels = rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        long_text = f"A field lies in the north. The roof is {colour}. A road with {index} cars passes. " * 3
        rows.append({"image": f"{index}.png", "long_text": long_text.strip(), "short_text": f"A {colour} roof."})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="session")
def run_options(captioned_folder) -> list[str]:
    """Command line of a tiny run, but for its folder."""
    width = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2"
    options = {
        "data.train": captioned_folder,
        "model.init": "scratch",
        "model.tokenizer": "train",
        "model.vocab_size": 600,
        "model.text": f"{{{width}}}",
        "model.vision": f"{{{width}, image_size: 32, patch_size: 8}}",
        "model.projection_dim": 24,
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "loop.batch_size": 4,
        "loop.steps": 4,
        "loop.log_every": 1,
        "precision": "fp32",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def clip(tmp_path_factory, _tokenizer_folder):
    """A stock CLIP of 77 positions, which a run stretches."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(_tokenizer_folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    LRSCLIPProcessor(LRSCLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**tower_configs(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture
def run_arguments(run_options, tmp_path) -> list[str]:
    """The same into a folder of its own; a test appends what it wants otherwise."""
    return ["--output_dir", str(tmp_path / "run"), *run_options]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state for the life of a process; each run here starts without one."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
