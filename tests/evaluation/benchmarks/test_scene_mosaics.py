"""Drawn mosaics: districts fill the plane, queries are true where their polygons say, files are complete."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from evaluation.benchmarks import scene_mosaics
from evaluation.benchmarks.localization_data import load_localization
from evaluation.benchmarks.scene_mosaics import LARGEST_DISTRICT, District, draw_mosaic, plan_mosaic


@pytest.mark.parametrize("seed", range(5))
def test_districts_fill_the_mosaic_and_neighbours_differ(seed):
    districts, names, scenes = plan_mosaic(random.Random(seed), 8)
    owner = np.full((8, 8), -1)
    for index, (top, bottom, left, right) in enumerate(districts):
        assert max(bottom - top, right - left) <= LARGEST_DISTRICT
        assert (owner[top:bottom, left:right] == -1).all()
        owner[top:bottom, left:right] = index
        grounds = {scenes[row, column].ground for row in range(top, bottom) for column in range(left, right)}
        assert len(grounds) == 1
    assert (owner >= 0).all() and len(scenes) == 64
    for (row, column), scene in scenes.items():
        assert scene.class_name == names[owner[row, column]] and scene.line is None
    for index, district in enumerate(districts):
        near = [
            name for other, name in zip(districts, names, strict=True) if other != district and district.touches(other)
        ]
        assert len(near) > 8 or names[index] not in near


def test_polygons_are_where_the_query_is_true():
    image, districts, queries = draw_mosaic(random.Random(1), 4, 32)
    assert image.size == (128, 128) and len(queries) == 4
    outlines = [district.polygon(32) for district in districts]
    classes = [query for query in queries if all(polygon in outlines for polygon in query.polygons)]
    scenes = [query for query in queries if query.text.count(" ") > 5]
    assert len(classes) >= 2 and len(scenes) == 2
    for query in scenes:
        assert len(query.polygons) < 8  # not true everywhere
        for (left, top), _, (right, bottom), _ in query.polygons:
            assert (right - left, bottom - top) == (32, 32) and left % 32 == top % 32 == 0
    assert District(1, 3, 0, 2).polygon(10) == [[0, 10], [20, 10], [20, 30], [0, 30]]


def test_the_command_writes_what_the_loader_reads(tmp_path, capsys):
    out = tmp_path / "mosaics"
    arguments = [str(out), "--mosaics", "2", "--tiles", "4", "--tile-pixels", "32", "--seed", "5"]
    assert scene_mosaics.main(arguments) == 0
    assert "2 mosaics of 128 x 128 pixels with 8 queries" in capsys.readouterr().out
    data = load_localization(out)
    assert data.name == "mosaics" and data.sizes == [(128, 128)] * 2 and len(data.texts) == 8
    assert data.counts["regions_over_the_edge"] == 0
    first = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert sorted(first) == ["0.png", "1.png", "localization.jsonl"]
    assert scene_mosaics.main(arguments) == 0  # over itself
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == first
    assert np.asarray(Image.open(out / "mosaics" / "0.png")).std() > 10
    assert all(json.loads(line)["polygons"] for line in first["localization.jsonl"].decode().splitlines())


@pytest.mark.parametrize(
    "option, value, problem",
    [
        ("--mosaics", "0", "--mosaics is 0; it must be at least 1."),
        ("--tiles", "1", "--tiles is 1; it must be at least 2."),
        ("--tile-pixels", "8", "--tile-pixels is 8; it must be at least 32, at most 1024."),
    ],
)
def test_bad_arguments_are_one_sentence(option, value, problem, tmp_path, capsys):
    assert scene_mosaics.main([str(tmp_path / "out"), option, value]) == 2
    assert capsys.readouterr().err.strip() == f"error: {problem}"
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert scene_mosaics.main([str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err
