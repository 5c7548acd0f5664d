"""Every recipe is read, and trains two steps on small stand-ins of the checkpoints that it starts from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_lrsclip import LRSCLIPModel
from modeling_lrsclip.convert import load_published
from modeling_lrsclip.published import checkpoints
from tests.modeling_lrsclip.references import published_state
from tests.modeling_lrsclip.source_files import write_bpe_file, write_source
from training.model import ModelConfig, build_model, build_processor, full_name, open_start, resolve_init
from training.run import run
from training.run_folder import MODELS, describe_init
from training.train import parse_config


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
TABLE = "text_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """A file with the two tables of Long-CLIP and LRSCLIP, one of OpenAI's CLIP, and the BPE file of both."""
    folder = tmp_path_factory.mktemp("published")
    long_clip = write_source("zip", published_state(49408, 248, two_tables=True), folder).rename(folder / "long.pt")
    clip = write_source("torchscript", published_state(49408, 77), folder).rename(folder / "clip.pt")
    write_bpe_file(folder / "bpe.txt.gz")
    return {"longclip": long_clip, "clip": clip, "bpe": folder / "bpe.txt.gz"}


def read(recipe: str, *options: str):
    return parse_config(["--config", str(CONFIGS / f"{recipe}.yaml"), "--output_dir", "run", *options])


def two_steps(recipe: str, folder: Path, data: Path, *options: str) -> Path:
    small = {"loop.steps": 2, "loop.batch_size": 4, "loop.log_every": 1, "data.workers": 0, "precision": "fp32"}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    if read(recipe, "--data.train", "x", "--model.tokenizer", "train").loop.micro_batch_size:
        words += ["--loop.micro_batch_size", "2"]
    words += ["--output_dir", str(folder), "--data.train", str(data), *options]
    final = run(read(recipe, *words))
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == [1, 2]
    return final


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_two_steps(recipe, clip, captioned_folder, tmp_path):
    starts_from = read(recipe, "--data.train", "x", "--model.tokenizer", "train").model.init
    if starts_from == "scratch":
        options = ["--model.tokenizer", "train", "--model.vocab_size", "600"]
    else:
        options = ["--model.init", str(clip)]
    final = two_steps(recipe, tmp_path / "run", captioned_folder, *options)
    model = LRSCLIPModel.from_pretrained(final)
    if starts_from == "scratch":
        return
    before, after = load_file(clip / "model.safetensors"), load_file(final / "model.safetensors")
    assert model.config.text_config.max_position_embeddings == 248
    assert before.keys() == after.keys()
    assert torch.equal(after[TABLE][:20], before[TABLE][:20])
    moved = [name for name in before if name != TABLE and not torch.equal(before[name], after[name])]
    assert any("text_model" in name for name in moved) and any("vision_model" in name for name in moved)


@pytest.mark.parametrize("size", ["b32", "b16", "l14"])
def test_what_the_paper_and_long_clip_say(size):
    """Table X of the paper; train/train.md of beichenzbc/Long-CLIP."""
    paper, long_clip = (read(f"vit_{size}_{kind}", "--data.train", "x") for kind in ("paper", "longclip"))
    assert paper.model.init == long_clip.model.init == describe_init(f"clip-vit-{size[0]}-{size[1:]}")["name"]
    optim, loss, loop = paper.optim, paper.loss, paper.loop
    assert (optim.name, optim.learning_rate, optim.momentum, optim.dampening) == ("sgd", 3e-4, 0.9, 0.1)
    assert (optim.schedule, optim.warmup_steps, optim.weight_decay, optim.max_grad_norm) == ("constant", 0, 0, None)
    assert (loss.long_weight, loss.pcm_rank, loss.label_smoothing) == (0.8, None, 0)
    assert (loop.batch_size, loop.epochs, loop.steps, loop.micro_batch_size) == (512, 1, None, None)
    optim, loss, loop = long_clip.optim, long_clip.loss, long_clip.loop
    assert (optim.name, optim.learning_rate, optim.weight_decay) == ("adamw", 1e-6, 1e-2)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.schedule, optim.warmup_steps, optim.max_grad_norm) == ("cosine", 200, None)
    assert (loss.long_weight, loss.pcm_rank, loss.label_smoothing) == (0.5, 32, 0.1)
    assert (loop.batch_size, loop.epochs) == (2048, 6)
    assert paper.model.freeze_kept_positions and long_clip.model.freeze_kept_positions
    assert all(config.model.kept_positions == 20 for config in (paper, long_clip))


def test_from_a_published_long_clip(published, captioned_folder, tmp_path):
    options = ["--model.init", str(published["longclip"]), "--model.tokenizer", str(published["bpe"])]
    final = two_steps("from_longclip", tmp_path / "run", captioned_folder, *options)
    before = load_published(published["longclip"], tokenizer=published["bpe"])[0].state_dict()[TABLE]
    after = load_file(final / "model.safetensors")[TABLE]
    assert torch.equal(after[:20], before[:20]) and not torch.equal(after[20:], before[20:])


def test_a_published_clip_is_stretched(published):
    config = ModelConfig(init=str(published["clip"]), tokenizer=str(published["bpe"]), stretch_ratio=2)
    start = open_start(config)
    processor = build_processor(start, [])
    model = build_model(start, processor)
    assert model.dtype == torch.float32 and model.config.text_config.hidden_act == "quick_gelu"
    assert len(model.text_model.embeddings.position_embedding.weight) == 20 + 57 * 2
    assert processor.tokenizer.model_max_length == 20 + 57 * 2


def test_a_published_file_is_opened_once(published, captioned_folder, tmp_path, monkeypatch):
    opened, read = [], checkpoints.read_published_file
    monkeypatch.setattr(checkpoints, "read_published_file", lambda path: opened.append(path) or read(path))
    options = ["--model.init", str(published["longclip"]), "--model.tokenizer", str(published["bpe"])]
    two_steps("from_longclip", tmp_path / "run", captioned_folder, *options)
    assert opened == [str(published["longclip"])]


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [MODELS[full_name(name)].title for name in ("clip", "longclip", "lrsclip")] == [
        "CLIP ViT-B/16",
        "Long-CLIP ViT-B/16",
        "LRSCLIP ViT-B/16",
    ]
    assert describe_init("longclip") == {"name": "BeichenZhang/LongCLIP-B", "kind": "hub"}
    assert resolve_init(ModelConfig(init="you/mine")).init == "you/mine"
    file = tmp_path / "RemoteCLIP-ViT-B-32.pt"
    file.write_bytes(b"")
    resolved = resolve_init(ModelConfig(init=str(file)))
    assert (resolved.init, resolved.preset) == (str(file), "remoteclip")
    assert resolve_init(ModelConfig(init=str(file), preset="skyclip")).preset == "skyclip"
    (tmp_path / "clip").mkdir()  # a folder of that name comes first
    assert full_name("clip") == "clip"
    with pytest.raises(ValueError, match="Did you mean long-clip-vit-b-16"):
        resolve_init(ModelConfig(init="longclip-vit-b16"))
    with pytest.raises(ValueError, match=r"model.preset is remote; choose among .*remoteclip"):
        ModelConfig(init="x.pt", preset="remote")
