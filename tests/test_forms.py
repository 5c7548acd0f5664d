"""Each form of captioned images gives the same rows to training in memory, streamed, evaluation and the builder."""

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from evaluation import run
from evaluation.benchmarks.retrieval_data import load_retrieval
from modeling_lrsclip.encoding.imagery import read_image
from training.data.pairs import load_pairs
from training.data.sources import DataConfig
from training.lrs2m.recipe import ReadConfig, SourceConfig
from training.lrs2m.sources.records import read_source


ROOT = Path(__file__).parents[1]
ROWS = 5


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (40 * number, 90, 200 - 30 * number)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Path]:
    """The same rows in every form of the README's table."""
    folder = tmp_path_factory.mktemp("forms")
    rows = [
        {"image": f"{n}.png", "long_text": f"Long, with commas; number {n}.", "short_text": f"Short {n}"}
        for n in range(ROWS)
    ]
    stored = [row | {"image": {"bytes": png(number), "path": None}} for number, row in enumerate(rows)]

    def place(name: str) -> Path:
        """A folder with the image files."""
        (folder / name).mkdir()
        for number in range(ROWS):
            (folder / name / f"{number}.png").write_bytes(png(number))
        return folder / name

    def write_csv(path: Path, delimiter: str = ",", **names: str) -> Path:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow([names.get(column, column) for column in rows[0]])
            writer.writerows(row.values() for row in rows)
        return path

    def write_tar(path: Path, numbers: range) -> Path:
        with tarfile.open(path, "w") as tar:
            for number in numbers:
                texts = {key: rows[number][key] for key in ("long_text", "short_text")}
                for suffix, content in (("png", png(number)), ("json", json.dumps(texts).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return path

    place("lines").joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    place("json").joinpath("rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), folder / "rows.parquet", row_group_size=2)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place("paths") / "rows.parquet")
    place("train")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), folder / "train" / "train.parquet")
    write_csv(place("metadata") / "metadata.csv", image="file_name", short_text="caption")
    (folder / "tars").mkdir()
    for shard, numbers in enumerate((range(3), range(3, ROWS))):
        write_tar(folder / "tars" / f"{shard:03d}.tar", numbers)
    return {
        "JSONL": folder / "lines" / "rows.jsonl",
        "JSON": folder / "json" / "rows.json",
        "CSV": write_csv(place("csv") / "rows.csv"),
        "CSV with semicolons": write_csv(place("semicolons") / "rows.csv", ";"),
        "TSV": write_csv(place("tsv") / "rows.tsv", "\t"),
        "parquet with images": folder / "rows.parquet",
        "parquet with paths": folder / "paths" / "rows.parquet",
        "folder with train.parquet": folder / "train",
        "folder with metadata.csv": folder / "metadata",
        "WebDataset tar": write_tar(folder / "rows.tar", range(ROWS)),
        "folder of tars": folder / "tars",
    }


def identity(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def expected() -> list[tuple[str, str, str]]:
    images = [identity(Image.open(io.BytesIO(png(number)))) for number in range(ROWS)]
    return [(image, f"Long, with commas; number {n}.", f"Short {n}") for n, image in enumerate(images)]


def by_training(path: Path, streaming: bool) -> list[tuple[str, str, str]]:
    pairs = load_pairs(DataConfig(train=str(path), streaming=streaming), ["long", "short"])
    return [(identity(read_image(row.image)), row.long, row.short) for row in pairs.read(list(range(len(pairs))))]


def by_evaluation(path: Path) -> list[tuple[str, str, str]]:
    long, short = (load_retrieval(path, column) for column in ("long_text", "short_text"))
    assert long.text_to_image == short.text_to_image == list(range(ROWS))
    return [(identity(image), *texts) for image, *texts in zip(long.images, long.texts, short.texts, strict=True)]


def by_builder(path: Path) -> list[tuple[str, str, str]]:
    is_tar = path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))
    read = ReadConfig(kind="webdataset" if is_tar else "table", path=str(path))
    records = read_source(SourceConfig(name="a", route="merge", licence="CC0-1.0", read=read), path.parent)
    return [(identity(read_image(record.image)), record.long_text, record.short_text) for record in records]


WAYS = {
    "in memory": lambda path: by_training(path, False),
    "streamed": lambda path: by_training(path, True),
    "evaluation": by_evaluation,
    "builder": by_builder,
}


def table() -> dict[str, list[str]]:
    """The README's table: of each form, what each way says."""
    lines = (ROOT / "training" / "README.md").read_text(encoding="utf-8").splitlines()
    begin = lines.index("| form | in memory | streamed | evaluation | builder |") + 2
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:] if line.startswith("|")]
    return {form: says for form, *says in cells if len(says) == len(WAYS)}


@pytest.mark.parametrize("way", WAYS)
def test_every_form_is_read_alike(forms, way):
    for form, path in forms.items():
        assert WAYS[way](path) == expected(), form


def test_the_table_names_every_form(forms):
    assert table() == dict.fromkeys(forms, ["yes"] * len(WAYS))


def test_columns_of_other_names_are_read_alike(forms, tmp_path):
    """All three kinds are named, where a usual name stands beside them for something else."""
    rows = [json.loads(line) for line in forms["JSONL"].read_text().splitlines()]
    named = {"image": "tile", "long": "description", "short": "heading"}
    others = [
        {
            "tile": str(forms["JSONL"].parent / row["image"]),
            "description": row["long_text"],
            "heading": row["short_text"],
        }
        | {"title": "another", "long_text": "another", "filename": "nothing.png"}
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, others)))
    path = str(tmp_path / "rows.jsonl")
    for streaming in (False, True):
        pairs = load_pairs(
            DataConfig(train=[{"path": path, "columns": named}], streaming=streaming), ["long", "short"]
        )
        assert [row.short for row in pairs.read(list(range(len(pairs))))] == [row["short_text"] for row in rows]
    long, short = (load_retrieval(path, column, columns=named) for column in ("long_text", "short_text"))
    read = zip(long.images, long.texts, short.texts, strict=True)
    assert [(identity(image), *texts) for image, *texts in read] == expected()
    columns = {"image": "tile", "long_text": "description", "short_text": "heading"}
    read = ReadConfig(kind="table", path=path, columns=columns)
    records = list(read_source(SourceConfig(name="a", route="merge", licence="CC0-1.0", read=read), tmp_path))
    assert [(identity(read_image(r.image)), r.long_text, r.short_text) for r in records] == expected()


def test_columns_are_named_on_the_command_line(tiny_checkpoint, forms, tmp_path, capsys):
    rows = [json.loads(line) for line in forms["JSONL"].read_text().splitlines()]
    others = [{"tile": str(forms["JSONL"].parent / row["image"]), "heading": row["short_text"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, others)))
    command = [
        "--model",
        str(tiny_checkpoint),
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--cache", "none", "--tasks", "zcrs", "--columns", "image=tile"]
    assert run.main([*command, "short=heading"]) == 0
    assert "columns tile and heading" in (tmp_path / "out" / "results.json").read_text()
    assert run.main([*command, "short=head"]) == 2
    assert "has no head; it has tile, heading (is heading what you mean?)" in capsys.readouterr().err
    for bad in ("caption=heading", "short=", "image=tile"):  # the last: named twice
        assert run.main([*command, bad]) == 2
        sentence = f"--columns {bad} must be KIND=NAME, each KIND of image, long, short once at most."
        assert sentence in capsys.readouterr().err
