"""The registry against the paper and the converter; names, files and folders; a fetch from a server that is here."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from evaluation.classification import ClassificationTask
from evaluation.paper import paper_tables
from modeling_lrsclip.convert import load_published
from modeling_lrsclip.encoding.encoder import Encoder
from modeling_lrsclip.published.checkpoints import ANY, PRESETS
from modeling_lrsclip.published.registry import MODELS, PAPER_ONLY, resolve
from tests.modeling_lrsclip.references import published_state


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_model_of_the_paper_is_here_under_its_name():
    for name, title in paper_tables()["names"].items():
        assert name in PAPER_ONLY or MODELS[name].title == title
    assert all(name == model.name == name.lower() and "=" not in name for name, model in MODELS.items())


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
    task = ClassificationTask("zic", "ZIC")
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


@pytest.mark.parametrize(
    "given, problem",
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
def test_what_cannot_be_loaded_is_one_sentence(tmp_path, given, problem):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=problem) as caught:
        resolve(given.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- the Hub


class Hub(BaseHTTPRequestHandler):
    """Serves `RemoteCLIP-ViT-B-32.pt` of one repository, and nothing else, as the Hub does."""

    content = b"weights"

    def do_HEAD(self):
        found = self.path.startswith("/chendelong/RemoteCLIP/resolve/") and self.path.endswith(
            "/RemoteCLIP-ViT-B-32.pt"
        )
        self.send_response(200 if found else 404)
        if found:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", '"etag"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.end_headers()
        return found

    def do_GET(self):
        if self.do_HEAD():
            self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolve_elsewhere(name, cache, **environment):
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    code = (
        "import sys\n"
        "from modeling_lrsclip.published.registry import resolve\n"
        "try:\n    source = resolve(sys.argv[1]); print(source.path, source.revision, source.label)\n"
        "except ValueError as error:\n    print('ValueError', error)\n"
    )
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | environment
    run = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_model_is_fetched_from_the_endpoint_of_the_environment_and_then_from_its_cache(hub, tmp_path):
    path, revision, label = resolve_elsewhere("remoteclip-vit-b-32", tmp_path, HF_ENDPOINT=hub).split()
    assert Path(path).read_bytes() == Hub.content and Path(path).name == "RemoteCLIP-ViT-B-32.pt"
    assert revision == COMMIT and label == "remoteclip-vit-b-32"
    again = resolve_elsewhere("remoteclip-vit-b-32", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert again.split() == [path, revision, label]
    missing = resolve_elsewhere("remoteclip-vit-l-14", tmp_path, HF_ENDPOINT=hub)
    assert missing.startswith("ValueError remoteclip-vit-l-14: RemoteCLIP-ViT-L-14.pt of chendelong/RemoteCLIP could")
    assert "404" in missing and len(missing.splitlines()) == 1


def test_without_network_the_error_says_what_to_download(tmp_path):
    said = resolve_elsewhere("georsclip-vit-b-32", tmp_path, HF_HUB_OFFLINE="1")
    assert "ckpt/RS5M_ViT-B-32.pt of Zilun/GeoRSCLIP could not be fetched (the Hub cannot be reached, and" in said
    assert said.endswith(
        "download https://huggingface.co/Zilun/GeoRSCLIP/blob/main/ckpt/RS5M_ViT-B-32.pt and give "
        "--model path/to/RS5M_ViT-B-32.pt."
    )
    said = resolve_elsewhere("clip-vit-b-16", tmp_path, HF_HUB_OFFLINE="1")
    assert "clone https://huggingface.co/openai/clip-vit-base-patch16 and give its folder with --model." in said
