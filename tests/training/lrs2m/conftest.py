"""Small pictures with captions, and recipes on them whose captioners are a loopback server."""

import json
from pathlib import Path

import pytest
import yaml

from tests.training.lrs2m.small_builds import THINGS, long_caption, picture, short_caption


@pytest.fixture(scope="session")
def tiles(tmp_path_factory) -> Path:
    """24 pictures and captions.jsonl with a long and a short caption each."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = []
    for index in range(24):
        picture(index).save(folder / f"{index:02d}.png")
        row = {"image": f"{index:02d}.png", "long_text": long_caption(index), "short_text": short_caption(index)}
        rows.append(row | {"class_name": THINGS[index % len(THINGS)]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def tokenizer_folder(_tokenizer_folder) -> str:
    return str(_tokenizer_folder)


@pytest.fixture
def write_recipe(tmp_path, tokenizer_folder):
    """Writes a recipe of sources; `url` is where its captioners listen."""

    def write(sources: list[dict], url: str = "http://127.0.0.1:9/v1", **fields) -> Path:
        engine = {"kind": "openai", "base_url": url, "concurrency": 4, "timeout": 5}
        values = {
            "name": "test",
            "tokenizer": tokenizer_folder,
            "captioners": {"mllm": engine | {"model": "tiny/mllm"}, "llm": engine | {"model": "tiny/llm"}},
            "sources": sources,
            "duplicates": {"inside": False},
            # The loopback server's answers are one text with a few words of the prompt in it; some sources share rows.
            "checks": dict.fromkeys(("repeated_answer", "repeated_row", "excluded_class", "agreement"), "off"),
            "validation_fraction": 0.2,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | fields))
        return path

    return write
