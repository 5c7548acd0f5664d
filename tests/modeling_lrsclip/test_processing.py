"""Tokens and pixels equal the published preprocessing; truncation is told; a save forgets the last call."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from modeling_lrsclip import LRSCLIPImageProcessor, LRSCLIPProcessor, processing_lrsclip
from modeling_lrsclip.image_processing_lrsclip import to_rgb
from modeling_lrsclip.processing_lrsclip import clean_text
from modeling_lrsclip.train_tokenizer import LONGEST_WORD, train_tokenizer
from tests.modeling_lrsclip.references import published_pixels, slow_token_ids


HARD_TEXTS = [
    "it's the airport's runway, they're 2500m long",
    "it\u2019s the airport\u2019s runway \u2014 \u201ctwo\u201d tanks",
    "fields &amp; roads &lt;north&gt; &amp;amp; &quot;harbour&quot;",
    "25 storage tanks, 3.5 ha; no. 17!!",
    "a \U0001f6e9\ufe0f on the apron \U0001f6a2\U0001f6a2",
    "\u6e2f\u53e3\u7684\u8239 ships \u9053\u8def",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u0130stanbul",
    "tabs\tand\nnew lines \r\n and   spaces ",
    "bell\x07 and \x1b[31mred\x1b[0m control",
    "\ufb01elds and \ufb02oods \uff26\uff35\uff2c\uff2c width",
    "the l\u00e2\u20ac\u2122eau mojibake",
    "HOUSES And ROOFS",
    "",
    "   ",
    "word " * 300,
]


@pytest.fixture
def recorded():
    """Messages that the package logs through transformers' logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = transformers_logging.get_logger(processing_lrsclip.__name__)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


class TestTokens:
    def test_equal_the_published_tokenizer(self, tiny_processor, tiny_tokenizer, long_texts):
        bpe = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in bpe["merges"]]
        texts = HARD_TEXTS + long_texts
        for text, ids in zip(texts, tiny_processor.encode_text(texts)):
            assert ids == slow_token_ids(text, bpe["vocab"], merges, 248), text

    def test_call_gives_the_same_rows(self, tiny_processor):
        called = tiny_processor(text=HARD_TEXTS, padding=False)["input_ids"]
        assert called == tiny_processor.encode_text(HARD_TEXTS)

    def test_padding_to_the_longest(self, tiny_processor, tiny_tokenizer, short_texts):
        inputs = tiny_processor(text=short_texts, return_tensors="pt")
        lengths = [len(ids) for ids in tiny_processor.encode_text(short_texts)]
        assert inputs["input_ids"].shape == (4, max(lengths))
        assert inputs["attention_mask"].sum(dim=1).tolist() == lengths
        assert (inputs["input_ids"][inputs["attention_mask"] == 0] == tiny_tokenizer.pad_token_id).all()

    def test_one_string_is_one_text(self, tiny_processor):
        assert tiny_processor(text="two tanks")["input_ids"] == tiny_processor.encode_text(["two tanks"])[0]

    def test_without_ftfy_quotes_are_still_straightened(self, tiny_processor, monkeypatch):
        expected = tiny_processor.encode_text([HARD_TEXTS[1], HARD_TEXTS[2]])
        monkeypatch.setattr(processing_lrsclip, "ftfy", None)
        assert tiny_processor.encode_text([HARD_TEXTS[1], HARD_TEXTS[2]]) == expected

    def test_plain_text_takes_the_short_way_to_the_same_result(self):
        plain = '  Two  "White" tanks\' roofs <b> (north) 50% ~ \\ `x` '
        fast = clean_text(plain)
        assert fast == " ".join(processing_lrsclip.ftfy.fix_text(plain).split()).lower()


class TestTruncation:
    def test_warns_once_with_the_count(self, tiny_processor, recorded, short_texts):
        inputs = tiny_processor(
            text=["tank " * 400, "road " * 300, *short_texts[:2]],
            short_text=["pond " * 300, *short_texts[:3]],
            return_tensors="pt",
        )
        assert inputs["input_ids"].shape[1] == inputs["short_input_ids"].shape[1] == 248
        assert recorded == ["3 of 8 captions are longer than 248 tokens and were cut there."]

    def test_a_text_that_just_fits_is_not_cut(self, tiny_processor, recorded):
        words = "a " * 246
        assert len(tiny_processor.encode_text([words])[0]) == 248
        tiny_processor(text=[words])
        assert recorded == []

    def test_own_max_length(self, tiny_processor, recorded, long_texts):
        inputs = tiny_processor(text=long_texts, max_length=20, return_tensors="pt")
        assert inputs["input_ids"].shape == (4, 20)
        assert recorded == ["4 of 4 captions are longer than 20 tokens and were cut there."]

    def test_a_save_forgets_it(self, tiny_processor, tmp_path, long_texts):
        tiny_processor.save_pretrained(tmp_path / "before")
        tiny_processor(text=long_texts, max_length=20, padding="max_length")
        tiny_processor.save_pretrained(tmp_path / "after")
        before, after = ((tmp_path / name / "tokenizer.json").read_text() for name in ("before", "after"))
        assert before == after and json.loads(after)["truncation"] is None and json.loads(after)["padding"] is None


class TestErrors:
    @pytest.mark.parametrize("argument", ["text", "short_text"])
    def test_not_a_string(self, tiny_processor, argument):
        with pytest.raises(ValueError, match=f"{argument}\\[1\\] is None \\(NoneType\\)"):
            tiny_processor(**{argument: ["a road", None]})

    def test_nothing(self, tiny_processor):
        with pytest.raises(ValueError, match="Nothing to process"):
            tiny_processor()

    def test_row_without_end_of_text(self, tiny_processor):
        with pytest.raises(ValueError, match="Text 0 .* has no end-of-text token"):
            tiny_processor(text=["a road"], add_special_tokens=False)


class TestPixels:
    @pytest.mark.parametrize(
        "size", [(32, 32), (40, 48), (33, 47), (47, 33), (101, 77), (20, 61), (256, 256), (35, 32)]
    )
    def test_equal_the_published_preprocessing(self, tiny_processor, size):
        pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        got = tiny_processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, published_pixels(image, 32), atol=1e-6, rtol=0)

    def test_real_resolution(self):
        image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (301, 273, 3), dtype=np.uint8))
        got = LRSCLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, published_pixels(image, 224), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
    def test_any_mode(self, tiny_processor, mode):
        ramp = np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (40, 1))
        if mode == "I;16":
            image = Image.fromarray(ramp.astype(np.uint16) * 40)
        elif mode in ("I", "F"):
            image = Image.fromarray(ramp.astype(np.int32 if mode == "I" else np.float32) * 40)
        else:
            image = Image.fromarray(ramp).convert("RGB").convert(mode)
        assert image.mode == mode
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == image.size
        got = tiny_processor(images=[image], return_tensors="pt")["pixel_values"]
        assert got.shape == (1, 3, 32, 32) and got.isfinite().all()
        brightness = np.asarray(rgb, dtype=float).mean(axis=(0, 2))
        assert brightness[0] < 10 and brightness[-1] > 245  # the ramp is still one, from black to white

    def test_constant_and_broken_16_bit(self):
        assert np.asarray(to_rgb(Image.fromarray(np.full((4, 4), 900, np.uint16)))).max() == 0
        values = np.array([[np.nan, 1.0], [3.0, np.inf]], np.float32)
        assert np.asarray(to_rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 0], [255, 0]]

    def test_arrays_and_tensors(self, tiny_processor, images):
        expected = tiny_processor(images=images[0], return_tensors="pt")["pixel_values"]
        array = np.asarray(images[0])
        for other in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
            assert torch.equal(tiny_processor(images=other, return_tensors="pt")["pixel_values"], expected)

    def test_arrays_of_other_ranges(self, tiny_processor, images):
        """0 to 1 is what 0 to 255 is; 16 bits are stretched as a file of them is; nothing turns black or white unsaid."""
        array = np.asarray(images[0])
        expected = tiny_processor(images=array, return_tensors="pt")["pixel_values"]
        for other in (array / 255, (array / 255).astype(np.float32), torch.from_numpy(array / 255).permute(2, 0, 1)):
            got = tiny_processor(images=other, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        for other in (array.astype(np.int64), array.astype(np.uint16)):
            got = tiny_processor(images=other, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        low, high = np.percentile(array, (2, 98), axis=(0, 1))
        stretched = np.floor(np.clip((array - low) / (high - low) * 255, 0, 255) + 0.5).astype(np.uint8)
        wanted = tiny_processor(images=stretched, return_tensors="pt")["pixel_values"]
        got = tiny_processor(images=array.astype(np.uint16) * 40, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, wanted, atol=0.03, rtol=0)
        plain = tiny_processor(images=array / 255, return_tensors="pt", do_rescale=False, do_resize=False)
        torch.testing.assert_close(
            plain["pixel_values"],
            tiny_processor(images=array, return_tensors="pt", do_resize=False)["pixel_values"],
            atol=1e-6,
            rtol=0,
            check_dtype=False,
        )
        with pytest.raises(ValueError, match="lie between -.* give 0 to 255 or 0 to 1, or, for images that are norm"):
            tiny_processor(images=array / 255 - 0.5, return_tensors="pt")


def test_auto_classes_after_a_save(tiny_checkpoint, tiny_processor, long_texts, short_texts, images):
    inputs = {"text": long_texts, "short_text": short_texts, "images": images, "return_tensors": "pt"}
    expected = tiny_processor(**inputs)
    again = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(again) is LRSCLIPProcessor
    got = again(**inputs)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert isinstance(tokenizer, CLIPTokenizer) and tokenizer.model_max_length == 248
    assert type(AutoImageProcessor.from_pretrained(tiny_checkpoint)) is LRSCLIPImageProcessor


class TestTrainTokenizer:
    def test_vocabulary(self, long_texts):
        tokenizer = train_tokenizer(long_texts, vocab_size=600, model_max_length=77)
        assert 514 < len(tokenizer) <= 600 and tokenizer.model_max_length == 77
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
        ids = tokenizer("Sn\u00f6 \U0001f6a2 and roads")["input_ids"]  # nothing is unknown to a byte-level BPE
        assert tokenizer.decode(ids, skip_special_tokens=True) == "sn\u00f6 \U0001f6a2 and roads"

    def test_every_run_learns_the_same(self, long_texts, short_texts):
        vocabularies = [train_tokenizer(long_texts + short_texts, 700).get_vocab() for _ in range(5)]
        assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)

    def test_too_small(self):
        with pytest.raises(ValueError, match="at least 514"):
            train_tokenizer(["a"], vocab_size=500)

    def test_a_word_without_end_is_learnt_in_pieces(self):
        """Whole, a word of a megabyte takes minutes, and gives tokens that double from merge to merge."""
        entries = train_tokenizer(["ab" * LONGEST_WORD * 8], vocab_size=560).get_vocab()
        assert max(map(len, entries)) == LONGEST_WORD + len("</w>")
        whole = train_tokenizer(["b" * LONGEST_WORD], vocab_size=560).get_vocab()
        assert whole == train_tokenizer(["b" * LONGEST_WORD + "b"], vocab_size=560).get_vocab()
