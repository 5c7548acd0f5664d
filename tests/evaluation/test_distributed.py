"""Two processes give, bit by bit, what one gives, and fail together; test_run.py has those of `accelerate launch`."""

import sys

import pytest
import torch

import modeling_lrsclip.encoding.encoder as encoding
from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.encoding.encoder import SharedWork
from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.encoding.model_inputs import encode_texts
from tests import processes


SCRIPT = """
import sys
from pathlib import Path

import torch
from accelerate import PartialState

import modeling_lrsclip.encoding.encoder as encoding
from tests.evaluation.test_distributed import encode, image_files

folder, state = Path(sys.argv[1]), PartialState(cpu=True)
encoding.PART = 2
found = encode(folder, distributed=True, cache_dir=folder / "kept")
try:
    encode(folder, distributed=True, broken=True)
except ValueError as error:
    found["error"] = str(error)
torch.save(found, folder / f"{state.process_index}_of_{state.num_processes}.pt")
"""


def image_files(folder, broken):
    paths = [folder / f"{index}.png" for index in range(7)]
    if broken:
        paths[2] = folder / "broken.png"  # in the second part, which is the second process's
    return ImageFiles(paths, [path.name for path in paths])


def encode(folder, broken=False, **options):
    encoder = load_encoder(str(folder / "model"), batch_size=2, **options)
    images = encoder.images(image_files(folder, broken))
    texts = encoder.texts(encode_texts(encoder.processor, (folder / "texts").read_text().split("\n")))
    return {"images": images.embeds, "texts": texts.embeds}


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path, images, long_texts, short_texts):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    for index in range(7):
        images[index % len(images)].rotate(index).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "texts").write_text("\n".join([*long_texts, *short_texts, long_texts[0]]))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_two_processes_give_what_one_gives(folder, monkeypatch):
    monkeypatch.setattr(encoding, "PART", 2)
    alone = encode(folder)
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    done = processes.run_ranks([sys.executable, folder / "script.py", folder], 2, project=True)
    for rank in range(2):
        assert done[rank].returncode == 0, done[rank].stderr[-3000:]
        encoded = torch.load(folder / f"{rank}_of_2.pt")
        assert torch.equal(encoded["images"], alone["images"]) and torch.equal(encoded["texts"], alone["texts"])
        assert encoded["error"].startswith("image broken.png cannot be read")
    assert len(list((folder / "kept").glob("*/*.safetensors"))) == 4 + 4  # each part by one process
    with_cache = encode(folder, cache_dir=folder / "kept")
    assert torch.equal(with_cache["images"], alone["images"])


def test_sharing_needs_a_process_group():
    with pytest.raises(ValueError, match="distributed=True needs a process group"):
        SharedWork(distributed=True)
