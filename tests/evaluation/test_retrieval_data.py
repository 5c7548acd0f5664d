"""Captions from every format, images that recur, published files, and the one sentence that bad files get."""

import io
import json

import pytest
from PIL import Image

from evaluation.benchmarks.retrieval_data import ImageFiles, find_sources, load_retrieval
from evaluation.benchmarks.tables import read_hub


@pytest.fixture
def folder(tmp_path, images):
    (tmp_path / "tiles").mkdir()
    for index, image in enumerate(images):
        image.save(tmp_path / "tiles" / f"{index}.png")
    return tmp_path


@pytest.fixture
def rows(images, long_texts, short_texts):
    return [
        {"image": f"tiles/{index}.png", "class_name": "x", "long_text": long, "short_text": short}
        for index, (_, long, short) in enumerate(zip(images, long_texts, short_texts, strict=True))
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_as(kind, folder, rows, images):
    import datasets

    if kind == "jsonl":
        return write_lines(folder / "captions.jsonl", rows)
    if kind == "json":
        (folder / "captions.json").write_text(json.dumps(rows), encoding="utf-8")
        return folder / "captions.json"
    if kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(folder / "captions.csv")
        return folder / "captions.csv"
    if kind == "parquet of paths":
        datasets.Dataset.from_list(rows).to_parquet(folder / "captions.parquet")
        return folder / "captions.parquet"
    embedded = [row | {"image": {"bytes": png(image), "path": None}} for row, image in zip(rows, images, strict=True)]
    features = datasets.Features(
        {name: datasets.Image() if name == "image" else datasets.Value("string") for name in rows[0]}
    )
    datasets.Dataset.from_list(embedded, features=features).to_parquet(folder / "test.parquet")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet of paths", "folder with embedded images"])
@pytest.mark.parametrize("column", ["long_text", "short_text"])
def test_every_format_gives_the_same(kind, column, folder, rows, images):
    data = load_retrieval(write_as(kind, folder, rows, images), column)
    assert data.texts == [row[column] for row in rows]
    assert data.text_to_image == list(range(len(rows)))
    assert data.name == folder.name
    for image, loaded in zip(images, data.images, strict=True):
        assert loaded.tobytes() == image.tobytes()


def test_recurring_images_and_lists_of_captions_become_texts_of_one_image(folder, rows):
    rows[0]["short_text"] = ["first", "second"]
    rows.append(rows[0] | {"short_text": "third", "image": "./tiles/0.png"})
    data = load_retrieval(write_lines(folder / "own.jsonl", rows), "short_text")
    assert len(data.images) == 4 and data.name == "own"
    assert [text for text, image in zip(data.texts, data.text_to_image, strict=True) if image == 0] == [
        "first",
        "second",
        "third",
    ]


def test_only_the_column_that_is_asked_for_is_needed(folder, rows):
    for row in rows:
        del row["short_text"]
    path = write_lines(folder / "captions.jsonl", rows)
    assert len(load_retrieval(path, "long_text").texts) == 4
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 1 has no short_text; it has image, class_name"):
        load_retrieval(path, "short_text")


def test_a_column_of_a_similar_name_is_suggested(folder, rows, images):
    renamed = [{("long-text" if name == "long_text" else name): value for name, value in row.items()} for row in rows]
    with pytest.raises(ValueError, match="is long-text what you mean"):
        load_retrieval(write_as("parquet of paths", folder, renamed, images), "long_text")


def test_missing_images_are_counted_and_the_first_named(folder, rows):
    for index in (1, 3):
        (folder / "tiles" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match=r"^2 of 4 images of .*are missing.*, first: tiles/1\.png, tiles/3\.png \("):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


@pytest.mark.parametrize("value", ["", "  ", None, [], ["fine", ""]])
def test_empty_captions_are_counted_and_the_first_named(folder, rows, value):
    rows[2]["long_text"] = value
    with pytest.raises(ValueError, match=r"^1 of 4 lines of .* have no long_text, or an empty one, first: line 3$"):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


def test_a_list_of_offenders_is_capped(folder, rows):
    rows = [row | {"image": f"none/{index}.png"} for index, row in enumerate(rows * 5)]
    problem = r"^20 of 20 .*\(neither in .* nor in a folder below\), first: none/0\.png, none/1\.png, none/2\.png, …$"
    with pytest.raises(ValueError, match=problem):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


def test_images_have_trainings_limits(folder, rows):
    """A strip of a few bytes that would take gigabytes, resized by its short side."""
    Image.new("RGB", (100_000, 1)).save(folder / "tiles" / "2.png")
    data = load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")
    with pytest.raises(ValueError, match=r"image tiles/2\.png cannot be read .*the short side needs 4"):
        list(data.images)


def test_an_unreadable_image_is_named_when_it_is_opened(folder, rows):
    (folder / "tiles/2.png").write_bytes((folder / "tiles/2.png").read_bytes()[:900])
    data = load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")
    assert data.images[1].size == (48, 40)
    with pytest.raises(ValueError, match=r"image tiles/2\.png cannot be read"):
        list(data.images)


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("a.jsonl", '{"image": "x"\n', r"a\.jsonl, line 1 is not valid JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1 is not an object"),
        ("a.jsonl", "", r"a\.jsonl has no rows"),
        ("a.json", "{}", "must hold a list of objects"),
        ("a.csv", "image,short_text\n", r"a\.csv has no rows"),
        ("a.csv", "image,short_text\nx,y\n", r"a\.csv, row 1 has no long_text"),
        ("a.parquet", "no parquet", r"a\.parquet is not a readable parquet file"),
        ("a.txt", "", r"a\.txt: \.txt is not a supported format"),
        ("a.csv", b"image,long_text\nx,\xff\xff\xff", r"a\.csv is neither UTF-8 nor GB18030 text"),
    ],
)
def test_files_of_another_shape_are_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=problem):
        load_retrieval(tmp_path / name, "long_text")


def test_a_path_that_is_not_there_and_a_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match=r"captions\.jsonl does not exist"):
        load_retrieval(tmp_path / "captions.jsonl", "long_text")
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds no test\.parquet, .*for example one of: mine\.jsonl"):
        load_retrieval(tmp_path, "long_text")


def test_the_content_hash_is_of_pixels_not_of_places(folder, images):
    files = [folder / "tiles" / f"{index}.png" for index in range(4)]
    from_files = ImageFiles(files, [file.name for file in files])
    from_bytes = ImageFiles([file.read_bytes() for file in files], list("abcd"))
    assert from_files.content_hash == from_bytes.content_hash
    assert from_files[:2].content_hash != from_files.content_hash
    images[0].save(files[1])
    assert ImageFiles(files, list("abcd")).content_hash != from_files.content_hash


def test_line_separators_within_a_caption_do_not_end_the_line(folder, rows):
    path = folder / "captions.jsonl"
    text = "A road\u2028and a field.\u0085"
    path.write_text(json.dumps(rows[0] | {"long_text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_retrieval(path, "long_text").texts == [text]


# ----------------------------------------------------------------------------------------------------- published files


def empty_images(folder, count, name="{}.jpg"):
    """Files that exist; nothing opens them here."""
    folder.mkdir(parents=True)
    names = [name.format(index) for index in range(count)]
    for file in names:
        (folder / file).touch()
    return names


def karpathy(names, splits, captions=5):
    sentences = [[{"raw": f"Caption {index} of {name}.", "tokens": []} for index in range(captions)] for name in names]
    images = [
        {"filename": name, "split": split, "imgid": index, "sentences": sentences[index]}
        for index, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    return {"images": images, "dataset": "rsitmd"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_rsitmds_own_json_gives_its_test_split(tmp_path, as_folder):
    names = empty_images(tmp_path / "RSITMD" / "images", 460, "boat_{}.tif")
    path = tmp_path / "RSITMD" / "dataset_RSITMD.json"
    path.write_text(json.dumps(karpathy(names, ["train"] * 5 + ["test"] * 452 + ["val"] * 3)), encoding="utf-8")
    data = load_retrieval(path.parent if as_folder else path, "short_text")
    assert (len(data.images), len(data.texts)) == (452, 2260)
    assert data.images.sources[0] == tmp_path / "RSITMD" / "images" / "boat_5.tif"
    assert data.texts[7] == "Caption 2 of boat_6.tif." and data.text_to_image[7] == 1
    assert data.name == "RSITMD" and data.is_whole
    assert data.summary.startswith("RSITMD: 452 images, 2,260 texts, the whole test split (dataset_RSITMD.json")
    assert data.describe()["expected"] == {"images": 452, "texts": 2260}


def test_a_part_of_a_test_split_is_said_to_be_one(tmp_path):
    names = empty_images(tmp_path / "images", 7)
    path = tmp_path / "dataset_rsicd.json"
    path.write_text(json.dumps(karpathy(names, ["test"] * 7)), encoding="utf-8")
    data = load_retrieval(path, "short_text")
    assert not data.is_whole and data.describe()["whole"] is False
    assert "RSICD: 7 images, 35 texts; its test split has 1,093 and 5,465: figures do not compare" in data.summary


def test_the_long_variants_have_one_text_an_image(tmp_path):
    names = empty_images(tmp_path / "images", 452)
    rows = [{"image": name, "long_text": f"Long {name}", "short_text": ["a"] * 5} for name in names]
    path = write_lines(tmp_path / "rsitmd-l.jsonl", rows)
    long, short = load_retrieval(path, "long_text"), load_retrieval(path, "short_text")
    assert (long.name, len(long.texts), long.is_whole) == ("RSITMD-L", 452, True)
    assert (short.name, len(short.texts), short.is_whole) == ("RSITMD", 2260, True)


def test_other_data_has_no_expected_counts(folder, rows):
    data = load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")
    assert data.expected is None and data.describe()["expected"] is None
    assert data.summary == f"{folder.name}: 4 images, 4 texts (captions.jsonl: columns image and long_text)"


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda entries: entries[1].pop("sentences"), "dataset_a.json, image 2 has no sentences; each image needs"),
        (lambda entries: entries[0].pop("filename"), "image 1 has no filename"),
        (lambda entries: entries[2].update(split="val"), None),
        (lambda entries: [entry.update(split="val") for entry in entries], "no image of split test; it has val: 3"),
        (lambda entries: entries[2].update(sentences=[]), "1 of 3 test images of .*short_text, .*first: test image 3"),
        (lambda entries: entries[2]["sentences"][1].pop("raw"), "1 of 3 test images of .* have no short_text"),
    ],
)
def test_a_karpathy_file_with_missing_fields_is_named(tmp_path, change, problem):
    document = karpathy(empty_images(tmp_path / "images", 3), ["test"] * 3)
    change(document["images"])
    path = tmp_path / "dataset_a.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    if problem is None:
        assert len(load_retrieval(path, "short_text").images) == 2
    else:
        with pytest.raises(ValueError, match=problem):
            load_retrieval(path, "short_text")


def test_short_captions_are_not_taken_for_long_ones(tmp_path):
    path = tmp_path / "dataset_rsitmd.json"
    path.write_text(json.dumps(karpathy(empty_images(tmp_path / "images", 1), ["test"])), encoding="utf-8")
    with pytest.raises(ValueError, match="has short captions only .*RSITMD-L"):
        load_retrieval(path, "long_text")


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_rs5ms_csv_in_its_encoding(tmp_path, encoding, delimiter):
    empty_images(tmp_path / "RSICD_images", 2, "airport_{}.jpg")
    captions = ["A “large” airport\u2019s apron.", "Two runways.", "It is 3 km long, or more.", "飞机", "Grass."]
    lines = [delimiter.join(["filename", "title"])]
    for image in (0, 1):
        lines += [f'airport_{image}.jpg{delimiter}"{caption}"' for caption in captions]
    (tmp_path / "rsicd_test.csv").write_bytes("\n".join(lines).encode(encoding))
    data = load_retrieval(tmp_path, "short_text")
    assert data.texts == captions * 2 and data.text_to_image == [0] * 5 + [1] * 5
    assert data.images.names == ["airport_0.jpg", "airport_1.jpg"]
    assert ("gb18030" in data.read_from) == (encoding == "gb18030") and "columns filename and title" in data.read_from


@pytest.mark.parametrize("every", [1, 5])
def test_amfmns_line_pairs(tmp_path, every):
    empty_images(tmp_path / "images", 2)
    captions = [f"Caption {index}." for index in range(10)]
    (tmp_path / "test_caps.txt").write_text("\n".join(captions) + "\n")
    names = ["0.jpg"] * 5 + ["1.jpg"] * 5 if every == 1 else ["0.jpg", "1.jpg"]
    (tmp_path / "test_filename.txt").write_text("\n".join(names) + "\n")
    data = load_retrieval(tmp_path, "short_text")
    assert data.texts == captions and data.text_to_image == [0] * 5 + [1] * 5
    assert data.name == tmp_path.name
    (tmp_path / "test_filename.txt").write_text("0.jpg\n" * 3)
    with pytest.raises(ValueError, match="has 10 captions, test_filename.txt 3 images"):
        load_retrieval(tmp_path, "short_text")
    (tmp_path / "test_filename.txt").unlink()
    with pytest.raises(ValueError, match="needs test_filename.txt beside it"):
        load_retrieval(tmp_path, "short_text")
    with pytest.raises(ValueError, match="short captions only"):
        load_retrieval(tmp_path, "long_text")


def test_a_folder_with_two_caption_files_asks_which(tmp_path):
    for name in ("rsitmd_test.csv", "rsicd_test.csv"):
        (tmp_path / name).write_text("filename,title\n")
    with pytest.raises(ValueError, match=r"several caption files \(rsicd_test\.csv, rsitmd_test\.csv\); name one"):
        load_retrieval(tmp_path, "short_text")


def test_a_folder_of_benchmarks_gives_those_with_the_texts_asked_for(tmp_path):
    for name in ("RSITMD", "RSITMD-L", "EuroSAT"):
        (tmp_path / name).mkdir()
    empty_images(tmp_path / "RSITMD/images", 1)
    short = karpathy(["0.jpg"], ["test"])
    (tmp_path / "RSITMD/dataset_RSITMD.json").write_text(json.dumps(short))
    write_lines(tmp_path / "RSITMD-L/test.jsonl", [{"image": "0.jpg", "long_text": "Long."}])
    assert find_sources(tmp_path, "short_text") == [str(tmp_path / "RSITMD")]
    assert find_sources(tmp_path, "long_text") == [str(tmp_path / "RSITMD-L")]
    assert find_sources(tmp_path / "RSITMD", "long_text") == [str(tmp_path / "RSITMD")]  # what it lacks, loading says
    assert find_sources("somebody/rsicd", "short_text") == ["somebody/rsicd"]
    (tmp_path / "RSITMD-L/test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"none of the caption files in .* \(RSITMD\) has a long_text"):
        find_sources(tmp_path, "long_text")


@pytest.mark.parametrize("name", ["aid.tar", "train.jsonl", "train-0.parquet", "metadata.csv"])
def test_what_lies_beside_benchmarks_hides_none(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    assert find_sources(tmp_path, "short_text") == [str(tmp_path)]
    (tmp_path / "RSITMD").mkdir()
    write_lines(tmp_path / "RSITMD/test.jsonl", [{"image": "0.jpg", "short_text": "Short."}])
    assert find_sources(tmp_path, "short_text") == [str(tmp_path / "RSITMD")]
    assert find_sources(tmp_path, "long_text") == [str(tmp_path)]  # nobody below has any
    (tmp_path / "captions.csv").touch()
    assert find_sources(tmp_path, "short_text") == [str(tmp_path)]


def test_a_clone_of_a_data_set_is_one_source(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000.parquet").touch()
    assert find_sources(tmp_path, "short_text") == [str(tmp_path)]


def test_images_are_found_in_the_folder_below_that_holds_most_of_them(folder, rows):
    (folder / "thumbnails").mkdir()
    (folder / "thumbnails" / "0.png").touch()
    for row in rows:
        row["image"] = row["image"].removeprefix("tiles/")
    data = load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")
    assert {source.parent.name for source in data.images.sources} == {"tiles"}


def test_a_data_set_as_the_hub_loads_it(folder, rows, images):
    write_as("folder with embedded images", folder, rows, images)  # load_dataset takes a folder as it takes an id
    table = read_hub(str(folder), ("captions", "short_text"))
    assert table.values == [row["short_text"] for row in rows]
    assert table.images[0]["bytes"] == png(images[0])
    assert table.how == "columns image and short_text, split test"
    with pytest.raises(ValueError, match="neither a path nor a Hub data set"):
        read_hub(str(folder), ("short_text",), split="nonesuch")


# ------------------------------------------------------------------------------------------------------- allow_missing


def damage(folder):
    """One image of four missing, one cut short."""
    (folder / "tiles/1.png").unlink()
    (folder / "tiles/2.png").write_bytes((folder / "tiles/2.png").read_bytes()[:900])


@pytest.mark.parametrize("allowed", [2, 3])
def test_images_may_be_left_out_up_to_a_number(folder, rows, allowed):
    path = write_lines(folder / "captions.jsonl", [*rows, rows[1] | {"long_text": "again"}])
    whole = load_retrieval(path, "long_text")
    damage(folder)
    data = load_retrieval(path, "long_text", allow_missing=allowed)
    assert data.images.names == ["tiles/0.png", "tiles/3.png"]
    assert data.texts == [whole.texts[0], whole.texts[3]] and data.text_to_image == [0, 1]
    assert data.skipped[0] == "tiles/1.png (missing)" and data.skipped[1].startswith("tiles/2.png (")
    assert "2 images left out, first: tiles/1.png (missing)" in data.summary
    assert data.describe()["skipped"] == list(data.skipped)
    assert [image.size for image in data.images] == [(48, 40)] * 2


def test_one_more_is_an_error_that_names_them(folder, rows):
    path = write_lines(folder / "captions.jsonl", rows)
    damage(folder)
    with pytest.raises(
        ValueError, match=r"^2 of 4 images .* are missing or cannot be read .*first: tiles/1\.png \(mis"
    ):
        load_retrieval(path, "long_text", allow_missing=1)
    with pytest.raises(ValueError, match=r"--allow-missing 1 does not cover them; --allow-missing 2 would"):
        load_retrieval(path, "long_text", allow_missing=1)
    with pytest.raises(ValueError, match=r"^1 of 4 images .* are missing .*--allow-missing 1 would leave them out"):
        load_retrieval(path, "long_text")


def test_not_all_images_may_be_left_out(folder, rows):
    path = write_lines(folder / "captions.jsonl", rows)
    for index in range(4):
        (folder / "tiles" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match="^4 of 4 images"):
        load_retrieval(path, "long_text", allow_missing=9)
    with pytest.raises(ValueError, match="allow_missing=-1 must be 0 or more"):
        load_retrieval(path, "long_text", allow_missing=-1)
