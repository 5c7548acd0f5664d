"""
Ten descriptions asked of an indexed archive whose places are known: `python -m geosearch.demo INDEX PLACES OUTPUT`.

PLACES is a file of JSON lines with `text`, `scene` (a path, or the end of one) and `pixel_box`, as
`evaluation.benchmarks.scene_archive` writes it. OUTPUT gets a page and a heat map of the last description that was found.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_lrsclip.commands import command, command_parser


if TYPE_CHECKING:
    from .exact_search import Hits


QUESTIONS, LOOKED_AT = 10, 50  # descriptions; places of each that are looked through for the right one
SHOWN = 40  # letters of a description in the table
SHARED = 0.5  # of the place's pixels that a window must show to be the right one


def rank_of(hits: "Hits", scene: str, pixel_box: list[int]) -> int | None:
    """
    Finds the first hit that shows at least half of a place.

    Args:
        hits: places found, best first.
        scene: path of the place's scene, or the end of it.
        pixel_box: left, top, width, height of the place.

    Returns:
        Its rank from 1; None: no hit does.
    """
    left, top, width, height = pixel_box
    for rank, row in enumerate(hits.rows.to_pylist(), 1):
        x, y, across, down = row["pixel_box"]
        shared_x = min(left + width, x + across) - max(left, x)
        shared_y = min(top + height, y + down) - max(top, y)
        shared = max(0, shared_x) * max(0, shared_y)
        if row["scene"].endswith(scene) and shared >= SHARED * width * height:
            return rank
    return None


def run(index_folder: Path, places_file: Path, output: Path) -> dict[str, int]:
    """
    Asks, prints what was found where, and writes a page and a heat map.

    Args:
        index_folder: of the index.
        places_file: JSON lines with `text`, `scene` and `pixel_box`; ten of them, evenly spread, are asked.
        output: folder for `hits.html` and `heat.tif`.

    Returns:
        How many descriptions were asked (`asked`), and found `first` or `among_five`.
    """
    from rich.console import Console  # seconds of imports, which --help and a mistyped option do without
    from rich.table import Table
    from tqdm import tqdm

    from .exact_search import search
    from .index_store import load_index_encoder, open_index
    from .locate import similarity_map, write_map
    from .page import write_page
    from .pictures import ScenePictures

    index = open_index(index_folder)
    encoder = load_index_encoder(index)
    places = [json.loads(line) for line in places_file.read_text(encoding="utf-8").splitlines()]
    asked = [places[(2 * number + 1) * len(places) // (2 * QUESTIONS)] for number in range(QUESTIONS)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("rank", "ms", "scene", "description"):
        table.add_column(name, justify="right" if name in ("rank", "ms") else "left", no_wrap=name == "description")
    ranks, shown = [], None
    for row in tqdm(asked, "asking", unit="description", disable=None, leave=False):
        started = time.perf_counter()
        hits = search(index, row["text"], encoder=encoder, top=LOOKED_AT)
        milliseconds = 1000 * (time.perf_counter() - started)
        ranks.append(rank_of(hits, row["scene"], row["pixel_box"]))
        shown = (row, hits) if ranks[-1] == 1 or shown is None else shown
        rank, name = str(ranks[-1] or f"> {len(hits)}"), Path(row["scene"]).name
        table.add_row(rank, f"{milliseconds:.0f}", name, f"{row['text'][:SHOWN]}…")
    Console().print(table)
    among_five = sum(rank is not None and rank <= 5 for rank in ranks)
    counts = {"asked": len(asked), "first": ranks.count(1), "among_five": among_five}
    print(
        f"Of {counts['asked']} descriptions, {counts['first']} were found at rank 1 and {counts['among_five']} within rank 5, "
        f"among {len(index):,} windows of {len(index.metadata['sources'])} scenes."
    )
    row, hits = shown
    heat = similarity_map(index, hits.vector, hits.rows["scene"][0].as_py())
    print(f"The page:     {write_page(ScenePictures(index), hits, output / 'hits.html', row['text'])}")
    print(f"The heat map: {write_map(heat, output / 'heat.tif')}")
    return counts


@command()
def main(arguments: list[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m geosearch.demo", __doc__.splitlines()[1])
    parser.add_argument("index", metavar="INDEX", type=Path, help="folder that geosearch index made")
    parser.add_argument("places", metavar="PLACES", type=Path, help="JSON lines with text, scene and pixel_box")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the page and the heat map")
    options = parser.parse_args(arguments)
    run(options.index, options.places, options.output)


if __name__ == "__main__":
    sys.exit(main())
