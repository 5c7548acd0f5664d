"""Tiny models with the real 248 positions and an offline tokenizer, shared by all tests."""

import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.train_tokenizer import train_tokenizer


os.environ["LRSCLIP_CACHE"] = tempfile.mkdtemp(prefix="lrsclip-embeddings-")  # of commands that modules' fixtures run
torch.set_num_threads(1)  # two test processes share two cores; more threads only wait for each other
gc.disable()  # until all is imported: to look through thousands of new modules takes a fifth of that time

# The files that take longest. The last ones are then short, and no process waits for the other at the end.
LONGEST = ["training/test_survival.py", "training/test_processes.py", "training/test_launch.py"]
LONGEST += ["geosearch/test_examples.py", "geosearch/test_shards.py", "model_cards/test_push_to_hub.py"]
LONGEST += ["training/test_push.py", "modeling_lrsclip/test_ecosystem.py", "test_readme.py", "training/test_train.py"]
LONGEST += ["training/test_ablate.py", "training/test_large_batch.py", "evaluation/test_run.py"]
LONGEST += [
    "modeling_lrsclip/test_export_onnx.py",
    "modeling_lrsclip/test_convert.py",
    "geosearch/test_index_store.py",
]
LONGEST += ["modeling_lrsclip/test_ecosystem_details.py", "modeling_lrsclip/test_plain_clip.py"]
LONGEST += ["modeling_lrsclip/test_remote_code.py", "modeling_lrsclip/published/test_registry.py"]
LONGEST += ["modeling_lrsclip/test_commands.py", "evaluation/test_metrics.py", "evaluation/test_distributed.py"]
PLACE = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}

LONG = [
    "Two white storage tanks stand in the upper left corner. A grey road runs from the left edge to the right edge, and "
    "three red cars are parked beside it. South of the road lies a dark green field with a small blue pond.",
    "A long concrete runway crosses the picture diagonally. Four white aeroplanes wait near its lower end. The grass on "
    "both sides is dry and yellow; a narrow taxiway leads to a large grey hangar on the right.",
    "Dense rows of houses with orange roofs fill the whole tile. Small gardens with round trees lie between them. A "
    "straight street divides the quarter into two halves, and a car turns at the crossing in the middle.",
    "Calm blue water covers the lower half. A wooden pier reaches out from the sandy beach, and five boats are moored "
    "along it. Behind the beach a thin line of trees separates the sand from a parking lot.",
]
SHORT = [
    "Two storage tanks beside a road.",
    "Four planes on a runway.",
    "Houses with orange roofs.",
    "A beach with a pier and boats.",
]


def pytest_configure(config):
    assert all(path.is_file() for path in PLACE), PLACE
    config.option.loadscopereorder = False  # of pytest-xdist, by the number of tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: PLACE.get(item.path, len(PLACE)))
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary():
    gc.unfreeze()  # hypothesis is imported now, and looks who refers to an object


@pytest.fixture(autouse=True)
def _embeddings_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setenv("LRSCLIP_CACHE", str(tmp_path / "kept-embeddings"))


@pytest.fixture(scope="session")
def long_texts() -> list[str]:
    return list(LONG)


@pytest.fixture(scope="session")
def short_texts() -> list[str]:
    return list(SHORT)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size=(40, 48, 3), dtype=np.uint8)) for _ in LONG]


@pytest.fixture(scope="session")
def _tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(LONG + SHORT, vocab_size=700).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_tokenizer(_tokenizer_folder):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_tokenizer_folder)


@pytest.fixture
def tiny_processor(tiny_tokenizer) -> LRSCLIPProcessor:
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LRSCLIPProcessor(LRSCLIPImageProcessor(**size), tiny_tokenizer)


def tower_configs(tokenizer, **text_fields) -> dict:
    """Keyword arguments of a config: two layers, width 32, image 32, patch 8."""
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "text_config": width | special | {"vocab_size": len(tokenizer)} | text_fields,
        "vision_config": width | {"image_size": 32, "patch_size": 8},
        "projection_dim": 24,
    }


@pytest.fixture
def tiny_model(tiny_tokenizer) -> LRSCLIPModel:
    torch.manual_seed(0)
    return LRSCLIPModel(LRSCLIPConfig(**tower_configs(tiny_tokenizer))).eval()


@pytest.fixture
def tiny_clip(tiny_tokenizer) -> CLIPModel:
    """A stock CLIP of 77 positions."""
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(**tower_configs(tiny_tokenizer))).eval()


@pytest.fixture
def tiny_checkpoint(tiny_model, tiny_processor, tmp_path):
    folder = tmp_path / "tiny-lrsclip"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder
