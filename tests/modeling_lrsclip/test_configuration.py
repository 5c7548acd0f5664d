"""The configuration checks itself, survives a round trip and is what `AutoConfig` and `CLIPConfig` read."""

import json

import pytest
from transformers import AutoConfig, CLIPConfig

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPModel, LRSCLIPTextConfig, LRSCLIPVisionConfig
from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.published.checkpoints import read_pretrained
from training.model import ModelConfig, open_start


def test_defaults_are_lrsclip_vit_b_16():
    config = LRSCLIPConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.max_position_embeddings, text.kept_positions, text.stretch_ratio) == (248, 20, 4)
    assert (vision.patch_size, vision.hidden_size, text.eos_token_id) == (16, 768, 49407)
    assert config.long_weight == 0.8 and config.model_type == "lrsclip"


def test_round_trip(tmp_path):
    config = LRSCLIPConfig(text_config={"hidden_size": 64}, projection_dim=48, long_weight=0.5)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LRSCLIPConfig) and again.to_diff_dict() == config.to_diff_dict()
    assert type(again.text_config) is LRSCLIPTextConfig and type(again.vision_config) is LRSCLIPVisionConfig
    assert again.text_config.projection_dim == again.vision_config.projection_dim == 48
    assert LRSCLIPTextConfig.from_pretrained(tmp_path).hidden_size == 64  # a tower out of the whole
    assert CLIPConfig.from_pretrained(tmp_path).text_config.max_position_embeddings == 248


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (LRSCLIPConfig, {"long_weight": 1.2}, "\\[0, 1\\]"),
        (LRSCLIPConfig, {"vision_config": {"num_hidden_layers": 2_000_000}}, "a tower may have 1000"),
        (LRSCLIPConfig, {"text_config": {"num_hidden_layers": 2_000_000}}, "a tower may have 1000"),
        (LRSCLIPTextConfig, {"max_position_embeddings": 250}, "20 \\+ n \\* 4"),
        (LRSCLIPTextConfig, {"stretch_ratio": 0}, "stretch_ratio >= 1"),
        (LRSCLIPTextConfig, {"kept_positions": -1}, "kept_positions >= 0"),
        (LRSCLIPTextConfig, {"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
    ],
)
def test_impossible_values(config_class, fields, message):
    with pytest.raises(Exception, match=message):
        config_class(**fields)


def test_any_length_without_stretch():
    assert LRSCLIPTextConfig(max_position_embeddings=77, stretch_ratio=1).max_position_embeddings == 77


@pytest.mark.parametrize("config_class", [CLIPConfig, LRSCLIPConfig])
@pytest.mark.parametrize("read", [read_pretrained, LRSCLIPModel.from_clip, load_encoder])
def test_a_folder_of_two_million_layers_is_refused_before_it_is_built(tmp_path, config_class, read):
    config = config_class().to_dict()
    config["vision_config"]["num_hidden_layers"] = 2_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers=2000000 is no CLIP's; a tower may have 1000"):
        read(str(tmp_path))


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 2_000_000}, {"hidden_size": "wide"}])
@pytest.mark.parametrize("read", [load_encoder, lambda path: open_start(ModelConfig(init=path))])
def test_a_configuration_that_none_could_have_is_refused_in_one_line(tmp_path, fields, read):
    config = LRSCLIPConfig().to_dict()
    config["text_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"^{tmp_path}.*{next(iter(fields))}.*mend its config.json.|a tower may have 1000"
    ) as error:
        read(str(tmp_path))
    assert "\n" not in str(error.value)
