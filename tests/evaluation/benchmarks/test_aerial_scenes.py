"""Drawn aerial scenes: what is written, and that captions, boxes, polygons and pixels agree."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from evaluation.benchmarks.aerial_scenes import captions as scene_captions
from evaluation.benchmarks.aerial_scenes import data_set as aerial_scenes
from evaluation.benchmarks.aerial_scenes.canvas import GRID
from evaluation.benchmarks.aerial_scenes.captions import NOUNS, NUMBERS, PLACES, with_article
from evaluation.benchmarks.aerial_scenes.layout import CLASS_OF, CLASSES, COLOURS, KINDS, plan_scene, scene_random


SIDE = 64
SCENES, VALIDATION_SCENES, TEST_SCENES, CANVASES = 260, 20, 40, 2  # more training scenes than a worker draws at a time


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The command's output, drawn by two processes."""
    out = tmp_path_factory.mktemp("scenes") / "data"
    counts = ["--scenes", str(SCENES), "--validation-scenes", str(VALIDATION_SCENES)]
    counts += ["--test-scenes", str(TEST_SCENES), "--canvases", str(CANVASES)]
    assert aerial_scenes.main([str(out), "--seed", "3", "--workers", "2", *counts]) == 0
    return out


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The same training scenes, drawn in this process."""
    return [aerial_scenes.scene_row(3, "train", index, SIDE) for index in range(SCENES)]


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def cell(item: dict) -> int:
    """The cell of the 3 x 3 grid that holds the middle of an object's box."""
    return int((item["x0"] + item["x1"]) * 3 / (2 * SIDE)) + 3 * int((item["y0"] + item["y1"]) * 3 / (2 * SIDE))


def test_files_do_not_depend_on_the_processes(data, rows):
    assert pyarrow.parquet.read_table(data / "train.parquet").to_pylist() == rows
    assert sorted(path.name for path in data.iterdir()) == sorted(aerial_scenes.FILES)
    assert not list(data.parent.glob(".data-*"))  # the temporary folder is gone


def test_datasets_decodes_the_files(data, tmp_path):
    from datasets import load_dataset

    files = {name: str(data / f"{name}.parquet") for name in ("train", "test")}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert (len(loaded["train"]), len(loaded["test"])) == (SCENES, TEST_SCENES)
    row = loaded["test"][0]
    assert isinstance(row["image"], Image.Image) and row["image"].size == (SIDE, SIDE)
    assert list(row) == ["image", "class_name", "short_text", "long_text", "objects"]
    assert set(row["objects"][0]) == {"kind", "colour", "x0", "y0", "x1", "y1"}


def test_record_and_tokenizer(data, rows):
    from transformers import AutoTokenizer

    record = json.loads((data / "scenes.json").read_text())
    assert (record["seed"], record["scenes"], record["test_scenes"], record["canvases"]) == (3, 260, 40, 2)
    assert record["class_names"] == list(aerial_scenes.CLASS_NAMES) and record["image_size"] == SIDE
    assert record["short_text_ceiling"]["R@10"] > 95

    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    long_lengths = [len(ids) for ids in tokenizer([row["long_text"] for row in rows])["input_ids"]]
    short_lengths = [len(ids) for ids in tokenizer([row["short_text"] for row in rows])["input_ids"]]
    assert 135 < np.mean(long_lengths) < 165 and min(long_lengths) > 77 and max(long_lengths) <= 248
    assert 10 < np.mean(short_lengths) < 20 and max(short_lengths) < 30


def test_splits_are_disjoint_and_none_depends_on_another(data, rows):
    test = [aerial_scenes.scene_row(3, "test", index, SIDE) for index in range(TEST_SCENES)]
    validation = [aerial_scenes.scene_row(3, "validation", index, SIDE) for index in range(VALIDATION_SCENES)]
    for split, drawn in (("test", test), ("validation", validation)):
        assert pyarrow.parquet.read_table(data / f"{split}.parquet").to_pylist() == drawn
    other_seed = [aerial_scenes.scene_row(4, "train", index, SIDE) for index in range(TEST_SCENES)]
    for column in (lambda row: row["image"]["bytes"], lambda row: row["long_text"]):
        known = {column(row) for row in rows}
        assert len(known) == len(rows)
        assert not known & {column(row) for row in test + validation + other_seed}
        assert not {column(row) for row in test} & {column(row) for row in validation}


def test_the_main_kind_fills_cells_of_one_colour_and_never_distracts(rows):
    assert {scene_class.main_kind for scene_class in CLASSES} < set(KINDS)
    for row in rows:
        main = [item for item in row["objects"] if item["kind"] == CLASS_OF[row["class_name"]].main_kind]
        assert len(main) in (2, 3) and len({item["colour"] for item in main}) == 1
        assert 6 <= len(row["objects"]) <= 8
        assert len({cell(item) for item in row["objects"]}) == len(row["objects"])


def test_boxes_hold_the_colour_they_name(rows):
    for row in rows[:100]:
        image = pixels(row).astype(int)
        for item in row["objects"]:
            assert 0 <= item["x0"] < item["x1"] <= SIDE and 0 <= item["y0"] < item["y1"] <= SIDE
            assert min(item["x1"] - item["x0"], item["y1"] - item["y0"]) >= 8
            inside = image[item["y0"] : item["y1"], item["x0"] : item["x1"]].reshape(-1, 1, 3)
            distances = np.abs(inside - np.array(list(COLOURS.values()))).sum(2)  # (pixels, colours)
            close = np.bincount(distances.argmin(1)[distances.min(1) < 80], minlength=len(COLOURS))
            assert list(COLOURS)[close.argmax()] == item["colour"]


def named_things() -> dict[str, tuple[str, str, int]]:
    """Every phrase for things and the (kind, colour or "", count) it stands for."""
    things = {}
    for kind, colour in itertools.product(KINDS, ("", *COLOURS)):
        for singular, plural in NOUNS[kind]:
            one, many = (form.format(colour).replace("  ", " ").strip() for form in (singular, plural))
            things[with_article(one)] = (kind, colour, 1)
            things |= {f"{NUMBERS[count]} {many}": (kind, colour, count) for count in (2, 3)}
    return things


def matcher(phrases) -> re.Pattern:
    return re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, phrases), key=len, reverse=True)) + r")\b")


THINGS = named_things()
CELLS = {name: index for index, names in enumerate(PLACES) for name in names}
THING, PLACE = matcher(THINGS), matcher(f"the {name}" for name in CELLS)
STEPS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}  # from an object to its neighbour


def check_sentence(text: str, objects: list[dict]) -> int:
    """Check a sentence about objects; returns how many objects it describes."""
    (kind, colour, count), *others = (THINGS[phrase] for phrase in THING.findall(text))
    same = [item for item in objects if (item["kind"], item["colour"]) == (kind, colour)]
    assert len(same) == count
    cells = {cell(item) for item in same}
    assert {CELLS[name.removeprefix("the ")] for name in PLACE.findall(text)} == cells
    relation = re.search(r"(above|below|left of|right of) ", PLACE.sub("", text))
    assert len(others) == (relation is not None)
    if relation:
        step = STEPS[relation.group(1)]
        neighbour = cell(same[0]) + step[0] + 3 * step[1]
        assert [item["kind"] for item in objects if cell(item) == neighbour] == [others[0][0]]
    return count


def test_long_captions_tell_the_truth(rows):
    for row in rows:
        sentences = [text.lower() for text in re.findall(r"[^.]+\.", row["long_text"])]
        assert row["class_name"] in sentences[0]
        about_objects = [text for text in sentences if THING.search(text)]
        assert sum(check_sentence(text, row["objects"]) for text in about_objects) == len(row["objects"])
        for text in set(sentences) - set(about_objects):
            if phrase := PLACE.search(text):  # an empty cell
                assert CELLS[phrase.group().removeprefix("the ")] not in {cell(item) for item in row["objects"]}
            if number := re.search(r"(\w+) objects (?:can|in)|holds (\w+) objects", text):
                assert NUMBERS[len(row["objects"])] in number.groups()


def test_short_captions_tell_the_truth(rows):
    for row in rows:
        text = row["short_text"].lower()
        assert row["class_name"] in text
        things = [THINGS[phrase] for phrase in THING.findall(text)]
        assert 2 <= len(things) <= 3
        for kind, colour, count in things:
            assert sum(item["kind"] == kind and colour in ("", item["colour"]) for item in row["objects"]) == count


def test_captions_are_good_english_and_varied(rows):
    texts = [row[column] for row in rows for column in ("short_text", "long_text")]
    for text in texts:
        assert text[0].isupper() and text.endswith(".") and "  " not in text and " ." not in text
        assert all(part.strip()[0].isupper() for part in text.rstrip(".").split(". "))
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE)
    assert len(set(re.findall(r"[a-z]+", " ".join(texts).lower()))) < 400
    orders = [re.search(r"around|covered|background|lies on|space between", row["long_text"]).start() for row in rows]
    assert np.std(orders) > 100  # the sentences come in any order


def test_canvases_and_their_polygons(data):
    rows = pyarrow.parquet.read_table(data / "localization.parquet").to_pylist()
    assert len(rows) == CANVASES
    side = GRID * SIDE
    for row in rows:
        assert pixels(row).shape == (side, side, 3)
        assert len(row["class_names"]) == GRID * GRID and row["queries"]
        for query in row["queries"]:
            classes = []
            for polygon in query["polygons"]:
                (x0, y0), (x1, y1) = np.min(polygon, 0), np.max(polygon, 0)
                assert 0 <= x0 < x1 <= side and 0 <= y0 < y1 <= side
                classes.append(row["class_names"][y0 // SIDE * GRID + x0 // SIDE])
            (name,) = set(classes)
            assert name in query["text"].lower()
            if not THING.search(query["text"].lower().replace(with_article(name), "")):  # only the class is named
                assert len(classes) == row["class_names"].count(name)


def test_ceiling_of_ambiguous_texts():
    scenes = [plan_scene(scene_random(0, "test", index, "plan"), "airport") for index in range(4)]
    texts = [scene_captions.ShortText("", (("airport", "class"),)) for _ in scenes]
    assert scene_captions.short_text_ceiling(scenes, texts) == {"R@1": 25.0, "R@5": 100.0, "R@10": 100.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"counts": {"train": 0}}, "--scenes is 0"),
        ({"counts": {"train": 2, "validation": -1}}, "--validation-scenes is -1"),
        ({"counts": {"train": 2, "test": -1}}, "--test-scenes is -1"),
        ({"counts": {"train": 2, "localization": -2}}, "--canvases is -2"),
        ({"image_size": 8}, "--image-size is 8"),
        ({"workers": 0}, "--workers is 0"),
    ],
)
def test_impossible_values(tmp_path, changed, named):
    wanted = {"counts": {"train": 2, "test": 1}, "seed": 0} | changed
    with pytest.raises(ValueError, match=named):
        aerial_scenes.write_dataset(tmp_path / "out", **wanted)
    assert not (tmp_path / "out").exists()


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    assert aerial_scenes.main([str(tmp_path / "out"), "--scenes", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_second_run_replaces_the_first_and_a_failed_one_does_not(tmp_path, monkeypatch):
    out = tmp_path / "out"
    aerial_scenes.write_dataset(out, {"train": 3, "test": 2, "localization": 1}, seed=0, image_size=40)
    (out / "notes.txt").write_text("mine")

    def fail(*_):
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(aerial_scenes, "encode_png", fail)
        with pytest.raises(RuntimeError):
            aerial_scenes.write_dataset(out, {"train": 4, "test": 2, "localization": 1}, seed=0, image_size=40)
    assert json.loads((out / "scenes.json").read_text())["scenes"] == 3
    assert pyarrow.parquet.read_metadata(out / "train.parquet").num_rows == 3

    aerial_scenes.write_dataset(out, {"train": 5}, seed=0, image_size=40)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "scenes.json", "tokenizer", "train.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
