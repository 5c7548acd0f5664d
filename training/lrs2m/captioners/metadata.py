"""Captions from what is known of an image: class, ground sample distance, place, date (after RS5M's meta-captions)."""

import math
import re
from typing import Any

from evaluation.benchmarks.class_names import derive_wording

from ..sources.images import Skip


# A clause in square brackets is left out where a field in it is unknown; a field outside of them is needed.
TEMPLATES = {
    "metadata-short": "A satellite image[ of {class_name}][, taken in {season}][, {gsd} a pixel][, in {utm_zone}].",
    "metadata-long": (
        "This is an overhead image[ of {class_name}].[ Each pixel covers {gsd} on the ground.][ It was taken in {month} "
        "{year}.][ On the {hemisphere} hemisphere this was in {season}.][ Its centre lies at {place}, in {utm_zone}.]"
    ),
}
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
SEASONS = ("winter", "spring", "summer", "autumn")  # meteorological, north; from December on
_SVALBARD = ((9, 31), (21, 33), (33, 35), (42, 37))  # degrees east that a zone reaches up to, 72 to 84 degrees north


def metadata_caption(fields: dict[str, Any], template: str) -> str:
    """
    A caption from a template.

    Args:
        fields: what is known: `class_name`, `gsd` (metres a pixel), `longitude`, `latitude` (degrees, WGS 84), `date`
            (ISO 8601, the month suffices), and any others.
        template: the name of one of `TEMPLATES`, or a template itself. Beside the fields it may use `utm_zone`, `place`,
            `hemisphere`, `season`, `month` and `year`.

    Returns:
        `str`; empty where a field outside brackets is unknown, or none of those in brackets is known.

    Raises:
        `ValueError`: for a name that is no template.
        [`Skip`]: for a coordinate or a date that cannot be.
    """
    text = TEMPLATES.get(template, template)
    if "{" not in text:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)}, and has no {{field}} in it.")
    known = {name: value for name, value in _derived(fields).items() if value not in (None, "")}
    used = set(re.findall(r"\{(\w+)\}", text)) & set(known)

    def is_known(clause: str) -> bool:
        return all(name in known for name in re.findall(r"\{(\w+)\}", clause))

    text = re.sub(r"\[([^\]]*)\]", lambda clause: clause[1] if is_known(clause[1]) else "", text)
    if not used or not is_known(text):
        return ""
    text = re.sub(r"\{(\w+)\}", lambda field: str(known[field[1]]), text)
    return " ".join(text.split())


def utm_zone(longitude: float, latitude: float) -> str | None:
    """
    `UTM zone 32 north`, with the exceptions of Norway and Svalbard; None beyond 84 degrees north and 80 south, where
    UTM ends.
    """
    if not -80 <= latitude <= 84:
        return None
    east = (longitude + 180) % 360 - 180
    zone = int((east + 180) // 6) + 1
    if 56 <= latitude < 64 and 3 <= east < 12:
        zone = 32
    elif latitude >= 72 and 0 <= east < 42:
        zone = next(zone for end, zone in _SVALBARD if east < end)
    return f"UTM zone {zone} {'north' if latitude >= 0 else 'south'}"


def season(month: int, latitude: float) -> str:
    """The meteorological season of a month, 1 to 12, on the hemisphere of a latitude."""
    return SEASONS[(month % 12 // 3 + (2 if latitude < 0 else 0)) % 4]


def _derived(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as they are worded, and those that follow from them."""
    worded = dict(fields)
    if fields.get("class_name"):
        worded["class_name"] = derive_wording(fields["class_name"])
    if fields.get("gsd") is not None:
        metres = float(fields["gsd"])
        if not 0 < metres < math.inf:
            raise Skip("impossible metadata", f"ground sample distance {metres} is not a length in metres")
        worded["gsd"] = f"{metres:.3g} m" if metres >= 1 else f"{100 * metres:.3g} cm"
    degrees: dict[str, float | None] = {}
    for name, most in (("longitude", 180), ("latitude", 90)):
        value = degrees[name] = None if fields.get(name) is None else float(fields[name])
        if value is not None and not abs(value) <= most:  # nan neither
            raise Skip("impossible metadata", f"{name} {value} is not between -{most} and {most} degrees")
    longitude, latitude = degrees["longitude"], degrees["latitude"]
    if latitude is not None:
        worded["hemisphere"] = "northern" if latitude >= 0 else "southern"
    if longitude is not None and latitude is not None:
        worded["utm_zone"] = utm_zone(longitude, latitude)
        north, east = "N" if latitude >= 0 else "S", "E" if longitude >= 0 else "W"
        worded["place"] = f"{abs(latitude):.2f}° {north}, {abs(longitude):.2f}° {east}"
    if date := str(fields.get("date") or ""):
        match = re.match(r"(\d{4})-?(\d{2})(?!\d{3})", date)
        if not match or not 1 <= int(match[2]) <= 12:
            raise Skip("impossible metadata", f"date {date[:30]!r} is not of the form 2017-07-04")
        year, month = map(int, match.groups())
        worded |= {"year": year, "month": MONTHS[month - 1]}
        if latitude is not None:
            worded["season"] = season(month, latitude)
    return worded
