"""A CLIP folder becomes an LRSCLIP folder."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from modeling_lrsclip import LRSCLIPProcessor, stretch_position_embedding
from modeling_lrsclip.convert import main


TABLE = "text_model.embeddings.position_embedding.weight"


@pytest.fixture
def clip_folder(tiny_clip, tiny_processor, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize(
    ("arguments", "positions"),
    [([], 77), (["--stretch"], 248), (["--stretch", "--kept-positions", "10", "--stretch-ratio", "7"], 479)],
)
def test_folder(clip_folder, tiny_clip, tmp_path, capsys, arguments, positions):
    main([str(clip_folder), str(tmp_path / "out"), *arguments])
    assert f"{positions} text positions" in capsys.readouterr().out
    model, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, LRSCLIPProcessor) and processor.tokenizer.model_max_length == positions
    assert processor.image_processor.crop_size["height"] == 32
    for name, tensor in tiny_clip.state_dict().items():
        if name == TABLE and arguments:
            numbers = [int(word) for word in arguments if word.isdigit()]
            tensor = stretch_position_embedding(tensor, *numbers)
        assert torch.equal(model.state_dict()[name], tensor), name


def test_nothing_there(tmp_path):
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_not_twice(clip_folder, tmp_path):
    main([str(clip_folder), str(tmp_path / "once"), "--stretch"])
    with pytest.raises(SystemExit, match="stretched by 4 before"):
        main([str(tmp_path / "once"), str(tmp_path / "twice"), "--stretch"])
