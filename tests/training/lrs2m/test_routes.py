"""Each route's texts, and where labels and joined captions come from."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyogrio
import pytest
import rasterio
import shapely
from PIL import Image
from pyarrow import parquet

from evaluation.benchmarks.tables import read_table
from modeling_lrsclip.files.configuration import validate
from tests.training.lrs2m.chat_server import ChatServer
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
from training.lrs2m.data_row import Record
from training.lrs2m.recipe import LabelsConfig, SourceConfig
from training.lrs2m.sources.images import Skip
from training.lrs2m.sources.labels import LabelReader
from training.lrs2m.sources.records import read_source


TABLE = {"kind": "table", "path": "a.csv"}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def vhm_row(index: int) -> dict:
    """As VHM's list_pretrain.json writes a caption."""
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": long_caption(index)}]
    return {"id": str(index), "image": f"MillionAID/train/Tile_{index:03d}.png", "conversations": turns}


def write_rs5m_tar(path, numbers):
    """As RS5M's tars are: img_content, img_name and caption of every sample."""
    with tarfile.open(path, "w") as tar:
        for index in numbers:
            members = {
                "img_content": png(picture(index)),
                "img_name": f"tile_{index:03d}.png".encode(),
                "caption": short_caption(index).encode(),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_merge_joins_vhm_and_rs5m_and_lists_what_has_no_partner(tmp_path, write_recipe):
    for number in range(2):
        write_rs5m_tar(tmp_path / f"rs3-train-{number:04d}.tar", range(number * 6, number * 6 + 6))
    rows = [vhm_row(index) for index in (11, 3, 4, 5, 6, 7, 8, 9, 2, 1, 20, 21)]
    (tmp_path / "list_pretrain.json").write_text(json.dumps([*rows, {"conversations": []}], indent=1))
    read = {"kind": "webdataset", "path": str(tmp_path / "rs3-train-*.tar"), "key": {"stem": True, "lower": True}}
    join = {
        "kind": "table",
        "path": str(tmp_path / "list_pretrain.json"),
        "key": {"basename": True, "stem": True, "lower": True},
    }
    recipe = write_recipe([source("merge", read, join=join)])
    assert build(recipe, tmp_path / "set") == 0
    merged = rows_of(tmp_path / "set")
    expected = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert [row["short_text"] for row in merged] == [short_caption(index) for index in expected]
    assert [row["long_text"] for row in merged] == [long_caption(index) for index in expected]
    assert [row["image"]["bytes"] for row in merged] == [png(picture(index)) for index in expected]
    assert {row["long_captioner"] for row in merged} == {"given"} and {row["sampling"] for row in merged} == {None}
    unmatched = [(entry["side"], entry["key"]) for entry in entries(tmp_path / "set", "unmatched")]
    assert unmatched == [
        ("images", "tile_000"),
        ("images", "tile_010"),
        ("captions", "tile_020"),
        ("captions", "tile_021"),
        ("captions", None),
    ]
    counts = manifest_of(tmp_path / "set")["counts"]["tiles"]
    assert counts["unmatched images"] == 2 and counts["unmatched captions"] == 3


def test_compress_takes_images_of_tars_and_captions_of_one_list(tmp_path, write_recipe):
    """VersaD as it is downloaded: tars of a sub-set, which need not be unpacked, and one list of all of them."""
    with tarfile.open(tmp_path / "crowdai-000000.tar", "w") as tar:
        for index in range(4):
            member = tarfile.TarInfo(f"crowdai/Tile_{index:03d}.png")
            member.size = len(png(picture(index)))
            tar.addfile(member, io.BytesIO(png(picture(index))))
    rows = [vhm_row(index) | {"source_dataset": name} for name in ("cvact", "crowdai") for index in range(4)]
    (tmp_path / "list_pretrain.json").write_text(json.dumps(rows))
    key = {"basename": True, "stem": True}
    read = {"kind": "webdataset", "path": str(tmp_path / "*.tar"), "key": key}
    join = {"kind": "table", "path": str(tmp_path / "list_pretrain.json"), "key": key}
    joined = source("compress", read, join=join | {"where": {"source_dataset": "crowdai"}})
    with ChatServer() as server:
        assert build(write_recipe([joined], server.url), tmp_path / "set") == 0
    made = rows_of(tmp_path / "set")
    assert [row["long_text"] for row in made] == [long_caption(index) for index in range(4)]
    assert [row["image"]["bytes"] for row in made] == [png(picture(index)) for index in range(4)]


def test_no_path_is_taken_from_a_tar(tmp_path, tiles):
    fields = json.dumps({"filename": str(tiles / "00.png"), "caption": short_caption(0)}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.json")
        member.size = len(fields)
        tar.addfile(member, io.BytesIO(fields))
    read = {"kind": "webdataset", "path": str(tmp_path / "a.tar")}
    (record,) = read_source(validate(SourceConfig, source("expand", read)), tmp_path)
    assert (record.image, record.image_key) == (None, "0")
    with pytest.raises(ValueError, match="sample 0 has no image; it has __key__, filename, caption"):
        read_table(tmp_path / "a.tar", ["caption"])


def test_merge_refuses_tables_without_keys(tmp_path, tiles, write_recipe, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"long_text": long_caption(0)}))
    join = {"kind": "table", "path": str(tmp_path / "long.jsonl")}
    recipe = write_recipe([source("merge", {"kind": "table", "path": str(tiles / "captions.jsonl")}, join=join)])
    assert build(recipe, tmp_path / "set") == 1
    assert "has a key; set join.columns.key" in capsys.readouterr().err


def test_expand_gives_the_short_caption_and_the_image_to_the_captioner(tiles, tmp_path, write_recipe):
    with ChatServer() as server:
        recipe = write_recipe(
            [source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 3})], server.url
        )
        assert build(recipe, tmp_path / "set") == 0
        said = sorted(request.text for request, _ in server.requests)
        assert all(request.image.startswith("data:image/png;base64,") for request, _ in server.requests)
        assert {request.body["model"] for request, _ in server.requests} == {"tiny/mllm"}
    for text in ("main ground objects", "attributes", "relation to each other"):
        assert all(text in one for one in said)
    assert all(any(short_caption(index) in one for one in said) for index in range(3))


def test_several_short_captions_become_rows_or_one_prompt(tmp_path, tiles, write_recipe):
    captions = [
        short_caption(0),
        "A second view of number 0.",
        short_caption(0),
        "A third one of number 0.",
        "A fourth of number 0.",
    ]
    entry = {"filename": "00.png", "split": "train", "sentences": [{"raw": text} for text in captions]}
    other = entry | {"split": "test", "filename": "01.png"}
    (tmp_path / "dataset_tiles.json").write_text(json.dumps({"images": [entry, other], "dataset": "tiles"}))
    read = {"kind": "table", "path": str(tmp_path / "dataset_tiles.json"), "images": str(tiles)}
    several = {"long": {"captioner": "mllm", "prompt": "expand_several@1"}}
    with ChatServer() as server:
        each = write_recipe([source("expand", read)], server.url)
        assert build(each, tmp_path / "each") == 0
        assert len(server.requests) == 4  # distinct captions, as Table I counts UC Merced's
        together = write_recipe(
            [source("expand", read | {"captions": "together", "split": "all"}, **several)], server.url
        )
        assert build(together, tmp_path / "together") == 0
        assert len(server.requests) == 6 and all(f'"{text}"' in server.requests[-1][0].text for text in captions)
    assert [row["short_text"] for row in rows_of(tmp_path / "each")] == list(dict.fromkeys(captions))
    assert [row["short_texts"] for row in rows_of(tmp_path / "together")] == [captions, captions]


def test_large_images_are_sent_smaller(tmp_path, write_recipe):
    (tmp_path / "own").mkdir()
    picture(1, (300, 200)).save(tmp_path / "own" / "a.png")
    (tmp_path / "own" / "c.csv").write_text("image,short_text\na.png,A road of number 1.\n")
    with ChatServer() as server:
        recipe = write_recipe(
            [source("expand", {"kind": "table", "path": str(tmp_path / "own" / "c.csv")})], server.url
        )
        assert build(recipe, tmp_path / "set", "--set", "captioners.mllm.max_image_side=64") == 0
        import base64

        head, content = server.requests[0][0].image.split(",")
        assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 43)
    assert rows_of(tmp_path / "set")[0]["width"] == 300  # the data set keeps the whole


# ------------------------------------------------------------------------------------------------------------- anchors


def anchored(tmp_path, write_recipe, read, labels, **fields) -> tuple[list[dict], list[str]]:
    """Rows of a build by route 4 and the anchors that its captioner was told, by image."""
    with ChatServer() as server:
        recipe = write_recipe([source("anchor", read, labels=labels, **fields)], server.url)
        assert build(recipe, tmp_path / "set", "--set", "max_skipped_fraction=1") == 0
    rows = rows_of(tmp_path / "set")
    assert all(row["long_prompt"] == "anchor@1" and row["short_prompt"] == "compress@1" for row in rows)
    assert all(row["short_words"] <= 20 for row in rows)
    return rows, [json.loads(row["anchors"])["text"] for row in rows]


@pytest.fixture
def two_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate("ab"):
        picture(index, (90, 60)).save(folder / f"{name}.png")
    return folder


def test_anchors_from_coco_boxes(tmp_path, two_images, write_recipe):
    boxes = [[0, 0, 9, 9], [80, 50, 9, 9], [2, 1, 9, 9], [40, 25, 10, 10]]
    annotations = [{"image_id": 7, "category_id": 1 + (n == 3), "bbox": box} for n, box in enumerate(boxes)]
    document = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "small-vehicle"}, {"id": 2, "name": "StorageTank"}],
        "annotations": annotations,
    }
    (tmp_path / "coco.json").write_text(json.dumps(document))
    labels = {"kind": "coco", "path": str(tmp_path / "coco.json"), "names": {"small-vehicle": "car"}}
    rows, texts = anchored(tmp_path, write_recipe, {"kind": "images", "path": str(two_images)}, labels)
    assert texts == ["3 cars (upper left 2, lower right), 1 storage tank (centre)"]
    anchors = json.loads(rows[0]["anchors"])
    assert anchors["counts"] == {"car": 3, "storage tank": 1} and anchors["objects"][1]["box"] == [
        0.8889,
        0.8333,
        0.9889,
        0.9833,
    ]
    assert [entry["reason"] for entry in entries(tmp_path / "set", "skipped")] == ["no labels"]


def test_anchors_from_masks(tmp_path, two_images, write_recipe):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((60, 90), dtype=np.uint8)
    mask[:20, :30], mask[40:, 60:], mask[30, 45] = 3, 3, 5
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    labels = {"kind": "masks", "path": str(tmp_path / "masks"), "names": {"3": "building", "5": "tree", "7": "road"}}
    _, texts = anchored(
        tmp_path, write_recipe, {"kind": "images", "path": str(two_images)}, labels | {"min_share": 0.001}
    )
    assert texts == ["2 buildings (upper left, lower right)"]
    assert [entry["reason"] for entry in entries(tmp_path / "set", "skipped")] == ["labels missing"]


def polygon(x0, y0, x1, y1):
    return {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]}


def write_shapes(path, shapes, properties: dict, crs: str | None = None):
    pyogrio.raw.write(
        path,
        shapely.to_wkb(shapes),
        list(properties.values()),
        list(properties),
        geometry_type=shapes[0].geom_type,
        crs=crs,
    )


FEATURES = [  # in a map of 0 to 180 by 0 to 60, y upwards: two images side by side
    ("Polygon", polygon(5, 50, 20, 58), "house", "red"),
    ("Polygon", polygon(80, 5, 100, 15), "pond", None),  # on the seam: in both
    ("Point", {"type": "Point", "coordinates": [135, 30]}, "tower", None),
    ("Line", {"type": "LineString", "coordinates": [[95, 59], [175, 59]]}, "road", "grey"),
]


@pytest.mark.parametrize("kind", ["geojson", "shapefile"])
def test_anchors_from_vectors_on_a_map(tmp_path, two_images, write_recipe, kind):
    # a: a world file; b: the bounds stand in a column
    (two_images / "a.pgw").write_text("1.0\n0.0\n0.0\n-1.0\n0.5\n59.5\n")
    table = [{"image": "a.png"}, {"image": "b.png", "bounds": [90, 0, 180, 60]}]
    (two_images / "tiles.jsonl").write_text("\n".join(map(json.dumps, table)))
    features = [
        {"type": "Feature", "geometry": shape, "properties": {"what": name, "colour": colour}}
        for _, shape, name, colour in FEATURES
    ]
    path = tmp_path / ("map.geojson" if kind == "geojson" else "map.shp")
    if kind == "geojson":
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    else:
        features = [feature for feature in features if feature["geometry"]["type"] == "Polygon"]
        shapes = shapely.from_geojson([json.dumps(feature["geometry"]) for feature in features])
        columns = [
            np.array([feature["properties"][name] for feature in features], object) for name in ("what", "colour")
        ]
        with pytest.warns(UserWarning, match="crs"):
            write_shapes(path, shapes, dict(zip(("what", "colour"), columns)))
    labels = {"kind": kind, "path": str(path), "field": "what", "attribute": "colour"}
    _, texts = anchored(tmp_path, write_recipe, {"kind": "table", "path": str(two_images / "tiles.jsonl")}, labels)
    more = ", 1 tower (centre)" if kind == "geojson" else ""
    road = "1 grey road (upper middle), " if kind == "geojson" else ""
    assert texts == ["1 pond (lower right), 1 red house (upper left)", f"{road}1 pond (lower left){more}"]


def test_an_images_own_damaged_vectors_cost_that_image_alone(tmp_path, write_recipe):
    (tmp_path / "own").mkdir()
    (tmp_path / "maps").mkdir()
    feature = {"type": "Feature", "geometry": polygon(5, 5, 20, 20), "properties": {"what": "mine"}}
    for index, text in enumerate([json.dumps(feature), '{"type": "Feature", "geom', json.dumps(feature)]):
        picture(index, (50, 40)).save(tmp_path / "own" / f"{index}.png")
        (tmp_path / "maps" / f"{index}.geojson").write_bytes(
            text.encode() if index < 2 else text.encode().replace(b"mine", b"min\x8c")
        )
    labels = {"kind": "geojson", "path": str(tmp_path / "maps"), "field": "what"}
    reader = LabelReader(LabelsConfig(**labels), tmp_path)
    records = [Record("own", index, tmp_path / "own" / f"{index}.png", image_key=f"{index}.png") for index in range(3)]
    assert [label.name for label in reader.of(records[0], (50, 40))] == ["mine"]
    for index in (1, 2):
        with pytest.raises(Skip, match=f"{index}.geojson cannot be read as geojson") as skipped:
            reader.of(records[index], (50, 40))
        assert skipped.value.reason == "labels unreadable"


def write_geotiff(path, image: Image.Image, transform, crs: str | None = None):
    pixels = np.asarray(image).transpose(2, 0, 1)
    profile = {"count": 3, "height": image.height, "width": image.width, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", transform=transform, crs=crs, **profile) as raster:
        raster.write(pixels)


def test_geotiff_tags_tell_where_an_image_lies(tmp_path, write_recipe):
    (tmp_path / "own").mkdir()
    write_geotiff(tmp_path / "own" / "a.tif", picture(1, (50, 40)), rasterio.Affine(2, 0, 1000, 0, -2, 5000))
    feature = {"type": "Feature", "geometry": polygon(1000, 4990, 1010, 5000), "properties": {"what": "mine"}}
    (tmp_path / "map.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    labels = {"kind": "geojson", "path": str(tmp_path / "map.geojson"), "field": "what"}
    rows, _ = anchored(tmp_path, write_recipe, {"kind": "images", "path": str(tmp_path / "own")}, labels)
    assert json.loads(rows[0]["anchors"])["objects"] == [
        {"label": "mine", "position": "upper left", "box": [0.0, 0.0, 0.1, 0.125]}
    ]
    assert rows[0]["image"]["path"].endswith(".png")  # viewers know PNG


@pytest.mark.parametrize("kind", ["geojson", "shapefile"])
def test_vectors_in_another_reference_system_are_reprojected(tmp_path, kind):
    """An image in UTM zone 32 and a map in degrees; of GeoJSON in the image's own metres, nothing is reprojected."""
    write_geotiff(
        tmp_path / "a.tif", picture(1, (50, 40)), rasterio.Affine(2, 0, 500_000, 0, -2, 5_500_080), "EPSG:32632"
    )
    metres = [shapely.box(500_010, 5_500_060, 500_020, 5_500_080), shapely.box(600_000, 5_500_000, 600_010, 5_500_010)]
    in_degrees = shapely.transform(
        np.array(metres), lambda points: np.array(rasterio.warp.transform("EPSG:32632", "EPSG:4326", *points.T)).T
    )
    record = Record("own", 0, tmp_path / "a.tif", image_key="a.tif")
    for shapes, crs in ((in_degrees, "EPSG:4326"), (metres, None if kind == "geojson" else "EPSG:32632")):
        path = tmp_path / f"{crs}.{kind.replace('file', '')[:7]}".replace(":", "").replace(".shape", ".shp")
        if kind == "geojson" and crs is None:  # as files are that keep the metres and leave out what they are
            features = [{"type": "Feature", "geometry": json.loads(shapely.to_geojson(shape)), "properties": {"n": 7}} for shape in shapes]  # fmt: skip
            path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        else:
            write_shapes(path, shapes, {"n": np.array([7, 8])}, crs)
        labels = LabelsConfig(kind=kind, path=str(path), field="n")
        (label,) = LabelReader(labels, tmp_path).of(record, (50, 40))
        assert label.name == "7" and label.box == pytest.approx((0.1, 0.0, 0.2, 0.25), abs=1e-4)


def test_anchors_from_objects_and_class_folders(tmp_path, write_recipe):
    objects = [{"kind": "plane", "colour": "white", "x0": 1, "y0": 1, "x1": 9, "y1": 9}] * 2
    table = pyarrow.Table.from_pylist([{"image": {"bytes": png(picture(1)), "path": None}, "objects": objects}])
    parquet.write_table(table, tmp_path / "scenes.parquet")
    labels = {"kind": "objects", "field": "kind", "attribute": "colour"}
    _, texts = anchored(tmp_path, write_recipe, {"kind": "table", "path": str(tmp_path / "scenes.parquet")}, labels)
    assert texts == ["2 white planes (upper left 2)"]
    for name in ("BaseballDiamond", "lake"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        picture(3).save(tmp_path / "classes" / name / "x.png")
    with ChatServer() as server:
        recipe = write_recipe(
            [
                source(
                    "anchor",
                    {"kind": "class_folders", "path": str(tmp_path / "classes")},
                    labels={"kind": "class_name"},
                )
            ],
            server.url,
        )
        assert build(recipe, tmp_path / "classes-set") == 0
    assert [json.loads(row["anchors"])["text"] for row in rows_of(tmp_path / "classes-set")] == [
        "baseball diamond",
        "lake",
    ]


def test_answers_that_leave_the_anchors_out_are_refused(tmp_path, tiles, write_recipe):
    def forgetful(request):
        return long_caption(0).replace("airport", "place")

    with ChatServer(answer=forgetful) as server:
        labels = {"kind": "class_name", "names": {"airport": "runway"}}
        read = {"kind": "table", "path": str(tiles / "captions.jsonl"), "limit": 1}
        recipe = write_recipe([source("anchor", read, labels=labels)], server.url)
        assert build(recipe, tmp_path / "set", "--set", "max_failed_fraction=1") == 0
    assert [(row["text"], row["reason"]) for row in entries(tmp_path / "set", "failed")] == [("long", "missing_class")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": "compress", "long": {}}, "on route compress the short text needs a captioner and a prompt"),
        ({"route": "merge"}, "on route merge the long text is given by the source"),
        (
            source("anchor", {}, labels={"kind": "class_name"}, join=TABLE) | {"read": TABLE},
            "join brings given captions, and route anchor has none",
        ),
        ({"labels": {"kind": "geojson", "path": "nowhere.geojson"}}, "nowhere.geojson does not exist"),
        ({"long": {"captioner": "mllm", "prompt": "expand@9"}}, "prompt expand@9 was asked for and expand@1 is here"),
        (
            {"long": {"captioner": "mllm", "prompt": "anchor@1"}},
            "the place {anchors}, which nothing fills on route expand",
        ),
        ({"long": {"captioner": "other", "prompt": "expand@1"}}, "asks captioner other; the recipe has llm, mllm"),
        ({"read": {"kind": "images", "path": "nowhere"}}, "nowhere is not a folder"),
        ({"read": {"kind": "table", "path": "nowhere.csv"}}, "nowhere.csv names no"),
        ({"raed": 1}, "sources.0.raed is not a field; did you mean sources.0.read?"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(tiles, tmp_path, write_recipe, capsys, change, message):
    base = source("expand", {"kind": "table", "path": str(tiles / "captions.jsonl")})
    assert build(write_recipe([base | change]), tmp_path / "set") == 1
    assert message in capsys.readouterr().err
