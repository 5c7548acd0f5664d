"""
Every ready recipe is read, and runs from end to end on a small copy of the layout that its data set is published in.

The copies are written from the facts that the recipes name, not from the recipes, and hold what a recipe must leave out.
"""

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
from training.lrs2m.recipe import Recipe, read_recipe
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
    by_row = {}
    for name in RECIPES:
        (source,) = recipe_of(name).sources
        by_row[source.paper_source or source.name] = (source, recipe_of(name))
    assert set(by_row) == {*table["rows"], "RSITMD-L", "RSICD-L", "MGRS-200k"}
    for name, values in table["rows"].items():
        row, (source, recipe) = dict(zip(columns, values)), by_row[name]
        assert ROUTE_NUMBERS[source.route] == row["route"] and len(source.licence) > 5
        for text, wanted in ((source.long, "long_text_source"), (source.short, "short_text_source")):
            if text.captioner:
                assert text.captioner == row[wanted].lower().replace(".", "-")  # a dot would divide --set's field
                model = recipe.captioners[text.captioner].model.lower().replace("_", ".")
                assert text.captioner.split("-")[0] in model


def test_all_of_table_1_is_one_build():
    names = [name for name in RECIPES if not name.endswith("_l") and name != "mgrs_200k"]
    together = read_recipe([FOLDER / f"{name}.yaml" for name in names])
    assert len(together.sources) == 11 and len(together.captioners) == 5
    assert len(together.duplicates.against) == 9


def test_a_recipe_says_where_its_facts_come_from_and_what_is_not_verified():
    for name in RECIPES:
        (source,) = recipe_of(name).sources
        if name != "own_vectors":
            assert source.facts and source.not_verified
            assert any("github.com/" in fact for fact in source.facts)  # a repository and a file in it


# ------------------------------------------------------------------------------------------------- layouts as published


VERSAD = ("crowdai", "cvact", "cvusa", "fmow-big-bbox-center", "fmow-small", "loveda", "millionAID")


def write_images(folder: Path, names: list[str], start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, start=start):
        picture(index).save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))


def versad(root: Path, *folders: str) -> None:
    """One list of all sub-sets, of which these have their images, `ROWS` in all; those of the others are elsewhere."""
    entries, count = [], 0
    for folder in VERSAD:
        here = folder in folders
        size = ROWS // len(folders) if here else 3
        names = [f"P{index:07d}.jpg" for index in range(count if here else 0, (count if here else 0) + size)]
        for index, name in enumerate(names, start=count if here else 0):
            said = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": long_caption(index)}]
            entries.append({"id": name, "image": name, "source_dataset": folder, "conversations": said})
        if here:
            write_images(root / "data/VersaD" / folder, names, start=count)
            count += size
    (root / "data/VersaD/list_pretrain.json").write_text(json.dumps(entries))


def rs5m_tars(root: Path) -> None:
    """Two tars with samples of three data sets in turn; the images of those that are not wanted are none."""
    folder = root / "data/RS5M/train"
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"rs3-train-{number:04d}.tar", "w") as tar:
            for index in range(number, ROWS, 2):
                content = io.BytesIO()
                picture(index).save(content, "JPEG", quality=95)
                for name, image in ((f"ben_{index}", content.getvalue()), (f"fmow_barn_{index}_rgb", b"")):
                    members = {
                        "caption": short_caption(index).encode(),
                        "img_content": image,
                        "img_name": f"{name}.jpg".encode(),
                    }
                    for suffix, value in members.items():
                        member = tarfile.TarInfo(f"{name}.{suffix}")
                        member.size = len(value)
                        tar.addfile(member, io.BytesIO(value))


def millionaid(root: Path) -> None:
    versad(root, "millionAID")
    (root / "data/RS5M").mkdir()
    rows = [f"ben_{index}.jpg,a sea\nmillionaid_P{index:07d}.jpg,{short_caption(index)}\n" for index in range(ROWS)]
    (root / "data/RS5M/rs3_train_intermediate.csv").write_text("img_name,caption\n" + "".join(rows))


def remote_clip(root: Path, name: str) -> None:
    names = [f"{index}.jpg" for index in range(ROWS)]
    write_images(root / "data/RemoteCLIP/data" / name, names)
    table = root / "data/RemoteCLIP/csv_file/train" / f"{name}.csv"
    table.parent.mkdir(parents=True)
    lines = [f"{short_caption(index)[:-1]}, seen from above .\t{one}" for index, one in enumerate(names)]
    table.write_text("\n".join(["title\tfilename", *lines]))


def karpathy(root: Path, file: str, images: str, split: str) -> None:
    """The images as the test split; and where that is what is asked for, one of another split without its file."""
    names = [f"tile_{index}.tif" for index in range(ROWS)]
    write_images((root / file).parent / images, names)
    captions = [[{"raw": f"{short_caption(index)} Version {number}."} for number in range(5)] for index in range(ROWS)]
    entries = [
        {"filename": name, "split": "test", "sentences": sentences}
        for name, sentences in zip(names, captions, strict=True)
    ]
    entries += [{"filename": "absent.tif", "split": "train", "sentences": captions[0]}] * (split == "test")
    (root / file).write_text(json.dumps({"images": entries, "dataset": "small"}))


def mgrs(root: Path) -> None:
    names = [f"{index}.png" for index in range(ROWS)]
    write_images(root / "data/MGRS-200k/global_imgs", names)
    box = {"x1": 1, "y1": 2, "x2": 9, "y2": 9, "W": 48, "H": 40}
    entries = [
        {
            "global_filepath": name,
            "brief_caption": short_caption(index),
            "detailed_caption": long_caption(index),
            "segment": [{"bbox": box, "category": "lake", "category_id": 3}],
        }
        for index, name in enumerate(names)
    ]
    (root / "data/MGRS-200k/text_info.json").write_text(json.dumps(entries))


def own_tiles(root: Path) -> None:
    write_images(root / "data/mine/tiles", [f"tile_{index}.png" for index in range(ROWS)])
    write_vectors(root / "data/mine/objects.geojson", root)


LAYOUTS = {
    "bigearthnet": rs5m_tars,
    "crowdai": lambda root: versad(root, "crowdai"),
    "cvact": lambda root: versad(root, "cvact"),
    "cvusa": lambda root: versad(root, "cvusa"),
    "det_10": lambda root: remote_clip(root, "Det-10"),
    "fmow": lambda root: versad(root, "fmow-big-bbox-center", "fmow-small"),
    "loveda": lambda root: versad(root, "loveda"),
    "mgrs_200k": mgrs,
    "millionaid": millionaid,
    "own_vectors": own_tiles,
    "rsicd_l": lambda root: karpathy(root, "data/evaluation/RSICD/dataset_rsicd.json", "RSICD_images", "test"),
    "rsitmd_l": lambda root: karpathy(root, "data/evaluation/RSITMD/dataset_RSITMD.json", "images", "test"),
    "seg_4": lambda root: remote_clip(root, "Seg-4"),
    "ucmerced": lambda root: karpathy(root, "data/UCM_captions/dataset.json", "imgs", "all"),
}


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


def write_evaluation_sets(recipe: Recipe, root: Path) -> None:
    """Each holds another image, and one of them the first image, re-encoded and upside down."""
    for number, name in enumerate(recipe.duplicates.against):
        folder = root / name
        folder.mkdir(parents=True)
        picture(1000 + number).save(folder / "other.png")
        if name.endswith("RSICD"):
            picture(0).rotate(180).save(folder / "leaked.jpg", quality=60)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, tmp_path, tokenizer_folder):
    recipe = recipe_of(name)
    LAYOUTS[name](tmp_path)
    write_evaluation_sets(recipe, tmp_path)
    folder = tmp_path / "built"
    with ChatServer() as server:
        # The server's answers are one text with other words in it.
        changes = [f"tokenizer={tokenizer_folder}", "checks.repeated_answer=off"]
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
