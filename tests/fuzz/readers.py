"""Every reader of files that somebody else may have written, each with whole files to start from and how they are damaged."""

import io
import json
import re
import sqlite3
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.strategies import (
    Whole,
    damaged,
    damaged_json,
    damaged_lines,
    damaged_parquet,
    damaged_safetensors,
    damaged_tar,
    damaged_zip,
)


ROOT = Path(__file__).parents[2]
Wholes = list[tuple[bytes, st.SearchStrategy[bytes]]]  # a whole file, and what becomes of it


@dataclass(frozen=True)
class Reader:
    """A kind of file: what it is called, whole ones with their damage, and all that reads it."""

    name: str  # of the file, with the suffix that readers go by
    wholes: Callable[[], Wholes]
    read: Callable[[Path], Any]


def _saved(save: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- checkpoints


@cache
def _published() -> dict[str, torch.Tensor]:
    from tests.modeling_lrsclip.references import published_state

    return published_state(300, two_tables=True)


def _checkpoints() -> Wholes:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(3, dtype=torch.float16)}
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    new = _saved(partial(torch.save, {"state_dict": state, "epoch": 3}))
    old = _saved(partial(torch.save, state, _use_new_zipfile_serialization=False))
    small, published = safetensors.torch.save(state), safetensors.torch.save(_published())
    return [
        (new, damaged_zip(Whole(new))),
        (old, damaged(Whole(old))),
        (script := _saved(partial(torch.jit.save, module)), damaged_zip(Whole(script))),
        (small, damaged_safetensors(Whole(small))),
        (published, damaged_safetensors(Whole(published))),
    ]


def _read_checkpoint(path: Path) -> None:
    from modeling_lrsclip.published.checkpoint_files import read_published_file
    from modeling_lrsclip.published.checkpoints import read_published_checkpoint

    for tensor in read_published_file(path).tensors.values():
        if isinstance(tensor, torch.Tensor):
            tensor.to(torch.float32).sum()
    try:
        read_published_checkpoint(path)
    except ValueError as error:
        if path.name not in str(error):
            raise


# ---------------------------------------------------------------------------------------------------- images, rasters


def _images() -> Wholes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    kinds = [
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
    ]
    files = [_saved(partial(image.save, format=kind, **options)) for kind, options in kinds]
    return [(file, damaged(Whole(file))) for file in files]


def _read_image(path: Path) -> None:
    from modeling_lrsclip.encoding.imagery import ImageError, image_size, open_image, read_image

    for read in (image_size, open_image, partial(read_image, shortest_edge=8)):
        for stored in (path, {"bytes": path.read_bytes(), "path": path.name}):
            try:
                read(stored)
            except ImageError as error:
                if path.name not in str(error):
                    raise
    read_image(path)


def _rasters() -> Wholes:
    from affine import Affine
    from rasterio.io import MemoryFile

    pixels = np.random.default_rng(0).integers(0, 4000, (3, 40, 48)).astype(np.uint16)
    profile = {"count": 3, "height": 40, "width": 48, "dtype": "uint16", "crs": "EPSG:32633"}
    files = []
    for options in ({}, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}):
        with MemoryFile() as memory:
            with memory.open(
                driver="GTiff", transform=Affine(10, 0, 4e5, 0, -10, 5.5e6), **profile, **options
            ) as file:
                file.write(pixels)
            files.append(memory.read())
    return [(file, damaged(Whole(file))) for file in files]


def _read_raster(path: Path) -> None:
    from geosearch.scenes import Scene, describe_scene
    from modeling_lrsclip.encoding.rasters import Raster

    with Raster(path) as raster:
        describe_scene(Scene(str(path)), raster)
        raster.read(0, 0, min(32, raster.width), min(32, raster.height))


# ------------------------------------------------------------------------------------------------------------- settings


def _yaml(path: Path) -> Callable[[], Wholes]:
    def wholes() -> Wholes:
        text = path.read_bytes()
        return [(text, damaged(Whole(text))), (text, damaged_json(yaml.safe_load(text)))]

    return wholes


def _read_training_recipe(path: Path) -> None:
    from training.train import parse_config

    parse_config(["--config", str(path), "--output_dir", "x", "--data.train", str(path.parent / "none.jsonl")])


def _read_lrs2m_recipe(path: Path) -> None:
    from training.lrs2m.recipe import read_recipe

    read_recipe([path])


def _read_prompt(path: Path) -> None:
    from training.lrs2m.captioners.prompts import load_prompt
    from training.lrs2m.recipe import TextConfig

    load_prompt(TextConfig(captioner="x", prompt=str(path)), path.parent)


# ------------------------------------------------------------------------------------------------- journals and caches


def _answers() -> Wholes:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT, finished INTEGER) WITHOUT ROWID")
    database.executemany("INSERT INTO answers VALUES (?, ?, 1)", [(f"{n:03d}", "words " * n) for n in range(60)])
    database.commit()
    whole = database.serialize()
    return [(whole, damaged(Whole(whole)))]


def _read_answers(path: Path) -> None:
    from training.lrs2m.captioners.captioner import Answer, AnswerStore

    store = AnswerStore(path)
    try:
        store.find("007")
        store.store("new", Answer("words", True))
        len(store)
    finally:
        store.close()


def _embeddings() -> Wholes:
    from modeling_lrsclip.encoding.encoder import EmbeddingCache

    with tempfile.TemporaryDirectory() as folder:
        EmbeddingCache(Path(folder), "model").save("content", torch.eye(3), 1.0)
        whole = next(Path(folder).rglob("*.safetensors")).read_bytes()
    return [(whole, damaged_safetensors(Whole(whole)))]


def _read_embeddings(path: Path) -> None:
    from modeling_lrsclip.encoding.encoder import EmbeddingCache

    kept = EmbeddingCache(path.parent, "model")
    kept.save("content", torch.eye(3), 1.0)
    next(path.parent.rglob("??/*.safetensors")).write_bytes(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is computed again
        loaded = kept.load("content")
    assert loaded is None or torch.equal(loaded[0], torch.eye(3)), "other embeddings than were kept"


def _log() -> Wholes:
    lines = [{"id": "a.tar:1", "file": "a.tar", "reason": "x"}, {"id": "a.tar:2", "file": "a.tar", "reason": "y"}]
    return [(b"", damaged_lines(lines))]


def _read_skipped(path: Path) -> None:
    from training.data.skipped import SkippedFile

    SkippedFile(path.parent).add([{"id": "b", "file": "b", "reason": "c"}])


def _manifest() -> Wholes:
    files = {"files": {"weights": {"bytes": 3, "sha256": "ab"}, "manifest.json": {"bytes": 1, "sha256": "x"}}}
    return [(json.dumps(files).encode(), damaged_json(files))]


def _read_manifest(path: Path) -> None:
    from training.checkpoint import find_damage

    assert find_damage(path.parent) is not None


# ------------------------------------------------------------------------------------------------------------ records


def _run_record() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "starts": [{"step": 0, "created": "2025-01-01T00:00:00+00:00", "versions": {"torch": "2"}}],
        "data": {"name": "tiles.jsonl", "kind": "local", "pairs": 4, "captions": {}},
        "steps": 2,
        "weights": {"step": 2, "sha256": "ab"},
        "config": {"loop": {"batch_size": 4}},
    }


def _read_run_record(path: Path) -> None:
    from training.run_folder import read_record

    read_record(path.parent)


def _results() -> Wholes:
    from tests.evaluation.test_bootstrap import classification_result, localization_result, retrieval_result

    known = dict.fromkeys(("images_sha256", "texts_sha256", "labels_sha256", "queries_sha256"), "0")
    results = [
        {"task": task, "dataset": "tiles"} | known | result | {"model": label}
        for label in ("a", "b")
        for task, result in (
            ("zcrl", retrieval_result(0, images=5)),
            ("zic", classification_result(0, images=9)),
            ("selo", localization_result(0, queries=4)),
        )
    ]
    document = {"models": [{"label": "a", "weights_sha256": "ab"}], "environment": {}, "results": results}
    return [(json.dumps(document).encode(), damaged_json(document))]


def _read_results(path: Path) -> None:
    from evaluation.compare import compare

    try:
        compare(str(path), label_a="a", label_b="b", resamples=100)
    except ValueError as error:  # about the models asked for, whichever file
        if not re.search("were not measured on the same|in common", str(error)):
            raise


# ---------------------------------------------------------------------------------------------------------- geosearch


@cache
def _index() -> dict[str, bytes]:
    from tests.geosearch.small_scenes import write_index
    from tests.geosearch.test_index_store import METADATA, rows_of

    with tempfile.TemporaryDirectory() as folder:
        index = write_index(folder, [rows_of("a.tif", 12)], METADATA)
        index.vectors(), index.rows()
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file()
        }


def _index_file(name: str) -> Callable[[], Wholes]:
    def wholes() -> Wholes:
        whole = _index()[name]
        if name.endswith(".json"):
            return [(whole, damaged_json(json.loads(whole)))]
        return [(whole, (damaged_parquet if name.endswith(".parquet") else damaged)(Whole(whole)))]

    return wholes


def _read_index(name: str, path: Path) -> None:
    from geosearch.exact_search import nearest_places
    from geosearch.hits import feature_table, hit_table, summary
    from geosearch.index_store import open_index

    folder = path.parent / "index"
    for other, content in _index().items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    content = path.read_bytes()
    (folder / name).write_bytes(content)
    if name.endswith(".parquet"):  # of a size that index.json knows
        metadata = json.loads(_index()["index.json"])
        metadata["parts"][0]["bytes"] = len(content)
        (folder / "index.json").write_text(json.dumps(metadata))
        (folder / "vectors.f16").unlink()
        (folder / "rows.arrow").unlink()
    index = open_index(folder)
    index.check_model("ab" * 32)
    hits = nearest_places(index, np.eye(8)[0], top=3)
    feature_table(hits), hit_table(hits), summary(hits)


def _stac() -> Wholes:
    asset = {"href": "a.tif", "type": "image/tiff", "roles": ["visual"]}
    item = {
        "type": "Feature",
        "id": "x",
        "assets": {"visual": asset},
        "properties": {"datetime": "2024-05-01T00:00:00Z"},
    }
    catalog = {
        "type": "Catalog",
        "links": [{"rel": "item", "href": "scenes.json"}, {"rel": "child", "href": "other.json"}],
    }
    documents = [item, {"type": "FeatureCollection", "features": [item, item]}, catalog]
    return [(json.dumps(document).encode(), damaged_json(document)) for document in documents]


def _scene_table() -> Wholes:
    whole = b"path,datetime\na.tif,2024-05-01\nb.tif,\n"
    return [(whole, damaged(Whole(whole)))]


def _scene_parquet() -> Wholes:
    whole = _saved(partial(pq.write_table, pa.table({"path": ["a.tif", "b.tif"], "datetime": ["2024-05-01", None]})))
    return [(whole, damaged_parquet(Whole(whole)))]


def _read_scenes(path: Path) -> None:
    from geosearch.scenes import find_scenes

    find_scenes([path])


# -------------------------------------------------------------------------------------------------------------- labels


def _coco() -> Wholes:
    document = {
        "categories": [{"id": 1, "name": "tank"}],
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    return [(json.dumps(document).encode(), damaged_json(document))]


def _read_coco(path: Path) -> None:
    from training.lrs2m.sources.labels import read_coco

    read_coco(path)


def _geojson() -> Wholes:
    shape = {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}
    feature = {"type": "Feature", "properties": {"label": "tank"}, "geometry": shape}
    document = {"type": "FeatureCollection", "features": [feature, feature]}
    return [(json.dumps(document).encode(), damaged_json(document))]


def _read_geojson(path: Path) -> None:
    from training.lrs2m.recipe import LabelsConfig
    from training.lrs2m.sources.geography import read_vectors

    read_vectors(path, LabelsConfig(kind="geojson", field="label")).within((0, 0, 2, 2))


# ------------------------------------------------------------------------------------------------------------- tables


_ROWS = [
    {"image": f"{number}.png", "long_text": "A grey road, and a field.", "short_text": "A road."}
    for number in range(4)
]


def _jsonl() -> Wholes:
    return [(b"".join(json.dumps(row).encode() + b"\n" for row in _ROWS), damaged_lines(_ROWS))]


def _json_table() -> Wholes:
    return [(json.dumps(_ROWS).encode(), damaged_json(_ROWS))]


def _csv() -> Wholes:
    whole = b"image,long_text,short_text\n" + b'0.png,"A grey road, and a field.",A road.\n' * 4
    return [(whole, damaged(Whole(whole)))]


def _parquet() -> Wholes:
    whole = _saved(partial(pq.write_table, pa.Table.from_pylist(_ROWS * 5), row_group_size=7))
    return [(whole, damaged_parquet(Whole(whole)))]


def _tar() -> Wholes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, row in enumerate(_ROWS):
            name = "ü" * 60 + str(number)  # long and not ASCII: a pax header
            members = {"jpg": b"\xff\xd8", "json": json.dumps(row).encode(), "long_text": b"A long text."}
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return [(buffer.getvalue(), damaged_tar(Whole(buffer.getvalue())))]


def _read_streamed(path: Path) -> None:
    from training.data.sources import DataConfig, SourceConfig, open_source

    columns = {"image": "image", "long": "long_text", "short": "short_text"}
    for rows in open_source(SourceConfig(str(path)), "train", columns, DataConfig(train=str(path)), streaming=True):
        rows.read(list(range(int(rows.chunks.sum()))))
        list(rows.texts("long"))


def _read_measured(path: Path) -> None:
    from evaluation.benchmarks.tables import read_table

    read_table(path, ["long_text"])


def _read_built(path: Path) -> None:
    from training.lrs2m.recipe import ReadConfig
    from training.lrs2m.sources.records import stored_rows

    kind = "webdataset" if path.suffix == ".tar" else "table"
    list(stored_rows(ReadConfig(kind, str(path), split="all"), path.parent))


def _vocabulary() -> Wholes:
    from tests.modeling_lrsclip.source_files import write_bpe_file

    with tempfile.TemporaryDirectory() as folder:
        write_bpe_file(Path(folder) / "bpe.gz")
        whole = (Path(folder) / "bpe.gz").read_bytes()
    return [(whole, damaged(Whole(whole)))]


def _read_vocabulary(path: Path) -> None:
    from modeling_lrsclip.published.tokenizer import tokenizer_from_bpe

    tokenizer_from_bpe(path, 77)


READERS = {
    "checkpoint": Reader("weights.pt", _checkpoints, _read_checkpoint),
    "image": Reader("tile.png", _images, _read_image),
    "raster": Reader("scene.tif", _rasters, _read_raster),
    "training recipe": Reader("recipe.yaml", _yaml(ROOT / "training/configs/demo.yaml"), _read_training_recipe),
    "LRS2M recipe": Reader("recipe.yaml", _yaml(ROOT / "training/lrs2m/recipes/ucmerced.yaml"), _read_lrs2m_recipe),
    "prompt": Reader("prompt.yaml", _yaml(ROOT / "training/lrs2m/prompts/expand.yaml"), _read_prompt),
    "answers": Reader("answers.sqlite", _answers, _read_answers),
    "embeddings": Reader("embeddings", _embeddings, _read_embeddings),
    "skipped rows": Reader("skipped.jsonl", _log, _read_skipped),
    "checkpoint's manifest": Reader("manifest.json", _manifest, _read_manifest),
    "run record": Reader("run.json", lambda: [(b"{}", damaged_json(_run_record()))], _read_run_record),
    "results": Reader("results.json", _results, _read_results),
    "index.json": Reader("index.json", _index_file("index.json"), partial(_read_index, "index.json")),
    "index part": Reader(
        "part", _index_file("parts/part-00000.parquet"), partial(_read_index, "parts/part-00000.parquet")
    ),
    "index rows": Reader("rows.arrow", _index_file("rows.arrow"), partial(_read_index, "rows.arrow")),
    "index vectors": Reader("vectors.json", _index_file("vectors.json"), partial(_read_index, "vectors.json")),
    "STAC": Reader("scenes.json", _stac, _read_scenes),
    "scene table": Reader("scenes.csv", _scene_table, _read_scenes),
    "scene parquet": Reader("scenes.parquet", _scene_parquet, _read_scenes),
    "COCO": Reader("coco.json", _coco, _read_coco),
    "GeoJSON": Reader("labels.geojson", _geojson, _read_geojson),
    "vocabulary": Reader("bpe.txt.gz", _vocabulary, _read_vocabulary),
}
for _suffix, _wholes in {"jsonl": _jsonl, "json": _json_table, "csv": _csv, "parquet": _parquet, "tar": _tar}.items():
    if _suffix != "json":
        READERS[f"streamed {_suffix}"] = Reader(f"rows.{_suffix}", _wholes, _read_streamed)
    if _suffix != "tar":
        READERS[f"measured {_suffix}"] = Reader(f"rows.{_suffix}", _wholes, _read_measured)
    READERS[f"built {_suffix}"] = Reader(f"rows.{_suffix}", _wholes, _read_built)
