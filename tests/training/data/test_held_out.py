"""`data.validation: 0.25`: images are held out with all their captions, the same ones however the rows are read."""

import json
import tarfile

import datasets
import pytest

from evaluation.benchmarks.retrieval_data import load_retrieval
from training import train
from training.data.fingerprints import fingerprints
from training.data.held_out import hold_out
from training.data.pairs import load_pairs
from training.data.sources import DataConfig


SHARE = 0.25  # 3 of 12 images


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


def split(path, streaming):
    return hold_out(load_pairs(DataConfig(train=str(path), streaming=streaming), ["long", "short"]), SHARE)


def captions(pairs):
    read = [(row.long, row.short) for row in pairs.read(list(range(len(pairs))))]
    assert [long for long, _ in read] == list(pairs.texts("long"))
    return read


def test_by_image_and_alike_in_every_form(forms):
    folder, rows = forms
    images = {(row["long_text"], row["short_text"]): row["image"].replace("copy", "3") for row in rows}
    found = {}
    for name in ("rows.jsonl", "rows.parquet", "rows.tar"):
        for streaming in (False, True):
            kept, held = split(folder / name, streaming)
            assert len(kept) + len(held) == len(rows) == 25
            found[name, streaming] = sorted(captions(held))
            sides = [{images[texts] for texts in captions(side)} for side in (kept, held)]
            assert not sides[0] & sides[1] and len(sides[1]) == 3
            visits = {number for step in range(3) for _, number in kept.order(0).batch(step, 6)}
            assert max(visits) < len(kept)
    assert len({json.dumps(texts) for texts in found.values()}) == 1
    again = split(folder / "rows.jsonl", True)[0]
    whole = load_pairs(DataConfig(train=str(folder / "rows.jsonl"), streaming=True), ["long", "short"])
    prints = [fingerprints(pairs, ["x"]) for pairs in (again, split(folder / "rows.jsonl", True)[0], whole)]
    assert prints[0] == prints[1] != prints[2]


def test_a_run_validates_on_what_it_never_visits(forms, run_arguments, tmp_path, capsys):
    folder, rows = forms
    arguments = [*run_arguments, "--data.train", str(folder / "rows.jsonl"), "--data.validation", str(SHARE)]
    train.main([*arguments, "--loop.log_ids", "true", "--loop.steps", "8"])
    assert "not held out" not in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    seen = {identifier for line in log if line["kind"] == "batch" for identifier in line["ids"]}
    visited = {rows[int(identifier.split(":")[1])]["image"].replace("copy", "3") for identifier in seen}
    data = load_retrieval(tmp_path / "run" / "held_out.parquet", "long_text")
    assert len(visited) == 9 and len(data.images) == 3
    assert not visited & {name.rpartition("/")[2].replace("copy", "3") for name in data.images.names}
    assert record["validation"]["share"] == SHARE and record["validation"]["pairs"] == len(data.texts)
    assert not {digest[:16] for digest in data.images.digests} & set(record["data"]["images_sha256"])
    train.main([*arguments, "--loop.log_ids", "true", "--loop.steps", "9", "--resume"])  # the same split, or refused


@pytest.mark.parametrize(
    "share, said", [("1.5", "a share of the training images lies between 0 and 1"), ("0", "lies")]
)
def test_shares_that_are_none(share, said, run_arguments):
    with pytest.raises(SystemExit, match=said):
        train.main([*run_arguments, "--data.validation", share])


def test_one_image_cannot_be_divided(forms, tmp_path):
    folder, rows = forms
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0] | {"image": str(folder / "0.png")}))
    with pytest.raises(ValueError, match="holds out a share of the images, and there are 1 different ones"):
        split(tmp_path / "one.jsonl", True)
