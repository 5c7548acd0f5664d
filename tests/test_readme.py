"""The README's commands and code run as they stand, on small data; the wheel holds what README says."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from transformers import CLIPConfig, CLIPModel

from evaluation import attention, compare
from evaluation import run as evaluation_run
from geosearch import __main__ as geosearch_command
from model_cards import build_card, push_to_hub
from modeling_lrsclip import LRSCLIPModel, convert, export_onnx
from modeling_lrsclip.files.configuration import field_types
from modeling_lrsclip.published.checkpoints import PRESETS
from modeling_lrsclip.published.registry import MODELS
from tests import processes
from tests.conftest import tower_configs
from tests.modeling_lrsclip.references import published_state
from tests.modeling_lrsclip.source_files import write_bpe_file, write_source
from training import train
from training.config import TrainConfig


ROOT = Path(__file__).parents[1]
README, MODEL_README = "README.md", "modeling_lrsclip/README.md"
ROOMS = ("modeling_lrsclip", "geosearch", "training", "training/lrs2m", "evaluation", "model_cards")
READMES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (README, *(f"{room}/README.md" for room in ROOMS))
    if (ROOT / name).is_file()
}
EVERYTHING = "\n".join(READMES.values())


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a README in one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


COMMANDS = list(
    dict.fromkeys(line.split("#")[0].strip() for block in blocks(EVERYTHING, "bash") for line in block.splitlines())
)
SMALL = [
    "--model.text", "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}",
    "--model.vision", "{image_size: 32, patch_size: 8, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}",
    "--model.vocab_size", "600", "--loop.batch_size", "2", "--loop.steps", "2", "--loop.log_every", "1",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch, images, long_texts, short_texts):
    """An empty folder with `your/captions.jsonl` and the recipes, as the working directory."""
    (tmp_path / "your" / "tiles").mkdir(parents=True)
    rows = []
    for index, image in enumerate(images):
        image.save(tmp_path / "your" / "tiles" / f"{index}.png")
        rows.append({"image": f"tiles/{index}.png", "long_text": long_texts[index], "short_text": short_texts[index]})
    (tmp_path / "your" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "training").symlink_to(ROOT / "training")
    images[0].save(tmp_path / "tile.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> list[str]:
    """The arguments of the one README command that contains all the words."""
    (match,) = [line for line in COMMANDS if all(word in line for word in words)]
    return shlex.split(match)


def test_every_target_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in {line.split()[1] for line in COMMANDS if line.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_ci_calls_the_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in COMMANDS


def test_from_scratch_then_use_then_evaluate(workplace, capsys):
    arguments = command("training.train", "debug_cpu.yaml")
    train.main([*arguments[arguments.index("training.train") + 1 :], *SMALL])
    assert capsys.readouterr().out.strip().splitlines()[-1] == "runs/mine/final"

    for code in (blocks(READMES[README], "python")[0], "".join(blocks(READMES[MODEL_README], "python")[:2])):
        code = code.replace("runs/demo/lrsclip/final", "runs/mine/final")
        shown = processes.run([sys.executable, "-c", code], cwd=workplace)
        assert shown.returncode == 0, shown.stderr
        assert re.fullmatch(r"tensor\(\[\[0\.\d+, 0\.\d+\]\]\)", shown.stdout.strip()), shown.stdout

    arguments = command("evaluation.run", "zcrl,zcrs")
    assert evaluation_run.main(arguments[arguments.index("evaluation.run") + 1 :]) == 0
    printed = capsys.readouterr().out
    assert "ZCRL" in printed and "ZCRS" in printed and "mine" in printed
    names = ["results.json", "results.md", "results.csv"]
    for name in (*names, "recall_vs_tokens.png", "retrieval_gallery.png", "token_lengths.png"):
        assert (workplace / "results" / name).stat().st_size > 0, name

    shutil.copytree("results", "other")
    assert compare.main(command("evaluation.compare")[3:]) == 0
    assert attention.main(command("evaluation.attention")[3:]) == 0 and (workplace / "attention.png").exists()
    assert build_card.main(command("build_card.py")[2:]) == 0
    assert "you/mine" in (workplace / "runs/mine/final/README.md").read_text()
    capsys.readouterr()
    assert push_to_hub.main(command("push_to_hub.py")[2:]) == 0
    printed = capsys.readouterr().out
    for name in ("model.safetensors", "modeling_lrsclip.py", "results.json", "evaluate_checkpoint.py"):
        assert name in printed, name


def test_a_place_is_found_by_describing_it(workplace, tiny_checkpoint, capsys):
    scenes = workplace / "your" / "scenes"
    scenes.mkdir()
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 96, 128), dtype=np.uint16)
    options = {"driver": "GTiff", "width": 128, "height": 96, "count": 3, "dtype": "uint16", "crs": "EPSG:32633"}
    with rasterio.open(
        scenes / "harbour.tif", "w", **options, transform=from_origin(500_000, 5_400_000, 1, 1)
    ) as scene:
        scene.write(pixels)
    tiny_checkpoint.rename(workplace / "tiny")
    (workplace / "runs" / "mine").mkdir(parents=True)
    (workplace / "runs" / "mine" / "final").symlink_to(workplace / "tiny")
    for words in (("index", "runs/mine/final"), ("search", "hits.html"), ("locate", "heat.tif")):
        assert geosearch_command.main(command("geosearch", *words)[1:]) == 0
    assert "harbour.tif" in capsys.readouterr().out
    for name in ("hits.html", "heat.tif", "places.geojson"):
        assert (workplace / name).stat().st_size > 0, name
    code = blocks(READMES["geosearch/README.md"], "python")[0]
    shown = processes.run([sys.executable, "-c", code], cwd=workplace)
    assert shown.returncode == 0 and shown.stdout.startswith(str(scenes / "harbour.tif")), shown.stderr


def test_fine_tuning_a_clip(workplace, tiny_clip, tiny_processor, capsys):
    tiny_clip.save_pretrained("clip")
    tiny_processor.save_pretrained("clip")
    arguments = command("training.train", "finetune.yaml")
    # The Hub is out of reach here: a small CLIP in a folder takes the place of openai/clip-vit-base-patch16.
    offline = ["--model.init", "clip", "--loop.batch_size", "2", "--loop.steps", "2", "--data.workers", "1"]
    train.main([*arguments[arguments.index("training.train") + 1 :], *offline])
    assert LRSCLIPModel.from_pretrained("runs/mine/final").config.text_config.max_position_embeddings == 248


def test_converting_the_published_file(workplace, tiny_tokenizer):
    state = published_state(49408, 248, two_tables=True)
    write_source("zip", state, workplace).rename("LRSCLIP_ViT-B-16.pt")
    write_bpe_file(workplace / "bpe_simple_vocab_16e6.txt.gz")
    convert.main(command("modeling_lrsclip.convert", "bpe_simple")[3:])
    assert len(CLIPModel.from_pretrained("lrsclip-b16").text_model.embeddings.position_embedding.weight) == 248
    convert.main(command("--plain-clip", "modeling_lrsclip.convert")[3:])
    assert json.loads(Path("lrsclip-b16-clip/config.json").read_text())["model_type"] == "clip"
    convert.main(command("--open-clip")[3:])
    assert Path("lrsclip-b16-open-clip/open_clip_model.safetensors").is_file()
    export_onnx.main(command("export_onnx")[3:])
    assert Path("lrsclip-b16-onnx/onnx/text_model.onnx").is_file()


def test_every_option_of_the_commands_exists(capsys):
    """Commands that need the Hub or public data are not run, but what they say is understood."""
    arguments = command("evaluation.run", "RSITMD")
    assert evaluation_run.parse_arguments(arguments[3:]).data == ["RSITMD", "RSICD", "EuroSAT", "AIR-SLT"]
    for name in re.findall(r"--preset ([\w-]+)", EVERYTHING):
        assert name in PRESETS, name
    for name in re.findall(r"`([a-z]+-?clip-vit-[\w-]+)`", EVERYTHING):
        assert name in MODELS, name


@pytest.mark.parametrize("readme", READMES)
def test_what_commands_name_is_there(readme):
    text = READMES[readme]
    commands = [line for block in blocks(text, "bash") for line in block.splitlines()]
    assert commands
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"python (\w+/\w+\.py)", text):
        assert (ROOT / link).exists() or ((ROOT / readme).parent / link).exists(), link
    for file in re.findall(r"--config(?:_file)? (\w+/[\w/.]+)", text):
        assert (ROOT / file).is_file(), file
    for line in commands:
        if "training.train " in line:
            words = shlex.split(line.split("#")[0])
            config = train.parse_config(words[words.index("training.train") + 1 :])
            assert config.output_dir and config.data.train
    for field in re.findall(r"--((?:loop|data|loss|optim|model|push)\.\w+)", text):
        assert field in field_types(TrainConfig), field


def test_stretching_any_clip(workplace, tiny_tokenizer):
    CLIPModel(CLIPConfig(**tower_configs(tiny_tokenizer))).save_pretrained("clip")
    lines = [line for block in blocks(READMES[MODEL_README], "python") for line in block.splitlines()]
    stretching = [line for line in lines if "LRSCLIPModel.from_clip" in line]
    assert len(stretching) > 1
    for line in stretching:
        positions = int(re.search(r"-> (\d+)", line)[1])
        names = {"LRSCLIPModel": LRSCLIPModel}
        exec(line.replace("openai/clip-vit-base-patch16", "clip"), names)
        assert names["model"].config.text_config.max_position_embeddings == positions


def test_the_wheel_holds_the_library_only(tmp_path):
    source = tmp_path / "source"  # a build leaves its traces where it runs
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ("modeling_lrsclip", "geosearch", "training"):
        shutil.copytree(ROOT / room, source / room)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lrsclip-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"modeling_lrsclip", "geosearch"}
    files = [path for room in ("modeling_lrsclip", "geosearch") for path in (ROOT / room).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
