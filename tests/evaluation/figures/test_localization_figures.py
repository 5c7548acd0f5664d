"""The picture of semantic localization, for scenes of any shape and texts with odd signs."""

import numpy as np
import pytest
from PIL import Image

from evaluation.benchmarks.localization_data import LocalizationData
from evaluation.figures.localization import draw_localization
from modeling_lrsclip.encoding.imagery import ImageFiles


@pytest.mark.parametrize("size, queries", [((900, 300), 1), ((200, 700), 3), ((640, 640), 4)])
def test_scenes_of_any_shape_are_drawn(size, queries, tmp_path):
    Image.new("RGB", size, "grey").save(tmp_path / "scene.png")
    width, height = size
    region = [[-20, 10], [width / 2, 10], [width / 3, height - 5]]
    text = "A $5 and $6 road with 100% _sand_ \\alpha " + "and a very long description of it " * 9
    images = ImageFiles([tmp_path / "scene.png"], ["scene.png"])
    data = LocalizationData("scenes", images, [(height, width)], [text] * queries, [0] * queries, [[region]] * queries)
    heat = (np.add.outer(np.arange(20), np.arange(64)) * 3).tolist()
    result = {
        "protocol": "v1",
        "examples": [{"query": query, "map": heat} for query in range(queries)],
        "per_query": {name: [0.5] * queries for name in ("Rsu", "Ras", "Rda", "Rmi")},
    }
    path = draw_localization(result, data, tmp_path / "selo.png", "a_model$")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (frame == 255).all() and picture.shape[1] > 900
    green = (np.abs(picture - (31, 157, 85)).sum(axis=2) < 12).sum()
    assert green > 500  # the outlines
    heading = picture[: picture.shape[0] // 3].reshape(-1, 3)
    assert (np.abs(heading - (252, 165, 10)).sum(axis=1) < 40).sum() > 20  # the scale of colours
    crosses = (picture == 255).all(axis=2) & (np.abs(np.roll(picture, 3, axis=1) - (34, 48, 60)).sum(axis=2) < 12)
    assert crosses.sum() > 20  # white beside dark, at the highest points of the maps
