"""Captioners on this machine: a tiny random Qwen2-VL that sees, a tiny Qwen2 that reads."""

import asyncio
import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.lrs2m.small_builds import build, entries, long_caption, picture, rows_of, short_caption, source
from tests.training.lrs2m.tiny_captioners import save_tiny_qwen2, save_tiny_qwen2_vl, teach
from training.lrs2m.captioners.captioner import CaptionerDown, Gate, Request, Sampling
from training.lrs2m.captioners.prompts import load_prompt
from training.lrs2m.captioners.transformers_model import Engine, RowSampler, TransformersCaptioner
from training.lrs2m.recipe import CaptionerConfig, TextConfig
from training.lrs2m.sources.images import data_url, read_picture


TAUGHT_LONG = long_caption(0)
TAUGHT_SHORT = "A road with parked cars beside a green field."


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_tiny_qwen2_vl(tmp_path_factory.mktemp("captioners") / "qwen2-vl", [long_caption(i) for i in range(12)])


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    return save_tiny_qwen2(tmp_path_factory.mktemp("captioners") / "qwen2", [long_caption(i) for i in range(12)])


def config(folder, **fields) -> CaptionerConfig:
    values = {"kind": "transformers", "model": str(folder), "dtype": "float32", "device_map": "cpu", "batch_size": 3}
    return CaptionerConfig(**values | fields)


def picture_file(index: int):
    buffer = io.BytesIO()
    picture(index, (60, 44)).save(buffer, "PNG")
    return read_picture(buffer.getvalue(), 8)


def requests_of_all_lengths(with_pictures: bool) -> list[Request]:
    pictures = [picture_file(index) if with_pictures and index != 2 else None for index in range(5)]
    return [
        Request(
            "You describe.", "Describe it. " * (index + 1), shown, Sampling(0.0 if index == 3 else 0.8, 0.9, 20, index)
        )
        for index, shown in enumerate(pictures)
    ]


@pytest.mark.parametrize("sees", [True, False])
def test_an_answer_depends_on_its_request_alone(seeing, reading, sees):
    engine = Engine(config(seeing if sees else reading))
    requests = requests_of_all_lengths(sees)
    together = engine.answer_all(requests)
    assert together == [engine.answer_all([request])[0] for request in requests]
    assert together[::-1] == engine.answer_all(requests[::-1])
    assert len({answer.text for answer in together}) == 5
    other = Request("You describe.", requests[0].user, requests[0].picture, Sampling(0.8, 0.9, 20, 99))
    assert engine.answer_all([other])[0] != together[0]  # another seed
    if sees:
        assert engine.model.dtype == torch.float32
        other = Request("You describe.", requests[0].user, picture_file(9), requests[0].sampling)
        with torch.no_grad():  # a random model's scores hardly move with the picture, too little to turn a draw
            scores = [engine.model(**engine.inputs([request])).logits for request in (requests[0], other)]
        assert not torch.allclose(*scores, atol=1e-6)


def test_bfloat16_is_the_default(seeing):
    engine = Engine(CaptionerConfig(kind="transformers", model=str(seeing), device_map="cpu"))
    assert engine.model.dtype == torch.bfloat16
    assert len(engine.answer_all(requests_of_all_lengths(True))) == 5


def test_a_text_model_is_not_asked_to_see(reading):
    with pytest.raises(CaptionerDown, match="reads no images"):
        Engine(config(reading)).answer_all(requests_of_all_lengths(True))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(CaptionerDown, match="cannot be loaded"):
        Engine(config(tmp_path / "nowhere"))


def test_row_sampler_draws_from_the_distribution():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = Counter()
    for seed in range(2000):
        drawn = RowSampler([Sampling(1.0, 0.9, 1, seed)], torch.device("cpu"))(torch.zeros(1, 1), scores[None])
        draws[int(drawn.argmax())] += 1
    # top-p 0.9 keeps the first three: 0.5, 0.3 and 0.15 of 0.95. Three standard deviations of 2000 draws are 0.033.
    assert set(draws) == {0, 1, 2}
    for token, share in ((0, 0.526), (1, 0.316), (2, 0.158)):
        assert abs(draws[token] / 2000 - share) < 0.034
    assert RowSampler([Sampling(0.0, 0.9, 1, 0)], torch.device("cpu"))(torch.zeros(1, 1), scores[None]).argmax() == 0


def test_batches_fill_before_they_go(reading):
    """Eleven rows of which four may be worked on at a time: batches are made of what waits, not of what the clock says."""
    gate = Gate()
    captioner = TransformersCaptioner(config(reading), gate.settle)
    gate.captioners = [captioner]
    sizes = []

    async def run():
        real = captioner.release
        captioner.release = lambda: (sizes.append(len(captioner.waiting)), real())
        requests = requests_of_all_lengths(False)[:4]
        gate.rows, gate.full = 4, True
        return await asyncio.gather(*(captioner.ask(request) for request in requests))

    answers = asyncio.run(run())
    assert sizes == [4] and len(answers) == 4


def test_a_random_model_fills_the_list_of_failures(tiles, seeing, write_recipe, tmp_path):
    read = {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 7}
    fields = {"captioners": {"mllm": local(seeing, max_tokens=12)}, "max_failed_fraction": 1, "long_tokens": [24, 248]}
    recipe = write_recipe([source("expand", read)], **fields)
    assert build(recipe, tmp_path / "set") == 0
    failed = entries(tmp_path / "set", "failed")
    assert [row["id"] for row in failed] == [f"tiles-{index:08d}" for index in range(7)]
    assert all(len(row["attempts"]) == 3 and row["reason"] for row in failed) and not rows_of(tmp_path / "set")


def test_rows_that_wait_for_an_equal_request_do_not_hold_a_batch_up(seeing, write_recipe, tmp_path, monkeypatch):
    """A batch goes when every row waits for one; a row that shares another's request waits for none of its own."""
    picture(0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "short_text": short_caption(index // 3)} for index in range(6)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batches, answer_all = [], Engine.answer_all

    def counted(engine, requests):
        batches.append(len(requests))
        return answer_all(engine, requests)

    monkeypatch.setattr(Engine, "answer_all", counted)
    read = {"kind": "table", "path": str(tmp_path / "captions.jsonl")}
    fields = {"captioners": {"mllm": local(seeing, max_tokens=12)}, "max_failed_fraction": 1, "long_tokens": [24, 248]}
    assert build(write_recipe([source("expand", read)], **fields), tmp_path / "set") == 0
    assert batches == [2, 2, 2]  # attempts for two different requests
    assert len(entries(tmp_path / "set", "failed")) == 6


def test_a_taught_model_makes_a_data_set(tiles, seeing, reading, write_recipe, tmp_path):
    greedy = Sampling(0.0, 1.0, 1, 0)
    pictures = [read_picture(tiles / f"{index:02d}.png", 8) for index in range(3)]
    expand, anchor, compress = (
        load_prompt(TextConfig("m", name), tiles) for name in ("expand@1", "anchor@1", "compress@1")
    )
    long_lessons = [
        Request(prompt.system, prompt.fill({"short_text": short_caption(index), "anchors": "airport"}), shown, greedy)
        for index, shown in enumerate(pictures)
        for prompt in (expand, anchor)
    ]
    short_lesson = Request(compress.system, compress.fill({"long_text": TAUGHT_LONG}), None, greedy)
    teach(Engine(config(seeing)), seeing, [(request, TAUGHT_LONG) for request in long_lessons])
    teach(Engine(config(reading)), reading, [(short_lesson, TAUGHT_SHORT)])
    captioners = {"mllm": local(seeing, max_tokens=120), "llm": local(reading, max_tokens=40)}
    read = {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 5}
    sources = [
        source("expand", read),
        source("anchor", read, name="anchored", labels={"kind": "class_name", "names": dict.fromkeys(("beach", "bridge", "canal", "church"), "airport")}),
    ]  # fmt: skip
    recipe = write_recipe(sources, captioners=captioners)
    assert build(recipe, tmp_path / "set") == 0
    rows = rows_of(tmp_path / "set")
    assert len(rows) == 10 and {row["long_text"] for row in rows} == {TAUGHT_LONG}
    assert {row["short_text"] for row in rows if row["route"] == "anchor"} == {TAUGHT_SHORT}
    assert {row["short_text"] for row in rows if row["route"] == "expand"} == {
        short_caption(index) for index in range(5)
    }
    assert {row["long_captioner"] for row in rows} == {"qwen2-vl"}  # the folder's name, not its path


def local(folder, max_tokens: int) -> dict:
    values = {"kind": "transformers", "model": str(folder), "temperature": 0.0, "max_tokens": max_tokens}
    return values | {"dtype": "float32", "device_map": "cpu", "batch_size": 4}


def test_images_are_sent_as_they_are_or_smaller():
    small = picture_file(1)
    assert data_url(small, 64).startswith("data:image/png;base64,")
    assert data_url(small, 40).startswith("data:image/jpeg;base64,")
    turned = picture(2, (60, 44))
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    shown = read_picture(buffer.getvalue(), 8)
    assert shown.size == (44, 60) and not shown.unchanged_for_captioners


def test_16_bits_are_stored_and_sent_as_training_reads_them():
    grey = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 20).save(grey, "PNG")
    shown = read_picture(grey.getvalue(), 8)
    levels = np.asarray(shown.image)
    assert levels.shape == (40, 40, 3) and (levels.min(), levels.max()) == (0, 255) and 120 < levels.mean() < 135
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.content))), levels) and shown.suffix == ".png"
