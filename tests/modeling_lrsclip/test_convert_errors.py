"""Files and options that cannot be converted: one sentence each, and nothing is written."""

import argparse
import json
import pickle
import zipfile

import huggingface_hub
import pytest
import torch

from modeling_lrsclip.convert import load_published, main
from modeling_lrsclip.published.checkpoint_files import read_published_file
from modeling_lrsclip.published.checkpoints import PRESETS, _choose_activation, _choose_heads
from modeling_lrsclip.published.state_dict_keys import Architecture
from modeling_lrsclip.published.tokenizer import tokenizer_from_bpe
from modeling_lrsclip.published.torchscript_archive import read_torchscript
from tests.modeling_lrsclip.references import published_state
from tests.modeling_lrsclip.source_files import as_openai_stores_it, write_bpe_file, write_source


BLOCK = "visual.transformer.resblocks.1."


@pytest.fixture
def tokenizer_folder(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def refused(tokenizer_folder, tmp_path):
    """Runs the command on a source that must be refused, and returns its one sentence."""

    def run(source, *options: str) -> str:
        arguments = [str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder), *options]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
        message = str(stopped.value)
        assert message.startswith("error: ") and message.endswith(".") and "\n" not in message, message
        return message

    return run


class TestDamaged:
    def test_an_old_pickle_cut_at_every_length(self, tiny_tokenizer, tmp_path):
        whole = write_source("legacy", {"a": torch.ones(3)}, tmp_path).read_bytes()
        for length in range(1, len(whole) - 1, 7):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            with pytest.raises(ValueError, match="cut.pt"):
                load_published(tmp_path / "cut.pt")

    def test_bytes_behind_the_end(self, tiny_tokenizer, tmp_path):
        path = write_source("safetensors", {"a": torch.ones(3)}, tmp_path)
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(ValueError, match="cannot be read"):
            load_published(path)


class TestNotACheckpoint:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "is empty; download it again"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
                "is a Git-LFS pointer of 64 bytes",
            ),
            (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not a checkpoint"),
            (b"PK\x03\x04 and no end", "is truncated: the table at the end"),
            (b"\x1f\x8b\x08rest", "is a gzip file, not a checkpoint"),
            (bytes(range(200, 256)) * 20, "is not a checkpoint"),
            (b"a text\n", "is not a checkpoint (its first bytes are b'a text\\n')"),
            (pickle.dumps({"weights": [1.0]}), "is a pickle that torch.save did not write"),
            ((100).to_bytes(8, "little") + b"{not json" + bytes(200), "its header cannot be read"),
            ((500_005).to_bytes(8, "little") + b'{"a":' + b"[" * 500_000, "its header cannot be read"),
        ],
    )
    def test_by_its_first_bytes(self, refused, tmp_path, content, said):
        (tmp_path / "model.pt").write_bytes(content)
        assert said in refused(tmp_path / "model.pt")

    @pytest.mark.parametrize(
        ("form", "said"),
        [
            ("zip", "is truncated"),
            ("torchscript", "is truncated"),
            ("safetensors", "is truncated: it has"),
            ("legacy", "cannot be read"),
        ],
    )
    def test_cut_short(self, refused, tmp_path, form, said):
        source = write_source(form, published_state(700), tmp_path)
        content = source.read_bytes()
        for length in (len(content) - 1000, 3000):
            source.write_bytes(content[:length])
            assert said in refused(source, "--activation", "gelu")

    def test_a_word_of_a_header_is_not_told_in_full(self, tmp_path):
        header = json.dumps({"a": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(ValueError, match="a.safetensors .*x{99}") as refused:
            read_published_file(tmp_path / "a.safetensors")
        assert len(str(refused.value)) < 1000

    @pytest.mark.parametrize(
        "damage", [(b"\xc3\xa9", b"\x89\x89"), (b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff")]
    )
    def test_a_damaged_table_of_an_archive(self, tmp_path, damage):
        """A name that is no text; a version of zip that nobody has."""
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("é/data.pkl", b"")
        whole = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(whole.replace(*damage))
        assert damage[0] in whole
        with pytest.raises(ValueError, match=r"a\.pt is truncated: the table .* is missing or damaged"):
            read_published_file(tmp_path / "a.pt")

    def test_a_zip_around_it(self, refused, tmp_path):
        with zipfile.ZipFile(tmp_path / "SkyCLIP.zip", "w") as archive:
            archive.writestr("SkyCLIP/epoch_20.pt", b"weights")
        assert "is a zip around SkyCLIP/epoch_20.pt; unpack it" in refused(tmp_path / "SkyCLIP.zip")
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            archive.writestr("notes.txt", b"weights")
        assert "is a zip archive without a checkpoint" in refused(tmp_path / "other.zip")

    def test_objects_besides_tensors(self, refused, tmp_path):
        content = {"state_dict": published_state(700), "args": argparse.Namespace(lr=1e-5)}
        for form in (True, False):
            torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=form)
            message = refused(tmp_path / "model.pt")
            assert "objects besides tensors (argparse.Namespace)" in message and "torch.save(" in message

    @pytest.mark.parametrize("content", [{"epoch": 3, "optimizer": {}}, [1, 2], torch.ones(3), {"state_dict": {}}])
    def test_no_state_dict(self, refused, tmp_path, content):
        torch.save(content, tmp_path / "model.pt")
        assert "no tensors there or under state_dict" in refused(tmp_path / "model.pt")

    def test_another_model(self, refused, tmp_path):
        torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "model.pt")
        assert "is not a CLIP checkpoint: none of its 2 keys (bias, weight)" in refused(tmp_path / "model.pt")

    def test_resnet(self, refused, tmp_path):
        state = {name: value for name, value in published_state(700).items() if not name.startswith("visual.")}
        state["visual.layer1.0.conv1.weight"] = torch.ones(4, 3, 3, 3)
        source = write_source("zip", state, tmp_path)
        assert "is a CLIP with a ResNet image tower" in refused(source)

    def test_a_folder(self, refused, tmp_path):
        (tmp_path / "folder").mkdir()
        assert "has no config.json" in refused(tmp_path / "folder")
        write_source("zip", published_state(700), tmp_path / "folder")
        assert "a checkpoint file, zip.bin: python -m modeling_lrsclip.convert" in refused(tmp_path / "folder")
        (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "siglip"}))
        assert "holds a model of type siglip" in refused(tmp_path / "folder")

    @pytest.mark.parametrize("name", ["weights/model.pt", "./here", "/no/where", "model.safetensors"])
    def test_no_such_file(self, refused, name):
        assert f"{name} does not exist" in refused(name)


class TestTensors:
    def write(self, tmp_path, changes: dict, two_tables: bool = False):
        state = published_state(700, 248 if two_tables else 77, two_tables=two_tables) | changes
        return write_source("zip", {name: value for name, value in state.items() if value is not None}, tmp_path)

    def test_both_sets_are_listed(self, refused, tmp_path):
        left_over = {"text_decoder.cls": torch.ones(2), f"{BLOCK}ls_1.gamma": torch.ones(128)}
        lacking = {f"{BLOCK}mlp.c_fc.bias": None, "ln_final.bias": None}
        message = refused(self.write(tmp_path, left_over | lacking), "--activation", "gelu")
        assert f"2 of its keys have no place (text_decoder.cls, {BLOCK}ls_1.gamma)" in message
        assert "2 weights of CLIPModel are missing (text_model.final_layer_norm.bias, " in message
        assert "vision_model.encoder.layers.1.mlp.fc1.bias)" in message

    def test_all_keys_are_listed(self, refused, tmp_path):
        message = refused(self.write(tmp_path, {f"extra.{n}": torch.ones(1) for n in range(30)}))
        assert "30 of its keys have no place" in message and "extra.29, extra.3," in message
        assert "more" not in message

    def test_two_keys_for_one_weight(self, refused, tmp_path):
        assert "(text.ln_final.bias)" in refused(self.write(tmp_path, {"text.ln_final.bias": torch.ones(64)}))

    def test_what_is_no_weight_is_used_up(self, tmp_path, tokenizer_folder):
        buffers = {
            "attn_mask": torch.zeros(77, 77),
            "input_resolution": torch.tensor(32),
            "logit_scale": torch.tensor([3.5]),
            "logit_bias": torch.zeros(1),
        }
        source = self.write(tmp_path, buffers)
        model, _ = load_published(source, tokenizer=tokenizer_folder, activation="gelu")
        assert model.logit_scale.shape == () and model.logit_scale.item() == 3.5

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"logit_bias": torch.tensor(-10.0)}, "1 of its keys have no place (logit_bias)"),
            ({"context_length": torch.tensor(248)}, "says context_length 248, its tensors make that 77"),
            ({"visual.positional_embedding": torch.ones(16, 128)}, "15 image positions besides the class token"),
            ({f"{BLOCK}mlp.c_fc.bias": torch.ones(99)}, "mlp.fc1.bias has shape (99,)"),
            ({f"{BLOCK}attn.in_proj_weight": torch.ones(100, 128)}, f"({BLOCK}attn.in_proj_weight)"),
            ({"visual.conv1.weight": torch.ones(128, 3)}, "has shape (128, 3), not 4 dimensions"),
            ({"ln_final.bias": torch.ones(64, dtype=torch.int8)}, "type torch.int8"),
            ({"ln_final.bias": [1.0]}, "(ln_final.bias)"),
        ],
    )
    def test_contradictions(self, refused, tmp_path, changes, said):
        assert said in refused(self.write(tmp_path, changes), "--activation", "gelu")

    @pytest.mark.parametrize("table", [torch.ones(77, 64), torch.ones(248, 32), torch.ones(248)])
    def test_two_tables_that_do_not_fit(self, refused, tmp_path, table):
        source = self.write(tmp_path, {"positional_embedding_res": table}, two_tables=True)
        assert "they must be equal, of 20 + n * 4 rows (248" in refused(source)

    def test_masks_that_take_the_tables_apart_elsewhere(self, refused, tmp_path):
        mask = (torch.arange(248) < 21).float()[:, None]
        for name, value in (("mask1", mask), ("mask2", 1 - mask)):
            source = self.write(tmp_path, {name: value}, two_tables=True)
            assert f"takes its position tables apart elsewhere than after row 20 ({name})" in refused(source)

    def test_too_large_for_fp16(self, refused, tmp_path):
        source = self.write(tmp_path, {"ln_final.bias": torch.full((64,), 1e6)})
        message = refused(source, "--activation", "gelu", "--dtype", "fp16")
        assert "text_model.final_layer_norm.bias has values up to 1e+06, more than torch.float16 holds" in message

    def test_a_folder_that_lacks_weights(self, refused, tiny_clip, tmp_path):
        state = tiny_clip.state_dict()
        state["text_model.more"] = state.pop("text_model.final_layer_norm.bias")
        state["logit_scale"] = torch.ones(3)
        tiny_clip.save_pretrained(tmp_path / "clip", state_dict=state)
        message = refused(tmp_path / "clip")
        assert "1 of its keys have no place (text_model.more), 2 weights are missing or of another shape" in message
        assert "(logit_scale, text_model.final_layer_norm.bias)" in message


def architecture(width: int, patch: int, **fields) -> Architecture:
    text_width = {768: 512, 1024: 768}.get(width, 1024)
    sizes = {"vision_width": width, "vision_layers": 12, "vision_feed_forward": 4 * width, "patch_size": patch}
    sizes |= {"image_size": 224, "text_width": text_width, "text_layers": 12, "text_feed_forward": 4 * text_width}
    return Architecture(
        **sizes | {"positions": 77, "vocabulary": 49408, "projection": 512, "two_tables": False} | fields
    )


B32, L14, H14 = architecture(768, 32), architecture(1024, 14), architecture(1280, 14)


class TestDecisions:
    """Activation and head counts are not in the tensors."""

    @pytest.mark.parametrize(
        ("preset", "model", "activation", "heads"),
        [
            ("openai", B32, "quick_gelu", (12, 8)),
            ("remoteclip", B32, "quick_gelu", (12, 8)),
            ("remoteclip", L14, "quick_gelu", (16, 12)),
            ("georsclip", B32, "quick_gelu", (12, 8)),
            ("georsclip", H14, "gelu", (16, 16)),
            ("skyclip", B32, "gelu", (12, 8)),
            ("skyclip", L14, "quick_gelu", (16, 12)),
            ("open-clip", L14, "gelu", (16, 12)),
            ("vit-h-14", H14, "gelu", (16, 16)),
            ("lrsclip", L14, "quick_gelu", (16, 12)),
            ("long-clip", L14, "quick_gelu", (16, 12)),
        ],
    )
    def test_presets(self, preset, model, activation, heads):
        assert _choose_activation(model, None, preset, None, "file")[0] == activation
        assert _choose_heads(model, False, preset, None, "file")[0] == heads

    def test_nothing_is_guessed(self, refused, tmp_path):
        source = write_source("zip", published_state(700), tmp_path)
        message = refused(source)
        assert all(name in message for name in (*PRESETS, "--activation {quick_gelu,gelu}"))
        single = write_source("safetensors", published_state(700, 248), tmp_path)
        assert "does not say which activation" in refused(single)  # one table of 248 rows: not Long-CLIP's own file

    def test_a_preset_covers_what_its_code_loads(self):
        with pytest.raises(
            ValueError, match="georsclip covers ViT-B/32, ViT-H/14 .* is a ViT-L/14; give --activation"
        ):
            _choose_activation(L14, None, "georsclip", None, "file")
        assert _choose_activation(L14, None, "georsclip", "quick_gelu", "file") == ("quick_gelu", "as given")

    def test_an_archive_knows_better(self, refused, tmp_path):
        source = write_source("torchscript", published_state(700), tmp_path)
        for options in (("--activation", "gelu"), ("--preset", "open-clip")):
            assert "computes quick_gelu in its own code; gelu contradicts it" in refused(source, *options)

    def test_heads_of_80_or_of_64(self):
        with pytest.raises(ValueError, match="is a ViT-H/14, which has heads 80 wide in open_clip and 64 wide by"):
            _choose_heads(H14, False, None, None, "file")
        assert _choose_heads(H14, False, None, (16, 16), "file")[0] == (16, 16)
        two_tables = architecture(1280, 14, two_tables=True)
        assert _choose_heads(two_tables, False, None, None, "file")[0] == (20, 16)

    def test_unusual_widths(self, refused, tmp_path):
        source = write_source("zip", published_state(700, 77, vision_width=96), tmp_path)
        message = refused(source, "--preset", "openai")
        assert "towers of widths (96, 64), not multiples of the usual heads" in message
        assert "do not divide the widths (96, 64)" in refused(source, "--preset", "openai", "--heads", "5", "1")

    def test_unknown_names(self, tmp_path):
        source = write_source("zip", published_state(700), tmp_path)
        with pytest.raises(ValueError, match="preset 'clip' is unknown; there are openai, "):
            load_published(source, preset="clip")
        with pytest.raises(ValueError, match="activation 'relu' is unknown; there are quick_gelu, gelu"):
            load_published(source, activation="relu")

    def test_a_folder_says_it_all(self, refused, tiny_checkpoint):
        message = refused(tiny_checkpoint, "--preset", "openai", "--heads", "2", "2")
        assert "preset, heads are for checkpoint files" in message


class TestTokenizer:
    def source(self, tmp_path):
        return write_source("zip", published_state(700, 248, two_tables=True), tmp_path)

    def test_out_of_reach(self, tmp_path, monkeypatch):
        source = self.source(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for tokenizer, name in ((None, "openai/clip-vit-base-patch16"), (tmp_path, str(tmp_path))):
            with pytest.raises(
                OSError, match=f"no tokenizer at {name}, .* give --tokenizer a folder, or the BPE file"
            ):
                load_published(source, tokenizer=tokenizer)
        with pytest.raises(OSError, match="no model nobody/nothing here, and the Hub gives none"):
            load_published("nobody/nothing")

    def test_of_another_model(self, tmp_path):
        write_bpe_file(tmp_path / "bpe.gz")
        with pytest.raises(ValueError, match="has 49,408 entries and ends texts with 49407, the model reads 700 and"):
            load_published(self.source(tmp_path), tokenizer=tmp_path / "bpe.gz")

    def test_not_the_bpe_file(self, tmp_path):
        path = tmp_path / "bpe.txt"
        write_bpe_file(path, merges=1000, more=0)
        with pytest.raises(ValueError, match="has 1,000 merges, CLIP's tokenizer takes 48,894"):
            tokenizer_from_bpe(path, 248)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ValueError, match="is a damaged gzip file"):
            tokenizer_from_bpe(path, 248)
        path.write_text("heading\na b\nthree symbols here\n")
        with pytest.raises(ValueError, match="line 3: 'three symbols here' is not a merge of two symbols"):
            tokenizer_from_bpe(path, 248)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is not text"):
            tokenizer_from_bpe(path, 248)
        path.write_text("heading\n" + "a b\n" * 48894)
        with pytest.raises(ValueError, match="repeats 48893 of its merges"):
            tokenizer_from_bpe(path, 248)


class _Writer(torch.nn.Module):
    """A module whose archive writes a file when `torch.jit.load` builds it."""

    def __init__(self, victim: str):
        super().__init__()
        self.weight, self.victim = torch.nn.Parameter(torch.ones(3)), victim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.victim, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        file = torch.from_file(state[1], True, 4, dtype=torch.uint8).fill_(65)
        self.weight, self.victim, self.training = state[0] + file.sum(), state[1], state[2]


def test_code_in_an_archive_does_not_run(refused, tmp_path):
    victim = tmp_path / "victim"
    torch.jit.script(_Writer(str(victim))).save(tmp_path / "model.pt")
    victim.write_text("safe")
    assert "is restored by code of the file, which is not run" in refused(tmp_path / "model.pt")
    assert victim.read_text() == "safe"
    torch.jit.load(tmp_path / "model.pt")  # the archive does what it is made for
    assert victim.read_text() == "AAAA"


def test_the_tensors_of_an_archive_are_those_of_torch(tmp_path):
    source = write_source("torchscript", as_openai_stores_it(published_state(700)), tmp_path)
    by_torch = torch.jit.load(source).state_dict()
    tensors = read_torchscript(source)
    assert tensors.keys() == by_torch.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == by_torch[name].dtype and torch.equal(tensor, by_torch[name]), name
