"""Every ready recipe is read, and runs from end to end on small stand-ins of its sources."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from evaluation.benchmarks.retrieval_data import load_retrieval
from evaluation.paper import paper_tables
from tests.training.lrs2m.chat_server import ChatServer
from tests.training.lrs2m.small_builds import (
    build,
    entries,
    long_caption,
    manifest_of,
    picture,
    rows_of,
    short_caption,
)
from training.lrs2m import retrieval_export
from training.lrs2m.recipe import ReadConfig, Recipe, read_recipe
from training.lrs2m.rejoin import main as rejoin


FOLDER = Path(retrieval_export.__file__).parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROWS = 6
ROUTE_NUMBERS = {"merge": 1, "compress": 2, "expand": 3, "anchor": 4}


def recipe_of(name: str) -> Recipe:
    return read_recipe([FOLDER / f"{name}.yaml"])


def test_table_1_is_covered_as_the_paper_made_it():
    table = paper_tables()["lrs2m"]
    columns = table["columns"]
    found = {}
    for name in RECIPES:
        (source,) = recipe_of(name).sources
        found[source.paper_source or source.name] = (source, recipe_of(name))
    assert set(found) == {*table["rows"], "RSITMD-L", "RSICD-L"}
    for name, values in table["rows"].items():
        row, (source, recipe) = dict(zip(columns, values)), found[name]
        assert ROUTE_NUMBERS[source.route] == row["route"] and len(source.licence) > 5
        for text, wanted in ((source.long, "long_text_source"), (source.short, "short_text_source")):
            if text.captioner:
                assert text.captioner == row[wanted].lower().replace(".", "-")  # a dot would divide --set's field
                model = recipe.captioners[text.captioner].model.lower().replace("_", ".")
                assert text.captioner.split("-")[0] in model


def test_all_of_table_1_is_one_build():
    names = [name for name in RECIPES if not name.endswith("_l")]
    together = read_recipe([FOLDER / f"{name}.yaml" for name in names])
    assert len(together.sources) == 11 and len(together.captioners) == 5
    assert len(together.duplicates.against) == 9


# ---------------------------------------------------------------------------------------------------------- stand-ins


def write_images(folder: Path, start: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"tile_{index}.png" for index in range(start, start + ROWS)]
    for index, name in enumerate(names, start=start):
        picture(index).save(folder / name)
    return names


def write_read(read: ReadConfig, root: Path, which: str) -> None:
    """Files as `read` describes them, of `ROWS` images with long or short captions."""
    path = root / read.path
    path.parent.mkdir(parents=True, exist_ok=True)
    names = write_images(root / read.images) if read.images else [f"tile_{index}.png" for index in range(ROWS)]
    if read.kind == "images":
        write_images(path)
    elif read.kind == "webdataset":
        write_tar(Path(str(path).replace("*", "00000")), names)
    elif path.suffix == ".csv":
        rows = [{read.columns.get("image", "image"): name} for name in names]
        for index, row in enumerate(rows):
            row[read.columns.get("key", "key")] = row[read.columns.get("image", "image")].upper()
            row |= read.where | {read.columns.get("short_text", "caption"): short_caption(index)}
        rows += [row | dict.fromkeys(read.where, "another") for row in rows if read.where]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif which == "long":
        path.write_text(json.dumps([conversation(index, name) for index, name in enumerate(names)]))
    else:
        path.write_text(json.dumps({"images": karpathy(names, read.split)}))


def karpathy(names: list[str], split: str) -> list[dict]:
    """The images as the test split; and where that is what is asked for, one of another split without its file."""
    captions = [[{"raw": f"{short_caption(index)} Version {number}."} for number in range(5)] for index in range(ROWS)]
    images = [{"filename": name, "split": "test", "sentences": own} for name, own in zip(names, captions, strict=True)]
    return images + [{"filename": "absent.png", "split": "train", "sentences": captions[0]}] * (split == "test")


def conversation(index: int, name: str) -> dict:
    """As LLaVA and VHM write a caption."""
    said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": long_caption(index)}]
    return {"id": str(index), "image": name, "conversations": said}


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for index, name in enumerate(names):
            content = io.BytesIO()
            picture(index).save(content, "JPEG", quality=95)
            fields = {
                "img_content": content.getvalue(),
                "img_name": name.encode(),
                "caption": short_caption(index).encode(),
            }
            for suffix, value in fields.items():
                member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))


def write_vectors(path: Path, root: Path) -> None:
    """Tiles of 48 x 40 pixels of one unit beside each other, and two boxes on each."""
    features = []
    for index in range(ROWS):
        tile = root / "data/mine/tiles" / f"tile_{index}.png"
        tile.with_suffix(".pgw").write_text(f"1\n0\n0\n-1\n{100 * index + 0.5}\n39.5\n")
        for kind, left in (("storage tank", 2), ("house", 30)):
            x0 = 100 * index + left
            ring = [[x0, 5], [x0 + 8, 5], [x0 + 8, 15], [x0, 15], [x0, 5]]
            geometry = {"type": "Polygon", "coordinates": [ring]}
            features.append({"type": "Feature", "properties": {"kind": kind}, "geometry": geometry})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def stand_in(recipe: Recipe, root: Path) -> None:
    """All that a recipe reads; each evaluation set holds the first image, re-encoded and upside down, and another."""
    (source,) = recipe.sources
    write_read(source.read, root, "long" if source.route in ("merge", "compress") else "short")
    if source.join:
        write_read(source.join, root, "short")
    if source.labels:
        write_vectors(root / source.labels.path, root)
    for number, name in enumerate(recipe.duplicates.against):
        folder = root / name
        folder.mkdir(parents=True)
        picture(1000 + number).save(folder / "other.png")
        if name.endswith("RSICD"):
            picture(0).rotate(180).save(folder / "leaked.jpg", quality=60)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, tmp_path, tokenizer_folder):
    recipe = recipe_of(name)
    stand_in(recipe, tmp_path)
    folder = tmp_path / "built"
    with ChatServer() as server:
        changes = [f"tokenizer={tokenizer_folder}"]
        changes += [f"captioners.{captioner}.base_url={server.url}" for captioner in recipe.captioners]
        assert build(FOLDER / f"{name}.yaml", folder, "--root", str(tmp_path), "--set", *changes) == 0
    rows, (source,) = rows_of(folder), recipe.sources
    leaked = entries(folder, "duplicates")
    each = 5 if source.read.split == "all" else 1
    if recipe.duplicates.against:
        assert {(entry["match"], entry["against"], entry["turn"]) for entry in leaked} == {
            ("leaked.jpg", "RSICD", "turned by 180")
        }
        assert len(rows) == each * (ROWS - 1) and len(leaked) == each
    else:
        assert len(rows) == ROWS and not leaked
    assert {row["licence"] for row in rows} == {source.licence} and not entries(folder, "failed")
    asked = {which: getattr(source, which).captioner for which in ("long", "short")}
    for row in rows:
        for which, captioner in asked.items():
            if captioner:
                assert row[f"{which}_captioner"] == recipe.captioners[captioner].model
                assert row[f"{which}_prompt"] == getattr(source, which).prompt
        assert (row["image"] is None) == (source.images == "omit")
    if source.images == "omit":
        target = tmp_path / "whole"
        assert rejoin([str(folder), "--images", str(tmp_path / source.read.images), "--output", str(target)]) == 0
        assert all(row["image"] for row in rows_of(target))
    if name.endswith("_l"):
        check_export(folder, tmp_path / manifest_of(folder)["name"])


def check_export(folder: Path, target: Path) -> None:
    """The evaluation reads what is written as the benchmark, with one long and five short texts an image."""
    assert retrieval_export.main([str(folder), "--output", str(target)]) == 0
    long, short = load_retrieval(target, "long_text"), load_retrieval(target, "short_text")
    assert long.name == target.name and short.name == target.name.removesuffix("-L")
    assert len(long.texts) == len(long.images) == ROWS and len(short.texts) == 5 * ROWS
    assert long.texts == [row["long_text"] for row in rows_of(folder)]
    assert isinstance(long.images[0], Image.Image) and short.text_to_image[:6] == [0] * 5 + [1]
    assert retrieval_export.main([str(folder), "--output", str(target)]) == 2  # nothing is replaced
