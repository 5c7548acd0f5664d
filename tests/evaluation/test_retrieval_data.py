"""Captions from every format, images that recur, and the one sentence that bad files get."""

import io
import json

import pytest

from evaluation.benchmarks.retrieval_data import ImageFiles, load_retrieval


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
    with pytest.raises(ValueError, match=r"^2 of 4 images of .*are missing.*, first: tiles/1\.png, tiles/3\.png$"):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


@pytest.mark.parametrize("value", ["", "  ", None, [], ["fine", ""], 3])
def test_empty_captions_are_counted_and_the_first_named(folder, rows, value):
    rows[2]["long_text"] = value
    with pytest.raises(ValueError, match=r"^1 of 4 lines of .* have no long_text, or an empty one, first: line 3$"):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


def test_a_list_of_offenders_is_capped(folder, rows):
    rows = [row | {"image": f"none/{index}.png"} for index, row in enumerate(rows * 5)]
    with pytest.raises(ValueError, match=r"^20 of 20 .*none/0\.png, none/1\.png, none/2\.png, …$"):
        load_retrieval(write_lines(folder / "captions.jsonl", rows), "long_text")


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
    ],
)
def test_files_of_another_shape_are_named(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        load_retrieval(tmp_path / name, "long_text")


def test_a_path_that_is_not_there_and_a_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match=r"captions\.jsonl does not exist"):
        load_retrieval(tmp_path / "captions.jsonl", "long_text")
    (tmp_path / "captions.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds no test\.parquet; .*for example one of: captions\.jsonl"):
        load_retrieval(tmp_path, "long_text")


def test_the_content_hash_is_of_pixels_not_of_places(folder, images):
    files = [folder / "tiles" / f"{index}.png" for index in range(4)]
    from_files = ImageFiles(files, [file.name for file in files])
    from_bytes = ImageFiles([file.read_bytes() for file in files], list("abcd"))
    assert from_files.content_hash == from_bytes.content_hash
    assert from_files[:2].content_hash != from_files.content_hash
    images[0].save(files[1])
    assert ImageFiles(files, list("abcd")).content_hash != from_files.content_hash
