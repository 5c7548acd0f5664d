"""Low-rank adapters: what they train, what they leave, and that a saved model has them in ordinary weights."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from modeling_lrsclip import LRSCLIPModel
from tests.conftest import tower_configs
from training.model import LoRAConfig, ModelConfig, build_model, merged, open_start
from training.run import run
from training.train import parse_config


TABLE = "text_model.embeddings.position_embedding.weight"
LORA = ["--model.lora", "{rank: 4, alpha: 8}", "--optim.learning_rate", "1e-2", "--optim.weight_decay", "0.1"]


@pytest.fixture
def clip(tmp_path, tiny_processor):
    folder = tmp_path / "clip"
    tiny_processor.save_pretrained(folder)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**tower_configs(tiny_processor.tokenizer))).save_pretrained(folder)
    return folder


def test_a_run_ends_with_ordinary_weights(clip, run_arguments, captioned_folder):
    arguments = [*run_arguments, "--model.init", str(clip), "--model.tokenizer", "null", *LORA]
    final = run(parse_config([*arguments, "--data.validation", str(captioned_folder)]))
    before, after = load_file(clip / "model.safetensors"), load_file(final / "model.safetensors")
    assert before.keys() == after.keys() == load_file(final.parent / "best/model.safetensors").keys()
    moved = {name for name in before if name != TABLE and not torch.equal(before[name], after[name])}
    projections = {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    adapted = {name for name in before if ".".join(name.split(".")[-2:]) in projections and "self_attn" in name}
    assert len(adapted) == 2 * 2 * 4 and moved == adapted | {"logit_scale"}
    assert torch.equal(after[TABLE][:20], before[TABLE][:20])
    assert not torch.equal(after[TABLE][20::4][:57], before[TABLE][20:])
    for name in adapted:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 4, name


def test_merged_computes_the_same(clip, tiny_processor, images, long_texts):
    model = build_model(open_start(ModelConfig(init=str(clip), lora=LoRAConfig(rank=3))), tiny_processor).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start
            torch.nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tiny_processor(text=long_texts, images=images, return_tensors="pt")
    plain = merged(model, model.state_dict())
    assert isinstance(plain, LRSCLIPModel) and not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        expected, got = model(**inputs), plain.eval()(**inputs)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_resumed_to_the_bit(clip, run_arguments, tmp_path):
    arguments = [*run_arguments, "--model.init", str(clip), "--model.tokenizer", "null", *LORA]
    arguments += ["--loop.save_every", "2"]
    whole = load_file(run(parse_config(arguments)) / "model.safetensors")
    folder = tmp_path / "run"
    for path in (folder / "checkpoints").glob("step-*4"):
        path.rename(tmp_path / "later")  # as if killed after step 2
    resumed = load_file(run(parse_config([*arguments, "--resume"])) / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_mistakes(run_arguments):
    with pytest.raises(ValueError, match="model.lora.targets names head; choose among q_proj"):
        LoRAConfig(targets=["head"])
    with pytest.raises(SystemExit, match="model.lora adapts trained weights and model.init is scratch"):
        parse_config([*run_arguments, *LORA])
