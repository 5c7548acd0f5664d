"""The same pairs in the same order from every form of storage, by any number of processes and workers, from any step."""

import contextlib
import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from modeling_lrsclip.files.tables import read_rows
from training.data.held_out import hold_out, image_keys
from training.data.pairs import CaptionedImages, DataConfig, load_pairs
from training.data.rows import GroupCache, ParquetRows
from training.data.visiting_order import VisitSampler


ROWS, BATCH, STEPS, SEED = 50, 8, 13, 3  # 6 batches an epoch: into the third one
TABLE = Features({"image": ImageFeature(), "long_text": Value("string"), "short_text": [Value("string")]})


def picture(number: int) -> bytes:
    """A PNG whose every pixel is the row's number."""
    stored = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 2 * number, 3 * number)).save(stored, "png")
    return stored.getvalue()


def row(number: int) -> dict:
    return {
        "long_text": f'Roof {number} is red, "quite" red.\nA road, number {number}, passes it.',
        "short_text": [f"Roof {number}.", f"Road {number}."],
    }


def write_tar(path, numbers, members) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for suffix, content in members(number).items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict:
    """The same rows as JSONL with image files, parquet shards of small row groups, and WebDataset tars."""
    folder = tmp_path_factory.mktemp("forms")
    rows = [row(number) for number in range(ROWS)]
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = [json.dumps({"image": f"{number}.png"} | row) for number, row in enumerate(rows)]
    (folder / "captions.jsonl").write_text("\n".join(lines[:20]) + "\n\n" + "\n".join(lines[20:]))
    (folder / "shards").mkdir()
    (folder / "tars").mkdir()
    for shard, numbers in enumerate(np.split(np.arange(ROWS), [13, 29])):
        embedded = [{"image": {"bytes": picture(number), "path": None}} | rows[number] for number in numbers]
        table = Dataset.from_list(embedded, features=TABLE).data.table
        pq.write_table(table, folder / "shards" / f"train-{shard:05d}-of-00003.parquet", row_group_size=5)
        write_tar(
            folder / "tars" / f"tiles-{shard:03d}.tar",
            numbers,
            lambda number: {"png": picture(number), "json": json.dumps(rows[number]).encode()},
        )
    return {
        "jsonl": folder / "captions.jsonl",
        "parquet": folder / "shards",
        "parquet glob": folder / "shards" / "train-*.parquet",
        "tar": folder / "tars" / "tiles-{000..002}.tar",
    }


def visited(config, share=(0, 1), start=0, workers=0, steps=STEPS) -> list[list[tuple]]:
    """(row number by its picture, long, short) of each place of each batch."""
    pairs = load_pairs(config, ["long", "short"])
    data = CaptionedImages(pairs, config, SEED)
    sampler = VisitSampler(pairs.order(SEED), BATCH, steps, start, share)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=workers)
    return [
        [(item["image"].getpixel((0, 0))[0], item["long_text"], item["short_text"]) for item in batch]
        for batch in loader
    ]


def told(form, forms, **fields) -> DataConfig:
    return DataConfig(train=str(forms[form]), **fields)


@pytest.fixture(scope="module")
def expected(forms):
    """One process that holds everything in memory."""
    return visited(told("jsonl", forms))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "parquet glob", "tar"])
def test_every_form_gives_the_same_batches(form, streaming, forms, expected):
    assert visited(told(form, forms, streaming=streaming)) == expected
    for batch in expected:
        assert all(
            long == row(number)["long_text"] and short in row(number)["short_text"] for number, long, short in batch
        )
    assert len({number for batch in expected[:6] for number, *_ in batch}) == 48, (
        "an epoch visits each row once at most"
    )


@pytest.mark.parametrize("form", ["jsonl", "parquet", "tar"])
def test_small_windows_by_any_processes_and_workers_from_any_step(form, forms, expected):
    config = told(form, forms, streaming=True, shuffle_buffer=12)
    whole = visited(config)
    assert whole != expected and sorted(whole[0]) != sorted(expected[0])
    halves = [visited(config, share=(rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole
    for start in range(STEPS):
        assert visited(config, start=start, steps=min(start + 2, STEPS)) == whole[start : start + 2]


def test_a_window_mixes_rows_from_far_apart(forms):
    for form in ("jsonl", "tar"):
        config = told(form, forms, streaming=True, shuffle_buffer=20)
        first = [number for number, *_ in visited(config, steps=1)[0]]
        assert max(first) - min(first) > 20, "chunks of two rows, taken at random"
    with pytest.warns(UserWarning, match="row groups of 5 rows, and data.shuffle_buffer=4 mixes rows of one"):
        load_pairs(told("parquet", forms, streaming=True, shuffle_buffer=4), ["long"])


def test_worker_processes_read_the_same(forms, expected):
    config = told("parquet", forms, streaming=True, shuffle_buffer=12)
    assert visited(config, share=(1, 2), start=4, workers=2) == visited(config, share=(1, 2), start=4)


def test_csv_lines_are_found_in_quotes(forms, tmp_path):
    rows = [row(number) | {"image": str(forms["jsonl"].parent / f"{number}.png")} for number in range(ROWS)]
    for line in rows:
        line["short_text"] = line["short_text"][0]
    Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    Dataset.from_list(rows).to_csv(tmp_path / "pairs.tsv", sep="\t")
    batches = [
        visited(DataConfig(train=str(tmp_path / name), streaming=streaming))
        for name in ("pairs.csv", "pairs.tsv")
        for streaming in (False, True)
    ]
    assert batches[0][0][0][1].count("\n") == 1 and batches[1:] == batches[:1] * 3


def test_rs5m_tars(tmp_path):
    """Keys as in om-ai-lab/RS5M dataloader.py, whose tars lie in one folder a split; one caption is both texts."""
    (tmp_path / "train").mkdir()
    for shard in ("pub11", "rs3"):
        write_tar(
            tmp_path / "train" / f"{shard}-train-0000.tar",
            range(6),
            lambda number: {
                "img_content": picture(number),
                "img_name": f"{number}.png".encode(),
                "caption": b"a farm",
            },
        )
    source = {"path": str(tmp_path / "train"), "columns": {"long": "caption", "short": "caption"}}
    for streaming in (False, True):
        config = DataConfig(train=[source], streaming=streaming)
        pairs = load_pairs(config, ["long", "short"])
        assert len(pairs) == 12 and pairs.read([7])[0].id == "rs3-train-0000.tar:000001"
        item = CaptionedImages(pairs, config, 0).__getitems__([(0, 7)])[0]
        assert (item["long_text"], item["short_text"], item["image"].getpixel((0, 0))) == (
            "a farm",
            "a farm",
            (1, 2, 3),
        )


def test_row_groups_are_read_once_a_window_and_then_let_go(forms, monkeypatch):
    config = told("parquet", forms, streaming=True, shuffle_buffer=12)
    pairs = load_pairs(config, ["long", "short"])
    read, held = [], []
    plain = ParquetRows._read_group

    def counting(self, group):
        read.append(group)
        return plain(self, group)

    monkeypatch.setattr(ParquetRows, "_read_group", counting)
    data, cache = CaptionedImages(pairs, config, SEED), pairs.parts[0].cache
    for visits in VisitSampler(pairs.order(SEED), BATCH, 6):
        data.__getitems__(visits)
        held.append(sum(group.num_rows for group in cache.groups.values()))
    groups = sum(len(part.chunks) for part in pairs.parts)
    assert max(held) <= 12 + 2 * 5 and all(part.cache is cache for part in pairs.parts)
    assert groups <= len(read) <= 2 * groups, "each once, and again where a window cuts it"


def test_what_a_share_leaves_is_read_once_a_window_too(forms, monkeypatch):
    config = told("parquet", forms, streaming=True, shuffle_buffer=12, validation=0.5)
    whole = load_pairs(config, ["long", "short"])
    pairs, _ = hold_out(whole, 0.5, image_keys(whole))
    read, plain = [], ParquetRows._read_group

    def counting(self, group):
        read.append(group)
        return plain(self, group)

    monkeypatch.setattr(ParquetRows, "_read_group", counting)
    for visits in VisitSampler(pairs.order(SEED), 4, len(pairs) // 4):
        pairs.read([number for _, number in visits])
    groups = sum(len(part.chunks) for part in pairs.parts)
    assert len(read) <= 2 * groups and whole.parts[0].cache.rows == 24 + 2 * 5


def test_nothing_but_footers_is_read_at_the_start(forms, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a row group was read")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    assert len(load_pairs(told("parquet", forms, streaming=True), ["long", "short"])) == ROWS


def test_captions_without_images(forms):
    for form in ("jsonl", "parquet", "tar"):
        for streaming in (False, True):
            pairs = load_pairs(told(form, forms, streaming=streaming), ["long"])
            assert list(islice(pairs.texts("long"), 3)) == [row(number)["long_text"] for number in range(3)]
            assert len(list(pairs.texts("long", 4))) == 4 and pairs.kinds == ("long",)


def test_files_behind_an_address(forms):
    """As those of the Hub are: read through fsspec."""
    import fsspec

    from training.data.sources import _open_parquet

    memory = fsspec.filesystem("memory")
    for path in sorted(forms["parquet"].iterdir()):
        memory.pipe(f"/pairs/{path.name}", path.read_bytes())
    files = [(memory, name) for name in sorted(memory.ls("/pairs", detail=False))]
    columns = {"image": "image", "long": "long_text", "short": "short_text"}
    parts = _open_parquet("you/pairs", files, columns, DataConfig(train="you/pairs", streaming=True))
    assert [int(part.chunks.sum()) for part in parts] == [13, 16, 21]
    assert parts[1].read([2])[0].long == row(15)["long_text"]


def with_footer(path: Path, change) -> bytes:
    """A parquet file's bytes with a changed footer, which ends with its length and a mark."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    footer = change(whole[-8 - length : -8])
    return whole[: -8 - length] + footer + len(footer).to_bytes(4, "little") + whole[-4:]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (b"\x80\x80\x80\x80\x80\x40", "says that it has 1,099,511,627,776 rows"),
        (b"\xe2\x09", "it has 600 rows, and says 625"),
    ],
)
def test_a_footer_that_counts_wrongly(tmp_path, rows, problem):
    path = tmp_path / "counted.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": "a.png"} | row(0)] * 600), path)
    path.write_bytes(with_footer(path, lambda footer: footer.replace(b"\xb0\x09", rows)))  # 600, as thrift has it
    with pytest.raises(ValueError, match=problem):
        pairs = load_pairs(DataConfig(train=str(path), streaming=True), ["long", "short"])
        raise ValueError(pairs.read([0])[0].fault)


def test_a_footer_whose_columns_are_damaged(tmp_path):
    """pyarrow ends the process where it is asked for the sizes of such a column."""
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": "a.png"} | row(0)]), path)
    whole = path.read_bytes()
    for at in range(len(whole) - 500, len(whole) - 8):
        path.write_bytes(whole[:at] + b"\x15" + whole[at + 1 :])
        with contextlib.suppress(ValueError):
            rows = ParquetRows(str(path), {"image": "image", "long": "long_text"}, GroupCache())
            assert [row.fault or row.long for row in rows.read([0])] and len(list(rows.texts("long"))) == 1


def test_a_row_group_is_held_up_to_a_size(tmp_path, monkeypatch):
    """A text of 128 KB that stands in all 300 rows takes 128 KB of the file, and 38 MB where it is read."""
    path = tmp_path / "large.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": "a.png"} | row(0) | {"long_text": "x" * (1 << 17)}] * 300), path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("modeling_lrsclip.files.tables.LARGEST_GROUP", 1 << 21)
    monkeypatch.setattr("training.data.rows.LARGEST_GROUP", 1 << 21)
    batches, plain = [], pq.ParquetFile.iter_batches

    def counting(self, *arguments, **options):
        for batch in plain(self, *arguments, **options):
            batches.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    pairs = load_pairs(DataConfig(train=str(path), streaming=True), ["long", "short"])
    limit = "row group 0 cannot be read (up to 2,097,152 bytes are held; write large.parquet with smaller row groups)"
    assert pairs.read([7])[0].fault == limit and 0 < len(batches) <= 2
    batches.clear()
    assert pairs.read([8])[0].fault == limit and not batches  # known now
    assert sum(len(text) for text in pairs.texts("long")) == 300 << 17 and len(list(read_rows(path))) == 300
    assert max(batches) < 1 << 22


def test_a_broken_row_group_names_itself(forms, tmp_path):
    path = tmp_path / "broken.parquet"
    whole = bytearray(next(forms["parquet"].iterdir()).read_bytes())
    group = pq.ParquetFile(pa.BufferReader(bytes(whole))).metadata.row_group(1).column(0)
    whole[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(whole)
    pairs = load_pairs(DataConfig(train=str(path), streaming=True), ["long", "short"])
    rows = pairs.read([4, 5])
    assert rows[0].fault is None and rows[1].fault.startswith("row group 1 cannot be read")
