"""Windows by hand, maps against a slow loop over pixels, and the task from its data to its table."""

import io
import json
import random

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.benchmarks.aerial_scenes.canvas import draw_canvas
from evaluation.benchmarks.localization_data import LocalizationData
from evaluation.localization import (
    LocalizationTask,
    localization_metrics,
    localization_table,
    similarity_map,
)
from evaluation.localization_maps import (
    PROTOCOLS,
    Protocol,
    SceneWindows,
    Window,
    best_windows,
    grid_windows,
    mean_scores,
    near_windows,
    probability_map,
    query_embeddings,
)
from evaluation.results import make_console, markdown, print_table
from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts


SMALL = {"v1": Protocol("v1", (48, 80)), "v2": Protocol("v2", (64,))}
TEXTS = ["Two white storage tanks beside a road.", "a beach", "houses with orange roofs and a green field"]


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    image, _, _ = draw_canvas(random.Random(3), 64)  # 256 x 256
    return image.crop((0, 0, 230, 180))


@pytest.fixture
def images_seen(tiny_model):
    """How many images each call of the tower got."""
    seen = []
    hook = tiny_model.vision_model.embeddings.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    yield seen
    hook.remove()


# -------------------------------------------------------------------------------------------------------------- windows


def test_windows_counted_by_hand():
    # 7 x 10 pixels, windows of 4. From 0: left 0, 3; top 0, 4, 6. Half a window on: left 2, 3; top 2, 6.
    windows = grid_windows(10, 7, Protocol("v1", (4,)))
    corners = [(0, 0), (4, 0), (6, 0), (0, 3), (4, 3), (6, 3), (2, 2), (6, 2), (2, 3)]  # (6, 3) comes once
    assert [(window.top, window.left) for window in windows] == corners
    assert all(window.bottom - window.top == window.right - window.left == 4 for window in windows)
    assert len(grid_windows(10, 7, Protocol("v2", (4,)))) == 6
    # As many as the published loop leaves files for a scene of 2000 x 2000.
    assert (
        len(grid_windows(2000, 2000, PROTOCOLS["v1"])) == 175 and len(grid_windows(2000, 2000, PROTOCOLS["v2"])) == 16
    )


def test_windows_of_a_scene_that_they_fit_exactly():
    assert grid_windows(8, 8, Protocol("v2", (4,))) == [(0, 4, 0, 4), (4, 8, 0, 4), (0, 4, 4, 8), (4, 8, 4, 8)]
    assert grid_windows(4, 4, Protocol("v1", (4,))) == [(0, 4, 0, 4)]


@pytest.mark.parametrize("seed", range(5))
def test_every_pixel_is_covered(seed):
    rng = np.random.default_rng(seed)
    sides = tuple(int(side) for side in rng.integers(2, 40, 2))
    height, width = (int(side) for side in rng.integers(max(sides), 120, 2))
    covered = np.zeros((height, width), bool)
    windows = grid_windows(height, width, Protocol("v1", sides))
    for top, bottom, left, right in windows:
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        covered[top:bottom, left:right] = True
    assert covered.all() and len(set(windows)) == len(windows)


def test_windows_around_a_window_in_the_corner():
    windows = near_windows(Window(488, 1000, 0, 512), 1000, 900)
    assert len(windows) == 18
    assert (424, 552, 0, 128) in windows and (360, 616, 0, 256) in windows  # upper left corner: moved inside
    assert (936, 1000, 448, 576) in windows and (872, 1000, 384, 640) in windows  # lower right corner: cut off
    assert (680, 808, 192, 320) in windows  # the middle
    assert (552, 680, 64, 192) in windows  # half way to the upper left corner
    assert (936, 1000, 836, 900) in near_windows(Window(488, 1000, 388, 900), 1000, 900)  # cut off twice


def test_the_best_sixth_is_looked_at_again():
    assert best_windows(np.array([0.3])).tolist() == [0]
    assert best_windows(np.array([5.0, 1, 9, 2, 7, 3])).tolist() == [2]  # 0.9 -> 0 and one more
    assert sorted(best_windows(np.arange(14.0)[::-1]).tolist()) == [0, 1, 2]  # 2.1 -> 2 and one more
    for noise in (0.0, 1e-7):  # of equal ones the last, though equal windows were encoded in batches of two shapes
        scores = np.array([0.25] * 6 + [0.5] * 8) + noise * np.arange(14)[::-1]
        assert best_windows(scores).tolist() == [11, 12, 13]


# ----------------------------------------------------------------------------------------------------------------- maps


def slow_map(encode, texts_embed, scene, protocol, reference_io):
    """Window by window and pixel by pixel."""
    height, width = scene.shape[:2]

    def score(window):
        top, bottom, left, right = window
        pixels = cv2.resize(scene[top:bottom, left:right], (256, 256), interpolation=cv2.INTER_CUBIC)
        image = Image.fromarray(pixels)
        if reference_io:
            _, content = cv2.imencode(".jpg", pixels[..., ::-1])
            image = Image.open(io.BytesIO(content.tobytes()))
        return float(encode(image) @ texts_embed)

    scored = [(window, score(window)) for window in grid_windows(height, width, protocol)]
    if protocol.name == "v2":
        scored.sort(key=lambda pair: pair[1])
        scored = scored[-(int(0.15 * len(scored)) + 1) :]
        near = {close for window, _ in scored for close in near_windows(window, height, width)}
        scored += [(window, score(window)) for window in sorted(near)]
    values = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            covering = [
                value for (top, bottom, left, right), value in scored if top <= y < bottom and left <= x < right
            ]
            values[y, x] = sum(covering) / len(covering) if covering else 0
    values -= values.min()
    heat = np.uint8(255 * (values / values.max()))
    heat = cv2.medianBlur(heat, 251) if protocol.name == "v1" else cv2.GaussianBlur(heat, (255, 255), 0)
    if reference_io:
        heat = cv2.imdecode(cv2.imencode(".jpg", heat)[1], cv2.IMREAD_GRAYSCALE)
    return heat


@pytest.mark.parametrize("name", ["v1", "v2"])
@pytest.mark.parametrize("reference_io", [False, True], ids=["", "jpeg"])
def test_maps_equal_the_slow_loop(name, reference_io, scene, tiny_model, tiny_processor):
    maps = similarity_map(tiny_model, tiny_processor, scene, TEXTS, SMALL[name], reference_io, batch_size=7)
    assert maps.shape == (3, 180, 230) and maps.dtype == np.uint8 and maps.max() > 100
    text = embed_texts(tiny_model, tiny_processor, TEXTS[:1])[0]
    if name == "v2":  # the mean with four shuffles of the words, which are always the same
        text = query_embeddings(Encoder(tiny_model, tiny_processor), TEXTS[:1], SMALL["v2"]).embeds[0]
    slow = slow_map(
        lambda image: embed_images(tiny_model, tiny_processor, [image])[0].double(),
        text.double(),
        np.asarray(scene),
        SMALL[name],
        reference_io,
    )
    assert np.abs(maps[0].astype(int) - slow).max() <= 1


def test_averages_are_exact_where_windows_overlap():
    windows = [Window(0, 4, 0, 4), Window(2, 6, 2, 6), Window(0, 6, 5, 6)]
    means, heights, widths = mean_scores(6, 6, windows, np.array([0.2, 0.4, 0.1]))
    whole = np.repeat(np.repeat(means, heights, axis=0), widths, axis=1)
    assert whole.shape == (6, 6)
    assert whole[0, 0] == 0.2 and whole[3, 3] == pytest.approx(0.3) and whole[5, 5] == pytest.approx(0.25)
    assert whole[0, 4] == 0 and whole[0, 5] == 0.1 and whole[5, 0] == 0


@pytest.mark.parametrize("name", SMALL)
def test_where_all_windows_are_alike_the_map_is_empty(name):
    windows = grid_windows(130, 180, SMALL[name])
    heat = probability_map(130, 180, windows, np.full(len(windows), 0.25), SMALL[name], False)
    assert heat.shape == (130, 180) and not heat.any()


def test_a_scene_is_encoded_once_for_all_queries(scene, tiny_model, tiny_processor, images_seen):
    similarity_map(tiny_model, tiny_processor, scene, TEXTS, SMALL["v1"], batch_size=16)
    assert sum(images_seen) == len(grid_windows(180, 230, SMALL["v1"]))
    images_seen.clear()
    similarity_map(tiny_model, tiny_processor, scene, TEXTS, SMALL["v2"], batch_size=16)
    first = len(grid_windows(180, 230, SMALL["v2"]))
    assert first < sum(images_seen) <= first + len(TEXTS) * 2 * 18
    assert len(images_seen) < 12  # in batches


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_the_same_again_and_alone(name, scene, tiny_model, tiny_processor):
    maps = similarity_map(tiny_model, tiny_processor, scene, TEXTS, SMALL[name])
    again = similarity_map(tiny_model, tiny_processor, scene, TEXTS, SMALL[name])
    assert (maps == again).all()
    alone = similarity_map(tiny_model, tiny_processor, scene, TEXTS[1:2], SMALL[name])
    assert np.abs(maps[1].astype(int) - alone[0]).max() <= 1
    assert similarity_map(tiny_model, tiny_processor, scene, [], SMALL[name]).shape == (0, 180, 230)


def test_bf16_and_stock_clip(scene, tiny_clip, tiny_processor):
    maps = similarity_map(tiny_clip, tiny_processor, scene, TEXTS, SMALL["v1"])
    half = similarity_map(tiny_clip, tiny_processor, scene, TEXTS, SMALL["v1"], dtype=torch.bfloat16)
    assert maps.shape == half.shape and maps.any() and half.any()


@pytest.mark.parametrize(
    "texts, protocol, problem",
    [
        (TEXTS, "v1", "scene of 230 x 180 pixels is smaller than a window of 768; protocol v1 takes .* 768 x 768"),
        (TEXTS, "v2", "smaller than a window of 512"),
        (TEXTS, "v3", "protocol 'v3' is not known; use v1 or v2"),
        (TEXTS[0], SMALL["v1"], "texts must be a list of strings, got one string"),
    ],
)
def test_bad_input_is_one_clear_sentence(texts, protocol, problem, scene, tiny_model, tiny_processor):
    with pytest.raises(ValueError, match=problem):
        similarity_map(tiny_model, tiny_processor, scene, texts, protocol)


@pytest.mark.parametrize(
    "name, windows, problem",
    [
        ("v3", (256,), "protocol 'v3' is not known"),
        ("v1", (), "whole numbers of pixels"),
        ("v1", (256, 1), "at least 2"),
        ("v2", (256, 512), "one size"),
    ],
)
def test_protocols_check_themselves(name, windows, problem):
    with pytest.raises(ValueError, match=problem):
        Protocol(name, windows)


# ----------------------------------------------------------------------------------------------------------------- task


@pytest.fixture
def source(scene, tmp_path):
    scene.save(tmp_path / "a.png")
    scene.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png")
    square = [[20, 30], [100, 30], [100, 120], [20, 120]]
    rows = [
        {"image": "a.png", "text": TEXTS[0], "polygons": [square]},
        {"image": "b.png", "text": TEXTS[1], "polygons": [square, [[120, 150], [250, 160], [170, 229]]]},
        {"image": "a.png", "text": TEXTS[2], "polygons": [[[150, 5], [220, 5], [220, 60]]]},
    ]
    path = tmp_path / "localization.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("reference_io", [False, True], ids=["", "jpeg"])
def test_the_task_measures_what_the_functions_do(reference_io, source, tiny_model, tiny_processor):
    task = LocalizationTask(SMALL["v1"], reference_io)
    data = task.load(str(source))
    assert isinstance(data, LocalizationData) and data.sizes == [(180, 230), (230, 180)]
    result = task.evaluate(Encoder(tiny_model, tiny_processor, batch_size=16), data)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    expected = []
    for index, query in enumerate(data.texts):
        scene = data.images[data.text_to_image[index]]
        (heat,) = similarity_map(tiny_model, tiny_processor, scene, [query], SMALL["v1"], reference_io, batch_size=16)
        expected.append(localization_metrics(heat, data.regions[index]))
    for name in ("Rsu", "Ras", "Rda", "Rmi"):
        assert result["per_query"][name] == pytest.approx([measures[name] for measures in expected], abs=2e-3)
        assert result["metrics"][name] == pytest.approx(np.mean(result["per_query"][name]))
    assert (result["images"], result["texts"], result["regions"], result["regions_over_the_edge"]) == (2, 3, 4, 1)
    assert result["windows"] == 2 * len(grid_windows(180, 230, SMALL["v1"]))
    assert result["data"] == data.describe() and result["data"]["read_from"] == str(source)
    assert result["queries"][1] == {"text": "a beach", "image": "b.png"}
    assert [example["query"] for example in result["examples"]] == [0, 1, 2]
    assert max(len(result["examples"][0]["map"]), len(result["examples"][0]["map"][0])) == 64
    assert ("reference_io_difference" in result) == reference_io
    if reference_io:
        plain = LocalizationTask(SMALL["v1"]).evaluate(Encoder(tiny_model, tiny_processor, batch_size=16), data)
        assert result["without_reference_io"]["metrics"] == plain["metrics"]
        assert result["reference_io_difference"]["Rsu"] == result["metrics"]["Rsu"] - plain["metrics"]["Rsu"] != 0


def test_a_scene_smaller_than_a_window_is_named_before_anything_is_encoded(source):
    with pytest.raises(
        ValueError, match=r"image a\.png of .*localization\.jsonl: the scene of 230 x 180 .* window of 512"
    ):
        LocalizationTask("v2").load(str(source))


def test_the_table_sets_the_paper_and_the_gap_beside_the_figures():
    result = {
        "model": "lrsclip-vit-b-16",
        "dataset": "AIR-SLT",
        "metrics": {"Rsu": 0.7701, "Ras": 0.2311, "Rda": 0.7345, "Rmi": 0.76},
        "images": 21,
        "texts": 57,
        "regions": 103,
        "data": {
            "expected": {"images": 22},
            "whole": False,
            "skipped": [],
            "summary": "AIR-SLT: 21 scenes; it has 22",
        },
        "protocol": "v1",
        "window_sizes": [256, 512, 768],
        "reference_io": True,
        "without_reference_io": {"metrics": {"Rsu": 0.77, "Ras": 0.23, "Rda": 0.73, "Rmi": 0.75}},
        "paper": {"Rsu": 0.7689, "Ras": 0.2371, "Rda": 0.7345, "Rmi": 0.7582},
        "gap": {"Rsu": 0.0012, "Ras": -0.006, "Rda": 0.0, "Rmi": 0.0018},
    }
    table = localization_table("Semantic localization (SeLo)", [result, dict(result, model="other")])
    one = ["lrsclip-vit-b-16", "paper", "gap", "without JPEG"]
    assert [row[0].strip() for row in table.rows] == [*one, "other", *one[1:]]
    text = markdown(table)
    assert "| +0.00120 | -0.00600 |" in text and "through JPEG as published" in text
    assert "\nAIR-SLT: 21 scenes; it has 22.\n" in text and "--reference-io" not in text

    whole = {
        "data": {"expected": {"images": 22}, "whole": True, "skipped": []},
        "reference_io": False,
        "protocol": "v2",
    }
    text = markdown(localization_table("Semantic localization (SeLo)", [result | whole]))
    assert "| SeLo-v1 (paper) | 0.69200 | 0.33230 | 0.66670 | 0.67720 |\n| SeLo-v2 (paper) | 0.71990 |" in text
    assert "The published loop is with protocol v1 and JPEG in between (--reference-io)." in text
    file = io.StringIO()
    print_table(make_console(file), table)
    assert max(map(len, file.getvalue().splitlines())) <= 100


def test_embeddings_of_windows_are_kept_on_disk(source, tmp_path, tiny_model, tiny_processor, images_seen):
    task = LocalizationTask(SMALL["v2"])
    data = task.load(str(source))
    first = task.evaluate(Encoder(tiny_model, tiny_processor, cache_dir=tmp_path / "kept"), data)
    assert images_seen
    images_seen.clear()
    again = task.evaluate(Encoder(tiny_model, tiny_processor, cache_dir=tmp_path / "kept"), data)
    assert not images_seen and again["per_query"] == first["per_query"]
    scene = data.images[0]
    changed = scene.copy()
    changed.putpixel((3, 4), (255, 0, 255))
    windows = [Window(0, 64, 0, 64), Window(0, 64, 100, 164)]
    parts = [SceneWindows(np.asarray(image), windows) for image in (scene, changed)]
    hashes = {part.content_hash for part in (*parts, parts[0][:1], SceneWindows(np.asarray(scene), windows, True))}
    assert len(hashes) == 4 and parts[0][:2].content_hash == parts[0].content_hash
