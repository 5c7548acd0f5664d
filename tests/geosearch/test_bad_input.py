"""What users give by mistake: one sentence each, and nothing of the rest is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.shutil
from rasterio.transform import from_origin

from geosearch import __main__ as command
from geosearch.index import locked
from geosearch.index_store import open_index
from geosearch.scenes import find_scenes
from tests import processes
from tests.geosearch.small_scenes import noise, tiny_checkpoint, write_scene


def _truncated(path):
    write_scene(path, noise(3, 100, 100))
    path.write_bytes(path.read_bytes()[:9000])


def _gigantic(path):
    with rasterio.open(
        path, "w", driver="GTiff", width=2**20, height=2**20, count=3, dtype="uint8", photometric="RGB", tiled=True,
        crs="EPSG:32633", transform=from_origin(0, 0, 1, 1), sparse_ok=True, bigtiff="YES", blockxsize=2**15, blockysize=2**15,
    ):  # fmt: skip
        pass


def _vrt_of_missing(path):
    write_scene(path.with_name("source.dat"), noise(3, 100, 100))
    rasterio.shutil.copy(path.with_name("source.dat"), path, driver="VRT")
    path.with_name("source.dat").unlink()


def _elsewhere(path):
    write_scene(path, noise(1, 100, 100), crs=None, transform=None)


def _nothing(path):
    write_scene(path, np.zeros((3, 100, 100), "uint16"), nodata=0)


# What stands for a scene -> what is said of it in skipped.jsonl, beside a good scene that is indexed.
SCENES = {
    "no coordinates.tif": (lambda path: write_scene(path, noise(3, 99, 99), None), "has no coordinate reference system"),
    "photo.png": (
        lambda path: write_scene(path, noise(3, 99, 99), None, driver="PNG", photometric=None),
        "has no coordinate reference system",
    ),
    "truncated.tif": (_truncated, "cannot be read"),
    "text.tif": (lambda path: path.write_text("text"), "no raster of a known format"),
    "empty.tif": (lambda path: path.write_bytes(b""), "is an empty file"),
    "zip.tif": (lambda path: path.write_bytes(b"PK\3\4" + bytes(50)), "is a zip archive"),
    "loop.tif": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "dangling.tif": (lambda path: path.symlink_to(path.with_name("nowhere")), "does not exist"),
    "pipe.tif": (os.mkfifo, "is not a regular file"),
    "200 bands.tif": (lambda path: write_scene(path, noise(200, 40, 40)), "has 200 bands"),
    "complex.tif": (lambda path: write_scene(path, noise(1, 40, 40).astype("complex64")), "complex numbers"),
    "all nodata.tif": (_nothing, "more than 50% of every window is nothing"),
    "all nan.tif": (lambda path: write_scene(path, np.full((3, 99, 99), np.nan, "float32")), "every window is nothing"),
    "tiny.tif": (lambda path: write_scene(path, noise(3, 2, 50)), "the short side needs 4"),
    "gigantic.tif": (_gigantic, "more than the 100,000,000 of one scene"),
    "virtual.vrt": (_vrt_of_missing, "No such file"),
    "local grid.tif": (
        lambda path: write_scene(path, noise(3, 99, 99), 'LOCAL_CS["mine",UNIT["metre",1]]'),
        "cannot be placed on the Earth",
    ),
    "off the map.tif": (
        lambda path: write_scene(path, noise(3, 99, 99), "EPSG:4326", from_origin(13, 500, 1, 1)),
        "cannot be placed on the Earth",
    ),
    "flat.tif": (
        lambda path: write_scene(path, noise(3, 99, 99), "EPSG:32633", rasterio.Affine(0, 0, 5, 0, 0, 5)),
        "",  # GDAL takes a transform of zeros for none, or it has no area
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCENES)
def test_a_bad_scene_is_named_and_the_good_one_indexed(make_index, tmp_path, kind):
    folder = tmp_path / "s"
    good = write_scene(folder / "good.tif", noise(3, 100, 100))
    make, sentence = SCENES[kind]
    make(folder / kind)
    content = make_index(folder)
    (entry,) = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    assert entry["scene"] == str(folder / kind) and sentence in entry["reason"], entry
    assert str(folder / kind) in entry["reason"] and "\n" not in entry["reason"]
    assert content["sources"][str(good)]["windows"] == 9
    assert set(open_index(tmp_path / "index").rows(["scene"])["scene"].to_pylist()) == {str(good)}


def test_unreadable_scenes_are_named(tmp_path, checkpoint):
    """Root may read everything: the command runs as nobody."""
    if os.geteuid():
        pytest.skip("changing the user takes root")
    folder = tmp_path / "s"
    write_scene(folder / "good.tif", noise(3, 100, 100))
    write_scene(folder / "locked.tif", noise(3, 100, 100)).chmod(0)
    code = (
        "import os, sys; from geosearch.scenes import Scene; from geosearch.plan import WindowOptions, _open_scene;"
        "from geosearch.windows import WindowSize; os.setuid(65534);"
        "print(_open_scene(Scene(sys.argv[1]), WindowOptions((WindowSize(64),))))"
    )
    for parent in (folder, *folder.parents[:4]):
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    command = [sys.executable, "-c", code, str(folder / "locked.tif")]
    result = processes.run(command, cwd=Path(__file__).parents[2], project=True)
    assert "locked.tif cannot be read (Permission denied)" in result.stdout, result


def test_the_same_scene_twice_is_indexed_once(make_index, tmp_path):
    scene = write_scene(tmp_path / "s" / "a.tif", noise(3, 100, 100))
    (tmp_path / "s" / "b.tif").symlink_to(scene)
    (tmp_path / "s" / "again").symlink_to(tmp_path / "s")  # a folder that holds itself
    assert make_index(tmp_path / "s", scene, str(tmp_path / "s" / "*.tif"))["rows"] == 9


def test_pictures_without_coordinates_are_told_in_pixels(make_index, tmp_path, capsys):
    scene = write_scene(tmp_path / "a.png", noise(3, 100, 130), None, driver="PNG", photometric=None)
    content = make_index(scene)
    assert content["coordinates"] == "pixels" and "places are told in pixels" in capsys.readouterr().err
    row = open_index(tmp_path / "index").rows().to_pylist()[0]
    left, top, width, height = row["pixel_box"]
    assert (
        row["bbox"] == {"xmin": left, "ymin": top, "xmax": left + width, "ymax": top + height} and row["crs"] is None
    )
    with pytest.raises(ValueError, match="the index holds pictures without coordinates, and only scenes on the Earth"):
        make_index(write_scene(tmp_path / "b.tif", noise(3, 100, 100)))


# Arguments -> the sentence on standard error, and exit status 2. {good} is a scene, {model} a model, {index} a finished index.
COMMANDS = {
    "missing scene": ("index {tmp}/none.tif --model {model} --output {tmp}/new", "none.tif does not exist"),
    "empty folder": ("index {empty} --model {model} --output {tmp}/new", "holds no scenes: files ending in .bmp"),
    "pattern of nothing": ("index {tmp}/*.jp2 --model {model} --output {tmp}/new", "holds no scenes"),
    "address": ("index https://example.org/a.tif --model {model} --output {tmp}/new", "is not on this machine"),
    "only bad ones": ("index {text} --model {model} --output {tmp}/new", "none of 1 scenes can be indexed; the first: "),
    "no model": ("index {good} --output {tmp}/new", "is a new index: name the --model"),
    "missing model": ("index {good} --model {tmp}/nowhere --output {tmp}/new", "nowhere does not exist"),
    "model without weights": ("index {good} --model {empty} --output {tmp}/new", "has no config.json"),
    "other model": ("index {good} --model {other} --output {index}", "was made with the weights"),
    "other windows": ("index {good} --model {model} --output {index} --window 32", "was made with sizes ['64'] and not ['32']"),
    "output is a file": ("index {good} --model {model} --output {text}", "is not a folder"),
    "stride": ("index {good} --model {model} --output {tmp}/new --stride 2", "stride 2"),
    "max-empty": ("index {good} --model {model} --output {tmp}/new --max-empty 1.5", "max_empty 1.5"),
    "bands": ("index {good} --model {model} --output {tmp}/new --bands 1,2", "name three (red, green, blue) or one (grey)"),
    "missing band": ("index {good} --model {model} --output {tmp}/new --bands 7,8,9", "has no band 7; its bands are 1 to 3"),
    "batch size": ("index {good} --model {model} --output {tmp}/new --batch-size 0", "--batch-size 0 must be at least 1"),
    "shard and ray": ("index {good} --model {model} --output {tmp}/new --shard 1/2 --on ray", "exclude each other"),
    "ray without ray": ("index {good} --model {model} --output {tmp}/new --shards 3", "need --on ray"),
    "merge of nothing": ("merge {empty}", "has no finished shards"),
    "windows in metres of a picture": ("index {photo} --model {model} --output {tmp}/new --window 50m", "it has no coordinates"),
}  # fmt: skip
PARSED = {
    "window": ("--window 224px", "write pixels (224) or metres (500m)"),
    "range": ("--range 5", "write two values (0,3000)"),
    "shard": ("--shard 5/4", "the first number goes from 1 to the second"),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("material")
    good = write_scene(folder / "good" / "good.tif", noise(3, 100, 100))
    photo = write_scene(folder / "photo.png", noise(3, 100, 100), None, driver="PNG", photometric=None)
    (folder / "empty").mkdir()
    (folder / "text.tif").write_text("text")
    import torch

    from modeling_lrsclip import LRSCLIPModel

    other = tiny_checkpoint(folder / "other")
    model = LRSCLIPModel.from_pretrained(other)
    with torch.no_grad():
        model.logit_scale += 1
    model.save_pretrained(other)
    paths = {"good": good, "photo": photo, "empty": folder / "empty", "text": folder / "text.tif", "other": other}
    index = folder / "index"
    assert not command.main(["index", str(good), "--model", checkpoint, "--output", str(index), "--window", "64"])
    return {**paths, "model": checkpoint, "index": index}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_bad_command_gets_one_sentence(material, tmp_path, capsys, kind):
    arguments, sentence = COMMANDS[kind]
    before = open_index(material["index"]).metadata
    capsys.readouterr()
    assert command.main(arguments.format(tmp=tmp_path, **material).split()) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in message
    assert open_index(material["index"]).metadata == before


@pytest.mark.parametrize("kind", PARSED)
def test_a_bad_argument_gets_one_sentence(capsys, kind):
    arguments, sentence = PARSED[kind]
    with pytest.raises(SystemExit, match="2"):
        command.main(["index", "a.tif", "--output", "x", *arguments.split()])
    assert sentence in capsys.readouterr().err


def test_two_processes_do_not_write_one_index(make_index, tmp_path):
    scene = write_scene(tmp_path / "a.tif", noise(3, 100, 100))
    with locked(tmp_path / "index"), pytest.raises(ValueError, match="is being written by another process"):
        make_index(scene)
    assert make_index(scene)["rows"] == 9


def test_the_help_is_there_at_once():
    code = "import sys; import geosearch.__main__ as c; c.main(['--help'])"
    result = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "index" in result.stdout and not {"torch", "rasterio", "pyarrow", "numpy"} & {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()
    }


# ------------------------------------------------------------------------------------------------- lists of scenes


def item(name: str, **assets) -> dict:
    properties = {"datetime": "2023-06-01T10:00:00Z"}
    return {"type": "Feature", "stac_version": "1.0.0", "id": name, "properties": properties, "assets": assets}


def test_stac_documents_lead_to_local_files(tmp_path):
    data = {"href": "./data/a.tif", "type": "image/tiff; application=geotiff", "roles": ["data"]}
    thumbnail = {"href": "a.png", "type": "image/png", "roles": ["thumbnail"]}
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "a.json").write_text(json.dumps(item("a", image=data, thumbnail=thumbnail)))
    several = item("several", B04={"href": "b4.tif"}, B03={"href": "b3.tif"})
    far = item("far", visual={"href": "https://example.org/far.tif"})
    local = item("local", visual={"href": f"file://{tmp_path}/with%20space.tif"}, other={"href": "other.tif"})
    collection = {"type": "FeatureCollection", "features": [several, far, local, item("none")]}
    (tmp_path / "items" / "more.json").write_text(json.dumps(collection))
    links = [
        {"rel": "item", "href": "items/a.json"},
        {"rel": "items", "href": "items/more.json"},
        {"rel": "self", "href": "x"},
    ]
    links += [{"rel": "child", "href": "collection.json"}, {"rel": "item", "href": "https://example.org/item.json"}]
    (tmp_path / "collection.json").write_text(json.dumps({"type": "Collection", "links": links}))
    (tmp_path / "wrong.json").write_text('{"type": "FeatureInfo"}')
    (tmp_path / "broken.json").write_text("{")
    listing = find_scenes([tmp_path / name for name in ("collection.json", "wrong.json", "broken.json")])
    assert [scene.path for scene in listing.scenes] == [f"{tmp_path}/items/data/a.tif", f"{tmp_path}/with space.tif"]
    assert listing.scenes[0].timestamp.isoformat() == "2023-06-01T10:00:00+00:00"
    reasons = [entry["reason"] for entry in listing.skipped]
    for sentence in ("several images (B04, B03): name one with --asset", "far.tif is not on this machine", "has no asset that is an image",
                     "item.json, which is not on this machine", "is no STAC item", "is no STAC document"):  # fmt: skip
        assert sum(sentence in reason for reason in reasons) == 1, sentence
    chosen = find_scenes([tmp_path / "items" / "more.json"], asset="B04")
    assert [scene.path for scene in chosen.scenes] == [f"{tmp_path}/items/b4.tif"] and len(chosen.skipped) == 3


def test_tables_lead_to_files(tmp_path, make_index):
    scene = write_scene(tmp_path / "d" / "a.tif", noise(3, 100, 100))
    (tmp_path / "list.csv").write_text("path,datetime\nd/a.tif,2022-03-04\n,\nhttp://x/y.tif,2022\nb\0.tif,\n")
    listing = find_scenes([tmp_path / "list.csv"])
    assert [entry.path for entry in listing.scenes] == [str(scene)] and len(listing.skipped) == 3
    make_index(tmp_path / "list.csv")
    times = set(open_index(tmp_path / "index").rows(["timestamp"])["timestamp"].to_pylist())
    assert [time.isoformat() for time in times] == ["2022-03-04T00:00:00+00:00"]
    pq.write_table(pa.table({"location": [str(scene)], "geometry": [b""]}), tmp_path / "tiles.parquet")
    assert [entry.path for entry in find_scenes([tmp_path / "tiles.parquet"]).scenes] == [str(scene)]
    pq.write_table(pa.table({"a": [1]}), tmp_path / "bad.parquet")
    (tmp_path / "none.csv").write_text("path\n")
    (tmp_path / "noise.parquet").write_bytes(b"PAR1")
    for name, sentence in [
        ("bad.parquet", "has no column of paths"),
        ("none.csv", "without rows"),
        ("noise.parquet", "cannot be read as a table"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            find_scenes([tmp_path / name])


def test_the_time_in_a_files_own_tags_is_taken(make_index, tmp_path):
    scene = write_scene(tmp_path / "a.tif", noise(3, 100, 100))
    with rasterio.open(scene, "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2021:02:03 04:05:06")
    assert make_index(scene)["sources"][str(scene)]["timestamp"] == "2021-02-03T04:05:06+00:00"
