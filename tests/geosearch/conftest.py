"""A tiny model, and a function that indexes scenes with it."""

import pytest
import torch
from transformers import CLIPTokenizer

from geosearch.index import IndexJob, build_index
from geosearch.windows import WindowSize
from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from tests.conftest import tower_configs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, _tokenizer_folder) -> str:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = CLIPTokenizer.from_pretrained(_tokenizer_folder)
    torch.manual_seed(0)
    LRSCLIPModel(LRSCLIPConfig(**tower_configs(tokenizer))).eval().save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    LRSCLIPProcessor(LRSCLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_index(checkpoint, tmp_path):
    """Function that indexes scenes with windows of 64 pixels."""

    def make(*scenes, output=None, window="64", **options):
        fields = {name: options.pop(name) for name in list(options) if name in IndexJob.__dataclass_fields__}
        job = IndexJob(
            [str(scene) for scene in scenes],
            output or tmp_path / "index",
            fields.pop("model", checkpoint),
            {"sizes": window and tuple(map(WindowSize.parse, window.split(","))), **options},
            device="cpu",
            **fields,
        )
        return build_index(job)

    return make
