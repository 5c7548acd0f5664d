"""Captions without pixels get their images back, the same bytes as if they had never been away."""

import io
import json
import shutil
import tarfile

import pytest
from datasets import load_dataset

from tests.training.lrs2m.small_builds import build, entries, manifest_of, picture, rows_of, source
from training.lrs2m.rejoin import main
from training.lrs2m.shards import read_shard


@pytest.fixture(params=["parquet", "webdataset"])
def folders(request, write_recipe, tiles, tmp_path):
    """The same data set with and without images."""
    read = {"kind": "table", "path": str(tiles / "captions.jsonl")}
    for name in ("embed", "omit"):
        recipe = write_recipe([source("merge", read, join=read)], images=name, format=request.param)
        assert build(recipe, tmp_path / name) == 0
    return tmp_path / "embed", tmp_path / "omit"


def rejoin(folder, images, target):
    return main([str(folder), "--images", str(images), "--output", str(target)])


def test_images_come_back(folders, tiles, tmp_path):
    whole, without = folders
    assert all(row["image"] is None for row in rows_of(without))
    assert rejoin(without, tiles, tmp_path / "again") == 0
    assert rows_of(tmp_path / "again") == rows_of(whole)
    splits = {
        name: manifest_of(folder)["splits"] for name, folder in (("whole", whole), ("again", tmp_path / "again"))
    }
    for split, described in splits["whole"].items():
        assert splits["again"][split]["rows"] == described["rows"]
    assert not (tmp_path / "again" / "work").exists() and manifest_of(tmp_path / "again")["rejoined"]


def test_what_is_missing_or_another_is_listed(folders, tiles, tmp_path, capsys):
    local = tmp_path / "mine"
    shutil.copytree(tiles, local)
    (local / "03.png").unlink()
    picture(99).save(local / "04.png")
    (local / "05.png").rename(local / "renamed.png")
    (local / "06.png").write_bytes(b"no image")
    assert rejoin(folders[1], local, tmp_path / "again") == 0
    assert "21 rows with images" in capsys.readouterr().out
    listed = {entry["image_key"]: entry["reason"] for entry in entries(tmp_path / "again", "unmatched")}
    assert listed == {"03.png": "image missing", "04.png": "another image", "06.png": "image unreadable"}
    kept = rows_of(tmp_path / "again")
    assert len(kept) == 21 and "05.png" in {row["image_key"] for row in kept}  # found by its content
    totals = manifest_of(tmp_path / "again")["totals"]
    assert totals["train"] + totals["validation"] == 21 and totals["unmatched another image"] == 1
    if manifest_of(folders[1])["format"] == "parquet":
        loaded = load_dataset("parquet", data_files=str(tmp_path / "again" / "data" / "train-*"), split="train")
        assert loaded[0]["image"].size == (48, 40)


def test_mistakes_are_sentences(folders, tiles, tmp_path, capsys):
    without = folders[1]
    (tmp_path / "empty").mkdir()
    for arguments, problem in (
        ((tmp_path / "empty", tiles, tmp_path / "a"), "holds no manifest.json"),
        ((without, tmp_path / "none", tmp_path / "a"), "is not a folder; --images"),
        ((without, tmp_path / "empty", tmp_path / "a"), "none of the 24 images"),
        ((without, tiles, without), "exists; give another --output"),
    ):
        assert rejoin(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and problem in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_key_does_not_lead_out_of_the_folder(tmp_path):
    from training.lrs2m.rejoin import LocalImages
    from training.lrs2m.sources.images import Skip

    (tmp_path / "inside").mkdir()
    picture(0).save(tmp_path / "secret.png")
    row = {"image_key": "../secret.png", "image_sha256": "0" * 64}
    with pytest.raises(Skip) as error:
        LocalImages([tmp_path / "inside"]).find(row)
    assert error.value.reason == "image missing" and json.dumps(str(error.value))


def test_the_image_of_a_tar_is_its_own_member(tmp_path):
    row = {"id": "a-1", "short_text": "A road."}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        metadata = row | {"image": {"bytes": None, "path": "/etc/passwd"}}
        for name, content in (("a-1.png", b"pixels"), ("a-1.json", json.dumps(metadata).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert list(read_shard(tmp_path / "a.tar")) == [row | {"image": {"bytes": b"pixels", "path": "a-1.png"}}]
