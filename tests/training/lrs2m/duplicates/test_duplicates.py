"""Planted copies are found, other images are not, whatever was stopped in between."""

import io
import sqlite3
from contextlib import closing

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from evaluation.benchmarks.aerial_scenes.data_set import scene_row
from training.lrs2m.duplicates import finder as finder_module
from training.lrs2m.duplicates.finder import DuplicateFinder
from training.lrs2m.duplicates.fingerprints import PARTS, TURNS, coefficients, hashes, margins, thumbnail, turned
from training.lrs2m.duplicates.hash_index import HashIndex
from training.lrs2m.duplicates.store import ImageStore


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
    codes = hashes(coefficients(np.stack([thumbnail(image) for image in images]))[:, 0])
    assert [f"{code:016x}" for code in codes] == [str(imagehash.phash(image)) for image in images]


def test_stripes_and_mirror_axes_have_one_hash_on_every_processor(tmp_path):
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 256, (32, 1), dtype=np.uint8), 32, axis=1)
    half = rng.integers(0, 256, (32, 16), dtype=np.uint8)
    for thumb in (stripes, stripes.T, np.concatenate([half, half[:, ::-1]], axis=1)):
        low = coefficients(thumb[None])  # about half of them are 0 but for last bits
        noisy = low + rng.uniform(-0.06, 0.06, (40, *low.shape[1:]))
        assert (hashes(noisy)[:, 0] == hashes(low)[0, 0]).all()
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


@pytest.mark.parametrize("looked_through, least", [(20_000, 1.0), (4_000, 0.97)])
def test_the_index_finds_what_looking_at_all_finds(looked_through, least):
    """While there are few, and through some of the lists when there are more."""
    rng = np.random.default_rng(0)
    known = rng.normal(scale=100, size=(10_000, 64))
    index = HashIndex(looked_through, 6, 32)
    assert not len(index.search(margins(known[:2]), 10, 8)[0])
    for start in range(0, 10_000, 200):
        index.add(hashes(known[start : start + 200]), np.arange(start, start + 200) * 3)
    assert len(index) == 10_000
    asked = known[::100] + 10 * rng.normal(size=(100, 64))
    query, entry, bits = index.search(margins(asked), 10, 8)
    every = np.bitwise_count(hashes(asked)[:, None] ^ hashes(known)[None])
    pairs = set(zip(query.tolist(), (entry // 3).tolist()))
    near = set(zip(*(places.tolist() for places in np.nonzero(every <= 10))))
    assert pairs <= near and len(pairs) >= least * len(near) >= 97
    assert (entry % 3 == 0).all() and (bits == every[query, entry // 3]).all()


def test_the_lists_looked_through_are_those_of_the_least_sure_bits():
    """Of 2 lists of 256 the second is that of the one bit nearest to the median, wherever among the key's bits it is."""
    every = np.arange(256, dtype=np.uint64)
    spread = np.zeros(256, np.uint64)
    index = HashIndex(1, 8, 16)  # 2 lists at least
    bits = [1, 8, 9, 2, 16, 10, 17, 18]  # of the lowest frequencies
    for position, bit in enumerate(bits):
        spread |= (every >> np.uint64(position) & np.uint64(1)) << np.uint64(63 - bit)
    index.add(spread, np.arange(256))
    for position, bit in enumerate(bits):
        above = np.full((1, 64), -100.0)
        above[0, bit] = -1.0
        query, entry, _ = index.search(above, 64, 256)
        assert set(entry.tolist()) == {0, 1 << position}


def test_what_a_query_finds_does_not_hang_on_the_steps():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**63, 3000, dtype=np.uint64)
    one, many = (HashIndex(500, 6, 32) for _ in range(2))
    one.add(codes, np.arange(3000))
    for start in range(0, 3000, 70):
        many.add(codes[start : start + 70], np.arange(start, min(start + 70, 3000)))
    asked = rng.normal(size=(50, 64))
    for first, second in zip(one.search(asked, 28, 4), many.search(asked, 28, 4)):
        assert len(first) and np.array_equal(first, second)


@pytest.mark.parametrize("looked_through", [100, 1])
def test_the_farthest_entry_that_counts(looked_through):
    """`reach` bits are near, one more is not; flat and in lists."""
    index = HashIndex(looked_through, 6, 32)
    codes = np.array([0b111, 0b1111], dtype=np.uint64)
    for number in range(2):
        index.add(codes[number : number + 1], np.array([number]))
    query, entry, bits = index.search(np.full((1, 64), -1.0), 3, 8)
    assert list(zip(query.tolist(), entry.tolist(), bits.tolist())) == [(0, 0, 3)]


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


def marked(image: Image.Image) -> Image.Image:
    image = image.copy()
    for line in range(2):
        ImageDraw.Draw(image).text((4, 20 + 40 * line), "PREVIEW", fill="white", font_size=14)
    return image


def turned_a_little(image: Image.Image) -> Image.Image:
    return image.rotate(3, Image.Resampling.BICUBIC)


def framed(image: Image.Image, colour: str) -> Image.Image:
    return jpeg(ImageOps.expand(image, 12, colour), 80)


OTHERWISE = {
    "blurred": (lambda image: image.filter(ImageFilter.GaussianBlur(4)), "copy", ""),
    "marked": (marked, "copy", ""),
    "turned by 3 degrees": (turned_a_little, "copy", ""),
    "equalised": (ImageOps.equalize, "copy", ""),
    "framed in white": (lambda image: framed(image, "white"), "copy", ""),
    "framed in black": (lambda image: framed(image, "black"), "copy", ""),
    "JPEG of quality 30": (lambda image: jpeg(image, 30), "copy", ""),
    "half as large": (lambda image: image.resize((48, 48)), "copy", ""),
    "turned": (lambda image: jpeg(image.rotate(90), 60), "copy", "turned by 90 clockwise"),
    "upside down": (lambda image: image.rotate(180), "copy", "turned by 180"),
    "mirrored": (lambda image: jpeg(ImageOps.mirror(image), 60), "copy", "mirrored left to right"),
    "90 % of each side": (lambda image: jpeg(crop(image, 0.9, 0.3), 60), "crop", ""),
    "85 % of each side": (lambda image: crop(image, 0.85, 0.9), "crop", ""),
    "a turned crop": (lambda image: crop(image, 0.88, 0.5).rotate(-90), "crop", "turned by 90 counterclockwise"),
}


HARD = ("marked", "turned by 3 degrees", "equalised", "framed in black")


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
    matches = [finder.check(f"copy-{index}", alter(scene)) for index, scene in enumerate(scenes)]
    names = [f"{index}.png" if evaluation else f"scene-{index}" for index in range(len(scenes))]
    right = [match for match, name in zip(matches, names) if match and match.match == name]
    hard = kind == "crop" or change in HARD
    assert len(right) >= (0.9 if hard else 1) * len(scenes)
    kinds = (kind, "contains") if change.startswith("framed") else (kind,)  # a line of the frame may stay
    assert sum(match.kind in kinds and match.turn == turn for match in right) >= 0.75 * len(right)
    assert {match.against for match in right} == {str(tmp_path) if evaluation else ""}
    assert not [match for match, name in zip(matches, names) if match and match.match != name]


def test_an_image_that_holds_an_earlier_one_is_found(scenes):
    finder = DuplicateFinder()
    for index, scene in enumerate(scenes):
        assert finder.check(f"part-{index}", jpeg(crop(scene, 0.87, 0.4), 70)) is None
    matches = [finder.check(f"scene-{index}", scene) for index, scene in enumerate(scenes)]
    right = [match for index, match in enumerate(matches) if match and match.match == f"part-{index}"]
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


def test_different_scenes_in_one_frame_are_different(scenes):
    finder = DuplicateFinder()
    corners = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(corners).polygon([(48, 0), (96, 48), (48, 96), (0, 48)], fill=255)
    for index, scene in enumerate(scenes):
        nothing = Image.new("RGB", scene.size)
        for name, image in (
            ("frame", ImageOps.expand(scene, 20, "white")),
            ("corners", Image.composite(scene, nothing, corners)),
        ):
            match = finder.check(f"{name}-{index}", image, key=f"{name}-{index}")
            assert match is None or match.match.endswith(f"-{index}")  # another cut of the same scene


def test_whatever_block_an_image_lies_in_it_is_found(scenes, monkeypatch, tmp_path):
    """Images before the last whole block of those shown and after it, in one run and in one that was stopped."""
    monkeypatch.setattr(finder_module, "BLOCK", 7)
    one, store = DuplicateFinder(), tmp_path / "prints.sqlite"
    for index, scene in enumerate(scenes[:24]):
        assert one.check(f"scene-{index}", scene) is None
        stopped = DuplicateFinder(store=store)
        assert stopped.check(f"scene-{index}", scene) is None
        stopped.close()
    stopped = DuplicateFinder(store=store)
    for index, scene in enumerate(scenes[:24]):
        copies = [finder.check(f"copy-{index}", jpeg(scene, 50)) for finder in (one, stopped)]
        assert copies[0] == copies[1] and copies[0].match == f"scene-{index}"


def test_flat_images_are_no_copies_of_each_other():
    finder = DuplicateFinder()
    water = [Image.new("RGB", (64, 64), (20, 40, 60 + shade)) for shade in range(3)]
    assert [finder.check(str(index), image) for index, image in enumerate(water)] == [None] * 3
    assert (finder.shown, finder.stored) == (3, 0)


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
    assert second.shown == len(shown) and second.stored == 5 + expected.count(None) <= 5 + len(shown) - 12
    second.close()

    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    assert DuplicateFinder([folder], inside=False, store=tmp_path / "prints.sqlite").stored == 6
    assert len(PARTS) == 25


def test_a_store_of_an_earlier_version(tmp_path):
    with closing(sqlite3.connect(tmp_path / "prints.sqlite")) as store:
        store.execute("CREATE TABLE images (number INTEGER PRIMARY KEY, owner TEXT, id TEXT, thumb BLOB)")
    for read_only in (False, True):
        with pytest.raises(ValueError, match="was written by an earlier version; build again with --restart"):
            ImageStore(tmp_path / "prints.sqlite", read_only)


def test_a_store_in_a_folder_of_any_name(scenes, tmp_path):
    folder = tmp_path / "tiles#1 50%41?"
    folder.mkdir()
    finder = DuplicateFinder(store=folder / "prints.sqlite")
    finder.check("row", scenes[0])
    finder.close()
    with closing(ImageStore(folder / "prints.sqlite", read_only=True)) as store:
        assert np.array_equal(store.thumb_of("row"), thumbnail(scenes[0]))


def test_a_set_that_does_not_count_hides_nothing(scenes, tmp_path):
    """Sixty better copies in one set, one copy in the other, which alone counts for the row."""
    rng = np.random.default_rng(0)
    for name, noise, count in (("counts", 40, 1), ("other", 4, 60)):
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = np.asarray(scenes[0]) + rng.normal(0, noise, (96, 96, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / name / f"{index}.png")
    counts, other = str(tmp_path / "counts"), str(tmp_path / "other")
    expected = DuplicateFinder([counts], crops=False).check("row", scenes[0])
    assert expected is not None
    assert DuplicateFinder([counts, other], crops=False).check("row", scenes[0], against=[counts]) == expected
