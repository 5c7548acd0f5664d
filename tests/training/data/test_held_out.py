"""`data.validation: 0.25`: images are held out with all their captions, the same ones however the rows are read."""

import hashlib
import json
import tarfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation.benchmarks.retrieval_data import load_retrieval
from training import train
from training.data.fingerprints import fingerprints
from training.data.held_out import hold_out, image_keys, write_held_out
from training.data.pairs import Pairs, load_pairs
from training.data.rows import Row
from training.data.sources import DataConfig


SHARE = 0.25  # of 12 images


@pytest.fixture(scope="module")
def forms(tmp_path_factory, captioned_folder):
    """The same 12 images with two rows each, and an image under a second name, in every form."""
    folder = tmp_path_factory.mktemp("forms")
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        (folder / row["image"]).write_bytes((captioned_folder / row["image"]).read_bytes())
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    rows += [row | {"long_text": f"Again. {row['long_text']}"} for row in rows]
    rows.append(rows[3] | {"image": "copy.png", "short_text": "The same roof."})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stored = [row | {"image": {"path": None, "bytes": (folder / row["image"]).read_bytes()}} for row in rows]
    datasets.Dataset.from_list(stored).to_parquet(folder / "rows.parquet", batch_size=5)
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(rows):
            (folder / "row.json").write_text(json.dumps({key: row[key] for key in ("long_text", "short_text")}))
            tar.add(folder / row["image"], f"{number:03d}.png")
            tar.add(folder / "row.json", f"{number:03d}.json")
    return folder, rows


def split(path, streaming, share=SHARE):
    pairs = load_pairs(DataConfig(train=str(path), streaming=streaming, max_skipped_fraction=1), ["long", "short"])
    return hold_out(pairs, share, image_keys(pairs))


def below(folder, names, share=SHARE):
    """The images whose hashes lie in the first `share` of all hashes; at least the smallest one."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    limit = max(share, int(min(digests.values())[:16], 16) / 2**64)
    return {name for name, digest in digests.items() if int(digest[:16], 16) <= limit * 2**64}


def captions(pairs):
    read = [(row.long, row.short) for row in pairs.read(list(range(len(pairs))))]
    assert [long for long, _ in read] == list(pairs.texts("long"))
    return read


def test_by_image_and_alike_in_every_form(forms):
    folder, rows = forms
    images = {(row["long_text"], row["short_text"]): row["image"].replace("copy", "3") for row in rows}
    held_captions = {}
    for name in ("rows.jsonl", "rows.parquet", "rows.tar"):
        for streaming in (False, True):
            kept, held = split(folder / name, streaming)
            assert len(kept) + len(held) == len(rows) == 25
            held_captions[name, streaming] = sorted(captions(held))
            sides = [{images[texts] for texts in captions(side)} for side in (kept, held)]
            assert not sides[0] & sides[1] and sides[1] == below(folder, set(images.values()))
            visits = {number for step in range(3) for _, number in kept.order(0).batch(step, 6)}
            assert max(visits) < len(kept)
    assert len({json.dumps(texts) for texts in held_captions.values()}) == 1
    again = split(folder / "rows.jsonl", True)[0]
    whole = load_pairs(DataConfig(train=str(folder / "rows.jsonl"), streaming=True), ["long", "short"])
    prints = [fingerprints(pairs, ["x"]) for pairs in (again, split(folder / "rows.jsonl", True)[0], whole)]
    assert prints[0] == prints[1] != prints[2]


def test_a_run_validates_on_what_it_never_visits(forms, run_arguments, tmp_path, capsys):
    folder, rows = forms
    stored, captions_file = [row | {"image": str(folder / row["image"])} for row in rows], tmp_path / "rows.jsonl"
    captions_file.write_text("\n".join(map(json.dumps, stored)))
    arguments = [*run_arguments, "--data.train", str(captions_file), "--data.validation", str(SHARE)]
    train.main([*arguments, "--loop.log_ids", "true", "--loop.steps", "8"])
    assert "not held out" not in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    seen = {identifier for line in log if line["kind"] == "batch" for identifier in line["ids"]}
    visited = {rows[int(identifier.split(":")[1])]["image"].replace("copy", "3") for identifier in seen}
    data = load_retrieval(tmp_path / "run" / "held_out.parquet", "long_text")
    held = {name.rpartition("/")[2].replace("copy", "3") for name in data.images.names}
    assert held == below(folder, held | visited) and len(visited | held) == 12 and not visited & held
    assert record["validation"]["share"] == SHARE and record["validation"]["pairs"] == len(data.texts)
    assert not {digest[:16] for digest in data.images.digests} & set(record["data"]["images_sha256"])
    train.main([*arguments, "--loop.log_ids", "true", "--loop.steps", "9", "--resume"])  # the same split, or refused
    table = (tmp_path / "run" / "held_out.parquet").read_bytes()
    with captions_file.open("a") as file:
        file.writelines("\n" + json.dumps(row) for row in stored)
    with pytest.raises(SystemExit, match="allow-changed-data"):
        train.main([*arguments, "--loop.log_ids", "true", "--loop.steps", "9", "--resume"])
    assert (tmp_path / "run" / "held_out.parquet").read_bytes() == table, "of the run that was not gone on with"


@pytest.mark.parametrize(
    "share, said", [("1.5", "a share of the training images lies between 0 and 1"), ("0", "lies")]
)
def test_shares_that_are_none(share, said, run_arguments):
    with pytest.raises(SystemExit, match=said):
        train.main([*run_arguments, "--data.validation", share])


def test_one_image_cannot_be_divided(forms, tmp_path):
    folder, rows = forms
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0] | {"image": str(folder / "0.png")}))
    with pytest.raises(ValueError, match="holds out a share of the images, and the data have only 1 different;"):
        split(tmp_path / "one.jsonl", True)


def test_grown_data_hold_out_what_they_did(forms, tmp_path):
    folder, rows = forms
    images = [row["image"] for row in rows[:12]]
    keys = np.array(
        [int(hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16], 16) for name in images], "uint64"
    )
    share = float(np.sort(keys)[5]) / 2**64 + 1e-9  # six of them
    few = [rows[index] | {"image": str(folder / images[index])} for index in np.argsort(keys)[4:9]]  # two and three
    for name, lines in ("few", few), ("all", [row | {"image": str(folder / row["image"])} for row in rows]):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    held = {name: set(captions(split(tmp_path / f"{name}.jsonl", True, share)[1])) for name in ("few", "all")}
    assert (
        held["few"] == held["all"] & {(row["long_text"], row["short_text"]) for row in few} and len(held["few"]) == 2
    )


def test_blank_lines_and_mended_images(forms, tmp_path):
    """Rows are counted alike in memory and streamed, and nothing is remembered of an image that was another one."""
    folder, rows = forms
    for row in rows[:12]:
        (tmp_path / row["image"]).write_bytes((folder / row["image"]).read_bytes())
    lines = [json.dumps(row) for row in rows[:12]]
    lines = ["\ufeff", *lines[:3], "   ", "\u3000\t\r", *lines[3:9], " " + lines[9], *lines[10:], "  "]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sides = [[set(captions(side)) for side in split(tmp_path / "rows.jsonl", way)] for way in (True, False, True)]
    assert sides[0] == sides[1] == sides[2] and sum(map(len, sides[0])) == 12
    first, last = sorted(rows[:12], key=lambda row: hashlib.sha256((folder / row["image"]).read_bytes()).hexdigest())[
        ::11
    ]
    for one, other in (first, last), (last, first):  # exported anew under the same names
        (tmp_path / one["image"]).write_bytes((folder / other["image"]).read_bytes())
    held = {long for long, _ in captions(split(tmp_path / "rows.jsonl", True)[1])}
    assert last["long_text"] in held and first["long_text"] not in held


class Listed:
    """Rows in memory."""

    name, location, one_by_one = "rows", "rows", True
    columns = {"image": "image", "long": "long_text", "short": "short_text"}

    def __init__(self, rows):
        self.rows, self.chunks = rows, np.array([len(rows)])

    def read(self, numbers):
        return [self.rows[number] for number in numbers]


UNUSABLE = [3, 0, [7], {"path": 3}, {"path": "0.png", "bytes": 7}, {"path": ["a"]}, {}, None, True, "half \ud800.png"]


def test_rows_that_no_table_can_hold(forms, tmp_path):
    folder, _ = forms
    images = [str(folder / "0.png"), (folder / "1.png").read_bytes(), {"path": str(folder / "2.png")}]
    rows = [Row(str(index), image, "Long.", ["One.", "Two."]) for index, image in enumerate([*UNUSABLE, *images])]
    rows += [Row("half", images[0], "Half \udfff.", "One."), Row("none", images[0], " ", "One.")]
    pairs = Pairs([[Listed(rows)]])
    keys = image_keys(pairs)[0]  # of a number nothing is opened: it would be a descriptor of this process
    assert [format(key, "016x") for key in keys[10:13].tolist()] == [
        hashlib.sha256((folder / f"{number}.png").read_bytes()).hexdigest()[:16] for number in range(3)
    ]
    write_held_out(pairs, tmp_path / "held_out.parquet")
    table = pq.read_table(tmp_path / "held_out.parquet").to_pylist()
    assert [row["image"] for row in table] == [
        {"bytes": None, "path": images[0]},
        {"bytes": images[1], "path": None},
        {"bytes": None, "path": str(folder / "2.png")},
    ]
    assert {tuple(row["short_text"]) for row in table} == {("One.", "Two.")}
