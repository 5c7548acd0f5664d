"""
The folders without remote code, and what reads them, in a process that cannot import this package: each consumer's
embeddings against `LRSCLIPModel`'s.
"""

import json
import os
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.convert import convert, main
from modeling_lrsclip.published.plain_clip import plain_tokenizer
from modeling_lrsclip.published.state_dict_keys import restore_published
from tests import processes
from tests.modeling_lrsclip.real_looking_captions import count_different_ids, real_looking_captions
from tests.modeling_lrsclip.references import published_image_embeds, published_state, published_text_embeds
from tests.modeling_lrsclip.source_files import write_source


TOLERANCE = 1e-6
PREAMBLE = """
import sys
sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
import json
import numpy as np
import torch
from PIL import Image

torch.set_num_threads(1)
all_texts, out = json.loads(sys.argv[1]), sys.argv[2]
images = [Image.open(file) for file in sys.argv[3:]]


def save(**arrays):
    np.savez(f"{out}/{name}.npz", **{key: np.asarray(array) for key, array in arrays.items()})


"""
CONSUMERS = {
    "AutoModel": (
        "plain-clip",
        """
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
assert type(model).__name__ == "CLIPModel" and type(processor).__name__ == "CLIPProcessor"
inputs = processor(text=all_texts, images=images, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
save(texts=output.text_embeds, images=output.image_embeds)
""",
    ),
    "pipelines": (
        "plain-clip",
        """
from transformers import CLIPVisionModelWithProjection, pipeline
texts = all_texts[:-1]  # the pipeline does not cut a text of 602 tokens
classify = pipeline("zero-shot-image-classification", model=folder)
results = classify(images, candidate_labels=texts, hypothesis_template="{}")
scores = [{row["label"]: row["score"] for row in result} for result in results]
# Of a whole CLIP this pipeline also wants texts: it takes the image tower.
tower = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
extract = pipeline("image-feature-extraction", model=tower, image_processor=folder)
embeds = np.concatenate([np.asarray(extract(image)) for image in images])
save(probabilities=[[score[text] for text in texts] for score in scores],
     images=embeds / np.linalg.norm(embeds, axis=1, keepdims=True))
""",
    ),
    "SentenceTransformer": (
        "plain-clip",
        """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, device="cpu")
assert model.max_seq_length == 248
save(texts=model.encode(all_texts, normalize_embeddings=True), images=model.encode(images, normalize_embeddings=True))
""",
    ),
    "SentenceTransformer, remote code": (
        "lrsclip",
        """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
save(texts=model.encode(all_texts, normalize_embeddings=True), images=model.encode(images, normalize_embeddings=True))
""",
    ),
    "CLIPTextModel": (
        "plain-clip",
        """
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(all_texts, padding="max_length", truncation=True, return_tensors="pt")
assert inputs["input_ids"].shape[1] == 248
with torch.no_grad():
    states = CLIPTextModel.from_pretrained(folder).eval()(**inputs)
    embeds = CLIPTextModelWithProjection.from_pretrained(folder).eval()(**inputs).text_embeds
save(states=states.last_hidden_state, pooled=states.pooler_output, texts=embeds / embeds.norm(dim=-1, keepdim=True))
""",
    ),
}


@pytest.fixture
def folders(tiny_checkpoint, tmp_path):
    """The same weights as an LRSCLIP and as a stock CLIP."""
    made = {}
    for layout in ("lrsclip", "plain-clip"):
        convert(tiny_checkpoint, tmp_path / layout, layout)
        made[layout] = tmp_path / layout
    return made


@pytest.fixture
def texts(long_texts, short_texts):
    """Some of more than 77 tokens, one that is cut at 248 (the last), some that are cleaned."""
    dressed = ["It\u2019s a \u201cgreen\u201d field &amp; a road", "a\u00a0b\n\nc", " ".join(long_texts[:3])]
    return [*long_texts, *short_texts, *dressed, "tank " * 300]


def expected(folder, texts, images):
    model, processor = LRSCLIPModel.from_pretrained(folder).eval(), LRSCLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(text=texts, images=images, return_tensors="pt")
        output = model(**inputs)
        tower = model.text_model(**processor(text=texts, padding="max_length", return_tensors="pt"))
    return {
        "texts": output.text_embeds.numpy(),
        "images": output.image_embeds.numpy(),
        "probabilities": output.logits_per_image[:, :-1].softmax(dim=-1).numpy(),
        "states": tower.last_hidden_state.numpy(),  # (N, 248, D), what a diffusion model is conditioned on
        "pooled": tower.pooler_output.numpy(),
    }


def test_consumers_without_this_package(folders, texts, images, tmp_path):
    """All in one process, which imports transformers once; the largest differences are printed with `-s`."""
    files = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    parts = [
        f"folder = {str(folders[layout])!r}\nname = {name!r}\n{code}" for name, (layout, code) in CONSUMERS.items()
    ]
    (tmp_path / "consumers.py").write_text("\n".join([PREAMBLE, *parts]))
    command = [sys.executable, str(tmp_path / "consumers.py"), json.dumps(texts), str(tmp_path), *map(str, files)]
    run = processes.run(command, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    wanted = expected(folders["lrsclip"], texts, images)
    for name in CONSUMERS:
        embeds = np.load(tmp_path / f"{name}.npz")
        for key in embeds.files:
            difference = np.abs(embeds[key] - wanted[key]).max()
            print(f"{name}: {key} within {difference:.1e}")
            assert difference <= TOLERANCE, (name, key)


def test_a_plain_folder_says_what_it_is(folders):
    folder = folders["plain-clip"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip" and config["architectures"] == ["CLIPModel"] and "auto_map" not in config
    assert config["text_config"]["max_position_embeddings"] == 248 and "stretch_ratio" not in config["text_config"]
    assert (
        CLIPConfig.from_pretrained(folder).text_config.eos_token_id
        == LRSCLIPModel.from_pretrained(folders["lrsclip"]).config.text_config.eos_token_id
    )
    assert not list(folder.glob("*.py")) and not re.search(
        "auto_map|lrsclip", (folder / "processor_config.json").read_text()
    )
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "conversion.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 248
    weights = load_file(folder / "model.safetensors")
    for name, tensor in load_file(folders["lrsclip"] / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


def test_a_plain_folder_converts_back(folders, tmp_path, texts):
    convert(folders["plain-clip"], tmp_path / "back")
    back, original = (
        LRSCLIPProcessor.from_pretrained(tmp_path / "back"),
        LRSCLIPProcessor.from_pretrained(folders["lrsclip"]),
    )
    assert back.encode_text(texts) == original.encode_text(texts)
    assert LRSCLIPModel.from_pretrained(tmp_path / "back").config.text_config.max_position_embeddings == 248


def test_what_of_the_cleaning_fits_into_the_tokenizer(tiny_processor):
    captions = real_looking_captions(1000)
    differ, without = count_different_ids(tiny_processor, captions)
    assert without > 300 and len(differ) <= 15, (without, len(differ))
    # Only what the normalizer leaves: rarer damage of the encoding, rarer entities, full-width letters.
    assert all(re.search("\u00c3|\u00e2|&[e#f]|[\uff10-\uff5a]", text) for text in differ), differ


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("it\u2019s \u201ca\u201d road", 'it\'s "a" road'),
        ("cars &amp; trees &lt;b&gt; &quot;x&quot; it&#39;s", 'cars & trees <b> "x" it\'s'),
        ("&amp;amp; &amp;lt;", "& <"),
        ("it\u00e2\u20ac\u2122s 25\u00c2\u00b0C", "it's 25\u00b0c"),
        ("a\ufb01eld\x1b[31m\ufeff of\uff0cgrass\u3000x", "afield of,grass x"),
        ("  A\n\n B\t", "a b"),
    ],
)
def test_the_tokenizers_own_cleaning(tiny_processor, text, clean):
    plain = plain_tokenizer(tiny_processor.tokenizer)
    assert plain(text)["input_ids"] == tiny_processor.tokenizer(clean)["input_ids"]
    assert plain(text)["input_ids"] == tiny_processor.encode_text([text])[0]


def test_it_decodes_as_words(tiny_processor):
    plain = plain_tokenizer(tiny_processor.tokenizer)
    assert (
        plain.decode(plain("A road beside two tanks")["input_ids"], skip_special_tokens=True)
        == "a road beside two tanks"
    )


class TestOpenClip:
    """The way back to open_clip's keys."""

    def test_it_is_the_file_that_was_converted(self, tiny_tokenizer, tmp_path):
        state = published_state(700, 248)
        restored = restore_published(self.tensors(state, tiny_tokenizer, tmp_path))
        assert restored.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(restored[name], tensor) and restored[name].is_contiguous(), name

    def tensors(self, state, tokenizer, folder):
        tokenizer.save_pretrained(folder / "tokenizer")
        source = write_source("zip", state, folder)
        convert(source, folder / "ours", tokenizer=folder / "tokenizer", activation="quick_gelu")
        return load_file(folder / "ours" / "model.safetensors")

    def test_the_published_arithmetic_on_it_gives_the_same_embeddings(self, tiny_tokenizer, tmp_path, texts, images):
        """On the file's own keys, by the reference written after openai/CLIP model.py, of which open_clip's is a copy."""
        state = published_state(700, 248, two_tables=True)
        self.tensors(state, tiny_tokenizer, tmp_path)
        main([str(tmp_path / "ours"), str(tmp_path / "open"), "--open-clip"])
        described = json.loads((tmp_path / "open" / "open_clip_config.json").read_text())
        model = described["model_cfg"]
        assert model["quick_gelu"] and model["text_cfg"]["context_length"] == 248 and model["embed_dim"] == 24
        assert described["preprocess_cfg"]["mean"] == [0.48145466, 0.4578275, 0.40821073]
        restored = load_file(tmp_path / "open" / "open_clip_model.safetensors")
        heads = (model["vision_cfg"]["width"] // model["vision_cfg"]["head_width"], model["text_cfg"]["heads"])
        processor = LRSCLIPProcessor.from_pretrained(tmp_path / "ours")
        wanted = expected(tmp_path / "ours", texts, images)
        ids = torch.tensor([row + [0] * (248 - len(row)) for row in processor.encode_text(texts)])
        embeds = published_text_embeds(restored, ids, heads[1], "quick_gelu").numpy()
        assert np.abs(embeds - wanted["texts"]).max() <= TOLERANCE
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        embeds = published_image_embeds(restored, pixels, heads[0], "quick_gelu").numpy()
        assert np.abs(embeds - wanted["images"]).max() <= TOLERANCE

    def test_what_open_clip_has_no_field_for(self, tiny_model, tiny_processor, tmp_path):
        tiny_model.config.text_config.hidden_act = "gelu"
        tiny_model.save_pretrained(tmp_path / "mixed")
        tiny_processor.save_pretrained(tmp_path / "mixed")
        with pytest.raises(SystemExit, match="open_clip runs both towers with quick_gelu or with gelu"):
            main([str(tmp_path / "mixed"), str(tmp_path / "open"), "--open-clip"])
        assert not (tmp_path / "open").exists()
