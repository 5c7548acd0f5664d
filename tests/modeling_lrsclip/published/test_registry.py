"""The registry against the paper and the converter; names, files and folders; a fetch from a server that is here."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from evaluation.classification import ClassificationTask
from evaluation.paper import paper_tables
from modeling_lrsclip.convert import load_published
from modeling_lrsclip.convert import main as convert_main
from modeling_lrsclip.encoding import Encoder
from modeling_lrsclip.published.checkpoints import ANY, PRESETS
from modeling_lrsclip.published.registry import MODELS, PAPER_ONLY, check_published, resolve
from tests import processes
from tests.hub_server import HubServer
from tests.hub_store import File
from tests.modeling_lrsclip.references import published_state


ROOT = Path(__file__).parents[3]


def test_every_model_of_the_paper_is_here_under_its_name():
    for name, title in paper_tables()["names"].items():
        assert name in PAPER_ONLY or MODELS[name].title == title
    assert all(name == model.name == name.lower() and "=" not in name for name, model in MODELS.items())


def test_every_row_names_repository_file_and_revision():
    for model in MODELS.values():
        assert model.source and model.licence, model.name
        if model.repo:
            assert re.fullmatch(r"main|[0-9a-f]{40}", model.revision), model.name
        else:
            assert model.url and model.file, model.name
    names = [Path(model.file).name for model in MODELS.values() if model.repo and model.file]
    assert len(set(names)) == len(names)  # or a file here could not be told by its name
    assert all(model.successor in MODELS for model in MODELS.values() if model.successor)


def test_what_the_files_leave_open_is_decided():
    for model in MODELS.values():
        if model.file:
            size = model.title.split()[-1]
            activations = PRESETS[model.preset].activations
            assert ({size, ANY} & set(activations)) or model.activation, model.name


@pytest.mark.parametrize(
    "file, name, options",
    [
        ("RemoteCLIP-ViT-L-14.pt", "remoteclip-vit-l-14", {"preset": "remoteclip"}),
        ("rs5m_vit-b-32.pt", "georsclip-vit-b-32", {"preset": "georsclip"}),
        ("RS5M_ViT-L-14.pt", "georsclip-vit-l-14", {"preset": "georsclip", "activation": "quick_gelu"}),
        ("longclip-B.pt", "long-clip-vit-b-16", {"preset": "long-clip"}),
        ("LRSCLIP_ViT-L-14.pt", "lrsclip-vit-l-14", {"preset": "lrsclip"}),
        ("DGTRS-CLIP-ViT-L-14.pt", "dgtrs-clip-vit-l-14", {"preset": "lrsclip"}),
        ("FarSLIP2_ViT-B-16.pt", "farslip2-vit-b-16", {"preset": "farslip"}),
        ("epoch_20.pt", None, {}),
        ("own.safetensors", None, {}),
    ],
)
def test_a_file_here_is_known_by_its_name(tmp_path, file, name, options):
    (tmp_path / file).touch()
    source = resolve(str(tmp_path / file))
    assert source.is_file and source.label == name and source.load_options == options


def test_a_name_may_be_said_with_the_file(tmp_path):
    (tmp_path / "epoch_20.pt").touch()
    source = resolve(f"skyclip-vit-l-14={tmp_path}/epoch_20.pt")
    assert source.label == "skyclip-vit-l-14" and source.load_options == {"preset": "skyclip"}
    assert Path(source.path) == tmp_path / "epoch_20.pt"


def test_a_published_file_is_measured_without_being_converted_first(tmp_path, tiny_tokenizer, images):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.save(published_state(len(tiny_tokenizer), 248, two_tables=True), tmp_path / "LRSCLIP_ViT-B-16.pt")
    for index, image in enumerate(images):
        (tmp_path / f"tiles/class_{index % 2}").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / f"tiles/class_{index % 2}/{index}.png")
    source = resolve(str(tmp_path / "LRSCLIP_ViT-B-16.pt"))
    model, processor = load_published(source.path, tokenizer=tmp_path / "tokenizer", **source.load_options)
    task = ClassificationTask()
    result = task.evaluate(Encoder(model, processor, source.label), task.load(str(tmp_path / "tiles")))
    assert source.label == "lrsclip-vit-b-16" and result["images"] == 4


def test_folders_and_hub_ids_are_passed_on(tmp_path):
    folder = tmp_path / "runs=1" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    source = resolve(str(folder))
    assert source.path == str(folder) and not source.is_file and source.label is None and source.load_options == {}
    assert resolve("somebody/some-clip").path == "somebody/some-clip"


@pytest.mark.parametrize("decisions, name", [(["zip: ViT-B/16"], "lrsclip-vit-b-16"), (["stretched to 419"], None)])
def test_a_converted_folder_is_known_by_its_record_unless_stretched(tmp_path, decisions, name):
    (tmp_path / "config.json").touch()
    record = {"source": "LRSCLIP_ViT-B-16.pt", "decisions": decisions}
    (tmp_path / "conversion.json").write_text(json.dumps(record))
    assert resolve(str(tmp_path)).label == name
    assert resolve(str(tmp_path)).load_options == {}


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_conversion_record_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").touch()
    (tmp_path / "conversion.json").write_text(content)
    with pytest.raises(ValueError, match=r"conversion\.json .*convert the model again"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "model, problem",
    [
        ("remoteclip-vit-l14", "does not exist; .* Did you mean remoteclip-vit-l-14"),
        ("selo-v1", "is no CLIP; only the paper's figures"),
        (
            "skyclip-vit-b-32",
            r"not on the Hub; download https://.*B32_top50pct\.zip, unpack it .*=path/to/epoch_20\.pt",
        ),
        ("weights.pt", r"^checkpoint file weights\.pt does not exist"),
        (
            "lrsclip-vit-b-16=none.pt",
            r"^none\.pt does not exist; give the checkpoint file or folder of lrsclip-vit-b-16",
        ),
        ("{tmp}", "has no config.json"),
        ("{tmp}/notes.txt", "notes.txt is no checkpoint file"),
        ("{tmp}/none", "none does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(tmp_path, model, problem):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=problem) as caught:
        resolve(model.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def publish(hub, model, content=b"weights", replaces=None):
    """A commit with the model's file in its repository, with `replaces`, a path, taken away; the commit's id."""
    known = ("model", model.repo) in hub.repos
    repo = hub.repo(model.repo) if known else hub.create(model.repo)
    parent = repo.resolve()
    files = {path: file for path, file in parent.files.items() if path != replaces}
    files[model.file or "config.json"] = File(content)
    return repo.commit("refs/heads/main", files, "weights", "", repo.owner, parent).oid


def resolve_elsewhere(hub, cache, *names, **environment):
    """A line of each name, from a process of its own: huggingface_hub reads the environment when it is imported."""
    code = (
        "import sys\n"
        "from modeling_lrsclip.published.registry import resolve\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        source = resolve(name); print(source.path, source.revision, source.label)\n"
        "    except ValueError as error:\n        print('ValueError', error)\n"
    )
    environment = hub.environment(cache) | environment
    run = processes.run([sys.executable, "-c", code, *names], cwd=ROOT, env=environment)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == len(names), run
    return run.stdout.splitlines()


def test_a_model_is_fetched_from_the_endpoint_of_the_environment_and_then_from_its_cache(hub, tmp_path):
    """And one that is not there, without network, is told with what to download."""
    commit = publish(hub, MODELS["long-clip-vit-b-16"])
    line, missing = resolve_elsewhere(hub, tmp_path, "long-clip-vit-b-16", "long-clip-vit-l-14")
    path, revision, label = line.split()
    assert Path(path).read_bytes() == b"weights" and Path(path).name == "longclip-B.pt"
    assert revision == commit and label == "long-clip-vit-b-16"
    assert missing.startswith("ValueError long-clip-vit-l-14: longclip-L.pt of BeichenZhang/LongCLIP-L at main could")
    assert "404" in missing
    names = ("long-clip-vit-b-16", "georsclip-vit-b-32", "clip-vit-b-16")
    again, file, folder = resolve_elsewhere(hub, tmp_path, *names, HF_HUB_OFFLINE="1")
    assert again.split() == [path, revision, label]
    revision = MODELS["georsclip-vit-b-32"].revision
    assert f"ckpt/RS5M_ViT-B-32.pt of Zilun/GeoRSCLIP at {revision[:12]} could not be fetched (the Hub cannot" in file
    assert file.endswith(
        f"download https://huggingface.co/Zilun/GeoRSCLIP/blob/{revision}/ckpt/RS5M_ViT-B-32.pt and give "
        "--model path/to/RS5M_ViT-B-32.pt."
    )
    assert "clone https://huggingface.co/openai/clip-vit-base-patch16 and give its folder with --model." in folder


def test_a_pinned_commit_is_fetched_whatever_main_holds(hub, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    old = publish(hub, MODELS["lrsclip-vit-l-14"], b"March 2025")
    publish(hub, MODELS["dgtrs-clip-vit-l-14"], b"July 2025", replaces="LRSCLIP_ViT-L-14.pt")
    pinned = dataclasses.replace(MODELS["lrsclip-vit-l-14"], revision=old)
    monkeypatch.setitem(MODELS, "lrsclip-vit-l-14", pinned)
    source = resolve("lrsclip-vit-l-14")
    assert Path(source.path).read_bytes() == b"March 2025" and source.revision == old
    assert Path(resolve("dgtrs-clip-vit-l-14").path).read_bytes() == b"July 2025"


def test_a_file_without_a_known_commit_is_found_in_the_history(hub, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    old = publish(hub, MODELS["lrsclip-vit-b-16"], b"March 2025")
    publish(hub, MODELS["dgtrs-clip-vit-b-16"], b"July 2025", replaces="LRSCLIP_ViT-B-16.pt")
    source = resolve("lrsclip-vit-b-16")
    assert Path(source.path).read_bytes() == b"March 2025" and source.revision == old
    (check,) = check_published([MODELS["lrsclip-vit-b-16"]])
    assert check.commit == old and check.problem == f"moved: it is at commit {old}"


def test_a_file_that_is_gone_names_what_stands_there_instead(hub, monkeypatch, tmp_path):
    hub.connect(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    publish(hub, MODELS["dgtrs-clip-vit-b-16"])
    publish(hub, MODELS["dgtrs-clip-vit-l-14"])
    for size, revision in (("vit-b-16", "main"), ("vit-l-14", "09dc0a7b6532")):
        name = size.replace("vit-b", "ViT-B").replace("vit-l", "ViT-L")
        with pytest.raises(ValueError) as caught:
            resolve(f"lrsclip-{size}")
        assert str(caught.value) == (
            f"lrsclip-{size}: LRSCLIP_{name}.pt of MitsuiChen14/DGTRS-CLIP-{name} at {revision} is gone from all 2 "
            f"commits; it holds DGTRS-CLIP-{name}.pt: --model dgtrs-clip-{size}."
        )


def test_check_published_lists_what_is_missing(hub, monkeypatch, tmp_path, capsys):
    hub.connect(monkeypatch)
    commits = {name: publish(hub, MODELS[name]) for name in ("long-clip-vit-b-16", "dgtrs-clip-vit-l-14")}
    rows = ["long-clip-vit-b-16", "long-clip-vit-l-14", "lrsclip-vit-l-14"]
    checks = check_published([MODELS[name] for name in rows])
    assert checks[0].commit == commits["long-clip-vit-b-16"] and checks[0].size == 7 and not checks[0].problem
    assert checks[1].problem.startswith("not reached (")
    assert "it holds DGTRS-CLIP-ViT-L-14.pt: --model dgtrs-clip-vit-l-14" in checks[2].problem
    monkeypatch.setattr("modeling_lrsclip.published.registry.MODELS", {name: MODELS[name] for name in rows})
    with pytest.raises(SystemExit, match="2 of 3 published models are missing, moved or out of reach"):
        convert_main(["--check-published"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == rows
    assert lines[0].endswith(f"at main: commit {checks[0].commit[:12]}, 0 MB; licence: not stated")


@pytest.mark.skipif(not os.environ.get("CHECK_PUBLISHED"), reason="asks huggingface.co: set CHECK_PUBLISHED=1")
def test_every_published_model_is_where_the_registry_has_it():
    assert [check.line for check in check_published() if check.problem] == []
