"""What a build finds out before it asks for anything, and what `--check` says."""

import json
import time
import tracemalloc

import pytest

from tests.training.lrs2m.chat_server import ChatServer
from tests.training.lrs2m.small_builds import build, long_caption, picture, rows_of, short_caption, source
from training.lrs2m import preflight
from training.lrs2m.recipe import ReadConfig, read_recipe
from training.lrs2m.sources.records import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures, and tables of them that are good or bad in one way each."""
    folder = tmp_path_factory.mktemp("preflight")
    names = [f"Forest_{index}.png" for index in range(5)]
    for index, name in enumerate(names):
        picture(index).save(folder / name)
    shorts = [short_caption(index) for index in range(5)]
    (folder / "semicolons.csv").write_text("file;title\n" + "".join(map("{};{}\n".format, names, shorts)))
    (folder / "paths.csv").write_text("file;title\n" + "".join(f"{one};a\n" for one in [*names, "./Forest_1.png"]))
    (folder / "unknown.csv").write_text("image,remark\n" + "".join(map("{},{}\n".format, names, shorts)))
    (folder / "absent.csv").write_text("image,title\n" + "".join(map("train/{},{}\n".format, names, shorts)))
    (folder / "imageless.csv").write_text("picture,title\n" + "".join(map("{},{}\n".format, names, shorts)))
    (folder / "empty.csv").write_text("image,title\n")
    rows = [{"key": name, "long_text": long_caption(index)} for index, name in enumerate(names)]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "other.jsonl").write_text("\n".join(json.dumps(row | {"key": f"x_{row['key']}"}) for row in rows))
    twice = [*rows, {"key": "forest_3.png", "long_text": "Another image's."}]
    (folder / "twice.jsonl").write_text("\n".join(map(json.dumps, twice)))
    return folder


def table(folder, name, **fields):
    return {"kind": "table", "path": str(folder / name)} | fields


def expanded(folder, name, **fields):
    return source("expand", table(folder, name, **fields))


def joined(folder, captions, name="semicolons.csv", **key):
    read = table(folder, name, columns={"image": "file"}, key=key)
    return source("merge", read, join=table(folder, captions, key=key))


MISTAKES = {
    "unknown caption column": (
        lambda folder: expanded(folder, "unknown.csv"),
        ["unknown.csv has no column for short_text", "it has image, remark", "Set sources.0.read.columns.short_text"],
    ),
    "wrong column name": (
        lambda folder: expanded(folder, "unknown.csv", columns={"short_text": "note"}),
        ["unknown.csv has no column note, which columns.short_text names; it has image, remark."],
    ),
    "no image column": (
        lambda folder: expanded(folder, "imageless.csv"),
        ["imageless.csv has no column for image", "it has picture, title"],
    ),
    "missing folder of images": (
        lambda folder: expanded(folder, "absent.csv", images=str(folder / "nowhere")),
        ["nowhere is not a folder; name the one that the image paths start at"],
    ),
    "images of another folder": (
        lambda folder: expanded(folder, "absent.csv"),
        ["none of the first 5 images of source 0 is there", "train/Forest_0.png", "train/Forest_2.png"],
    ),
    "where that fits nothing": (
        lambda folder: expanded(folder, "semicolons.csv", where={"file": {"prefix": "forest_"}}),
        ["none of the 5 rows", "fits where (file: prefix 'forest_')", "file='Forest_0.png'; file='Forest_1.png'"],
    ),
    "where on a column that is not there": (
        lambda folder: expanded(folder, "semicolons.csv", where={"set": "train"}),
        ["has no column set, which where names; it has file, title"],
    ),
    "no rows": (lambda folder: expanded(folder, "empty.csv"), ["empty.csv holds no rows"]),
    "absent evaluation set": (
        lambda folder: expanded(folder, "semicolons.csv", columns={"image": "file"}) | {"against": ["data/eval/RSICD"]},
        ["sources.0.against names data/eval/RSICD, which does not exist"],
    ),
    "keys that never match": (
        lambda folder: joined(folder, "other.jsonl"),
        ["no key is on both sides", "semicolons.csv has Forest_0.png, Forest_1.png, Forest_2.png", "has x_Forest_0.png, x_F"],
    ),
    "two images of one key": (
        lambda folder: joined(folder, "long.jsonl", name="paths.csv", basename=True),
        ["./Forest_1.png and Forest_1.png of", "paths.csv have the same key, Forest_1.png,"],
    ),
    "two names of one key": (
        lambda folder: joined(folder, "twice.jsonl", lower=True, stem=True),
        ["Forest_3.png and forest_3.png of", "have the same key, forest_3,"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_asked(name, folder, write_recipe, tmp_path, capsys):
    mistaken, parts = MISTAKES[name]
    assert build(write_recipe([mistaken(folder)]), tmp_path / "set") == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and all(part in error for part in parts), error


def test_numbers_are_checked_with_the_recipe(folder, write_recipe, tmp_path, capsys):
    wrong = expanded(folder, "semicolons.csv", where={"file": {"pattern": "("}})
    assert build(write_recipe([wrong]), tmp_path / "set") == 1
    assert "pattern '(' is no regular expression" in capsys.readouterr().err
    right = expanded(folder, "semicolons.csv")
    for change, message in (
        ("long_tokens=[248, 40]", "long_tokens=[248, 40] must be the fewest and the most"),
        ("captioners.mllm.max_tokens=15", "max_tokens=15 cannot hold the 40 tokens"),
        ("sources.0.read.where={file: {}}", "where needs a value, a list of values, a prefix or a pattern"),
    ):
        assert build(write_recipe([right]), tmp_path / "set", "--set", change) == 1
        assert message in capsys.readouterr().err


def test_where_takes_values_prefixes_and_patterns(folder, write_recipe, tmp_path):
    merged = joined(folder, "long.jsonl")
    for where, expected in (
        ({"file": "Forest_2.png"}, "2"),
        ({"file": ["Forest_0.png", "Forest_4.png"]}, "04"),
        ({"file": {"prefix": ["Forest_1", "Forest_3"]}}, "13"),
        ({"file": {"pattern": "[2-4].png$"}, "title": {"pattern": "number (1|4)"}}, "4"),
    ):
        read = merged["read"] | {"where": where}
        target = tmp_path / expected
        assert build(write_recipe([merged | {"read": read}]), target) == 0
        assert [row["image_key"] for row in rows_of(target)] == [f"Forest_{number}.png" for number in expected]


def test_a_part_of_a_large_file_is_taken_while_it_is_read(tmp_path):
    """Two of the six data sets of one list as VersaD's, of which no more than a piece is ever in memory."""
    names = ("crowdai", "cvact", "fmow-small", "fmow-big-bbox-center", "loveda", "millionAID")
    with (tmp_path / "list_pretrain.json").open("w") as file:
        for number in range(6000):
            said = [{"from": "gpt", "value": f"{number} " + "The ground is bright. " * 40}]
            row = {"image": f"{number}.jpg", "source_dataset": names[number // 1000], "conversations": said}
            file.write(("[" if not number else ",\n") + json.dumps(row))
        file.write("]")
    fmow = table(tmp_path, "list_pretrain.json", columns={"image": "{source_dataset}/{image}"})
    read = ReadConfig(**fmow, where={"source_dataset": {"prefix": "fmow"}})
    next(read_rows(read, tmp_path))  # what is imported with the first row is not the file's
    tracemalloc.start()
    keys = [row["image"] for row in read_rows(read, tmp_path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys == [f"{names[number // 1000]}/{number}.jpg" for number in range(2000, 4000)]
    size = (tmp_path / "list_pretrain.json").stat().st_size
    assert peak < 1e6 < 5e6 < size  # bytes


def test_the_first_rows_are_looked_at_whatever_the_clock_says(folder, write_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "SECONDS", -1.0)
    recipe = write_recipe([expanded(folder, "absent.csv")])
    assert build(recipe, tmp_path / "set") == 1
    assert "none of the first 5 images of source 0 is there" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "ROWS", 2)
    read = expanded(folder, "semicolons.csv", columns={"image": "file"}, where={"file": {"prefix": "Forest_3"}})
    preflight.check_sources(read_recipe([write_recipe([read])]), tmp_path)
    assert capsys.readouterr().err == (
        f"warning: none of the first 2 rows of {folder / 'semicolons.csv'} fits where; the rest was not read\n"
    )


def test_a_large_file_of_labels_is_not_read_to_be_looked_at(folder, write_recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "boxes.json").write_text("no COCO file")
    labels = {"kind": "coco", "path": str(tmp_path / "boxes.json")}
    read = expanded(folder, "semicolons.csv", columns={"image": "file"})
    anchored = source("anchor", read["read"], labels=labels)
    with ChatServer() as server:
        recipe = write_recipe([anchored], server.url)
        assert build(recipe, tmp_path / "set", "--check") == 1
        assert "boxes.json is not a COCO file" in capsys.readouterr().err
        monkeypatch.setattr(preflight, "LARGEST_LABELS", 5)
        assert build(recipe, tmp_path / "set", "--check") == 0
    said = capsys.readouterr().out
    assert f"of the first 5 rows 5 are good; labels were not looked at, {tmp_path / 'boxes.json'} has 0 MiB" in said


def test_names_of_the_hub_and_paths(tmp_path):
    for name in ("owner/name", "owner/name-v1.5", "RSICD"):
        assert not preflight._is_path(name)
    for name in ("data/eval.jsonl", "./name", "a/b/c", "$DATA/name", "~/name", "data/eval.tar"):
        assert preflight._is_path(name)


def test_check_says_what_a_build_would_do_and_writes_nothing(folder, write_recipe, tmp_path, capsys):
    good = expanded(folder, "semicolons.csv", columns={"image": "file"}) | {"not_verified": ["the file's name"]}
    with ChatServer() as server:
        recipe = write_recipe([good], server.url)
        started = time.monotonic()
        assert build(recipe, tmp_path / "set", "--check") == 0
        assert time.monotonic() - started < 10 and not server.requests
    said = capsys.readouterr().out
    for part in (
        "tiles: route expand, long text asked of mllm (tiny/mllm) with expand@1, short text given",
        "of the first 5 rows 5 are good",
        "first: Forest_0.png A airport of number 0",
        "not verified: the file's name",
        f"captioner mllm: {server.url} answers",
        "where no build is yet",
    ):
        assert part in said
    assert not (tmp_path / "set").exists()
    bad = expanded(folder, "absent.csv") | {"name": "other", "against": ["a/b/c"]}
    assert build(write_recipe([bad, good]), tmp_path / "set", "--check") == 1  # and nothing listens
    errors = capsys.readouterr().err.splitlines()
    assert (
        len(errors) == 3
        and "a/b/c" in errors[0]
        and "train/Forest_0.png" in errors[1]
        and "does not answer" in errors[2]
    )
