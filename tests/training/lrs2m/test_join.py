"""Parts that were built apart make the data set of one undivided build, to the byte."""

import json
import os
import signal
import sqlite3
from collections import Counter
from contextlib import closing

import pytest
import yaml
from PIL import ImageOps

from tests import processes
from tests.training.lrs2m.chat_server import ChatServer, Fault
from tests.training.lrs2m.small_builds import (
    THINGS,
    build,
    entries,
    long_caption,
    manifest_of,
    picture,
    rows_of,
    short_caption,
    source,
)
from training.lrs2m import build as build_module
from training.lrs2m import join as join_module
from training.lrs2m import output
from training.lrs2m.data_row import Record
from training.lrs2m.join import main as join
from training.lrs2m.output import Progress, save_progress
from training.lrs2m.part import Part


IMAGES, ROWS = 26, 32
COPIES = {7: 2, 11: 5, 20: 12, 23: 7, 24: 20}  # images that are turned or mirrored copies of earlier ones
LEAKED = (3, 4)  # images of which there is an evaluation image


def files_of(folder):
    """What a user sees of a data set, by name: bytes."""
    names = ["manifest.json", *(f"{name}.jsonl" for name in output.LISTS)]
    paths = [*(folder / name for name in names), *sorted((folder / "data").iterdir())]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def shown_images(folder):
    """Names of the images that the search of a set has counted, in order: blocks of them are searched by themselves."""
    with closing(sqlite3.connect(folder / "work" / "duplicates.sqlite")) as store:
        return store.execute("SELECT id FROM images WHERE owner = '' ORDER BY number").fetchall()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Images with near-copies among them, some with several captions, one unreadable; two evaluation images."""
    folder = tmp_path_factory.mktemp("archive")
    for name in ("tiles", "evaluated"):
        (folder / name).mkdir()
    for index in range(IMAGES):
        image = picture(COPIES.get(COPIES.get(index, index), COPIES.get(index, index)))
        image = ImageOps.mirror(image) if index in (7, 20) else image.rotate(180) if index in COPIES else image
        image.save(folder / "tiles" / f"{index:02d}.png")
    for index in LEAKED:
        picture(index).save(folder / "evaluated" / f"{index}.jpg", quality=60)
    (folder / "tiles" / "09.png").write_bytes(b"no image")
    rows = [
        {"image": f"{number % IMAGES:02d}.png", "long_text": long_caption(number), "short_text": short_caption(number)}
        | {"class_name": THINGS[number % len(THINGS)]}
        for number in range(ROWS)
    ]
    (folder / "tiles" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for index in (50, 51, 52):
        picture(index).save(folder / "tiles" / f"{index}.png")
    join_rows = [{"image": f"{number:02d}.png", "long_text": long_caption(number)} for number in (51, 50, 1, 40, 6)]
    (folder / "tiles" / "long.jsonl").write_text("\n".join(map(json.dumps, join_rows)))
    images = [{"image": f"{number:02d}.png", "short_text": short_caption(number)} for number in (1, 50, 52, 6, 51)]
    (folder / "tiles" / "images.jsonl").write_text("\n".join(map(json.dumps, images)))
    return folder


FIRST_SEEDS = {}


def faults(request):
    """One row is never answered well, another not at its first seed, whichever build asks."""
    if "number 5 " in request.text:
        return Fault(text="I cannot see the image.")
    first = FIRST_SEEDS.setdefault(request.text, request.seed) == request.seed
    return Fault(text="") if "number 8 " in request.text and first else None


@pytest.fixture(scope="module")
def undivided(archive, tmp_path_factory, _tokenizer_folder):
    """Recipes that a loopback server answers, and what undivided builds of them wrote, by format."""
    made = {}
    with ChatServer(faults=faults) as server:
        table = {"kind": "table", "path": str(archive / "tiles" / "captions.jsonl")}
        images, joined = (table | {"path": str(archive / "tiles" / f"{name}.jsonl")} for name in ("images", "long"))
        labels = {
            "kind": "class_name",
            "classes": ["road", "building"],
        }  # a third of the classes in a caption is labelled
        engine = {"kind": "openai", "model": "tiny/mllm", "base_url": server.url, "concurrency": 4}
        values = {
            "name": "test",
            "tokenizer": str(_tokenizer_folder),
            "captioners": {"mllm": engine},
            "sources": [source("expand", table, labels=labels), source("merge", images, name="merged", join=joined)],
            "duplicates": {"inside": True, "against": [str(archive / "evaluated")]},
            "checks": {
                "repeated_answer": "warn",
                "excluded_class": "warn",
            },  # the answers of the server are one text with other words in it
            "validation_fraction": 0.2,
            "shard_rows": 4,
            "max_skipped_fraction": 0.5,
            "max_failed_fraction": 0.5,
        }

        def built(form="parquet"):
            folder = archive / form
            if form not in made:
                folder.mkdir()
                (folder / "recipe.yaml").write_text(yaml.safe_dump(values | {"format": form}))
                assert build(folder / "recipe.yaml", folder / "set") == 0
                made[form] = files_of(folder / "set")
            return folder / "recipe.yaml", made[form]

        yield built


@pytest.mark.parametrize("count, form", [(3, "webdataset"), (4, "parquet")])
def test_joined_parts_are_the_undivided_build(undivided, tmp_path, count, form):
    recipe, expected = undivided(form)
    for part in range(count, 0, -1):  # in any order, here or there
        assert build(recipe, tmp_path / ("here" if part % 2 else "there"), "--part", f"{part}/{count}") == 0
    folders = [str(folder) for folder in (tmp_path / "there", tmp_path / "here") if folder.exists()]
    assert join([*folders, "--output", str(tmp_path / "joined")]) == 0
    joined = files_of(tmp_path / "joined")
    assert joined.keys() == expected.keys()
    assert {name for name in expected if joined[name] != expected[name]} == set()
    listed = Counter(entry["against"] for entry in entries(tmp_path / "joined", "duplicates"))
    assert listed["evaluated"] >= 2 and listed[""] >= 4  # both kinds are there
    assert shown_images(tmp_path / "joined") == shown_images(recipe.parent / "set")
    assert any(row["label_precision"] not in (None, 0, 1) for row in rows_of(tmp_path / "joined"))
    counts = manifest_of(tmp_path / "joined")["totals"]
    assert all(counts[name] for name in ("failed", "skipped", "unmatched images", "unmatched captions"))
    assert (tmp_path / "joined" / "statistics.json").exists()


def test_a_part_hangs_on_the_key_alone():
    records = [Record("tiles", number, None, f"{number % 50}.png") for number in range(200)]
    records += [Record("tiles", number, None, "") for number in range(200, 300)]
    parts = [[record.id for record in Part(number, 7).choose(records)] for number in range(1, 8)]
    assert sorted(sum(parts, [])) == [record.id for record in records]  # each once
    assert all(2 * 300 / 7 > len(part) > 300 / 7 / 2 for part in parts)
    again = [record.id for record in Part(3, 7).choose(records[5:])]
    assert again == [name for name in parts[2] if name >= records[5].id]
    whole = {record.id: record.image_key for record in records[:200]}
    owners = [{whole[name] for name in part if name in whole} for part in parts]
    assert sum(map(len, owners)) == 50  # all rows of an image in one part


def test_an_interrupted_join_goes_on(undivided, tmp_path, monkeypatch):
    recipe, expected = undivided()
    for part in (1, 2):
        assert build(recipe, tmp_path / "parts", "--part", f"{part}/2") == 0
    command = [str(tmp_path / "parts"), "--output", str(tmp_path / "joined")]
    stops = 0
    for name, at in (("checkpoint", 2), ("checkpoint", 3), ("finish", 1)):
        calls, real = Counter(), getattr(join_module.Output, name)

        def stopping(*arguments, real=real, calls=calls, at=at):
            calls["of it"] += 1
            if calls["of it"] == at:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(join_module.Output, name, stopping)
        stops += join(command) == 130
        monkeypatch.undo()
        assert name == "finish" or build(recipe, tmp_path / "joined") == 1  # its place is none of an undivided build's
    assert stops == 3 and join(command) == 0 and join(command) == 0
    assert join([str(tmp_path / "parts"), str(tmp_path / "joined"), "--output", str(tmp_path / "joined")]) == 0
    assert files_of(tmp_path / "joined") == expected
    with ChatServer() as server:  # the answers came along
        assert build(recipe, tmp_path / "joined", "--restart", "--set", f"captioners.mllm.base_url={server.url}") == 0
        assert len(server.requests) <= 3  # those that were refused


def kill_at_checkpoint(main, command, number):
    """Run a command in this process, which dies right after a checkpoint."""
    real, calls = output.Output.checkpoint, Counter()

    def checkpoint(*arguments):
        real(*arguments)
        calls["of it"] += 1
        if calls["of it"] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    output.Output.checkpoint = checkpoint
    main(command)


def test_images_before_a_checkpoint_are_known_after_a_kill(undivided, tmp_path):
    recipe, expected = undivided()
    building = ["--config", str(recipe), "--output", str(tmp_path / "parts"), "--part", "1/1"]
    joining = [str(tmp_path / "parts"), "--output", str(tmp_path / "joined")]
    for main, command in ((build_module.main, building), (join, joining)):
        killed = processes.call(kill_at_checkpoint, main, command, 3)
        assert killed.wait() == -signal.SIGKILL
        assert main(command) == 0
    assert files_of(tmp_path / "joined") == expected


def test_parts_that_do_not_belong_together(undivided, tmp_path, capsys):
    recipe, _ = undivided()
    parts, command = tmp_path / "parts", [str(tmp_path / "parts"), "--output", str(tmp_path / "joined")]
    assert build(recipe, parts, "--part", "4/3") == 1
    assert "the first number goes from 1" in capsys.readouterr().err
    assert join(command) == 1
    assert "no finished part" in capsys.readouterr().err
    assert build(recipe, parts, "--part", "2/3") == 0 and join(command) == 1
    assert "of 3 parts 1, 3 are missing" in capsys.readouterr().err
    os.rename(parts / "2-of-3" / "manifest.json", parts / "2-of-3" / "manifest")
    assert join(command) == 1
    assert "2-of-3 is no finished part" in capsys.readouterr().err
    os.rename(parts / "2-of-3" / "manifest", parts / "2-of-3" / "manifest.json")
    assert build(recipe, parts, "--part", "1/3", "--set", "seed=3") == 0 and join(command) == 1
    assert "are not parts of one build" in capsys.readouterr().err
    assert build(recipe, parts, "--parts", "3") == 1
    assert "--ray-address and --parts need --on ray" in capsys.readouterr().err


def test_a_join_goes_on_with_its_own_work_alone(undivided, tmp_path, capsys):
    recipe, _ = undivided()
    assert build(recipe, tmp_path, "--part", "1/1") == 0
    part, command = tmp_path / "1-of-1", [str(tmp_path), "--output", str(tmp_path)]  # below the output, beside it
    (tmp_path / "data").mkdir()
    assert join(command) == 1 and "holds data of something else; take another --output" in capsys.readouterr().err
    assert (tmp_path / "data").exists() and not (tmp_path / "work").exists()
    (tmp_path / "data").rmdir()
    progress = Progress(manifest_of(part)["recipe_hash"], index=3)
    (tmp_path / "work").mkdir()
    save_progress(tmp_path, progress)  # of an undivided build
    assert join(command) == 1 and "holds an unfinished build" in capsys.readouterr().err
    (tmp_path / "work" / "progress.json").unlink()
    assert join(command) == 0 and join(command) == 0
    (part / "manifest.json").write_text(json.dumps(manifest_of(part) | {"versions": "later"}))  # it was built again
    assert join(command) == 1 and "is not of these parts as they are now" in capsys.readouterr().err


def test_a_join_holds_the_caps_of_the_whole(undivided, tmp_path, capsys):
    recipe, _ = undivided()
    again = "checks.repeated_answer=on"  # which is known when all parts are there
    assert build(recipe, tmp_path, "--part", "1/1", "--set", again) == 0
    command = [str(tmp_path), "--output", str(tmp_path / "joined")]
    assert join(command) == 1 and "repeated_answer" in capsys.readouterr().err
    assert not (tmp_path / "joined" / "manifest.json").exists()
    assert build(recipe, tmp_path, "--part", "1/1", "--set", again, "max_failed_fraction=1") == 0
    assert join(command) == 0 and {row["source"] for row in rows_of(tmp_path / "joined")} == {"merged"}


def test_tasks_of_ray_build_the_same(undivided, tmp_path):
    ray = pytest.importorskip("ray")
    recipe, expected = undivided()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        for _ in range(2):  # at once, where it is complete
            assert build(recipe, tmp_path / "set", "--on", "ray", "--parts", "2") == 0
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "set") == expected
    assert not (tmp_path / "set" / "parts").exists()
