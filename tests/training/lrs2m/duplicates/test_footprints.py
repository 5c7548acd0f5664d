"""Rows on the ground of an evaluation image are left out, whatever they look like."""

import json

import pytest
import shapely

from tests.training.lrs2m.small_builds import build, entries, long_caption, picture, rows_of, short_caption, source
from training.lrs2m.duplicates.footprints import Footprints


@pytest.fixture
def outlines(tmp_path):
    """Two squares of a hundredth of a degree, at (10, 50) and (20, -10)."""
    features = [
        {
            "type": "Feature",
            "properties": {},
            "geometry": json.loads(shapely.to_geojson(shapely.box(x, y, x + 0.01, y + 0.01))),
        }
        for x, y in ((10, 50), (20, -10))
    ]
    file = tmp_path / "evaluated.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return file


def test_ground_that_is_shared(outlines):
    footprints = Footprints([outlines])
    assert footprints.overlapped(10.005, 50.005, None, (100, 100)) == "evaluated.geojson:0"
    assert footprints.overlapped(20.005, -9.995, 1.0, (100, 100)) == "evaluated.geojson:1"
    assert footprints.overlapped(10.02, 50.005, None, (100, 100)) is None
    # 0.01 degrees of longitude are 716 m at 50 degrees north; half of the image's width must reach over them.
    assert footprints.overlapped(10.02, 50.005, 1.0, (1400, 100)) is None
    assert footprints.overlapped(10.02, 50.005, 1.0, (1460, 100)) == "evaluated.geojson:0"
    assert footprints.overlapped(10.005, 50.02, 1.0, (100, 2200)) is None  # 1,113 m of latitude
    assert footprints.overlapped(10.005, 50.02, 1.0, (100, 2260)) == "evaluated.geojson:0"
    assert footprints.overlapped(None, 50.0, 1.0, (100, 100)) is None


def test_outlines_that_cannot_be_read(tmp_path):
    (tmp_path / "no.geojson").write_text("no outlines")
    with pytest.raises(ValueError, match="no.geojson cannot be read as outlines"):
        Footprints([tmp_path / "no.geojson"])


def test_a_build_leaves_them_out(outlines, tmp_path, write_recipe):
    rows = []
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
        row = {"image": f"{index}.png", "long_text": long_caption(index), "short_text": short_caption(index)}
        rows.append(row | {"lon": 10.005 + 0.01 * index, "lat": 50.005})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {"kind": "table", "path": str(tmp_path / "captions.jsonl")}
    recipe = write_recipe(
        [source("merge", table, join=table)], duplicates={"inside": False, "footprints": [str(outlines)]}
    )
    assert build(recipe, tmp_path / "set") == 0
    assert [row["image_key"] for row in rows_of(tmp_path / "set")] == ["1.png", "2.png", "3.png"]
    (left,) = entries(tmp_path / "set", "duplicates")
    assert (left["image_key"], left["match"], left["kind"]) == ("0.png", "evaluated.geojson:0", "same ground")
