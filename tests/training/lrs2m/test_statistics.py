"""Statistics of a small data set, counted by hand; the same from parquet and tars."""

import json
import re

import pytest
from PIL import Image

from tests.training.lrs2m.small_builds import build, rows_of, source
from training.lrs2m.statistics import main, paper_row, report, statistics


def recipe_of(write_recipe, tiles, **fields):
    """24 rows named after one of the paper's subsets, with coordinates, and 12 of another source that reuse images."""
    rows = [json.loads(line) for line in (tiles / "captions.jsonl").read_text().splitlines()]
    placed = [
        row | {"image": str(tiles / row["image"]), "longitude": 11.5 + index, "latitude": 48.1 - 10 * index / 2}
        for index, row in enumerate(rows)
    ]
    file = tiles.parent / "placed.jsonl"
    file.write_text("\n".join(map(json.dumps, placed)))
    read = {"kind": "table", "path": str(file)}
    join = {"kind": "table", "path": str(file)}
    first = source("merge", read, join=join, name="uc-merced", paper_source="UCMerced", licence="CC0-1.0")
    again = {"kind": "table", "path": str(file), "limit": 12}
    second = source("merge", again, join=join, name="mine", licence="CC-BY-4.0", images="omit")
    return write_recipe([first, second], **fields)


@pytest.fixture
def folder(write_recipe, tiles, tmp_path):
    assert build(recipe_of(write_recipe, tiles), tmp_path / "set") == 0
    return tmp_path / "set"


def test_counts_are_those_of_the_rows(folder):
    described, rows = statistics(folder), rows_of(folder)
    assert described["rows"] == len(rows) == 36 and described["images"] == 24
    assert described["splits"]["train"] + described["splits"]["validation"] == 36
    for which in ("long", "short"):
        tokens = [row[f"{which}_tokens"] for row in rows]
        assert described[which]["mean_tokens"] == pytest.approx(sum(tokens) / 36)
        assert described[which]["over_77"] == sum(count > 77 for count in tokens) / 36
        assert described[which]["over_248"] == sum(count > 248 for count in tokens) / 36
        assert described[which]["longest"] == max(tokens) and described[which]["median_tokens"] == sorted(tokens)[17]
        assert sum(described[which]["histogram"]) == 36 and described[which]["histogram"][max(tokens)] == tokens.count(
            max(tokens)
        )
        words = {word for row in rows for word in re.findall(r"[a-z]+", row[f"{which}_text"].lower())}
        assert described[which]["vocabulary"] == len(words)
    assert described["with_coordinates"] == 36
    first, second = described["sources"]
    assert (first["name"], first["rows"], first["route"], first["licence"]) == ("uc-merced", 24, "merge", "CC0-1.0")
    assert (second["name"], second["rows"], second["images"]) == ("mine", 12, "no")
    assert first["paper"]["pairs"] == 9430 and "paper" not in second
    lengths = [row["long_tokens"] for row in rows if row["source"] == "mine"]
    assert second["long_mean_tokens"] == pytest.approx(sum(lengths) / 12) and second["long_from"] == "given"


def test_tars_count_the_same(folder, write_recipe, tiles, tmp_path):
    assert build(recipe_of(write_recipe, tiles, format="webdataset"), tmp_path / "tars") == 0
    tars, parquet = statistics(tmp_path / "tars"), statistics(folder)
    assert tars.pop("data_sha256") != parquet.pop("data_sha256") and tars == parquet


def test_the_command(folder, tmp_path, capsys):
    assert main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "| uc-merced | merge | 24 | given |" in shown and "| 9,430 | 207.17 | 13.11 |" in shown
    assert "| **all** |  | 36 |" in shown and "2,023,688" in shown
    assert report(json.loads((folder / "statistics.json").read_text())) == (folder / "statistics.md").read_text()
    for name in ("token_lengths.png", "map.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").getcolors()) > 20  # something is drawn
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no manifest.json")


def test_sources_are_found_in_table_1():
    assert paper_row("det_10")["pairs"] == 110794 and paper_row("Det-10")["name"] == "Det-10"
    assert paper_row("mine") is None
