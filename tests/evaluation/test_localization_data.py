"""Scenes, queries and regions from each source, and what is wrong with them said in one sentence."""

import json

import pytest
from PIL import Image

from evaluation.benchmarks.aerial_scenes.data_set import write_dataset
from evaluation.benchmarks.localization_data import AIR_SLT_COUNTS, find_sources, load_localization
from evaluation.benchmarks.tables import NotHere


SQUARE = [[10.5, 20], [60, 20], [60, 70.25]]


@pytest.fixture
def folder(tmp_path):
    """AIR-SLT's folder, with two images and three queries."""
    (tmp_path / "imgs").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (200, 100), "green").save(tmp_path / "imgs" / "0.jpg")
    Image.new("L", (80, 90)).save(tmp_path / "imgs" / "1.jpg")
    write(tmp_path, [("a pond.\n", "0.jpg", [SQUARE]), ("a road", "1.jpg", [SQUARE]), ("two", "0.jpg", [SQUARE] * 3)])
    return tmp_path


def write(folder, rows):
    rows = [{"caption": caption, "jpg_name": name, "points": points} for caption, name, points in rows]
    (folder / "annotations" / "anno.json").write_text(json.dumps(rows), encoding="utf-8")


def test_air_slt_as_published(folder):
    for source in (folder, folder / "annotations" / "anno.json", str(folder)):
        data = load_localization(source)
        assert (data.name, data.images.names, data.sizes) == ("AIR-SLT", ["0.jpg", "1.jpg"], [(100, 200), (90, 80)])
        assert (data.texts, data.text_to_image) == (["a pond.", "a road", "two"], [0, 1, 0])
        assert data.regions == [[SQUARE], [SQUARE], [SQUARE] * 3]
        assert data.counts == {"images": 2, "texts": 3, "regions": 5, "regions_over_the_edge": 0}
        assert data.expected == AIR_SLT_COUNTS == {"images": 22, "texts": 59, "regions": 103}


def test_what_was_found_is_told_against_what_was_published(folder):
    data = load_localization(folder)
    assert not data.is_whole and data.describe()["expected"] == AIR_SLT_COUNTS
    assert data.summary == (
        "AIR-SLT: 2 scenes, 3 queries, 5 regions; it has 22, 59 and 103: figures do not compare with published ones "
        f"({folder}/annotations/anno.json)"
    )
    rows = [("a", f"{index % 22}.jpg", [SQUARE] * (2 if index < 44 else 1)) for index in range(59)]
    for index in range(22):
        Image.new("RGB", (80, 90)).save(folder / "imgs" / f"{index}.jpg")
    write(folder, rows)
    whole = load_localization(folder)
    assert whole.is_whole and "22 scenes, 59 queries, 103 regions, all of it" in whole.summary


def test_sources_are_found_below_a_folder(folder, tmp_path):
    assert find_sources(folder) == [str(folder)]
    above = tmp_path / "sets"
    for name in ("one", "two", "other"):
        (above / name).mkdir(parents=True)
    for name in ("one", "two"):
        (above / name / "localization.jsonl").write_text("")
    assert find_sources(above) == [str(above / "one"), str(above / "two")]
    assert find_sources("nowhere.jsonl") == ["nowhere.jsonl"]
    with pytest.raises(NotHere, match="other holds none of"):
        find_sources(above / "other")


def test_json_lines(folder):
    rows = [{"image": "imgs/1.jpg", "text": "a\u2028b", "polygons": [SQUARE, [[-5, 5], [20, 5], [20, 30]]]}]
    (folder / "localization.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n\n", encoding="utf-8")
    data = load_localization(folder / "localization.jsonl")
    assert (data.name, data.texts, data.expected) == (folder.name, ["a\u2028b"], {})
    assert data.counts["regions_over_the_edge"] == 1


def test_the_embedded_landscapes(tmp_path):
    write_dataset(tmp_path / "scenes", {"train": 1, "localization": 2}, seed=0, image_size=32, workers=1)
    data = load_localization(tmp_path / "scenes")
    assert data.name == "scenes" and data.sizes == [(128, 128)] * 2 and len(data.texts) == 16
    assert data.images[1].size == (128, 128) and data.text_to_image == [0] * 8 + [1] * 8


def test_turned_images_are_measured_upright(folder):
    image = Image.new("RGB", (200, 100))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "imgs" / "0.jpg", exif=exif)
    data = load_localization(folder)
    assert data.sizes[0] == (200, 100) and data.images[0].size == (100, 200)


def test_queries_and_images_have_hashes(folder):
    before = load_localization(folder)
    write(folder, [("a pond", "0.jpg", [SQUARE]), ("a road", "1.jpg", [SQUARE])])
    after = load_localization(folder)
    assert before.images.content_hash == after.images.content_hash and before.queries_hash != after.queries_hash


def test_missing_images_may_be_left_out_up_to_a_number(folder):
    (folder / "imgs" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images of .*anno\.json are missing.*0\.jpg.*--allow-missing 1"):
        load_localization(folder)
    data = load_localization(folder, allow_missing=1)
    assert (data.texts, data.images.names, data.skipped) == (["a road"], ["1.jpg"], ["0.jpg (missing)"])


@pytest.mark.parametrize(
    "rows, problem",
    [
        (
            [("a pond", "0.jpg", [[[300, 10], [400, 10], [400, 90]]])],
            "entry 1, image 0.jpg: region 0 reaches from x 300",
        ),
        ([("a", "1.jpg", [SQUARE]), ("b", "0.jpg", [])], "entry 2, image 0.jpg: no region is given"),
        ([("a", "1.jpg", [[[1, 2], [3, 4]]])], "entry 1, image 1.jpg: region 0 must be at least three corners"),
        ([("a", "1.jpg", "none")], "entry 1: the regions must be a list of polygons, got 'none'"),
        ([("  ", "1.jpg", [SQUARE])], "entry 1 has an empty text"),
        ([("a", None, [SQUARE])], "entry 1: jpg_name must be the path of an image, got None"),
        ([], "anno.json has no queries"),
    ],
)
def test_bad_queries_are_named(rows, problem, folder):
    write(folder, rows)
    with pytest.raises(ValueError, match=problem):
        load_localization(folder)


@pytest.mark.parametrize(
    "name, content, problem",
    [
        (
            "localization.jsonl",
            '{"image": "a.png", "text": "b"}',
            "line 1 has no polygons; a query has the fields image",
        ),
        ("localization.jsonl", '{"image": ', "line 1 is not valid JSON"),
        ("anno.json", '{"caption": "a"}', "must hold a list of queries with jpg_name, caption, points"),
        ("anno.json", '["a"]', "entry 1 has no jpg_name and no caption and no points"),
        ("queries.txt", "", "txt is not supported; use .json, .jsonl or .parquet"),
        ("localization.parquet", "no parquet", "is not a readable parquet file"),
    ],
)
def test_bad_files_are_named(name, content, problem, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem) as error:
        load_localization(tmp_path / name)
    other_kind = problem.startswith(("line 1 has no", "must hold", "entry 1 has no", "txt"))
    assert isinstance(error.value, NotHere) == other_kind  # captions for another task, perhaps


def test_a_later_line_without_regions_is_an_error(folder):
    rows = [{"image": "imgs/0.jpg", "text": "a", "polygons": [SQUARE]}, {"image": "imgs/0.jpg", "text": "a"}]
    (folder / "localization.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="line 2 has no polygons") as error:
        load_localization(folder / "localization.jsonl")
    assert not isinstance(error.value, NotHere)


def test_other_columns_missing_files_and_broken_images_are_named(folder, tmp_path):
    write_dataset(tmp_path / "scenes", {"train": 1}, seed=0, image_size=32, workers=1)
    for source, problem in (
        (tmp_path / "scenes", r"holds none of annotations/anno\.json, anno\.json, localization\.jsonl"),
        (tmp_path / "scenes" / "train.parquet", "must have the columns image and queries; it has image, class_name"),
        (tmp_path / "nothing", "nothing does not exist; give a folder with one of"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_localization(source)
    (folder / "imgs" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 1\.jpg cannot be read"):
        load_localization(folder)
