"""Answers that serve many images, and equal rows, are found whatever the order of the rows, and leave the set in one step."""

import hashlib
import itertools
import random
import shutil

import pytest

from tests.training.lrs2m.chat_server import ChatServer
from tests.training.lrs2m.small_builds import build, entries, long_caption, manifest_of, rows_of, short_caption, source
from training.lrs2m import output
from training.lrs2m.checks.across_rows import MOST_IMAGES, SAME, SHINGLE, find_repeats
from training.lrs2m.checks.candidate import words_of


CANNED = (
    "The image shows an aerial view of an urban area with several buildings, roads and green spaces between them, and the "
    "layout of the streets is regular with trees on both sides and cars parked in front of the houses near the centre."
)


def row(position: int, image: int, long_text: str, **more) -> dict:
    digest = hashlib.sha256(str(image).encode()).hexdigest()
    known = {"id": f"a-{position:08d}", "source": "a", "image_key": str(image), "image_sha256": digest}
    return known | {"long_text": long_text, "short_text": "A road.", "long_captioner": "m"} | more


def some_rows() -> list[dict]:
    rng = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    rows = [row(number, number, " ".join(rng.choices(words, k=60))) for number in range(40)]  # unlike each other
    rows += [row(40 + number, 40 + number, CANNED) for number in range(6)]
    rows += [
        row(46 + number, 46 + number, CANNED.replace("cars", f"{words[number]} cars")) for number in range(4)
    ]  # nearly
    rows += [row(50 + number, 90, " ".join(words[:50])) for number in range(5)]  # one image, so one answer
    rows += [row(55 + number, 100 + number, " ".join(words[100:150])) for number in range(MOST_IMAGES)]  # few
    rows += [row(60 + number, 200 + number, " ".join(words[:50]), long_captioner="given") for number in range(5)]
    return rows


def test_answers_of_many_images_in_any_order(tmp_path):
    rows = some_rows()
    wanted = {one["id"]: 10 if 40 <= int(one["id"][2:]) < 50 else 1 for one in rows}
    wanted |= {f"a-{55 + number:08d}": MOST_IMAGES for number in range(MOST_IMAGES)}
    wanted |= {f"a-{60 + number:08d}": 0 for number in range(5)}
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        repeats = find_repeats(iter(rows), len(rows), tmp_path)
        assert {one["id"]: int(images) for one, images in zip(rows, repeats.images)} == wanted


def test_likeness_is_that_of_the_texts(tmp_path):
    """Pairs are linked as the exact Jaccard similarity of their groups of words says, but for those near to the threshold."""
    rng = random.Random(1)
    base = [f"w{number}" for number in range(100)]
    texts = []
    for changed in [0, 1, 2, 3, 5, 8, 12, 20, 30, 50]:
        other = [
            f"x{rng.random()}" if number in rng.sample(range(100), changed) else word
            for number, word in enumerate(base)
        ]
        texts.append(" ".join(other))

    def groups(text):
        words = words_of(text)
        return {tuple(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}

    clear = 0
    for left, right in itertools.combinations(texts, 2):
        exact = len(groups(left) & groups(right)) / len(groups(left) | groups(right))
        if abs(exact - SAME) > 0.15:
            clear += 1
            repeats = find_repeats(iter([row(0, 0, left), row(1, 1, right)]), 2, tmp_path)
            assert (repeats.images.tolist() == [2, 2]) == (exact > SAME), exact
    assert clear > 20


def test_equal_rows(tmp_path):
    rows = [row(0, 0, "A b c."), row(1, 1, "A b c."), row(2, 0, "A b c.", long_captioner="given"), row(3, 0, "A b d.")]
    rows.append(row(4, 0, "A b c.", short_text="A lake."))
    assert find_repeats(iter(rows), 5, tmp_path).equal_to.tolist() == [0, 1, 0, 3, 4]
    assert not len(find_repeats(iter(()), 0, tmp_path).images)


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_build_without_them(tiles, write_recipe, tmp_path, monkeypatch, form):
    """Rows with a canned answer are listed as failed, equal ones as duplicates; a kill before that is durable changes nothing."""
    lines = (tiles / "captions.jsonl").read_text().splitlines()
    (tiles / "twice.jsonl").write_text("\n".join([*lines, lines[20], lines[21]]))
    read = {"kind": "table", "path": str(tiles / "twice.jsonl")}
    numbers = {short_caption(index): index for index in range(24)}

    def answer(request):
        index = next(index for text, index in numbers.items() if f'"{text}"' in request.text)
        return (
            CANNED
            if index < canned
            else long_caption(index).replace(
                "a small blue pond", f"pond{index} " * 3 + f"b{index} " * 3 + f"c{index} " * 3
            )
        )

    canned = 8
    levels = {"repeated_answer": "on", "agreement": "off"}
    with ChatServer(answer=answer) as server:
        fields = {"checks": levels, "max_failed_fraction": 0.5, "format": form, "shard_rows": 7}
        recipe = write_recipe([source("expand", read)], server.url, **fields)
        assert build(recipe, tmp_path / "set") == 0
        save, killed = output.save_progress, []

        def stop(folder, progress):
            if progress.compared and not killed:
                killed.append(True)
                raise ValueError("killed")
            save(folder, progress)

        monkeypatch.setattr(output, "save_progress", stop)
        assert build(recipe, tmp_path / "again") == 1 and killed
        assert build(recipe, tmp_path / "again") == 0
        asked = len(server.requests)
        if form == "parquet":  # asked again with other seeds, the rows that failed alone and only once
            retried = shutil.copytree(tmp_path / "set", tmp_path / "retried")
            for of_now, failing, asked_now in ((4, 4, 8), (0, 0, 4), (8, 0, 0)):
                canned = of_now
                assert build(recipe, retried, "--retry-failed") == 0
                assert len(entries(retried, "failed")) == failing and len(server.requests) == asked + asked_now
                asked = len(server.requests)
            canned = 8
        warned = write_recipe(
            [source("expand", read)], server.url, **fields | {"checks": levels | {"repeated_answer": "warn"}}
        )
        assert build(warned, tmp_path / "warned") == 0
    failed = entries(tmp_path / "set", "failed")
    assert [int(entry["id"][-2:]) for entry in sorted(failed, key=lambda one: one["id"])] == list(range(8))
    assert {entry["reason"] for entry in failed} == {"repeated_answer"}
    assert failed[0]["attempts"][0]["detail"] == "one answer for 8 images"
    assert [entry["id"][-2:] for entry in entries(tmp_path / "set", "duplicates")] == ["24", "25"]
    assert len(rows_of(tmp_path / "set")) == 16
    counts = manifest_of(tmp_path / "set")["counts"]["tiles"]
    assert (counts["failed"], counts["duplicates"], counts["train"] + counts["validation"]) == (8, 2, 16)
    assert manifest_of(tmp_path / "again") == manifest_of(tmp_path / "set")  # which holds the hash of every file
    marked = [row["id"][-2:] for row in rows_of(tmp_path / "warned") if "repeated_answer" in row["warnings"]]
    assert marked == [f"{index:02d}" for index in range(8)]
    assert manifest_of(tmp_path / "warned")["counts"]["tiles"]["warned: repeated_answer"] == 8
