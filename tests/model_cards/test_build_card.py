"""Cards say what results.json, the training record and the paper say, and nothing else."""

import copy
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard
from transformers import AutoModel

from evaluation import run as evaluation_run
from evaluation.paper import beside_paper, paper_figures, paper_tables
from model_cards.build_card import build_card, main
from model_cards.checkpoint import PUBLISHED, published_model, read_checkpoint
from model_cards.redaction import command_for
from model_cards.result_tables import NOT_YET, TASKS, paper_rows
from modeling_lrsclip import LRSCLIPModel
from modeling_lrsclip.encoding import Encoder
from modeling_lrsclip.files.hashing import weights_sha256
from modeling_lrsclip.published.registry import MODELS
from tests import processes
from training import train


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"


@pytest.fixture(scope="module")
def data(tmp_path_factory, images, long_texts, short_texts):
    folder, rows = tmp_path_factory.mktemp("data"), []
    for index, (image, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True)):
        image.save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "long_text": long, "short_text": short}))
    (folder / "tiles.jsonl").write_text("\n".join(rows))
    return folder / "tiles.jsonl"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A model folder as the training leaves it."""
    width = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    options = {
        "output_dir": tmp_path_factory.mktemp("runs") / "mine",
        "data.train": data,
        "model.init": "scratch",
        "model.tokenizer": "train",
        "model.vocab_size": 600,
        "model.text": f"{{{width}}}",
        "model.vision": f"{{{width}, image_size: 32, patch_size: 8}}",
        "model.projection_dim": 24,
        "loop.batch_size": 4,
        "loop.steps": 2,
    }
    AcceleratorState._reset_state(True)  # accelerate keeps it for the life of a process
    train.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    AcceleratorState._reset_state(True)
    return options["output_dir"] / "final"


@pytest.fixture(scope="module")
def results(trained, data):
    """What evaluation.run wrote of it."""
    output = trained.parents[1] / "results"
    assert evaluation_run.main(["--model", str(trained), "--data", str(data), "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def document(folder: Path, results: list[dict], label: str = "lrsclip-vit-b-16") -> dict:
    """A results.json of the weights in `folder` without having measured them."""
    results = [{"model": label} | result for result in results]
    model = {"label": label, "path": str(folder), "weights_sha256": read_checkpoint(folder).weights_sha256}
    return {
        "models": [model | {"dtype": "float32", "device": "cpu"}],
        "results": [result | beside_paper(result) for result in results],
        "environment": {"python": "3.11.0", "versions": {"torch": "2.13.0", "datasets": None}},
    }


def retrieval(task: str, dataset: str, texts: int, value: float = 12.25) -> dict:
    metrics = {f"{way}_R@{k}": value + k for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    counts = {"images": 452, "texts": texts, "share_truncated": 0.0625, "tokens": {"mean": 15.25, "longest": 61}}
    return {"task": task, "dataset": dataset, "metrics": metrics | {"mR": value + 16 / 3}} | counts


def section(card: ModelCard | str, title: str) -> str:
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", str(card), re.M | re.S)[1]


def tables_of(card: ModelCard) -> str:
    """The four tables and what is noted below them."""
    return section(card, "Results").partition("### ")[2]


def numbers(value) -> set[str]:
    """Every number in a JSON-like value, as a card may write it."""
    if isinstance(value, dict):
        return set().union(*map(numbers, value.values()), *map(numbers, value))
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    if isinstance(value, str):
        return set(re.findall(r"\d[\d,]*(?:\.\d+)?", value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = abs(value)
        whole = {f"{value}", f"{value:,}"} if isinstance(value, int) else set()
        return whole | {f"{value:.1f}", f"{value:.2f}", f"{value:.4f}", f"{100 * value:.2f}"}
    return set()


def assert_numbers_come_from(text: str, *sources) -> None:
    figures = re.findall(r"(?<![\w@])\d[\d,]*(?:\.\d+)?", text)
    known = set().union(*map(numbers, sources))
    assert figures and set(figures) <= known, sorted(set(figures) - known)


# ------------------------------------------------------------------------------------------------- a model of one's own


def test_the_card_of_a_trained_and_measured_model(trained, results):
    card = build_card(trained, results, repo_id="you/tiny")
    record = json.loads((trained / "run.json").read_text())

    assert_numbers_come_from(tables_of(card), results)
    assert_numbers_come_from(section(card, "Token length"), results, [248])
    tables = section(card, "Results")
    assert tables.count("| measured |") == 2 and "| paper |" not in tables and "| gap |" not in tables
    assert [title for title in TASKS.values() if f"### {title}\n\n{NOT_YET.capitalize()}." in tables] == [
        TASKS["zic"],
        TASKS["selo"],
    ]
    assert "tiles (4 images, 4 texts) † | measured |" in tables
    assert "- † seen, not zero-shot: it was trained on this very file." in tables
    mean = results["results"][0]["metrics"]["mR"]
    assert f"| {mean:.2f} |" in tables
    assert "| tokens kept | 20 | 40 | 77 | 120 | 160 | 200 | 248 |" in card.content

    recipe = section(card, "Training data and recipe")
    assert "started from | random weights" in recipe and "2 steps of 4 pairs" in recipe
    assert "0.8 for the long and 0.2 for the short text" in recipe and "sgd, learning rate 0.0003" in recipe
    assert f"torch {record['versions']['torch']}" in section(card, "Reproduce")
    commands = section(card, "Reproduce")
    assert "accelerate launch -m training.train --config config.yaml" in commands
    assert "python -m evaluation.run --model you/tiny --data tiles.jsonl --output results" in commands
    assert str(trained.parents[2]) not in str(card) and "{{" not in str(card) and "\n\n\n" not in str(card)
    assert "LRS2M" not in section(card, "Limits") and "cwz14" not in str(card)


def test_figures_on_what_was_trained_on_are_not_in_the_index(trained, results):
    assert {"seen"} <= results["results"][0].keys() and "model-index" not in build_card(
        trained, results
    ).data.to_dict()


def test_written_and_loaded_the_card_is_equal(trained, results, tmp_path):
    unseen = [{k: v for k, v in result.items() if k != "seen"} | {"source": "new"} for result in results["results"]]
    results = results | {"results": unseen}
    card = build_card(trained, results, repo_id="you/tiny")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert str(loaded) == str(card) and loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.eval_results == card.data.eval_results

    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["license"] == "unknown"
    assert metadata["pipeline_tag"] == "zero-shot-image-classification" and metadata["metrics"] == ["recall"]
    assert "base_model" not in metadata and "datasets" not in metadata
    (index,) = metadata["model-index"]
    assert index["name"] == "tiny"
    # Long and short retrieval on the same images stay apart, each with all of its metrics.
    assert [entry["dataset"]["config"] for entry in index["results"]] == ["zcrl", "zcrs"]
    for entry, result in zip(index["results"], results["results"], strict=True):
        shown = {metric["type"]: metric["value"] for metric in entry["metrics"]}
        assert shown == {name: round(value, 2) for name, value in result["metrics"].items()}


def test_the_lines_of_use_run_without_the_package(trained, images, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", str(build_card(trained)), re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(lines) == 5
    images[0].save(trained.parent / "tile.png")
    script = "import sys; sys.modules['modeling_lrsclip'] = None\n" + code
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    shown = processes.run(command, cwd=trained.parent, env=environment)
    assert shown.returncode == 0, shown.stderr
    ((first, second),) = json.loads(shown.stdout)
    assert first != second


def test_what_is_not_known_is_said_to_be_so(tiny_checkpoint):
    card = build_card(tiny_checkpoint)
    assert "Not recorded: the folder holds no `run.json`" in str(card)
    assert section(card, "Results").lower().count(NOT_YET) == 4 and NOT_YET in section(card, "Token length")
    assert "model-index" not in card.data.to_dict() and "**Weights**: not stated" in str(card)
    assert "# tiny-lrsclip\n" in str(card) and 'from_pretrained("tiny-lrsclip"' in str(card)
    assert "python -m evaluation.run --model tiny-lrsclip --tasks all" in str(card)
    licensed = build_card(tiny_checkpoint, license_id="cc-by-4.0")
    assert licensed.data.license == "cc-by-4.0" and "**Weights**: cc-by-4.0, as stated by" in str(licensed)


def test_names_of_the_hub_reach_the_metadata(trained):
    record = json.loads((trained / "run.json").read_text())
    record["init"] = {"name": "openai/clip-vit-base-patch16", "kind": "hub"}
    record["init_run"] = copy.deepcopy(record) | {"init_run": None}
    record["data"] |= {"name": "you/pairs", "kind": "hub"}
    record["validation"], record["best"] = {"name": "you/pairs", "kind": "hub", "pairs": 3}, {"step": 2, "mR": 66.25}
    record["git"] = {"commit": "0123456789abcdef", "modified": True}
    card = build_card(trained, training=record)
    assert card.data.base_model == "openai/clip-vit-base-patch16" and card.data.datasets == ["you/pairs"]
    assert "at commit `0123456789ab`, with changes that were not committed:" in str(card)
    assert "mR 66.2 at best, after step 2, on 3 pairs" in str(card)
    assert "itself trained for 2 steps on 4 pairs of `tiles.jsonl`" in str(card)
    assert "OpenAI's model card of CLIP" in str(card)


# ------------------------------------------------------------------------------------------------- weights and mistakes


@pytest.mark.parametrize("dtype, shards", [("float32", None), ("bfloat16", None), ("float16", "20KB")])
def test_the_hash_is_that_of_the_evaluation(tiny_model, tmp_path, dtype, shards):
    tiny_model.to(getattr(torch, dtype)).save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    facts = read_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    assert (
        facts.weights_sha256 == Encoder(AutoModel.from_pretrained(tmp_path, dtype=torch.float32), None).weights_sha256
    )
    weights = AutoModel.from_pretrained(tmp_path).state_dict()
    assert facts.weights_sha256 == weights_sha256(sorted(weights.items()))
    assert facts.stored_dtype == dtype
    assert facts.parameters == sum(weight.numel() for weight in tiny_model.parameters())


def test_results_of_other_weights_are_refused(tiny_checkpoint, tmp_path):
    results = document(tiny_checkpoint, [retrieval("zcrs", "tiles", 5)], label="a")
    build_card(tiny_checkpoint, results)
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    model = LRSCLIPModel.from_pretrained(other)
    with torch.no_grad():
        model.logit_scale += 1e-3
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"^the results are those of a \(\w{12}\), not of the weights in .*other"):
        build_card(other, results)


def test_a_training_record_of_other_weights_is_refused(trained, tiny_checkpoint):
    record = json.loads((trained / "run.json").read_text())
    with pytest.raises(ValueError, match="^the training record is that of other weights"):
        build_card(tiny_checkpoint, training=record)
    with pytest.raises(ValueError, match="^the training record lacks what run.json"):
        build_card(tiny_checkpoint, training={"steps": 3})
    with pytest.raises(ValueError, match="was trained by its authors"):
        build_card(trained, published="lrsclip-vit-b-16")


def test_mistakes_are_one_sentence(tiny_checkpoint, tiny_clip, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_checkpoint / "config.json", tmp_path / "bare")
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"broken")
    for name in ("conversion.json", "run.json"):
        shutil.copytree(tiny_checkpoint, tmp_path / name)
        (tmp_path / name / name).write_text("[]")
    for folder, problem in (
        (tmp_path, "has no config.json"),
        (tmp_path / "clip", "is a clip model; cards are for lrsclip"),
        (tmp_path / "bare", "holds neither model.safetensors nor"),
        (damaged, "cannot be read"),
        (tmp_path / "conversion.json", "conversion.json cannot be read .it holds a list and no object"),
        (tmp_path / "run.json", "run.json cannot be read .it holds a list and no object"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_card(folder)
    for options, problem in (
        ({"results": {"models": []}}, "give the results.json of evaluation.run"),
        ({"results": document(tiny_checkpoint, []) | {"models": []}}, "those of no model"),
        ({"repo_id": "a/b/c"}, "a/b/c"),
        ({"published": "lrsclip-vit-h-14"}, "there are lrsclip-vit-b-16, lrsclip-vit-l-14"),
    ):
        with pytest.raises(ValueError, match=problem):
            build_card(tiny_checkpoint, **options)
    with pytest.raises(ValueError, match="needs a checkpoint folder or"):
        build_card(None)
    with pytest.raises(ValueError, match="give the checkpoint folder that was measured"):
        build_card(None, document(tiny_checkpoint, []), published="lrsclip-vit-b-16")


ATTACK = "a <img src=x onerror=alert(1)>\n\n# Mine ![x](https://evil.example/x.png) [y](https://evil.example) | `z`\n```\n<script>"


def hostile(value):
    """JSON-like data, to each of whose texts an attack is added."""
    if isinstance(value, dict):
        return {name: hostile(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return value + ATTACK if isinstance(value, str) else value


def assert_harmless(card: str) -> None:
    body = re.sub(r"^(```\w+)\n.*?^```$", "", card.partition("\n---\n")[2], flags=re.M | re.S)
    assert "a &lt;img src=x" in body and "```" not in body
    assert not re.search(r"<[a-z]|!\[x|\[y\]\(|^# Mine|<script>", body, re.M)


def test_what_others_wrote_is_plain_text_in_the_body(trained, results, tmp_path):
    record = json.loads((trained / "run.json").read_text())
    kept = {"weights": record["weights"], "config": record["config"]}
    record["init"] = {"name": f"{tmp_path}/x", "kind": "folder"}
    record = hostile(record | {"init_run": None}) | kept
    record["config"]["data"]["train"] = ATTACK
    measured = copy.deepcopy(results)
    for result in measured["results"]:
        result |= {"dataset": result["dataset"] + ATTACK, "remarks": [ATTACK], "seen": ATTACK}
    measured["environment"], measured["command"] = hostile(measured["environment"]), f"x --data '{ATTACK}'"
    folder = shutil.copytree(trained, tmp_path / 'm<img src=x>"`![x](y)')
    (folder / "run.json").write_text(json.dumps(record))
    card = str(build_card(folder, measured))
    assert_harmless(card)
    assert card.count("```") % 2 == 0 and card.count("\n## ") == str(build_card(trained, results)).count("\n## ")
    (folder / "run.json").unlink()
    conversion = {"source": ATTACK, "sha256": ATTACK, "decisions": [ATTACK]}
    (folder / "conversion.json").write_text(json.dumps(conversion))
    assert_harmless(str(build_card(folder)))


@pytest.mark.parametrize(
    "task, value", [("zcrs", float("nan")), ("zcrs", 150.0), ("zic", -0.1), ("selo", 1.5), ("zic", "9"), ("zic", True)]
)
def test_a_metric_that_none_can_be_is_refused(tiny_checkpoint, task, value):
    result = {"task": task, "dataset": "tiles", "metrics": {"mR": 1.0, "accuracy": value}}
    with pytest.raises(
        ValueError, match=f"the results say accuracy = {value} for {task} on tiles, which lies between 0"
    ):
        build_card(tiny_checkpoint, document(tiny_checkpoint, [result]))
    limits = [
        {"task": task, "dataset": "tiles", "metrics": {"Rsu": value}} for task, value in (("selo", 1), ("zic", 100))
    ]
    build_card(tiny_checkpoint, document(tiny_checkpoint, limits))


# ---------------------------------------------------------------------------------------------------- beside the paper


def test_measured_paper_and_gap(tiny_checkpoint):
    scenes = {"task": "zic", "dataset": "RESISC45", "images": 31500, "metrics": {"accuracy": 70.128, "top5": 90.0}}
    selo = {"task": "selo", "dataset": "AIR-SLT", "metrics": {"Rsu": 0.7, "Ras": 0.2, "Rda": 0.75, "Rmi": 0.74754}}
    measured = [retrieval("zcrl", "RSITMD-L", 452), retrieval("zcrs", "RSICD", 100), scenes, selo]
    results = document(tiny_checkpoint, measured)
    card = build_card(tiny_checkpoint, results)
    tables = tables_of(card)
    assert "prints for LRSCLIP ViT-B/16, *gap*" in str(card)
    assert_numbers_come_from(tables, results, [paper_rows("lrsclip-vit-b-16", task) for task in TASKS])
    assert "| RSITMD-L (452 images, 452 texts) | measured | 13.25 | 17.25 |" in tables
    assert "|  | paper | 38.50 | 73.89 | 84.96 | 36.28 | 70.80 | 84.29 | 64.79 |" in tables
    gap = results["results"][0]["gap"]["mR"]
    assert f" {gap:+.2f} |" in tables
    assert "- The paper's RSITMD-L and RSICD-L were not published" in tables
    assert f"| RSICD-L | {NOT_YET} | – |" in tables
    # Other data under the same name: the paper's figure does not stand beside it, and its own row says so.
    assert "- Not compared with the paper: its RSICD has 1,093 images (here 452) and 5,465 texts (here 100)." in tables
    assert f"| RSICD | {NOT_YET} | – |" in tables
    assert "| RESISC45 (31,500 images) | 70.13 | 73.12 | -2.99 |" in tables
    assert f"| EuroSAT | {NOT_YET} | 57.55 | – |" in tables and "| mean of the six | – | 75.70 | – |" in tables
    assert "| AIR-SLT | measured | 0.7000 | 0.2000 | 0.7500 | 0.7475 |" in tables
    assert "|  | gap | -0.0689 | -0.0371 | +0.0155 | -0.0107 |" in tables
    values = [result.metric_value for result in card.data.eval_results]
    assert 0.7475 in values and 70.13 in values and 90.0 in values and not {64.79, 73.12, 0.7582} & set(values)


def test_a_published_model_measured_under_another_name(tiny_checkpoint):
    with pytest.raises(ValueError, match="no conversion of LRSCLIP_ViT-L-14.pt"):
        build_card(tiny_checkpoint, published="lrsclip-vit-l-14")
    record = {"source": "LRSCLIP_ViT-L-14.pt", "sha256": "0" * 64, "decisions": ["activation quick_gelu"]}
    (tiny_checkpoint / "conversion.json").write_text(json.dumps(record))
    assert "Converted from `LRSCLIP_ViT-L-14.pt`" in build_card(tiny_checkpoint).text
    results = document(tiny_checkpoint, [retrieval("zcrs", "RSITMD", 2260)], label="converted")
    assert "paper" not in results["results"][0]
    tables = section(build_card(tiny_checkpoint, results, published="lrsclip-vit-l-14"), "Results")
    assert "|  | paper | 17.52 |" in tables and f"| RSITMD | {NOT_YET}" not in tables
    gap = results["results"][0]["metrics"]["mR"] - paper_figures("lrsclip-vit-l-14", "zcrs", "rsitmd")["mR"]
    assert f"{gap:+.2f} |" in tables


def test_models_that_saw_a_benchmark_are_flagged(tiny_checkpoint):
    seen = {"task": "zic", "dataset": "UCMerced", "images": 2100, "metrics": {"accuracy": 95.0}}
    tables = section(build_card(tiny_checkpoint, document(tiny_checkpoint, [seen])), "Results")
    assert "| UCMerced (2,100 images) † | 95.00 | – | – |" in tables
    assert (
        "- † seen, not zero-shot: LRS2M, on which LRSCLIP was trained, contains images of UC Merced, fMoW and MillionAID"
        in tables
    )


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_ready_cards_are_what_the_command_writes(key, tmp_path):
    ready = CARDS / f"{key.replace('-', '_')}.md"
    assert main(["--published", key, "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == ready.read_text()
    card = ModelCard.load(ready)
    tables = tables_of(card)
    of_version_1 = key.startswith("lrsclip")
    assert tables.count(NOT_YET) == (
        2 + 2 + 7 + 1 if of_version_1 else 1 if key.endswith("b-16") else 0
    ) and "measured |" not in tables.replace("| measured | paper", "")
    rows = [paper_rows(key, task) for task in TASKS]
    if any(rows):  # no figure of DGTRS-CLIP ViT-L/14 is known
        assert_numbers_come_from(tables, rows, paper_tables()["names"])
    assert "model-index" not in card.data.to_dict() and card.data.base_model == published_model(key)[0]["base_model"]
    for name, row in paper_tables()["lrs2m"]["rows"].items():
        assert re.search(rf"^\| {re.escape(name)} \| {row[0]:,} \|.*\| {row[4]:.2f} \|$", str(card), re.M)


def test_the_published_shapes_are_clips():
    # openai/CLIP has 149,620,737 and 427,616,513 parameters; the longer table adds 171 rows.
    assert "| parameters | 149,708,289 |" in (CARDS / "lrsclip_vit_b_16.md").read_text()
    assert "| parameters | 427,747,841 |" in (CARDS / "lrsclip_vit_l_14.md").read_text()


def test_published_weights_are_where_the_evaluation_fetches_them():
    for key in PUBLISHED:
        model, card = MODELS[key], (CARDS / f"{key.replace('-', '_')}.md").read_text()
        assert f"`{model.file}` in\n[{model.repo}](https://huggingface.co/{model.repo})" in card
        assert (f"commit `{model.revision}`" in card) == (model.revision != "main")
        assert "chen2025lrsclip" in card and "chen2025dgtrs" in card
        assert ("neither is the curriculum's schedule" in card.replace("\n", " ")) == key.startswith("dgtrs")


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_from_the_clones_root(tiny_checkpoint, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(document(tiny_checkpoint, [retrieval("zcrs", "tiles", 5)])))
    command = [sys.executable, "model_cards/build_card.py", "--checkpoint", str(tiny_checkpoint), "--repo", "you/name"]
    command += ["--results", str(tmp_path / "results.json")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = processes.run(command, cwd=ROOT, env=environment)
    assert done.stdout.strip() == str(tiny_checkpoint / "README.md"), done.stderr
    assert ModelCard.load(tiny_checkpoint / "README.md").data.model_name == "name"
    assert not list(tiny_checkpoint.glob(".README*"))


def test_the_commands_mistakes_are_one_sentence(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    checkpoint = ["--checkpoint", str(tiny_checkpoint)]
    for arguments, problem in (
        ([*checkpoint, "--results", str(tmp_path / "results.json")], "cannot be read ("),
        ([*checkpoint, "--training", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--published", "lrsclip-vit-b-16"], "--output FILE is needed"),
        ([], "needs a checkpoint folder or"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and problem in error and error.count("\n") == 1
    assert not (tiny_checkpoint / "README.md").exists()


# -------------------------------------------------------------------------------------------------------- data set card


def test_the_data_set_card_template():
    template = CARDS / "lrs2m_dataset_card_template.md"
    assert DatasetCard.load(template).data.license == "other"
    lrs2m = paper_tables()["lrs2m"]
    for name, (pairs, long_from, long_tokens, short_from, short_tokens, route) in lrs2m["rows"].items():
        row = f"| {name} | {route} | {pairs:,} | {long_from} | {long_tokens:.2f} | {short_from} | {short_tokens:.2f} |"
        assert row in template.read_text(), row

    empty = DatasetCard.from_template(DatasetCardData(), template_path=str(template))
    assert (
        empty.content.count("not yet counted") == 8
        and "{" not in empty.text.replace("@article{", "").split("title")[0]
    )
    source = {"name": "Tiles", "route": 3, "pairs": 1234, "long_source": "a model", "long_mean_tokens": 101.5}
    source |= {"short_source": "people", "short_mean_tokens": 12.25, "licence": "CC-BY-4.0", "images": "yes"}
    counts = {"rows": 1234, "images": 1200, "failed": 3, "duplicates": 4, "long_mean_tokens": 101.5}
    shares = {"short_mean_tokens": 12.25, "over_77": 80.0, "over_248": 1.5}
    details = {"name": "Mine", "captioners": ["a model"], "evaluation_sets": ["RSITMD"], "commands": ["a", "b"]}
    full = DatasetCard.from_template(
        DatasetCardData(), template_path=str(template), sources=[source], **counts, **shares, **details
    )
    assert "not yet" not in full.content.lower() and "# Mine\n" in full.content
    assert "| Tiles | 3 | 1,234 | a model | 101.50 | people | 12.25 |" in full.content
    assert "| Tiles | CC-BY-4.0 | yes |" in full.content and "```bash\na\nb\n```" in full.content


def test_the_command_of_a_card_is_for_its_model_alone_and_without_paths():
    command = "python -m evaluation.run --model=/home/u/x rsitmd=/home/u/y --tasks all --data /home/u/RSITMD C:\\\\d\\\\e --output=/o/r"
    shown = command_for(command, "you/mine")
    assert shown == "python -m evaluation.run --model you/mine --tasks all --data RSITMD e --output r"
