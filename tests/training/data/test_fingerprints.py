"""A resumed run knows whether its data are those that it began with, in whatever form they are stored."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from tests.soak import make_data, run_arguments
from tests.training.data.test_data_streaming import picture, write_tar
from training import train
from training.data.fingerprints import changes, fingerprints
from training.data.pairs import load_pairs
from training.data.rows import image_sha256
from training.data.sources import DataConfig
from training.distributed import MistakeError


FORMS = [
    "rows.jsonl",
    "rows.parquet",
    "rows.jsonl, streaming",
    "rows.csv, streaming",
    "rows.parquet, streaming",
    "rows.tar",
]
FEATURES = Features({"image": ImageFeature(), "long_text": Value("string"), "short_text": Value("string")})
CHANGES = {
    "reversed": lambda rows: rows[::-1],
    "two exchanged": lambda rows: [rows[1], rows[0], *rows[2:]],
    "one word": lambda rows: [rows[0] | {"long_text": rows[0]["long_text"].replace("road", "lane")}, *rows[1:]],
    "shortened": lambda rows: rows[:-1],
    "lengthened": lambda rows: [*rows, rows[0]],
}


def rows_of_roofs() -> list[dict]:
    rows = []
    for number in range(6):
        texts = {"long_text": f"Roof {number} is red beside the road" + "." * number, "short_text": f"Roof {number}."}
        rows.append({"image": f"{number}.png"} | texts)
    return rows


def write(form: str, folder: Path, rows: list[dict], group: int = 3) -> str:
    name = form.partition(",")[0]
    path = folder / name
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(number))
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif name.endswith("tar"):
        write_tar(path, range(len(rows)), lambda number: {"png": b"x", "json": json.dumps(rows[number]).encode()})
    else:
        embedded = [row | {"image": {"bytes": picture(0), "path": row["image"]}} for row in rows]
        table = Dataset.from_list(embedded, features=FEATURES).data.table
        pq.write_table(table, path, row_group_size=group)
    return str(path)


def state_of(form: str, folder: Path, rows: list[dict], group: int = 3) -> list[dict]:
    config = DataConfig(train=write(form, folder, rows, group), streaming="streaming" in form)
    return fingerprints(load_pairs(config, ["long", "short"]), ["rows"])


@pytest.mark.parametrize("form", FORMS)
def test_changed_rows_are_seen_and_the_same_ones_are_not(form, tmp_path):
    rows = rows_of_roofs()
    before = state_of(form, tmp_path, rows)
    assert before[0]["rows"] == 6 and changes(before, state_of(form, tmp_path, rows, group=2)) == []
    for name, change in CHANGES.items():
        after = change(rows)
        (message,) = changes(before, state_of(form, tmp_path, after)) or [None]
        if len(after) != 6:
            assert message == f"rows had 6 rows and has {len(after)}"
        elif form == "rows.tar" and name == "one word":
            assert message is None  # as many bytes in the same places: a tar's members are not read
        else:
            assert message == "rows has its 6 rows in another order or with other texts", name


def test_a_resumed_run_with_changed_data(tmp_path, capsys):
    captions = make_data(tmp_path / "data", pairs=16)
    arguments = [*run_arguments(captions, tmp_path / "run", steps=2, save_every=1), "--loop.validate_every", "1000"]
    train.main(arguments)
    tokenizer = (tmp_path / "run/final/tokenizer.json").read_text()
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    fewer_words = [row | {"long_text": "A road.", "short_text": "A road."} for row in reversed(rows)]
    captions.write_text("\n".join(map(json.dumps, fewer_words)))  # of which a smaller tokenizer would be trained
    arguments += ["--loop.save_every", "2"]
    with pytest.raises(
        SystemExit, match=r"have changed since: .*captions\.jsonl has its 16 rows in another order .*--allow-"
    ) as refused:
        train.main(arguments)
    assert isinstance(
        refused.value.__cause__, MistakeError
    )  # of all processes together, so that the first one says it
    train.main([*arguments, "--allow-changed-data"])
    assert (tmp_path / "run/final/tokenizer.json").read_text() == tokenizer
    first, second = json.loads((tmp_path / "run/run.json").read_text())["starts"]
    assert "changed_data" not in first
    assert second["changed_data"] == [f"{captions} has its 16 rows in another order or with other texts"]


def test_a_damaged_row_group_is_no_end(tmp_path):
    """Its rows are skipped and named when their turn comes; another group damaged is other data."""
    path = Path(write("rows.parquet, streaming", tmp_path, rows_of_roofs(), group=2))
    whole, hashes = path.read_bytes(), set()
    config = DataConfig(train=str(path), streaming=True)
    hashes.add(fingerprints(load_pairs(config, ["long", "short"]), ["rows"])[0]["sha256"])
    for group in (1, 2):
        column = pq.ParquetFile(path).metadata.row_group(group).column(2)
        start = column.dictionary_page_offset or column.data_page_offset
        path.write_bytes(
            whole[:start] + b"\xff" * column.total_compressed_size + whole[start + column.total_compressed_size :]
        )
        hashes.add(fingerprints(load_pairs(config, ["long", "short"]), ["rows"])[0]["sha256"])
        path.write_bytes(whole)
    assert len(hashes) == 3


@pytest.mark.parametrize("stored", [{"path": 5}, 5, 0, {}, None, "a\0b.png", "absent.png"])
def test_what_is_no_image_file_has_no_hash(stored, monkeypatch):
    really = open

    def guarded(file, *arguments, **options):
        assert not isinstance(file, int), "a number is a file descriptor"
        return really(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", guarded)
    assert image_sha256(stored) is None
