"""Planted copies are found, other images are not, whatever was stopped in between."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from evaluation.benchmarks.aerial_scenes.data_set import scene_row
from training.lrs2m.duplicates.finder import DuplicateFinder
from training.lrs2m.duplicates.fingerprints import PARTS, TURNS, coefficients, hashes, thumbnail, turned
from training.lrs2m.duplicates.hash_index import HashIndex, probe_keys


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rows = [scene_row(7, "train", index, 96) for index in range(36)]
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def crop(image: Image.Image, share: float, at: float) -> Image.Image:
    side = round(image.width * share)
    left, top = round(at * (image.width - side)), round((1 - at) * (image.height - side))
    return image.crop((left, top, left + side, top + side))


def test_hashes_are_those_of_imagehash(scenes):
    images = [*scenes, scenes[2].convert("L"), scenes[0].resize((50, 31)), jpeg(scenes[1], 20)]
    own = hashes(coefficients(np.stack([thumbnail(image) for image in images]))[:, 0])
    assert [f"{code:016x}" for code in own] == [str(imagehash.phash(image)) for image in images]


def test_stripes_and_mirror_axes_have_one_hash_on_every_processor(tmp_path):
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 256, (32, 1), dtype=np.uint8), 32, axis=1)
    half = rng.integers(0, 256, (32, 16), dtype=np.uint8)
    for thumb in (stripes, stripes.T, np.concatenate([half, half[:, ::-1]], axis=1)):
        low = coefficients(thumb[None])  # about half of them are 0 but for last bits
        noisy = low + rng.uniform(-0.06, 0.06, (40, *low.shape[1:]))
        assert (hashes(noisy)[:, 0] == hashes(low)[0, 0]).all()
        assert (probe_keys(noisy[:, 0])[..., 0] == probe_keys(low[:, 0])[..., 0]).all()
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    match = DuplicateFinder([tmp_path]).check("copy", Image.fromarray(stripes))
    assert (match.match, match.kind, match.distance) == ("stripes.png", "copy", 0)


def test_turns_are_what_they_are_called():
    pixels = np.arange(32 * 32).reshape(32, 32)
    views = dict(zip(TURNS, turned(pixels)))
    assert np.array_equal(views["turned by 90 clockwise"], np.rot90(pixels, -1))
    assert np.array_equal(views["turned by 90 counterclockwise"], np.rot90(pixels))
    assert np.array_equal(views["turned by 180"], np.rot90(pixels, 2))
    assert np.array_equal(views["mirrored left to right"], pixels[:, ::-1])
    assert len({view.tobytes() for view in views.values()}) == 8


def test_the_index_finds_what_looking_at_all_finds():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(5000, 64))
    index = HashIndex(buffer=1500)
    for start in range(0, 5000, 100):
        index.add(hashes(known[start : start + 100]), np.arange(start, start + 100))
    assert len(index) == 5000
    asked = known[::50] + 0.1 * rng.normal(size=(100, 64))
    query, entry, bits = index.search(hashes(asked), probe_keys(asked), 10)
    every = np.bitwise_count(hashes(asked)[:, None] ^ hashes(known)[None])
    found = set(zip(query.tolist(), entry.tolist()))
    near = set(zip(*(places.tolist() for places in np.nonzero(every <= 10))))
    assert found <= near and len(found) >= 0.97 * len(near) >= 97
    assert (bits == every[query, entry]).all()


@pytest.mark.parametrize("buffered", [True, False])
def test_the_farthest_entry_that_counts(buffered):
    """`reach` bits are near, one more is not; in the buffer and in the sorted pieces."""
    index = HashIndex(buffer=100 if buffered else 1)
    codes = np.array([0b111, 0b1111], dtype=np.uint64)
    for number in range(2):
        index.add(codes[number : number + 1], np.array([number]))
    keys = probe_keys(np.where(np.arange(64) < 61, -1.0, 1.0)[None])  # of 0b111
    query, entry, bits = index.search(np.zeros(1, np.uint64), keys, 3)
    assert set(zip(entry.tolist(), bits.tolist())) == {(0, 3)}


def test_the_farthest_copy_that_counts(scenes):
    small = jpeg(scenes[0].resize((60, 60)), 8)

    def match(distance):
        finder = DuplicateFinder(distance=distance, crops=False)
        assert finder.check("scene", scenes[0]) is None
        return finder.check("copy", small)

    bits = match(18).distance
    assert 0 < bits < 18 and match(bits).kind == "copy"
    nearer = match(bits - 1)
    assert nearer is None or nearer.kind != "copy"


OTHERWISE = {
    "JPEG of quality 30": (lambda image: jpeg(image, 30), "copy", ""),
    "half as large": (lambda image: image.resize((48, 48)), "copy", ""),
    "turned": (lambda image: jpeg(image.rotate(90), 60), "copy", "turned by 90 clockwise"),
    "upside down": (lambda image: image.rotate(180), "copy", "turned by 180"),
    "mirrored": (lambda image: jpeg(ImageOps.mirror(image), 60), "copy", "mirrored left to right"),
    "90 % of each side": (lambda image: jpeg(crop(image, 0.9, 0.3), 60), "crop", ""),
    "85 % of each side": (lambda image: crop(image, 0.85, 0.9), "crop", ""),
    "a turned crop": (lambda image: crop(image, 0.88, 0.5).rotate(-90), "crop", "turned by 90 counterclockwise"),
}


@pytest.mark.parametrize("change", OTHERWISE)
@pytest.mark.parametrize("evaluation", [False, True])
def test_planted_copies_are_found(scenes, tmp_path, change, evaluation):
    alter, kind, turn = OTHERWISE[change]
    if evaluation:
        for index, scene in enumerate(scenes):
            scene.save(tmp_path / f"{index}.png")
        finder = DuplicateFinder([tmp_path], inside=False)
    else:
        finder = DuplicateFinder()
        assert [finder.check(f"scene-{index}", scene) for index, scene in enumerate(scenes)] == [None] * len(scenes)
    found = [finder.check(f"copy-{index}", alter(scene)) for index, scene in enumerate(scenes)]
    names = [f"{index}.png" if evaluation else f"scene-{index}" for index in range(len(scenes))]
    right = [match for match, name in zip(found, names) if match and match.match == name]
    assert len(right) >= (0.9 if kind == "crop" else 1) * len(scenes)
    assert sum(match.kind == kind and match.turn == turn for match in right) >= 0.75 * len(right)
    assert {match.against for match in right} == {str(tmp_path) if evaluation else ""}
    assert not [match for match, name in zip(found, names) if match and match.match != name]


def test_an_image_that_holds_an_earlier_one_is_found(scenes):
    finder = DuplicateFinder()
    for index, scene in enumerate(scenes):
        assert finder.check(f"part-{index}", jpeg(crop(scene, 0.87, 0.4), 70)) is None
    found = [finder.check(f"scene-{index}", scene) for index, scene in enumerate(scenes)]
    right = [match for index, match in enumerate(found) if match and match.match == f"part-{index}"]
    assert len(right) >= 0.9 * len(scenes)
    assert sum(match.kind == "contains" for match in right) >= 0.9 * len(right)


def test_what_is_not_asked_for_is_not_searched(scenes, tmp_path):
    scenes[0].save(tmp_path / "evaluated.png")
    without_crops = DuplicateFinder(crops=False)
    assert without_crops.check("a", scenes[0]) is None and without_crops.check("b", crop(scenes[0], 0.85, 0)) is None
    assert without_crops.check("c", scenes[0].rotate(90)).kind == "copy"

    finder = DuplicateFinder([tmp_path / "evaluated.png"], inside=False)
    assert finder.check("a", scenes[0], against=[]) is None  # for this source the set does not count
    assert finder.check("b", scenes[1]) is None and finder.check("c", scenes[1]) is None
    with pytest.raises(ValueError, match="distance=19 must be 0 to 18"):
        DuplicateFinder(distance=19)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no evaluation images"):
        DuplicateFinder([tmp_path / "empty"])


def test_rows_of_one_image_get_one_answer(scenes):
    finder = DuplicateFinder()
    assert finder.check("row-0", scenes[0], key="a.png") is None
    assert finder.check("row-1", scenes[0], key="a.png") is None  # the same image, another caption
    assert finder.check("row-2", jpeg(scenes[0], 50), key="b.jpg").match == "a.png"
    again = finder.check("row-3", jpeg(scenes[0], 50), key="b.jpg")
    assert (again.id, again.match) == ("row-3", "a.png")


def test_flat_images_are_no_copies_of_each_other():
    finder = DuplicateFinder()
    water = [Image.new("RGB", (64, 64), (20, 40, 60 + shade)) for shade in range(3)]
    assert [finder.check(str(index), image) for index, image in enumerate(water)] == [None] * 3
    assert finder.counts()["flat"] == 3


def test_a_stopped_search_goes_on(scenes, tmp_path):
    folder = tmp_path / "evaluated"
    folder.mkdir()
    for index in range(5):
        scenes[index].save(folder / f"{index}.png")
    shown = [*scenes[3:], *(jpeg(scene, 40).rotate(180) for scene in scenes[::3])]
    names = [f"row-{index}" for index in range(len(shown))]
    whole = DuplicateFinder([folder])
    expected = [whole.check(name, image) for name, image in zip(names, shown)]

    first = DuplicateFinder([folder], store=tmp_path / "prints.sqlite")
    half = [first.check(name, image) for name, image in zip(names[:30], shown)]
    first.close()
    second = DuplicateFinder([folder], store=tmp_path / "prints.sqlite")
    rest = [second.check(name, image) for name, image in zip(names[20:], shown[20:])]  # some are asked for again
    assert half[:20] + rest == expected
    counts = second.counts()
    assert counts["images"] == len(shown) and sum(counts["matches"].values()) == sum(map(bool, expected)) >= 12
    second.close()

    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    assert DuplicateFinder([folder], store=tmp_path / "prints.sqlite").counts()["evaluation_images"] == {
        str(folder): 6
    }
    assert len(PARTS) == 25
