"""
A sheet of rows for a person to read: CSV with thumbnails, and the share of false captions from it when it is filled in.

Rows are drawn by a hash of their id: the same set gives the same sheet.
"""

import csv
import hashlib
import heapq
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_lrsclip.encoding.imagery import read_image
from modeling_lrsclip.files.atomic import replace_bytes, replace_json, replace_text

from ..data_row import Row


SHEET, PAGE, THUMBNAILS, DRAWN_FROM = "sheet.csv", "sheet.html", "thumbnails", "drawn_from.json"
SIDE = 512  # pixels of a thumbnail
FILLED = ("long_false", "short_false")  # columns for the reader: statements that the image does not bear out
COLUMNS = ("number", "id", "thumbnail", "long_text", "short_text", *FILLED, "remark")
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px sans-serif;max-width:70em;margin:2em}}article{{display:flex;gap:1em;margin:1em 0}}img{{width:24em;height:auto}}</style>
<h1>{title}</h1><p>Count the statements that the picture does not bear out, and write the numbers (0: all are true) into
long_false and short_false of {sheet}. Rows without a number count as not read.</p>
{rows}
"""


def write_sheet(rows: Iterable[Row], count: int, folder: Path, title: str, data_sha256: str) -> int:
    """
    Write the sheet, a page that shows it, and the thumbnails.

    Args:
        rows: of a data set with pixels.
        count: of rows to draw.
        folder: is made; a sheet that is there is not overwritten.
        title: of the page.
        data_sha256: of the data set, which the filled-in sheet is then bound to.

    Returns:
        Number of rows drawn.

    Raises:
        `ValueError`: for a sheet that is there already, and rows without pixels.
    """
    if (folder / SHEET).exists():
        raise ValueError(f"{folder / SHEET} exists and may be filled in; read it back or remove it.")
    digests = ((hashlib.sha256(row["id"].encode()).hexdigest(), row) for row in rows)
    drawn = [row for _, row in heapq.nsmallest(count, digests, key=lambda one: one[0])]
    if not all(row["image"] for row in drawn):
        raise ValueError("rows have no pixels to show; put them back with training.lrs2m.rejoin first.")
    (folder / THUMBNAILS).mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    lines = csv.DictWriter(table, COLUMNS, lineterminator="\r\n")
    lines.writeheader()
    shown = []
    for number, row in enumerate(drawn, start=1):
        name = f"{THUMBNAILS}/{number:04d}.jpg"
        replace_bytes(folder / name, _thumbnail(row["image"]["bytes"]))
        lines.writerow(
            {"number": number, "thumbnail": name}
            | {key: _no_formula(row[key]) for key in ("id", "long_text", "short_text")}
        )
        texts = "".join(f"<p>{html.escape(row[key])}</p>" for key in ("short_text", "long_text"))
        shown.append(f'<article><img src="{name}" alt=""><div><h2>{number}</h2>{texts}</div></article>')
    replace_text(folder / PAGE, _PAGE.format(title=html.escape(title), sheet=SHEET, rows="\n".join(shown)))
    replace_json(folder / DRAWN_FROM, {"data_sha256": data_sha256})
    replace_text(folder / SHEET, "\ufeff" + table.getvalue())  # by the mark, spreadsheets know the encoding
    return len(drawn)


def read_sheet(path: Path, data_sha256: str) -> dict[str, Any]:
    """
    The share of false captions of a filled-in sheet, with 95 % intervals after Wilson.

    Args:
        path: the CSV file, also as spreadsheets save it, with semicolons.
        data_sha256: of the data set that it is to have been drawn from.

    Returns:
        `rows` read, and for `long`, `short` and `either` text: `false` (captions with a false statement), `rate`, `low` and
        `high`.

    Raises:
        `ValueError`: for a file that is no sheet, a sheet of other data, a value that is no number, and a sheet that nobody
            has filled in.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --sheet N writes a sheet.")
    drawn_from = path.with_name(DRAWN_FROM)
    if not drawn_from.is_file() or json.loads(drawn_from.read_bytes()).get("data_sha256") != data_sha256:
        raise ValueError(
            f"{path} was not drawn from the data that is in {path.parent.parent} now; move the folder away and write a sheet "
            "of it with --sheet N."
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:  # of Excel in western countries: ids and numbers, all that is read, are ASCII
        text = content.decode("cp1252", errors="replace")
    delimiter = ";" if text.split("\n")[0].count(";") > text.split("\n")[0].count(",") else ","
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if not {"id", *FILLED} <= set(lines.fieldnames or ()):
        raise ValueError(
            f"{path} lacks columns of {', '.join(('id', *FILLED))}; write the sheet again with --sheet N."
        )
    read = [values for number, line in enumerate(lines, start=2) if (values := _filled(line, f"{path}, row {number}"))]
    if not read:
        raise ValueError(f"{path} has no row with numbers in {' and '.join(FILLED)}; fill it in first.")
    columns = {"long": [one[0] > 0 for one in read], "short": [one[1] > 0 for one in read]}
    columns["either"] = [any(one) for one in zip(*columns.values())]
    return {"rows": len(read)} | {which: wilson(sum(values), len(read)) for which, values in columns.items()}


def wilson(false: int, rows: int) -> dict[str, float]:
    """Rate of `false` of `rows` with its 95 % interval after Wilson."""
    from scipy.stats import binomtest  # a second, which --help does without

    interval = binomtest(false, rows).proportion_ci(method="wilson")
    return {"false": false, "rate": false / rows, "low": float(interval.low), "high": float(interval.high)}


def _filled(line: dict[str, str], where: str) -> tuple[int, ...] | None:
    values = [(line[name] or "").strip() for name in FILLED]
    if not any(values):
        return None
    if not all(value.isdecimal() for value in values):
        raise ValueError(
            f"{where}: {' and '.join(FILLED)} hold {values[0]!r} and {values[1]!r}; write a number in each."
        )
    return tuple(map(int, values))


def _no_formula(text: str) -> str:
    """A cell that a spreadsheet takes for text, also where it begins like a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _thumbnail(content: bytes) -> bytes:
    image = read_image(content).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
