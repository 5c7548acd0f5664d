"""Pairs from every kind of source, visits that can be repeated, and offenders named."""

import json
import random
import re
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from modeling_lrsclip.encoding.imagery import read_image
from training.data.batches import Collator
from training.data.inspection import inspect_pairs
from training.data.pairs import CaptionedImages, DataConfig, load_pairs, shuffle_sentences, split_sentences
from training.data.visiting_order import EpochOrder, Mixture, VisitSampler


KINDS = ["long", "short"]


def pairs_of(source, kinds=KINDS, **fields):
    return load_pairs(DataConfig(train=str(source), **fields), kinds)


def data_of(source, seed=0, **fields):
    config = DataConfig(train=str(source), **fields)
    return CaptionedImages(load_pairs(config, KINDS), config, seed)


def sampler(rows, batch_size, steps, seed, start=0, rank=0, world=1):
    order = Mixture([EpochOrder([rows], None, seed)])
    return VisitSampler(order, batch_size, steps, start, (rank, world))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


@pytest.fixture
def sources(captioned_folder, tmp_path):
    """The same 12 pairs in every form."""
    rows = rows_of(captioned_folder)
    absolute = [row | {"image": str(captioned_folder / row["image"])} for row in rows]
    table = Dataset.from_list(absolute)
    table.to_csv(tmp_path / "pairs.csv")
    table.to_csv(tmp_path / "pairs.tsv", sep="\t")
    (tmp_path / "pairs.json").write_text(json.dumps(absolute))
    features = Features({"image": ImageFeature(), "long_text": Value("string"), "short_text": Value("string")})
    embedded = [row | {"image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in absolute]
    Dataset.from_list(embedded, features=features).to_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "folder").mkdir()
    Dataset.from_list(embedded, features=features).to_parquet(tmp_path / "folder" / "train.parquet")
    names = ["pairs.csv", "pairs.tsv", "pairs.json", "pairs.parquet", "folder"]
    return [captioned_folder, captioned_folder / "captions.jsonl", *(tmp_path / name for name in names)]


def test_every_source_gives_the_same_pairs(sources, captioned_folder):
    expected = rows_of(captioned_folder)
    for source in sources:
        pairs = pairs_of(source)
        assert list(pairs.texts("short")) == [row["short_text"] for row in expected], source
        image = read_image(pairs.read([3])[0].image)
        assert image.tobytes() == Image.open(captioned_folder / "3.png").tobytes(), source


def test_other_column_names(captioned_folder, tmp_path):
    renamed = [{"file": row["image"], "text": row["long_text"]} for row in rows_of(captioned_folder)]
    for row in renamed:
        row["file"] = str(captioned_folder / row["file"])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    pairs = pairs_of(tmp_path / "data.jsonl", ["long"], image_column="file", long_column="text")
    assert len(pairs) == 12 and pairs.kinds == ("long",)
    assert pairs.read([2])[0].long == renamed[2]["text"] and pairs.read([2])[0].short is None


class TestErrors:
    def write(self, path, rows):
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    def load(self, source):
        return pairs_of(source)

    def test_missing_images_are_counted_and_named(self, captioned_folder, tmp_path):
        source = self.write(tmp_path / "captions.jsonl", rows_of(captioned_folder))
        with pytest.raises(
            ValueError, match="12 images that do not exist, the first: .*0.png, .*1.png, .*2.png; mend"
        ):
            self.load(source)

    def test_empty_captions(self, captioned_folder):
        rows = rows_of(captioned_folder)
        rows[4]["short_text"] = "  "
        rows[7]["short_text"] = None
        with pytest.raises(ValueError, match="2 rows with an empty short_text, the first: 4, 7"):
            self.load(self.write(captioned_folder / "empty.jsonl", rows))

    def test_missing_column(self, captioned_folder):
        rows = [{"image": "0.png", "words": "a"}]
        with pytest.raises(ValueError, match="no column 'long_text', 'short_text'; it has image, words"):
            self.load(self.write(captioned_folder / "column.jsonl", rows))

    def test_no_source(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            self.load("nowhere.jsonl")
        with pytest.raises(ValueError, match="holds no caption file; name it one of train.parquet, train.jsonl"):
            self.load(str(tmp_path))
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match="must end in one of .parquet, .jsonl"):
            self.load(str(tmp_path / "a.txt"))

    def test_unreadable_image(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match="broken.png cannot be read"):
            read_image(str(tmp_path / "broken.png"))
        with pytest.raises(ValueError, match="an embedded image cannot be read"):
            read_image({"bytes": b"no image", "path": None})


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).size == (10, 20)


class TestVisits:
    def test_each_epoch_is_another_permutation(self):
        batches = list(sampler(rows=10, batch_size=3, steps=6, seed=0))
        first, second = ([index for batch in half for _, index in batch] for half in (batches[:3], batches[3:]))
        assert len(set(first)) == len(set(second)) == 9 and first != second
        assert [batch[0][0] for batch in batches] == [0, 0, 0, 1, 1, 1]

    def test_processes_share_the_global_batch(self):
        whole = list(sampler(rows=10, batch_size=4, steps=5, seed=3))
        parts = [list(sampler(rows=10, batch_size=4, steps=5, seed=3, rank=rank, world=2)) for rank in (0, 1)]
        assert [a + b for a, b in zip(*parts)] == whole

    def test_a_later_start_goes_on(self):
        whole = list(sampler(rows=10, batch_size=4, steps=7, seed=3))
        assert list(sampler(rows=10, batch_size=4, steps=7, seed=3, start=3)) == whole[3:]

    def test_errors(self):
        with pytest.raises(ValueError, match="512 is more than the 125 training pairs"):
            sampler(rows=125, batch_size=512, steps=1, seed=0)
        with pytest.raises(ValueError, match="multiple of their number, 4"):
            sampler(rows=125, batch_size=30, steps=1, seed=0, world=4)

    def test_what_is_random_depends_on_the_visit_alone(self, captioned_folder):
        data = data_of(captioned_folder, seed=5, shuffle_sentences=True)
        alone = data.__getitems__([(1, 7)])[0]["long_text"]
        among = data.__getitems__([(0, 3), (1, 7), (1, 2)])[1]["long_text"]
        later = data.__getitems__([(2, 7)])[0]["long_text"]
        assert alone == among and alone != later
        assert sorted(alone.split()) == sorted(later.split())

    def test_one_of_several_captions(self, captioned_folder, tmp_path):
        row = {"image": str(captioned_folder / "0.png"), "long_text": "d", "short_text": ["a", "b", "c"]}
        (tmp_path / "several.jsonl").write_text(json.dumps(row))
        data = data_of(tmp_path / "several.jsonl")
        assert {data.__getitems__([(epoch, 0)])[0]["short_text"] for epoch in range(30)} == {"a", "b", "c"}


def test_the_first_sentence_as_short_text(captioned_folder):
    config = DataConfig(train=str(captioned_folder), shuffle_sentences=True)
    items = CaptionedImages(load_pairs(config, ["long"]), config, seed=5, short_from_long=True).__getitems__(
        [(0, 3), (1, 3), (2, 3)]
    )
    assert {item["short_text"] for item in items} == {"A field lies in the north."}, "of the text before shuffling"
    assert len({item["long_text"] for item in items}) > 1


def test_sentences():
    # DIFFERS: Long-CLIP's first part is "A road, 3.5 m wide! Two cars" and its last ones keep no full stop.
    text = " A road, 3.5 m wide! Two cars. Is it wet? No\n"
    assert split_sentences(text) == ["A road, 3.5 m wide!", "Two cars.", "Is it wet?", "No"]


def test_shuffled_sentences_are_the_same_sentences():
    text = "One road. Two tanks! Three ships? Four fields."
    shuffled = shuffle_sentences(text, random.Random(1))
    assert shuffled != text
    assert sorted(re.findall(r"\w+ \w+[.!?]", shuffled)) == sorted(re.findall(r"\w+ \w+[.!?]", text))


def test_collator(tiny_processor, captioned_folder):
    data = data_of(captioned_folder)
    items = data.__getitems__([(0, index) for index in range(4)])
    batch = Collator(tiny_processor)(items)
    expected = tiny_processor(
        text=[item["long_text"] for item in items],
        short_text=[item["short_text"] for item in items],
        images=[item["image"] for item in items],
        return_tensors="pt",
    )
    assert set(batch) == {"pixel_values", "input_ids", "short_input_ids", "ids", "skipped"}
    assert all((batch[name] == expected[name]).all() for name in ("pixel_values", "input_ids", "short_input_ids"))
    assert batch["ids"] == [f"captions.jsonl:{index}" for index in range(4)] and batch["skipped"] == []


@pytest.mark.parametrize("streaming", [False, True])
def test_one_empty_caption_of_many_is_left_out_and_named(captioned_folder, tmp_path, streaming):
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()] * 10
    rows = [row | {"image": str(captioned_folder / row["image"])} for row in rows]
    rows[4]["short_text"] = " "
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = data_of(tmp_path / "captions.jsonl", streaming=streaming)
    (item,) = data.__getitems__([(0, 4)])
    assert item["id"] == "captions.jsonl:5"
    (skipped,) = item["skipped"]
    assert skipped["id"] == "captions.jsonl:4" and "short caption is missing or empty" in skipped["reason"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "mistake, sentence",
    [
        ("none", None),
        ("swapped", "long_text is shorter than short_text on average: the two columns seem to be swapped"),
        ("html", "3 of 12 texts of long_text looked at hold HTML tags, such as <br/>"),
        ("equal", "all 12 texts of short_text looked at are equal: 'A roof.'"),
        ("one image", "7 of 12 rows looked at hold the same image"),
        ("half", None),
        ("less than", None),
    ],
)
def test_silent_mistakes_are_said(captioned_folder, tiny_processor, tmp_path, mistake, sentence, streaming):
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["image"] = str(captioned_folder / row["image"])
        if mistake == "swapped":
            row["long_text"], row["short_text"] = row["short_text"], row["long_text"]
        elif mistake == "html" and number < 3:
            row["long_text"] = f"Fields.<br/>{row['long_text']}"
        elif mistake == "equal":
            row["short_text"] = "A roof."
        elif mistake in ("one image", "half") and number < (7 if mistake == "one image" else 6):
            (tmp_path / f"{number}.png").write_bytes((captioned_folder / "0.png").read_bytes())
            row["image"] = str(tmp_path / f"{number}.png")
        elif mistake == "less than":
            row["long_text"] += " Fewer than 3 < 4 cars, more > 2."
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=str(tmp_path / "captions.jsonl"), streaming=streaming)
    warnings = inspect_pairs(load_pairs(config, KINDS), tiny_processor, config)["warnings"]
    assert len(warnings) == (sentence is not None) and all(text.startswith(sentence) for text in warnings)
