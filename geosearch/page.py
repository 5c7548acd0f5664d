"""Hits in a page: a map of scenes and footprints as inline SVG, and `hits.html`, one file that needs no network."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .exact_search import Hits
from .hits import place_name, summary, writing
from .pictures import ScenePictures, data_uri


UNITS = 1e5  # of the drawing in a degree: browsers draw with 24 bits
MAP_PIXELS = 800  # width of the map where labels have their size
MARGIN = 0.06  # of the map's longer side around what is shown
OVERVIEW, THUMBNAIL = 1024, 256  # longest side of the pictures in a page, pixels
MOST_OVERVIEWS = 12  # of a page; other scenes are outlines
GRATICULE = (30, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # degrees between lines
GAP = 0.05  # between scenes without coordinates, which lie side by side, as a share of the widest

Ring = np.ndarray  # (4, 2) upper left, upper right, lower right, lower left


# ------------------------------------------------------------------------------------------------------------------ map


class MapFrame:
    """
    Transform from longitude and latitude (or pixels of a scene) to the drawing: x to the right, y down.

    Args:
        pictures: of the index.
        scenes: that are shown; they decide middle and scale.
    """

    def __init__(self, pictures: ScenePictures, scenes: Sequence[str]):
        self.pictures = pictures
        self.pixels = pictures.index.metadata["coordinates"] != "wgs84"
        corners = {scene: pictures.corners(scene) for scene in scenes}
        if self.pixels:
            widths = [pictures.facts(scene)["width"] for scene in scenes]
            starts = np.cumsum([0.0, *(width + GAP * max(widths) for width in widths)])
            self.offsets = dict(zip(scenes, starts))
        else:
            middles = np.array([ring.mean(axis=0) for ring in corners.values()])
            turned = np.exp(1j * np.radians(middles[:, 0])).sum()  # the mean of longitudes on both sides of 180
            self.middle = np.array([np.degrees(np.angle(turned)), _mercator(middles[:, 1]).mean()])
        self.rings = {scene: self.ring(scene) for scene in scenes}

    def ring(self, scene: str, pixel_box: tuple[int, int, int, int] | None = None) -> Ring:
        """Corners of a part of a scene in the drawing."""
        corners = self.pictures.corners(scene, pixel_box)
        return corners + [self.offsets[scene], 0.0] if self.pixels else self.points(corners)

    def points(self, lon_lat: np.ndarray) -> np.ndarray:
        """Places in the drawing, in Mercator's projection, of `(K, 2)` longitudes and latitudes next to each other."""
        away = lon_lat[:, 0] - self.middle[0]
        turn = 360 * round(float(away.mean()) / 360)
        return np.stack([away - turn, self.middle[1] - _mercator(lon_lat[:, 1])], axis=-1) * UNITS

    def view(self, scenes: Sequence[str]) -> tuple[float, float, float, float]:
        """Left, top, width and height that show scenes."""
        points = np.concatenate([self.rings[scene] for scene in scenes])
        low, high = points.min(axis=0), points.max(axis=0)
        margin = MARGIN * max(high - low)
        low, high = low - margin, high + margin
        left, top, width, height = (float(value) for value in (*low, *(high - low)))
        return left, top, width, height


@dataclass(frozen=True)
class HeatLayer:
    """A picture of similarities over a whole scene."""

    scene: str
    picture: Image.Image  # RGBA, from the scene's upper left pixel to its lower right one


def map_svg(
    pictures: ScenePictures,
    hits: Hits | None,
    scenes: Sequence[str],
    heat: HeatLayer | None = None,
    focus: str | None = None,
) -> str:
    """
    Map of scenes with their overviews, the footprints of hits, and a heat map over one of them.

    Args:
        pictures: of the index.
        hits: places found; None: none.
        scenes: paths of those that are shown; the first `MOST_OVERVIEWS` with their overview.
        heat: lies above the overviews, in a group of class `heat`.
        focus: scene that is looked at first; a double click then shows all. None: all of them.

    Returns:
        An `svg` element of class `map`. A hit is a polygon with `data-rank`.
    """
    frame = MapFrame(pictures, scenes)
    whole = frame.view(scenes)
    view = frame.view([focus]) if focus is not None else whole
    boxes = f'viewBox="{_numbers(view)}" data-home="{_numbers(whole)}"'
    parts = [f'<svg class="map" xmlns="http://www.w3.org/2000/svg" {boxes}>']
    if not frame.pixels:
        parts += [_graticule(frame, area) for area in dict.fromkeys((whole, view))]
    for number, scene in enumerate(scenes):
        overview = pictures.picture(scene, None, OVERVIEW) if number < MOST_OVERVIEWS else None
        if overview is not None:
            parts.append(_image(overview, frame.rings[scene], 82))
        title = html.escape(Path(scene).name)
        parts.append(f'<polygon class="scene" points="{_points(frame.rings[scene])}"><title>{title}</title></polygon>')
    parts.append('<g class="heat">')
    if heat is not None:
        parts.append(_image(heat.picture, frame.rings[heat.scene], None))
    parts.append("</g>")
    scale = view[2] / MAP_PIXELS
    rows = hits.rows.to_pylist() if hits is not None else []
    for rank in range(len(rows), 0, -1):  # the best on top
        row = rows[rank - 1]
        ring = frame.ring(row["scene"], row["pixel_box"])
        label = _label(f'<circle r="11"/><text dy="4.5">{rank}</text>', ring.mean(axis=0), scale)
        parts.append(f'<g class="hit" data-rank="{rank}"><polygon points="{_points(ring)}"/>{label}</g>')
    return "".join([*parts, "</svg>"])


def _image(picture: Image.Image, ring: Ring, quality: int | None) -> str:
    """A picture stretched over a ring; exact where the ring is a parallelogram."""
    across, down, origin = ring[1] - ring[0], ring[3] - ring[0], ring[0]
    matrix = _numbers((*across, *down, *origin))
    uri = data_uri(picture, quality)
    return f'<image width="1" height="1" preserveAspectRatio="none" transform="matrix({matrix})" href="{uri}"/>'


def _label(content: str, point: Sequence[float], scale: float) -> str:
    return f'<g class="label" transform="translate({_numbers(point)}) scale({scale:.6g})">{content}</g>'


def _mercator(lat: np.ndarray) -> np.ndarray:
    """Mercator's ordinate in degrees of longitude; shapes stay true at every latitude."""
    return np.degrees(np.arcsinh(np.tan(np.radians(np.clip(lat, -89.5, 89.5)))))


def _graticule(frame: MapFrame, view: tuple[float, float, float, float]) -> str:
    """Lines of whole degrees or parts of them, a few across the map, each with its number."""
    left, top, width, height = view
    steps = [step for step in GRATICULE if step * 4 * UNITS <= width]
    if not steps:
        return ""
    parts, step, scale = ['<g class="graticule">'], steps[0], width / MAP_PIXELS
    west, east = (edge / UNITS + frame.middle[0] for edge in (left, left + width))
    edges = (np.radians(frame.middle[1] - edge / UNITS) for edge in (top + height, top))
    south, north = (float(np.degrees(np.arctan(np.sinh(edge)))) for edge in edges)
    for number in range(math.ceil(west / step), math.floor(east / step) + 1):
        x = (number * step - frame.middle[0]) * UNITS
        lon = (number * step + 180) % 360 - 180
        parts.append(f'<path d="M{_numbers((x, top))}V{top + height:.9g}"/>')
        parts.append(_degree(f"{abs(lon):.6g}°{'E' if lon >= 0 else 'W'}", x, top + height, scale))
    for number in range(math.ceil(south / step), math.floor(north / step) + 1):
        lat = number * step
        y = (frame.middle[1] - float(_mercator(np.array(lat)))) * UNITS
        parts.append(f'<path d="M{_numbers((left, y))}H{left + width:.9g}"/>')
        parts.append(_degree(f"{abs(lat):.6g}°{'N' if lat >= 0 else 'S'}", left, y, scale))
    return "".join([*parts, "</g>"])


def _degree(text: str, x: float, y: float, scale: float) -> str:
    return _label(f'<text class="degree" x="4" y="-4">{text}</text>', (x, y), scale)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{float(value):.9g}" for value in values)


def _points(ring: Ring) -> str:
    return " ".join(f"{x:.9g},{y:.9g}" for x, y in ring)


MAP_STYLE = """
svg.map { width: 100%; height: 100%; background: #eef1f4; display: block; touch-action: none; cursor: grab; user-select: none }
svg.map:active { cursor: grabbing }
svg.map .scene { fill: none; stroke: #54616e; stroke-width: 1; vector-effect: non-scaling-stroke }
svg.map image { image-rendering: auto }
svg.map .heat { pointer-events: none }
svg.map .graticule path { fill: none; stroke: #c7ced6; stroke-width: 1; vector-effect: non-scaling-stroke }
svg.map .degree { font: 11px system-ui, sans-serif; fill: #6b7682 }
svg.map .hit polygon { fill: #ffb00022; stroke: #ff8c00; stroke-width: 2; vector-effect: non-scaling-stroke }
svg.map .hit circle { fill: #ff8c00; stroke: #fff; stroke-width: 1.5 }
svg.map .hit text { font: bold 12px system-ui, sans-serif; fill: #fff; text-anchor: middle }
svg.map .hit { cursor: pointer }
svg.map .hit.chosen polygon { stroke: #d0021b; stroke-width: 3; fill: none }
svg.map .hit.chosen circle { fill: #d0021b }
"""

# attachMap(root, report): wheel and drag move the map within `root`; a click on a hit chooses it and is reported.
MAP_SCRIPT = """
function attachMap(root, report) {
  const map = () => root.querySelector('svg.map');
  const view = () => map().getAttribute('viewBox').split(' ').map(Number);
  function show(box) {
    const svg = map();
    const bounds = svg.getBoundingClientRect();
    svg.setAttribute('viewBox', box.join(' '));
    const scale = Math.max(box[2] / bounds.width, box[3] / bounds.height);
    svg.querySelectorAll('.label').forEach(label => label.setAttribute('transform',
      label.getAttribute('transform').replace(/scale\\([^)]*\\)/, 'scale(' + scale + ')')));
  }
  function zoom(factor, x, y) {
    const box = view();
    show([x - (x - box[0]) * factor, y - (y - box[1]) * factor, box[2] * factor, box[3] * factor]);
  }
  function point(event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(map().getScreenCTM().inverse());
    return [place.x, place.y];
  }
  function choose(rank, move) {
    const svg = map();
    svg.querySelectorAll('.hit').forEach(hit => hit.classList.toggle('chosen', hit.dataset.rank == rank));
    const hit = svg.querySelector('.hit[data-rank="' + rank + '"]');
    if (hit && move) {
      const box = hit.querySelector('polygon').getBBox();
      const side = 8 * Math.max(box.width, box.height);
      show([box.x + box.width / 2 - side / 2, box.y + box.height / 2 - side / 2, side, side]);
    }
  }
  let held = null, moved = false;
  root.addEventListener('wheel', event => {
    if (!event.target.closest('svg.map')) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, ...point(event));
  }, {passive: false});
  root.addEventListener('pointerdown', event => {
    if (event.target.closest('svg.map')) { held = point(event); moved = false; }
  });
  root.addEventListener('pointermove', event => {
    if (!held || !event.buttons) { held = null; return; }
    const place = point(event), box = view();
    if (Math.abs(event.movementX) + Math.abs(event.movementY) > 1) moved = true;
    show([box[0] + held[0] - place[0], box[1] + held[1] - place[1], box[2], box[3]]);
  });
  root.addEventListener('pointerup', () => { held = null; });
  root.addEventListener('dblclick', event => { if (event.target.closest('svg.map')) show(map().dataset.home.split(' ').map(Number)); });
  root.addEventListener('click', event => {
    const hit = event.target.closest('svg.map .hit');
    if (hit && !moved) { choose(hit.dataset.rank, false); report(Number(hit.dataset.rank)); }
  });
  if (map()) show(view());
  return {choose};
}
"""


# ----------------------------------------------------------------------------------------------------------------- page

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #1d2730; display: flex; flex-direction: column; height: 100vh }}
header {{ padding: 12px 20px; border-bottom: 1px solid #d7dde3 }}
h1 {{ font-size: 16px; font-weight: 600; margin: 0 0 4px }}
header p {{ margin: 2px 0; color: #54616e; font-size: 13px }}
main {{ flex: 1; display: grid; grid-template-columns: minmax(320px, 2fr) 3fr; min-height: 0 }}
ol {{ list-style: none; margin: 0; padding: 12px 20px; overflow-y: auto }}
li {{ display: grid; grid-template-columns: 128px 1fr; gap: 12px; padding: 8px; border-radius: 8px; cursor: pointer }}
li:hover {{ background: #f1f4f7 }}
li.chosen {{ background: #fff3df }}
li img {{ width: 128px; height: 128px; object-fit: cover; border-radius: 4px; background: #dfe4e9 }}
li b {{ font-size: 16px }}
li div div {{ font-size: 13px; color: #54616e; overflow-wrap: anywhere }}
.bar {{ height: 6px; background: #e4e9ee; border-radius: 3px; margin: 4px 0 }}
.bar i {{ display: block; height: 100%; background: #ff8c00; border-radius: 3px }}
#map {{ min-height: 0 }}
@media (max-width: 760px) {{ main {{ grid-template-columns: 1fr }} #map {{ height: 60vh; grid-row: 1 }} body {{ height: auto }} }}
{style}
</style>
</head>
<body>
<header><h1>{title}</h1>{lines}</header>
<main><ol>{cards}</ol><div id="map">{map}</div></main>
<script>
{script}
const list = document.querySelector('ol');
function mark(rank) {{
  list.querySelectorAll('li').forEach(card => card.classList.toggle('chosen', card.dataset.rank == rank));
  const card = list.querySelector('li.chosen');
  if (card) card.scrollIntoView({{block: 'nearest'}});
}}
const map = attachMap(document.getElementById('map'), mark);
list.addEventListener('click', event => {{
  const card = event.target.closest('li');
  if (card) {{ mark(card.dataset.rank); map.choose(card.dataset.rank, true); }}
}});
</script>
</body>
</html>
"""


def hits_page(pictures: ScenePictures, hits: Hits, title: str) -> str:
    """
    A page with a thumbnail, similarity and place of every hit, and a map: one text, which needs nothing else.

    Args:
        pictures: of the index that was searched.
        hits: places found.
        title: what was looked for.

    Returns:
        HTML.
    """
    scenes = list(dict.fromkeys(hits.rows["scene"].to_pylist())) or pictures.scenes
    least, most = (float(function(hits.similarity)) if len(hits) else 0.0 for function in (np.min, np.max))
    cards = []
    for rank, row in enumerate(hits.rows.to_pylist(), 1):
        similarity = hits.similarity[rank - 1]
        share = 15 + 85 * (similarity - least) / max(most - least, 1e-9)
        cards.append(
            f'<li data-rank="{rank}">{_thumbnail(pictures, row)}<div><b>{rank}</b> {similarity:.4f} '
            f'<span title="standard deviations above the mean of the index">({hits.z_score[rank - 1]:+.1f} σ)</span>'
            f'<div class="bar"><i style="width: {share:.0f}%"></i></div>'
            + "".join(f"<div>{html.escape(line)}</div>" for line in hit_lines(hits, row))
            + "</div></li>"
        )
    return _PAGE.format(
        title=html.escape(title),
        lines="".join(f"<p>{html.escape(line)}</p>" for line in summary(hits)),
        cards="".join(cards),
        map=map_svg(pictures, hits, scenes, focus=scenes[0]),
        style=MAP_STYLE,
        script=MAP_SCRIPT,
    )


def hit_lines(hits: Hits, row: dict) -> list[str]:
    """Place, scene, pixels and time of a hit, for people."""
    left, top, width, height = row["pixel_box"]
    position = place_name(row["centre_lon"], row["centre_lat"], hits.coordinates)
    lines = [position, Path(row["scene"]).name, f"{width} × {height} pixels at {left}, {top}"]
    return lines + ([f"{row['timestamp']:%Y-%m-%d %H:%M} UTC"] if row["timestamp"] else [])


def _thumbnail(pictures: ScenePictures, row: dict) -> str:
    picture = pictures.picture(row["scene"], row["pixel_box"], THUMBNAIL)
    if picture is None:
        return f'<img alt="{html.escape(row["scene"])} cannot be read">'
    return f'<img alt="" src="{data_uri(picture)}">'


def write_page(pictures: ScenePictures, hits: Hits, path: str | Path, title: str) -> Path:
    """
    Writes [`hits_page`] to a file in one step.

    Args:
        pictures, hits, title: as for [`hits_page`].
        path: file to write.

    Returns:
        `path`.

    Raises:
        [`~geosearch.exact_search.SearchProblem`]: for a place that takes no file.
    """
    path = Path(path)
    with writing(path) as growing:
        growing.write_text(hits_page(pictures, hits, title), encoding="utf-8")
    return path
