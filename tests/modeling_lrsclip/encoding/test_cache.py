"""What was embedded once is read, what changed is not, and a damaged file is told apart."""

import os

import pytest
import torch

import modeling_lrsclip.encoding.encoder as encoding
from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from modeling_lrsclip.encoding.encoder import EmbeddingCache
from modeling_lrsclip.encoding.imagery import ImageFiles
from modeling_lrsclip.encoding.model_inputs import encode_texts
from modeling_lrsclip.files.cache_folder import cache_folder


@pytest.fixture
def files(tmp_path, images):
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return ImageFiles(paths, [path.name for path in paths])


def again(files):
    return ImageFiles(files.sources, files.names)  # its hash is computed anew


@pytest.fixture
def computed(monkeypatch):
    """Numbers of images and texts that went through the towers."""
    counts = {"embed_images": [], "embed_token_rows": []}

    def count(name, original):
        monkeypatch.setattr(encoding, name, lambda *inputs: counts[name].append(len(inputs[2])) or original(*inputs))

    for name in counts:
        count(name, getattr(encoding, name))
    return counts


@pytest.fixture
def encoder(tiny_model, tiny_processor, tmp_path):
    """A function that makes an encoder as a new run does, with parts of two items."""
    return lambda **options: Encoder(
        tiny_model, tiny_processor, **{"cache_dir": tmp_path / "kept", "batch_size": 2} | options
    )


@pytest.fixture(autouse=True)
def parts_of_two(monkeypatch):
    monkeypatch.setattr(encoding, "PART", 2)


def test_a_second_run_reads_what_the_first_computed(encoder, computed, files, long_texts):
    first = encoder()
    rows = encode_texts(first.processor, [*long_texts, long_texts[0]])
    images, texts = first.images(files), first.texts(rows)
    assert computed == {"embed_images": [2, 2], "embed_token_rows": [2, 2]}
    second = encoder()
    for kept, computed_now in ((second.images(again(files)), images), (second.texts(rows), texts)):
        assert torch.equal(kept.embeds, computed_now.embeds)
        assert kept.seconds == computed_now.seconds > 0  # as first paid
    assert computed == {"embed_images": [2, 2], "embed_token_rows": [2, 2]}
    plain = embed_images(first.model, first.processor, files), embed_texts(first.model, first.processor, long_texts)
    torch.testing.assert_close((images.embeds, texts.embeds[:-1]), plain, atol=1e-5, rtol=0)


def test_without_a_folder_nothing_is_kept(encoder, computed, files, tmp_path):
    for _ in range(2):
        encoder(cache_dir=None).images(again(files))
    assert computed["embed_images"] == [4, 4] and not (tmp_path / "kept").exists()


def test_only_the_part_of_a_changed_file_is_computed_again(encoder, computed, files, images):
    before = encoder().images(files).embeds
    images[0].save(files.sources[3])
    after = encoder().images(again(files)).embeds
    assert computed["embed_images"] == [2, 2, 2]
    assert torch.equal(before[:3], after[:3]) and not torch.equal(before[3], after[3])
    torch.testing.assert_close(after[3], after[0])


def test_what_decides_an_embedding_is_noticed(encoder, computed, files, tiny_model, tiny_processor):
    rows = encode_texts(tiny_processor, ["a road"])

    def run(**options):
        instance = encoder(**options)
        instance.images(again(files)), instance.texts(rows)
        numbers = [sum(calls) for calls in computed.values()]
        [calls.clear() for calls in computed.values()]
        return numbers

    assert run() == [4, 1] and run() == [0, 0]
    assert run(dtype=torch.bfloat16) == [4, 1]
    tiny_processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert run() == [4, 0]
    tiny_model.config.text_config.hidden_act = "gelu"
    assert run() == [4, 1]
    with torch.no_grad():
        tiny_model.logit_scale += 1e-3
    assert run() == [4, 1] and run() == [0, 0]


def test_a_run_that_was_killed_goes_on(encoder, computed, files, images):
    content = files.sources[3].read_bytes()
    files.sources[3].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        encoder().images(files)
    files.sources[3].write_bytes(content)
    embeds = encoder().images(again(files)).embeds
    assert computed["embed_images"] == [2, 2, 2]  # the second part twice
    torch.testing.assert_close(embeds, encoder(cache_dir=None).images(again(files)).embeds)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other width", "no tensor"])
def test_a_damaged_file_is_computed_again_with_a_warning(encoder, computed, files, tmp_path, damage):
    before = encoder().images(files).embeds
    path = sorted((tmp_path / "kept").glob("*/*.safetensors"))[0]
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other width":
        path.write_bytes(content.replace(b"[2,24]", b"[3,16]"))
    else:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is computed again"):
        after = encoder().images(again(files)).embeds
    assert torch.equal(before, after) and computed["embed_images"] == [2, 2, 2]
    assert path.read_bytes()[-30:] == content[-30:]  # mended


def test_files_that_changed_places_are_computed_again(encoder, files, tmp_path):
    whole = encoder().images(files).embeds
    one, other = sorted((tmp_path / "kept").rglob("*.safetensors"))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    with pytest.warns(UserWarning, match="its values, or its name, do not match its checksum"):
        assert torch.equal(encoder().images(again(files)).embeds, whole)


def test_a_folder_that_cannot_be_written_is_no_end(encoder, files, tmp_path):
    (tmp_path / "kept").write_text("a file in the way")
    with pytest.warns(UserWarning, match="embeddings are not kept in"):
        assert len(encoder().images(files).embeds) == 4


def test_files_appear_whole_under_their_names(tmp_path):
    cache = EmbeddingCache(tmp_path, "model")
    cache.save("a", torch.ones(2, 3), 1.5)
    embeds, seconds = cache.load("a")
    assert torch.equal(embeds, torch.ones(2, 3)) and seconds == 1.5
    assert cache.load("b") is None and EmbeddingCache(tmp_path, "other").load("a") is None
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".safetensors"]


def test_the_usual_place_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.delenv("LRSCLIP_CACHE", raising=False)
    assert str(cache_folder("embeddings")) == os.path.expanduser("~/.cache/lrsclip/embeddings")
    monkeypatch.setenv("LRSCLIP_CACHE", str(tmp_path))
    assert cache_folder("indices") == tmp_path / "indices"
