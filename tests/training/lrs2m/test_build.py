"""A build ends with every row in the data set or in a list, whatever the captioners do and wherever it is interrupted."""

import asyncio
import json
import os
import signal
import sys
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest

from tests import processes
from tests.training.lrs2m.chat_server import ChatServer, Fault, plausible
from tests.training.lrs2m.small_builds import (
    build,
    entries,
    long_caption,
    manifest_of,
    picture,
    rows_of,
    short_caption,
    source,
)
from training.lrs2m import output
from training.lrs2m.build import Build
from training.lrs2m.captioners.captioner import AnswerStore, Gate
from training.lrs2m.pipeline import Pipeline
from training.lrs2m.recipe import ReadConfig, SourceConfig, TextConfig, read_recipe
from training.lrs2m.sources.captions_by_key import Unmatched


GERMAN = "Das Bild zeigt eine graue Straße und viele kleine Häuser mit roten Dächern, daneben liegt ein Feld. " * 2
# Per row (its number stands in the short caption): faults of its requests one after another, the last one for all later.
FAULTS = {
    0: [Fault(status=429, headers={"Retry-After": "0"}), Fault(status=429), Fault()],
    1: [Fault(status=500), Fault(status=503), Fault()],
    2: [Fault(delay=5.0), Fault()],  # slower than the time-out
    3: [Fault(body="this is no JSON"), Fault()],
    4: [Fault(body='{"choices": []}'), Fault()],
    5: [Fault(finish_reason="length")],
    6: [Fault(reset=True), Fault()],
    7: [Fault(half=True), Fault()],
    8: [Fault(status=500)],
    9: [Fault(text="I'm sorry, but I cannot describe this image.")],
    10: [Fault(text="I'm sorry, but I can't help with that."), Fault()],
    11: [Fault(text=GERMAN)],
    12: [Fault(text="A road is seen beside the field. " * 20)],
    13: [Fault(text="A road.")],
    14: [Fault(status=400, body='{"error": {"message": "image is too large"}}')],
    15: [Fault(text=""), Fault(text="  \n"), Fault()],
    16: [Fault(body='{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'), Fault()],
    17: [Fault(body='{"choices": [{"message": {"content": ["a"]}}]}'), Fault()],
    18: [Fault(text=f"**Caption:** \n\n\"{long_caption(18)}\"")],
}  # fmt: skip
LOST = {
    5: "cut_off",
    8: "HTTP 500 (4 tries)",
    9: "refusal",
    11: "language",
    12: "repetition",
    13: "length",
    14: "HTTP 400: image is too large",
}


def faults_by_row():
    """Serves `FAULTS`; counts the requests of a row whatever their seed."""
    asked = Counter()

    def fault(request):
        number = int(request.text.split("of number ")[1].split()[0])
        asked[number] += 1
        planned = FAULTS.get(number, [Fault()])
        return planned[min(asked[number], len(planned)) - 1]

    return fault


def test_every_row_ends_captioned_or_listed(tiles, write_recipe, tmp_path):
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})]
    with ChatServer(faults=faults_by_row()) as server:
        recipe = write_recipe(sources, server.url, max_failed_fraction=0.5)
        overrides = ["captioners.mllm.timeout=3", "captioners.mllm.tries=4"]
        assert build(recipe, tmp_path / "set", "--set", *overrides) == 0
        requests = server.requests
    rows, failed = rows_of(tmp_path / "set"), entries(tmp_path / "set", "failed")
    ids = [row["id"] for row in rows] + [row["id"] for row in failed]
    assert sorted(ids) == [f"tiles-{index:08d}" for index in range(24)]  # none twice, none lost
    assert {int(row["id"][-2:]): row["reason"] for row in failed} == LOST
    counts = manifest_of(tmp_path / "set")["counts"]["tiles"]
    assert counts["train"] + counts["validation"] == 17 and counts["failed"] == 7
    assert counts["asked again: refusal"] == 1 and counts["asked again: length"] == 3
    refused = next(row for row in failed if row["reason"] == "refusal")
    assert len({attempt["seed"] for attempt in refused["attempts"]}) == 3  # each attempt with another seed
    assert len([request for request, sent in requests if request.seed is not None]) == len(requests)
    assert next(row for row in rows if row["id"].endswith("18"))["long_text"] == long_caption(18)
    for row in rows:
        assert (row["long_captioner"], row["long_prompt"], row["short_captioner"]) == (
            "tiny/mllm",
            "expand@1",
            "given",
        )
        assert 40 <= row["long_tokens"] <= 248 and row["licence"] == "CC0-1.0" and len(row["image_sha256"]) == 64
        assert set(json.loads(row["sampling"])["long"]) == {"temperature", "top_p", "max_tokens", "seed"}
    assert server.most_at_once <= 4  # the cap


def test_images_come_back_through_datasets(tiles, write_recipe, tmp_path):
    recipe = write_recipe(
        [
            source(
                "expand", {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 6}, long={"template": "x"}
            )
        ]
    )
    assert build(recipe, tmp_path / "set") == 1  # a template where the route asks for a captioner
    with ChatServer() as server:
        recipe = write_recipe([source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})], server.url)
        assert build(recipe, tmp_path / "set") == 0
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "set" / "data"), cache_dir=str(tmp_path / "cache")
    )
    assert set(loaded) == {"train", "validation"} and loaded["train"].num_rows + loaded["validation"].num_rows == 24
    for split in loaded.values():
        for row in split:
            assert row["image"].tobytes() == picture(int(row["id"][-2:])).tobytes()


@pytest.fixture(scope="module")
def whole(tiles, tmp_path_factory, _tokenizer_folder):
    """A data set of two routes that was built without interruption, and its recipe but for the server's address."""
    table = {"kind": "table", "path": str(tiles / "captions.jsonl")}
    sources = [
        source("expand", table | {"limit": 14}),
        source("anchor", table | {"limit": 9}, name="anchored", labels={"kind": "class_name"}),
    ]
    folder = tmp_path_factory.mktemp("whole")
    return sources, folder


def recipe_of_whole(write_recipe, sources, url):
    return write_recipe(sources, url, shard_rows=3, validation_fraction=0.3, max_failed_fraction=0.5, format="parquet")


def one_bad_row(request):
    return Fault(text="I cannot see the image.") if "number 5 " in request.text else None


@pytest.fixture
def expected(whole, write_recipe):
    """Hashes of the files of the uninterrupted build."""
    sources, folder = whole
    if not (folder / "manifest.json").exists():
        with ChatServer(faults=one_bad_row) as server:
            assert build(recipe_of_whole(write_recipe, sources, server.url), folder) == 0
    files = [file for split in manifest_of(folder)["splits"].values() for file in split["files"]]
    assert len(files) > 6 and max(file["rows"] for file in files) <= 3  # several checkpoints within a source
    return content_of(folder)


def content_of(folder):
    manifest = manifest_of(folder)
    return {key: manifest[key] for key in ("splits", "lists", "counts", "totals", "recipe_hash")}


@pytest.mark.parametrize("where", ["answer", "checkpoint", "placing", "manifest"])
def test_a_stopped_build_goes_on_to_the_same_files(whole, expected, write_recipe, tmp_path, monkeypatch, where):
    folder, calls, stops = tmp_path / "set", Counter(), 0

    def stop_at(module, name, at):
        """The function, stopping the process at its `at`-th call as far as a test can."""
        real = getattr(module, name)

        def stopping(*arguments):
            calls[where] += 1
            if calls[where] == at:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(module, name, stopping)

    with ChatServer(faults=one_bad_row) as server:
        recipe = recipe_of_whole(write_recipe, whole[0], server.url)
        for at in range(2, 40, 6):
            calls.clear()
            if where == "answer":
                stop_at(AnswerStore, "store", at)
            elif where == "checkpoint":
                stop_at(output, "sync", at)
            elif where == "placing":
                stop_at(output.os, "replace", at)
            else:
                stop_at(output, "replace_json", at)
            stops += build(recipe, folder) == 130
            monkeypatch.undo()
            if calls[where] < at:
                break
        assert stops
        assert build(recipe, folder) == 0
        answered = Counter((json.dumps(request.body), sent) for request, sent in server.requests)
    assert content_of(folder) == expected
    repeated = sum(count - 1 for count in answered.values())
    assert repeated <= 4 * 7  # no more than what was under way at each stop
    if where != "answer":
        assert repeated <= 4


def test_a_killed_process_loses_only_what_was_under_way(whole, expected, write_recipe, tmp_path):
    folder = tmp_path / "set"
    with ChatServer(faults=one_bad_row, delay=0.05) as server:
        recipe = recipe_of_whole(write_recipe, whole[0], server.url)
        command = [sys.executable, "-m", "training.lrs2m.build", "--config", str(recipe), "--output", str(folder)]
        process = processes.start(command, project=True)
        deadline = time.monotonic() + 120
        while len(server.requests) < 13 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "manifest.json").exists()
        server.delay = 0.0
        assert build(recipe, folder) == 0
        asked = Counter(json.dumps(request.body) for request, _ in server.requests)
    assert content_of(folder) == expected
    assert sum(count - 1 for count in asked.values()) <= 4


def test_order_of_answers_does_not_matter(whole, expected, write_recipe, tmp_path):
    def late(request):
        return one_bad_row(request) or Fault(delay=(zlib.crc32(request.text.encode()) % 7) / 100)

    with ChatServer(faults=late) as server:
        recipe = recipe_of_whole(write_recipe, whole[0], server.url)
        assert build(recipe, tmp_path / "set", "--set", "captioners.mllm.concurrency=9", "lookahead=5") == 0
    assert content_of(tmp_path / "set") == expected


def test_restart_asks_only_for_what_has_no_answer(tiles, write_recipe, tmp_path):
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})]
    broken = {"yes": True}

    def fault(request):
        return Fault(status=400) if broken["yes"] and "number 7 " in request.text else None

    with ChatServer(faults=fault) as server:
        recipe = write_recipe(sources, server.url)
        assert build(recipe, tmp_path / "set") == 0
        assert len(entries(tmp_path / "set", "failed")) == 1
        broken["yes"] = False
        assert build(recipe, tmp_path / "set") == 0  # complete: nothing is asked
        assert len(server.requests) == 24
        assert build(recipe, tmp_path / "set", "--restart") == 0
        assert len(server.requests) == 25 and len(rows_of(tmp_path / "set")) == 24
        assert build(recipe, tmp_path / "set", "--set", "seed=1") == 1  # another recipe


def test_a_captioner_that_is_gone_stops_the_build(tiles, write_recipe, tmp_path, capsys):
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})]
    recipe = write_recipe(sources, max_failures_in_a_row=5)
    started = time.monotonic()
    assert build(recipe, tmp_path / "set") == 1  # nothing listens there: that is not tried as often as a request
    assert "127.0.0.1:9/v1 does not answer (ConnectError)" in capsys.readouterr().err
    assert time.monotonic() - started < 20
    with ChatServer(faults=lambda request: Fault(reset=True)) as server:  # it was there, and goes
        changes = ["captioners.mllm.tries=1", f"captioners.mllm.base_url={server.url}"]
        assert build(recipe, tmp_path / "set", "--set", *changes) == 1
    assert "left 5 rows in a row without an answer" in capsys.readouterr().err
    with ChatServer(faults=lambda request: Fault(status=401, body='{"error": "no such key"}')) as server:
        assert build(recipe, tmp_path / "set", "--set", f"captioners.mllm.base_url={server.url}") == 1
        assert "HTTP 401 (no such key)" in capsys.readouterr().err
    with ChatServer() as server:  # the same folder goes on where it was left
        assert build(recipe, tmp_path / "set", "--set", f"captioners.mllm.base_url={server.url}") == 0
    assert len(rows_of(tmp_path / "set")) == 24 and not entries(tmp_path / "set", "failed")


def test_rows_at_a_time_grow_with_the_servers(tiles, write_recipe):
    expand = source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})
    for urls in (["http://a/v1"], ["http://a/v1", "http://b/v1", "http://c/v1"]):
        recipe = read_recipe([write_recipe([expand], urls)])
        rows = Build._lookahead(SimpleNamespace(recipe=recipe), recipe.sources[0])
        assert rows == 8 * 4 * len(urls)  # 4: the recipe's concurrency


def test_equal_requests_under_way_together_are_asked_once(tmp_path, write_recipe):
    """Rows with one image and one caption, of which the second asks nothing while the first waits for its answer."""
    picture(0).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "short_text": short_caption(index % 3)} for index in range(12)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expand = source("expand", {"kind": "table", "path": str(tmp_path / "captions.jsonl")})
    with ChatServer(delay=0.05) as server:
        assert build(write_recipe([expand], server.url, lookahead=12), tmp_path / "set") == 0
        assert len(server.requests) == len({json.dumps(request.body) for request, _ in server.requests}) == 3
    assert len({row["long_text"] for row in rows_of(tmp_path / "set")}) == 3 and len(rows_of(tmp_path / "set")) == 12
    with ChatServer(faults=lambda request: Fault(status=400), delay=0.05) as server:  # a failure is shared as well
        recipe = write_recipe([expand], server.url, lookahead=12, max_failed_fraction=1)
        assert build(recipe, tmp_path / "failed") == 0
        assert len(server.requests) == 3 and len(entries(tmp_path / "failed", "failed")) == 12


def test_failed_rows_are_asked_again(tiles, write_recipe, tmp_path, monkeypatch, capsys):
    """New seeds for a text that was refused, one request for one that had no answer, none for the others."""
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 8})]
    faulty = {"number 2 ": Fault(text="I cannot see the image."), "number 5 ": Fault(status=400)}

    def fault(request):
        return next((fault for mark, fault in faulty.items() if mark in request.text), None)

    folder = tmp_path / "set"
    with ChatServer(faults=fault) as server:
        recipe = write_recipe(sources, server.url, max_failed_fraction=0.5)
        assert build(recipe, folder) == 0
        before = {row["id"]: row for row in rows_of(folder)}
        assert len(before) == 6 and len(server.requests) == 6 + 3 + 1
        assert build(recipe, folder, "--retry-failed", "--set", "seed=1") == 1  # of another recipe: nothing is lost
        assert "another recipe" in capsys.readouterr().err and len(rows_of(folder)) == 6
        assert build(recipe, folder, "--retry-failed") == 0
        assert len(entries(folder, "failed")) == 2 and len(server.requests) == 10 + 3 + 1
        assert len({attempt["seed"] for attempt in entries(folder, "failed")[0]["attempts"]}) == 6
        faulty.clear()
        monkeypatch.setattr(Build, "run", interrupted)  # the order is kept, whenever the process ends
        assert build(recipe, folder, "--retry-failed") == 130
        monkeypatch.undo()
        assert build(recipe, folder) == 0
    assert len(server.requests) == 14 + 2 and not entries(folder, "failed")
    rows = {row["id"]: row for row in rows_of(folder)}
    assert len(rows) == 8 and before.items() <= rows.items()
    assert build(recipe, folder, "--retry-failed") == 1  # the server has ended, the finished set stays
    assert f"captioner mllm: {server.url} does not answer" in capsys.readouterr().err
    (tiles / "captions.jsonl").rename(tiles / "moved.jsonl")
    assert build(recipe, folder, "--retry-failed") == 1
    (tiles / "moved.jsonl").rename(tiles / "captions.jsonl")
    assert build(recipe, folder) == 0 and {row["id"]: row for row in rows_of(folder)} == rows


async def interrupted(self):
    raise KeyboardInterrupt


def test_another_way_of_asking_has_answers_of_its_own(tiles, write_recipe, tmp_path):
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 2})]
    with ChatServer() as server:
        recipe = write_recipe(sources, server.url)
        assert build(recipe, tmp_path / "set") == 0
        for asked, change in ((4, "captioners.mllm.extra={top_k: 5}"), (6, "captioners.mllm.max_image_side=32")):
            assert build(recipe, tmp_path / "set", "--restart", "--set", change) == 0
            assert len(server.requests) == asked


def test_a_captioner_that_writes_nothing_of_use_stops_the_build_early(
    tiles, write_recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(output, "EARLY_ROWS", 6)
    sources = [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})]
    with ChatServer(answer=lambda request: "A road.", delay=0.02) as server:
        recipe = write_recipe(sources, server.url, lookahead=4)
        assert build(recipe, tmp_path / "set") == 1
        assert 18 <= len(server.requests) <= 3 * 11
    messages = capsys.readouterr().err.strip().splitlines()
    assert messages[0].startswith("error: 6 of 6 rows of tiles failed")
    assert len(messages) == 1  # nothing else went wrong


def test_an_interruption_waits_for_the_images_that_are_read():
    def records():
        for position in range(3):
            time.sleep(0.1)
            yield Unmatched("images", "a", position)

    async def run():
        config = SourceConfig(
            "tiles", "expand", "CC0-1.0", ReadConfig("images", "."), long=TextConfig("m", "expand@1")
        )
        pipeline = Pipeline(SimpleNamespace(source=config), None, None, 8, 4, Gate())
        reading = asyncio.create_task(anext(pipeline.outcomes(records())))
        await asyncio.sleep(0.05)
        reading.cancel()
        await reading

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_bad_rows_are_skipped_listed_and_capped(tmp_path, write_recipe, capsys):
    folder = tmp_path / "tiles"
    folder.mkdir()
    for index in range(10):
        picture(index).save(folder / f"{index}.png")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:200])  # truncated
    (folder / "1.png").write_bytes(b"no image")
    picture(2, (12, 40)).save(folder / "2.png")  # tiny
    (folder / "3.png").unlink()
    texts = [short_caption(index) for index in range(10)]
    texts[4], texts[5] = "  ", "Ein Caf\xe9 beside a road."
    rows = [
        json.dumps({"image": f"{i}.png", "long_text": long_caption(i), "short_text": text}, ensure_ascii=False)
        for i, text in enumerate(texts)
    ]
    (folder / "captions.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
    table = {"kind": "table", "path": str(folder / "captions.jsonl")}
    with ChatServer() as server:
        recipe = write_recipe([source("expand", table)], server.url)
        assert build(recipe, tmp_path / "set") == 1
        error = capsys.readouterr().err
        assert "6 of 10 rows of tiles skipped (" in error and "image unreadable 2" in error
        assert build(recipe, tmp_path / "set", "--set", "max_skipped_fraction=0.6") == 0
        assert len(server.requests) == 4  # nothing was asked for the skipped rows
    skipped = {entry["image_key"]: entry["reason"] for entry in entries(tmp_path / "set", "skipped")}
    assert skipped == {
        "0.png": "image unreadable",
        "1.png": "image unreadable",
        "2.png": "image too small",
        "3.png": "image missing",
        "4.png": "empty short caption",
        "5.png": "garbled short caption",
    }
    assert len(rows_of(tmp_path / "set")) == 4


def test_a_build_without_a_row_is_none(tiles, write_recipe, tmp_path, capsys):
    read = {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 3}
    duplicates = {"inside": False, "against": [str(tiles)]}
    recipe = write_recipe([source("merge", read, join=read)], duplicates=duplicates)
    assert build(recipe, tmp_path / "set") == 1 and not (tmp_path / "set" / "manifest.json").exists()
    assert "no row is left for the data set (3 duplicates)" in capsys.readouterr().err


def test_duplicates_are_left_out_before_anything_is_asked(tiles, write_recipe, tmp_path):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    big = picture(3, (256, 224))
    big.save(evaluation / "bench.png")
    folder = tmp_path / "own"
    folder.mkdir()
    for name, image in (
        ("a", big),
        ("b", picture(50, (256, 224))),
        ("c", picture(50, (256, 224)).resize((200, 180))),
        ("d", picture(60, (256, 224))),
    ):
        image.save(folder / f"{name}.jpg", quality=60)
    rows = [
        {"image": f"{name}.jpg", "short_text": f"A {name} of number {i} in a field."} for i, name in enumerate("abcd")
    ]
    rows.append({"image": "d.jpg", "short_text": "A second house of number 9 for one image."})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    duplicates = {"inside": True, "against": [str(evaluation)]}
    with ChatServer() as server:
        table = {"kind": "table", "path": str(folder / "captions.jsonl")}
        recipe = write_recipe([source("expand", table)], server.url, duplicates=duplicates)
        assert build(recipe, tmp_path / "set") == 0
        assert len(server.requests) == 3
    listed = {entry["image_key"]: entry for entry in entries(tmp_path / "set", "duplicates")}
    assert set(listed) == {"a.jpg", "c.jpg"} and listed["a.jpg"]["against"] == "evaluation"
    assert [row["image_key"] for row in rows_of(tmp_path / "set")] == ["b.jpg", "d.jpg", "d.jpg"]
    assert str(tmp_path) not in (tmp_path / "set" / "manifest.json").read_text()  # no path of this machine


def test_a_source_without_licence_stops_the_build(tiles, write_recipe, tmp_path, capsys):
    nameless = source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})
    del nameless["licence"]
    assert build(write_recipe([nameless]), tmp_path / "set") == 1
    assert "sources.0.licence is not set; every source must name its licence" in capsys.readouterr().err
    assert build(write_recipe([nameless | {"licence": " "}]), tmp_path / "set") == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("images", ["embed", "omit"])
def test_formats_hold_the_same_rows(tiles, write_recipe, tmp_path, form, images):
    with ChatServer(answer=plausible) as server:
        recipe = write_recipe(
            [source("compress", {"kind": "table", "path": str(tiles / "captions.jsonl")})],
            server.url,
            format=form,
            images=images,
        )
        assert build(recipe, tmp_path / "set") == 0
        assert {request.image for request, _ in server.requests} == {None}  # the long caption says enough
    rows = rows_of(tmp_path / "set")
    assert len(rows) == 24 and all(row["short_words"] <= 20 for row in rows)
    assert [row["long_text"] for row in rows] == [long_caption(index) for index in range(24)]
    contents = [row["image"] and row["image"]["bytes"] for row in rows]
    assert contents == [(tiles / f"{i:02d}.png").read_bytes() if images == "embed" else None for i in range(24)]
    if form == "webdataset" and images == "embed":
        loaded = datasets.load_dataset(
            "webdataset", data_dir=str(tmp_path / "set" / "data"), cache_dir=str(tmp_path / "cache")
        )
        first = loaded["train"][0]
        assert first["json"]["long_text"].startswith("The image shows") and "png" in loaded["train"].features
        assert first["txt"] == first["json"]["short_text"]  # what readers of image-text pairs take
