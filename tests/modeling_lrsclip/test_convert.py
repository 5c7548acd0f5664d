"""A published checkpoint, a CLIP or an LRSCLIP becomes a folder for `from_pretrained`, whole or not at all."""

import hashlib
import json
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel

from modeling_lrsclip import LRSCLIPProcessor, stretch_position_embedding
from modeling_lrsclip.convert import convert, load_published, main
from tests import processes
from tests.modeling_lrsclip.references import published_state
from tests.modeling_lrsclip.source_files import as_openai_stores_it, write_source


TABLE = "text_model.embeddings.position_embedding.weight"


@pytest.fixture
def clip_folder(tiny_clip, tiny_processor, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def tokenizer_folder(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


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


def test_nothing_of_the_users_is_replaced(clip_folder, tmp_path):
    out = tmp_path / "out"
    main([str(clip_folder), str(out)])
    main([str(clip_folder), str(out)])  # an earlier conversion is
    inside = out / "original"
    clip_folder.rename(inside)
    with pytest.raises(SystemExit, match="original lies in .*out, which would be replaced"):
        main([str(inside), str(out)])
    clip_folder = inside.rename(clip_folder)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="out holds notes.txt beside an earlier conversion"):
        main([str(clip_folder), str(out)])
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").exists()


def test_a_folder_without_tokenizer(tiny_clip, tiny_processor, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.image_processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(SystemExit, match="no tokenizer at .*clip, .* give --tokenizer"):
        main([str(tmp_path / "clip"), str(tmp_path / "out")])


def test_not_twice(clip_folder, tmp_path):
    main([str(clip_folder), str(tmp_path / "once"), "--stretch"])
    with pytest.raises(SystemExit, match="stretched by 4 before"):
        main([str(tmp_path / "once"), str(tmp_path / "twice"), "--stretch"])


class TestFile:
    """A published checkpoint file."""

    def test_stretched(self, tokenizer_folder, tmp_path):
        state = published_state(700)
        source = write_source("zip", state, tmp_path)
        options = ["--preset", "openai", "--tokenizer", str(tokenizer_folder)]
        main([str(source), str(tmp_path / "out"), *options, "--stretch"])
        model = AutoModel.from_pretrained(tmp_path / "out")
        assert torch.equal(model.state_dict()[TABLE], stretch_position_embedding(state["positional_embedding"]))
        text_config = model.config.text_config
        assert (text_config.kept_positions, text_config.stretch_ratio) == (20, 4)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 248

    def test_two_tables_become_one_that_counts_as_stretched(self, tokenizer_folder, tmp_path):
        state = published_state(700, 248, two_tables=True)
        source = write_source("zip", state, tmp_path)
        model, processor = load_published(source, tokenizer=tokenizer_folder)
        expected = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
        assert torch.equal(model.state_dict()[TABLE], expected)
        assert processor.tokenizer.model_max_length == 248
        with pytest.raises(ValueError, match="stretched by 4 before"):
            load_published(source, tokenizer=tokenizer_folder, stretch_ratio=4)

    def test_a_line_for_each_stage_and_a_record(self, tokenizer_folder, tmp_path, capsys):
        source = write_source("zip", published_state(700, 248, two_tables=True), tmp_path)
        main([str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)])
        lines = capsys.readouterr().err.splitlines()
        stages = [line.split()[0] for line in lines]
        assert list(dict.fromkeys(stages)) == ["reading", "mapping", "tokenizer", "writing", "checking"]
        record = json.loads((tmp_path / "out" / "conversion.json").read_text())
        assert record["source"] == "zip.bin" and record["text_positions"] == 248 and record["dtype"] == "float32"
        assert record["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        printed = "\n".join(lines)
        for decision in record["decisions"]:
            assert decision in printed
        assert "activation quick_gelu: two position tables, MitsuiChen14/LRSCLIP" in printed
        assert "heads 2 (vision) and 1 (text)" in printed

    @pytest.mark.parametrize(("option", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
    def test_dtype(self, tokenizer_folder, tmp_path, option, dtype):
        state = as_openai_stores_it(published_state(700))
        source = write_source("torchscript", state, tmp_path)
        main([str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder), "--dtype", option])
        model = AutoModel.from_pretrained(tmp_path / "out")
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        expected = state["token_embedding.weight"].to(getattr(torch, dtype))
        assert torch.equal(model.state_dict()["text_model.embeddings.token_embedding.weight"], expected)

    def test_every_weight_keeps_the_type_of_the_source(self, tokenizer_folder, tmp_path):
        source = write_source("torchscript", as_openai_stores_it(published_state(700)), tmp_path)
        convert(source, tmp_path / "out", tokenizer=tokenizer_folder)
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert types["text_model.encoder.layers.0.self_attn.q_proj.weight"] == torch.float16
        assert types["text_model.embeddings.token_embedding.weight"] == types["logit_scale"] == torch.float32
        for model_class in (AutoModel, CLIPModel):  # and nothing is rounded when it is loaded
            assert model_class.from_pretrained(tmp_path / "out").dtype == torch.float32

    def test_the_loaded_model_does_not_need_the_file(self, tokenizer_folder, tmp_path):
        state = published_state(700, 248, two_tables=True)
        source = write_source("zip", state, tmp_path)
        model, _ = load_published(source, tokenizer=tokenizer_folder)
        with open(source, "r+b") as file:
            file.write(bytes(source.stat().st_size))  # in place: a mapped file would change with it
        name = "vision_model.encoder.layers.1.mlp.fc1.weight"
        assert torch.equal(model.state_dict()[name], state["visual.transformer.resblocks.1.mlp.c_fc.weight"])


class TestOutput:
    def test_an_earlier_conversion_is_replaced(self, clip_folder, tmp_path):
        convert(clip_folder, tmp_path / "out", stretch_ratio=4)
        convert(clip_folder, tmp_path / "out")
        assert AutoModel.from_pretrained(tmp_path / "out").config.text_config.max_position_embeddings == 77

    def test_anything_else_is_not(self, clip_folder, tmp_path):
        (tmp_path / "out").mkdir()
        convert(clip_folder, tmp_path / "out")  # an empty folder is fine
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        with pytest.raises(
            ValueError, match="mine holds something else than an earlier conversion; give a new folder"
        ):
            convert(clip_folder, tmp_path / "mine")
        with pytest.raises(ValueError, match="is a file; give a folder"):
            convert(clip_folder, tmp_path / "mine" / "notes.txt")
        with pytest.raises(ValueError, match="is the source itself"):
            convert(tmp_path / "out", tmp_path / "out")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]

    def test_whole_or_not_at_all(self, clip_folder, tmp_path):
        """A disk that takes files of 64 kB at most, as one that runs full."""
        script = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
            "from modeling_lrsclip.convert import main; main(sys.argv[1:])"
        )
        done = processes.run([sys.executable, "-c", script, str(clip_folder), str(tmp_path / "out")])
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert "out cannot be written" in done.stderr.splitlines()[-1]
        assert {path.name for path in tmp_path.iterdir()} == {"clip"}


PEAK = """
import re, sys
from modeling_lrsclip.convert import convert

small, large, tokenizer, out = sys.argv[1:]
peaks = []
for source in (small, large):  # the first brings in what the libraries need
    convert(source, out, tokenizer=tokenizer)
    # Not getrusage: its maximum comes down from the process that started this one.
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
print((peaks[1] - peaks[0]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tokenizer_folder, tmp_path):
    """At most 1.5 times the weights, above what the libraries take: none is held twice, no optimizer state is read."""
    (tmp_path / "small").mkdir()
    small = write_source("zip", published_state(700, 248, two_tables=True), tmp_path / "small")
    state, large = published_state(700, 248, 1024, 768, two_tables=True), tmp_path / "large"
    torch.save({"state_dict": state, "optimizer": {name: tensor + 1 for name, tensor in state.items()}}, large)
    size = sum(tensor.nbytes for tensor in state.values())
    arguments = [str(path) for path in (small, large, tokenizer_folder, tmp_path / "out")]
    shown = processes.run([sys.executable, "-c", PEAK, *arguments], check=True)
    assert 0.5 * size < int(shown.stdout) < 1.5 * size
