"""Class folders, splits, tables and ClassLabels; the class-name files; the one sentence that bad data gets."""

import io
import json
import re

import pytest

from evaluation.benchmarks import class_names
from evaluation.benchmarks.aerial_scenes.data_set import CLASS_NAMES, write_dataset
from evaluation.benchmarks.class_names import (
    derive_wording,
    find_dataset,
    known_datasets,
    load_templates,
)
from evaluation.benchmarks.classification_data import find_sources, load_classification
from evaluation.benchmarks.tables import plain
from evaluation.paper import dataset_key, paper_tables


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def unknown_folders(tmp_path, images):
    """Two classes of a data set that nobody knows."""
    for index, image in enumerate(images):
        save(image, tmp_path / "tiles" / ("ParkingLot" if index % 2 else "open_water") / f"{index}.png")
    return tmp_path / "tiles"


# --------------------------------------------------------------------------------------------------------- class names


CLASS_COUNTS = {  # as published with the data sets
    "resisc45": 45,
    "eurosat": 10,
    "patternnet": 38,
    "whu_rs19": 19,
    "optimal31": 31,
    "rs_c11": 11,
    "aid": 30,
    "uc_merced": 21,
    "skyscript": 70,
    "fmow": 62,
    "millionaid": 51,
    "rsicb256": 35,
    "rsicb128": 45,
    "aerial_scenes": 10,
}


def test_every_class_file_is_complete_and_unambiguous():
    assert {key: len(dataset.classes) for key, dataset in known_datasets().items()} == CLASS_COUNTS
    for key, dataset in known_datasets().items():
        wordings = dataset.wordings()
        assert len(set(wordings)) == len(wordings), key
        assert all(re.fullmatch(r"[a-z]+( [a-z]+)*", wording) for wording in wordings), key
        further = [plain(name) for name in sum(dataset.also.values(), ())]
        known = {plain(name) for name in (*dataset.classes, *wordings)}
        assert len(set(further)) == len(further) and not known & set(further), key
        assert set(dataset.also) <= set(dataset.classes), key
        for index, (folder, wording) in enumerate(dataset.classes.items()):
            assert dataset.find_class(folder) == dataset.find_class(wording) == index, (key, folder)


def test_the_scenes_file_has_the_generators_classes():
    assert known_datasets()["aerial_scenes"].folders == list(CLASS_NAMES)


def test_the_papers_data_sets_are_its_table_iv_with_its_counts():
    columns = paper_tables()["tables"]["IV"]["columns"]
    ours = [dataset for dataset in known_datasets().values() if dataset.in_paper]
    assert [dataset_key("zic", dataset.name) for dataset in ours] == [name for name in columns if name != "mean"]
    for dataset in ours:
        assert paper_tables()["datasets"][dataset_key("zic", dataset.name)]["images"] == dataset.images
        figures = [
            row[columns.index(dataset_key("zic", dataset.name))]
            for row in paper_tables()["tables"]["IV"]["rows"].values()
        ]
        # Every printed accuracy is a multiple of 1/images, where that can be told from two digits (one erratum apart).
        if dataset.images < 5000:
            odd = [f for f in figures if round(100 * round(f * dataset.images / 100) / dataset.images, 2) != f]
            assert len(odd) <= 1, (dataset.name, odd)


@pytest.mark.parametrize(
    "name, key",
    [
        ("NWPU-RESISC45", "resisc45"),
        ("EuroSAT_RGB", "eurosat"),
        ("eurosat-rgb", "eurosat"),
        ("WHURS19", "whu_rs19"),
        ("Optimal-31", "optimal31"),
        ("RS_C11_Database", "rs_c11"),
        ("RSC11", "rs_c11"),
        ("UCMerced_LandUse", "uc_merced"),
        ("UCMerced", "uc_merced"),
        ("PatternNet", "patternnet"),
        ("AID", "aid"),
        ("SkyScript_cls", "skyscript"),
        ("fMoW-rgb", "fmow"),
        ("Million-AID", "millionaid"),
        ("RSI-CB256", "rsicb256"),
        ("rsicb256", "rsicb256"),
        ("RSI-CB128", "rsicb128"),
    ],
)
def test_data_sets_are_known_by_the_names_people_give_them(name, key):
    assert find_dataset(name).key == key


def test_other_names_are_not_taken_for_a_known_data_set():
    assert find_dataset("said", "my_aid_2", "eurosat-l1c", "") is None


@pytest.mark.parametrize(
    "folder, wording",
    [
        ("BaseballField", "baseball field"),
        ("baseball_field", "baseball field"),
        ("oil-gas field", "oil gas field"),
        ("parkinglot", "parking" + "lot"),
        ("School2", "school2"),
    ],
)
def test_a_wording_is_derived_from_an_unknown_folder(folder, wording):
    assert derive_wording(folder) == wording


def test_the_folder_wording_is_lower_case_with_underscores_as_spaces():
    assert known_datasets()["eurosat"].wordings("folder")[0] == "annualcrop"
    assert known_datasets()["resisc45"].wordings("folder")[2] == "baseball diamond"
    assert known_datasets()["eurosat"].wordings("human")[0] == "annual crop land"


def test_template_sets_and_files(tmp_path):
    assert load_templates("paper").templates == ("a satellite photo of {class_name}",)
    assert load_templates("plain").fill("sea or lake") == ["sea or lake"]
    sets = json.loads((class_names.FOLDER / "templates.json").read_text())["sets"]
    for name in sets:
        assert all("{class_name}" in template for template in load_templates(name).templates)
    path = tmp_path / "templates.txt"
    path.write_text("an aerial view\n")
    with pytest.raises(ValueError, match=r"templates\.txt, template 1 \('an aerial view'\) has no \{class_name\}"):
        load_templates(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no templates"):
        load_templates(str(path))
    with pytest.raises(ValueError, match="neither a file nor one of paper, plain"):
        load_templates("none")


# ------------------------------------------------------------------------------------------------------------- folders


def test_class_folders_of_an_own_data_set(unknown_folders):
    data = load_classification(unknown_folders)
    assert data.name == "tiles" and data.dataset.key is None
    assert data.dataset.classes == {"ParkingLot": "parking lot", "open_water": "open water"}
    assert data.images.names == ["ParkingLot/1.png", "ParkingLot/3.png", "open_water/0.png", "open_water/2.png"]
    assert data.labels == [0, 0, 1, 1]
    assert "derived from the folders' names (ParkingLot = 'parking lot', open_water = 'open water')" in data.summary
    assert data.describe()["expected"] is None


def test_splits_are_merged(tmp_path, images):
    for index, (split, name) in enumerate([("train", "a"), ("train", "b"), ("Test", "a"), ("val", "b")]):
        save(images[index], tmp_path / "own" / split / name / "0.png")
    data = load_classification(tmp_path / "own")
    assert data.images.names == ["Test/a/0.png", "train/a/0.png", "train/b/0.png", "val/b/0.png"]
    assert data.labels == [0, 0, 1, 1]
    assert data.read_from == "own: class folders of Test + train + val"


@pytest.mark.parametrize("inside", ["", "Images", "2750/images"])
def test_a_known_data_set_keeps_all_its_classes_whatever_its_folders_are_called(tmp_path, images, inside):
    root = tmp_path / "EuroSAT" / inside
    for image, name in zip(images, ["annual_crop", "SEALAKE", "Industrial Buildings", "AnnualCrop"], strict=True):
        save(image, root / name / "0.png")
    for source in (tmp_path / "EuroSAT", root):
        data = load_classification(source)
        assert data.name == "EuroSAT" and len(data.dataset.classes) == 10
        folders = data.dataset.folders
        assert sorted(folders[label] for label in data.labels) == [
            "AnnualCrop",
            "AnnualCrop",
            "Industrial",
            "SeaLake",
        ]
        assert "the data set has 27,000: figures do not compare" in data.summary
        assert "no image of 7 classes (Forest, HerbaceousVegetation, Highway)" in data.summary


def test_groups_of_classes_of_a_known_data_set_are_seen_through(tmp_path, images):
    places = ["woodland/forest", "water area/sea", "transportation/Parkinglot", "woodland/forest"]
    for index, (image, path) in enumerate(zip(images, places, strict=True)):
        save(image, tmp_path / "RSI-CB256" / path / f"{index}.png")
        save(image, tmp_path / "mine" / path / f"{index}.png")
    data = load_classification(tmp_path / "RSI-CB256")
    assert sorted(data.dataset.folders[label] for label in data.labels) == ["forest", "forest", "parkinglot", "sea"]
    assert data.dataset.wordings()[data.dataset.find_class("parkinglot")] == "parking lot"
    assert find_sources(tmp_path) == [str(tmp_path / "RSI-CB256")]  # of `mine` nobody knows which folders are classes
    with pytest.raises(ValueError, match="holds no class folders"):
        load_classification(tmp_path / "mine")


def test_a_folder_without_a_name_mapping_is_named(tmp_path, images):
    for image, name in zip(images, ["Airport", "Harbour", "Residentail"], strict=False):
        save(image, tmp_path / "WHU-RS19" / name / "0.png")
    with pytest.raises(ValueError, match=r"class 'Harbour' and 1 more have no name in .*whu_rs19\.json .*version 1"):
        load_classification(tmp_path / "WHU-RS19")
    (tmp_path / "WHU-RS19/Harbour").rename(tmp_path / "WHU-RS19/Port")
    with pytest.raises(ValueError, match=r"class 'Residentail' has no name in .*\(is it Residential\?\)"):
        load_classification(tmp_path / "WHU-RS19")


def test_a_source_may_say_which_data_set_it_is(unknown_folders, tmp_path):
    (unknown_folders / "ParkingLot").rename(unknown_folders / "parking")
    (unknown_folders / "open_water").rename(unknown_folders / "pond")
    data = load_classification(f"whu-rs19={unknown_folders}")
    assert data.name == "WHU-RS19" and {data.dataset.folders[label] for label in data.labels} == {"Parking", "Pond"}
    odd = tmp_path / "a=b"
    unknown_folders.rename(odd)
    assert load_classification(odd).name == "a=b"


def test_what_is_no_image_is_counted_and_hidden_files_are_not(unknown_folders):
    (unknown_folders / "ParkingLot/Thumbs.db").touch()
    (unknown_folders / "ParkingLot/.DS_Store").touch()
    (unknown_folders / "labels").mkdir()
    (unknown_folders / ".ipynb_checkpoints").mkdir()
    data = load_classification(unknown_folders)
    assert len(data.images) == 4
    assert data.left_out == ("1 files that are no images (.db)", "folders without images: labels")
    assert "1 files that are no images (.db)" in data.summary


def test_a_folder_of_data_sets(unknown_folders, tmp_path, images):
    for name in ("beach", "forest"):
        save(images[0], tmp_path / f"UCMerced_LandUse/Images/{name}/a.png")
    save(images[0], tmp_path / "RSITMD/images/a.png")  # no classes
    (tmp_path / "notes").mkdir()
    assert find_sources(tmp_path) == [str(tmp_path / "UCMerced_LandUse"), str(unknown_folders)]
    assert find_sources(unknown_folders) == [str(unknown_folders)]
    assert find_sources("timm/eurosat-rgb") == ["timm/eurosat-rgb"]
    with pytest.raises(ValueError, match="holds neither class folders with images"):
        find_sources(tmp_path / "notes")


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda path: (path / "empty").mkdir(parents=True), "holds no class folders with images"),
        (lambda path: None, "does not exist; give a folder of class folders"),
    ],
)
def test_a_source_without_classes(tmp_path, make, problem):
    make(tmp_path / "own")
    with pytest.raises(ValueError, match=problem):
        load_classification(tmp_path / "own")


def test_one_class_is_not_enough(tmp_path, images):
    save(images[0], tmp_path / "own/only/0.png")
    assert find_sources(tmp_path / "own") == [str(tmp_path / "own")]
    with pytest.raises(ValueError, match=r"has one class only \(only\)"):
        load_classification(tmp_path / "own")


def test_images_may_be_left_out_up_to_a_number(unknown_folders):
    path = unknown_folders / "open_water/2.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"image open_water/2\.png cannot be read"):
        list(load_classification(unknown_folders).images)
    data = load_classification(unknown_folders, allow_missing=1)
    assert len(data.images) == 3 and data.labels == [0, 0, 1]
    assert data.skipped[0].startswith("open_water/2.png (")
    (unknown_folders / "ParkingLot/1.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^2 of 4 images of .*are missing or cannot be read, first: ParkingLot/1\.png"
    ):
        load_classification(unknown_folders, allow_missing=1)


# -------------------------------------------------------------------------------------------------------------- tables


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, names):
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": png(image), "path": None}, "label": label} for image, label in zip(images, labels)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def test_class_labels_of_parquet_files_all_splits(tmp_path, images):
    names = ["airport", "football field", "railway station"]
    write_parquet(tmp_path / "WHU-RS19/data/train-00000-of-00001.parquet", images[:3], [2, 0, 1], names)
    write_parquet(tmp_path / "WHU-RS19/data/test-00000-of-00001.parquet", images[2:], [1, 2], names)
    data = load_classification(tmp_path / "WHU-RS19")
    folders = [data.dataset.folders[label] for label in data.labels]
    assert folders == ["footballField", "railwayStation", "railwayStation", "Airport", "footballField"]
    assert len(data.images) == 5  # the same picture twice is two images


def test_class_labels_of_a_data_set_of_the_hub(tmp_path, images):
    from evaluation.benchmarks.tables import read_hub

    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", images[:2], [1, 0], ["a", "b"])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[2:], [1, 1], ["a", "b"])
    table = read_hub(str(tmp_path), ("label",), split=None)
    assert [table.label_names[value] for value in table.values] == ["b", "a", "b", "b"]
    assert table.how == "columns image and label, split train + test"


def test_a_number_without_a_name_and_an_image_of_two_classes_are_errors(tmp_path, images):
    write_parquet(tmp_path / "own.parquet", images, [0, 1, -1, 0], ["a", "b"])
    with pytest.raises(ValueError, match=r"1 of 4 rows of .*own\.parquet have no class name, first: row 3"):
        load_classification(tmp_path / "own.parquet")
    save(images[0], tmp_path / "0.png")
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"image": "0.png", "class_name": name}) for name in "ab"))
    with pytest.raises(ValueError, match=r"gives 0\.png two classes, a and b"):
        load_classification(path)


def test_the_class_column_of_a_caption_file(tmp_path, images):
    rows = []
    for index, image in enumerate(images):
        save(image, tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "class_name": "two words" if index else "one", "short_text": "x"})
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_classification(path)
    assert data.name == tmp_path.name and data.dataset.wordings() == ["one", "two words"]
    assert data.labels == [0, 1, 1, 1]
    path.write_text("\n".join(json.dumps({"image": "0.png"}) for _ in rows))
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 1 has no label; it has image"):
        load_classification(path)


def test_the_drawn_scenes_have_their_classes(tmp_path):
    counts = {"train": 4, "test": 12, "localization": 1}
    write_dataset(tmp_path / "scenes", counts, seed=0, image_size=48, workers=1)
    for source in (tmp_path / "scenes", tmp_path / "scenes/test.parquet"):
        data = load_classification(source)
        assert data.dataset.key == "aerial_scenes" and len(data.images) == 12  # the held-out ones
        assert len(data.dataset.classes) == 10 and len(set(data.labels)) > 1
    assert find_sources(tmp_path / "scenes") == [str(tmp_path / "scenes")]
    assert find_sources(tmp_path) == [str(tmp_path / "scenes")]
