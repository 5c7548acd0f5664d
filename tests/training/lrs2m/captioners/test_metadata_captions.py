"""Metadata become sentences; what is unknown is left out, what cannot be is refused."""

import pytest

from training.lrs2m.captioners.metadata import metadata_caption, season, utm_zone
from training.lrs2m.sources.images import Skip


@pytest.mark.parametrize(
    ("longitude", "latitude", "zone"),
    [
        (11.58, 48.14, "32 north"),  # Munich
        (149.13, -35.28, "55 south"),  # Canberra
        (-122.42, 37.77, "10 north"),  # San Francisco
        (5.32, 60.39, "32 north"),  # Bergen: Norway's exception, else 31
        (2.9, 60.39, "31 north"),
        (5.32, 55.99, "31 north"),
        (5.32, 64.0, "31 north"),
        (15.65, 78.22, "33 north"),  # Longyearbyen: Svalbard's
        (8.0, 75.0, "31 north"),
        (10.0, 75.0, "33 north"),
        (22.0, 75.0, "35 north"),
        (35.0, 75.0, "37 north"),
        (42.0, 75.0, "38 north"),
        (-180.0, 0.0, "1 north"),
        (180.0, 0.0, "1 north"),
        (179.9, -0.1, "60 south"),
    ],
)
def test_utm_zones(longitude, latitude, zone):
    assert utm_zone(longitude, latitude) == f"UTM zone {zone}"


def test_utm_ends_before_the_poles():
    assert utm_zone(0, 84.1) is None and utm_zone(0, -80.1) is None and utm_zone(0, -80) == "UTM zone 31 south"


def test_seasons():
    north = ["winter"] * 2 + ["spring"] * 3 + ["summer"] * 3 + ["autumn"] * 3 + ["winter"]
    assert [season(month, 48) for month in range(1, 13)] == north
    assert [season(month, -35) for month in range(1, 13)] == north[6:] + north[:6]


FIELDS = {"class_name": "BaseballField", "gsd": 0.31, "longitude": 149.13, "latitude": -35.28, "date": "2017-07-04"}


def test_a_caption_says_what_is_known():
    assert metadata_caption(FIELDS, "metadata-short") == (
        "A satellite image of baseball field, taken in winter, 31 cm a pixel, in UTM zone 55 south."
    )
    assert metadata_caption(FIELDS, "metadata-long") == (
        "This is an overhead image of baseball field. Each pixel covers 31 cm on the ground. It was taken in July 2017. "
        "On the southern hemisphere this was in winter. Its centre lies at 35.28° S, 149.13° E, in UTM zone 55 south."
    )
    template = "{class_name} in {country}[, {month}]"
    assert metadata_caption(FIELDS | {"country": "Australia"}, template) == "baseball field in Australia, July"


def test_what_is_unknown_is_left_out():
    short = {
        ("class_name",): "A satellite image of baseball field.",
        ("gsd",): "A satellite image, 31 cm a pixel.",
        ("date",): "",  # a date alone tells no season
        ("date", "latitude"): "A satellite image, taken in winter.",
        ("longitude", "latitude"): "A satellite image, in UTM zone 55 south.",
        (): "",
    }
    for names, text in short.items():
        assert metadata_caption({name: FIELDS[name] for name in names}, "metadata-short") == text
    assert metadata_caption({"gsd": 10}, "metadata-long") == (
        "This is an overhead image. Each pixel covers 10 m on the ground."
    )
    assert metadata_caption(FIELDS, "{class_name} in {country}") == ""
    assert metadata_caption(FIELDS | {"latitude": 89.0}, "{class_name}[ in {utm_zone}]") == "baseball field"


@pytest.mark.parametrize(
    "wrong", [{"latitude": 91}, {"longitude": float("nan")}, {"date": "July"}, {"date": "2017-13-01"}, {"gsd": 0}]
)
def test_impossible_metadata_are_refused(wrong):
    with pytest.raises(Skip) as error:
        metadata_caption(FIELDS | wrong, "metadata-short")
    assert error.value.reason == "impossible metadata" and str(next(iter(wrong.values()))) in str(error.value)


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="'metadata-shrt' is none of metadata-short, metadata-long"):
        metadata_caption(FIELDS, "metadata-shrt")
