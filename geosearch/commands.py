"""The commands that ask an index: `geosearch search`, `locate` and `serve`. Nothing heavy is imported before one runs."""

import argparse
import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path


def add_search(commands: argparse._SubParsersAction) -> None:
    """`geosearch search`."""
    parser = commands.add_parser(
        "search",
        help="places that look like a text or an image",
        description="Compares every window of an index with a text, an image or both, and prints the places that are "
        "nearest, best first.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder that geosearch index made")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what is to be seen, in up to 248 tokens")
    parser.add_argument("--image", metavar="FILE", help="what it is to look like, alone or with TEXT")
    parser.add_argument("--not", metavar="TEXT", dest="exclude", help="what is not to be seen")
    parser.add_argument("--bbox", metavar="W,S,E,N", type=_numbers(4), help="degrees; W greater than E crosses 180")
    parser.add_argument("--near", metavar="LON,LAT,KM", type=_numbers(3), help="kilometres around a point")
    parser.add_argument("--after", metavar="DATE", type=_date, help="acquired on this day (2024-05-31, UTC) or later")
    parser.add_argument("--before", metavar="DATE", type=_date, help="acquired before this day (UTC)")
    parser.add_argument("--top", type=int, default=10, help="places to find (10)")
    parser.add_argument("--output", metavar="FILE", help="write them to a .geojson, .gpkg or .parquet file")
    parser.add_argument("--html", metavar="FILE", help="write a page with thumbnails and a map, for any browser")
    _add_model(parser)
    parser.set_defaults(run=run_search)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="where the index's model is now (where it was then)")
    parser.add_argument("--device", default="cpu", help="where it runs, for example cuda (cpu)")


def _numbers(count: int) -> Callable[[str], tuple[float, ...]]:
    def numbers(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers with commas between")
        return values

    return numbers


def _date(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; write 2024-05-31") from error


def run_search(options: argparse.Namespace) -> None:
    """Finds, prints and writes; what can be wrong with the arguments is said before the model is loaded."""
    from .exact_search import Area, search
    from .hits import feature_table, output_driver, print_hits, write_features
    from .index_store import load_index_encoder, open_index
    from .page import write_page
    from .pictures import ScenePictures

    area = Area(options.bbox, options.near, options.after, options.before)
    if options.output:
        output_driver(options.output)
    index = open_index(options.index)
    area.rows(index)
    image = ScenePictures(index).example(options.image) if options.image else None
    encoder = load_index_encoder(index, options.model, options.device)
    question = {"image": image, "exclude": options.exclude, "area": area, "top": options.top}
    hits = search(index, options.text, encoder=encoder, **question)
    print_hits(hits)
    if options.output:
        print(f"-> {write_features(feature_table(hits), options.output, hits.coordinates)}")
    if options.html:
        title = options.text or f"Like {options.image}"
        print(f"-> {write_page(ScenePictures(index), hits, options.html, title)}")


# --------------------------------------------------------------------------------------------------------------- locate


def add_locate(commands: argparse._SubParsersAction) -> None:
    """`geosearch locate`."""
    parser = commands.add_parser(
        "locate",
        help="where in a scene is what a text describes",
        description="Writes a map of similarity in the scene's own coordinates, and the places on it. Over an indexed "
        "scene no image is encoded; a scene file is indexed first, for this once.",
    )
    parser.add_argument("source", metavar="INDEX_OR_SCENE", help="folder that geosearch index made, or a scene's file")
    parser.add_argument("text", metavar="TEXT", help="what is to be seen, in up to 248 tokens")
    parser.add_argument("--not", metavar="TEXT", dest="exclude", help="what is not to be seen")
    parser.add_argument("--scene", help="which scene of the index: its path or the end of it")
    parser.add_argument("--output", metavar="FILE", help="write the map to a Cloud Optimized GeoTIFF (.tif)")
    parser.add_argument("--places", metavar="FILE", help="write the places to a .geojson, .gpkg or .parquet file")
    parser.add_argument("--window", help="for a scene's file: in pixels (224) or metres (500m), commas between")
    _add_model(parser)
    parser.set_defaults(run=run_locate)


def run_locate(options: argparse.Namespace) -> None:
    """Maps, prints and writes."""
    from .exact_search import SearchProblem
    from .hits import output_driver

    if options.places:
        output_driver(options.places)
    if options.output and Path(options.output).suffix.lower() not in (".tif", ".tiff"):
        raise SearchProblem(f"{options.output} is to be a GeoTIFF: let its name end in .tif.")
    if Path(options.source).is_dir():
        if options.window:
            raise SearchProblem("--window is for a scene's file; the windows of an index are there already.")
        _locate(options, Path(options.source))
        return
    if not options.model:
        raise SearchProblem(f"{options.source} is no index: name the --model that is to look at this scene.")
    from .index import IndexJob, build_index
    from .windows import WindowSize

    with tempfile.TemporaryDirectory(prefix="geosearch-") as folder:
        sizes = options.window and tuple(map(WindowSize.parse, options.window.split(",")))
        job = IndexJob([options.source], Path(folder), options.model, {"sizes": sizes}, device=options.device)
        build_index(job)
        _locate(options, Path(folder))


def _locate(options: argparse.Namespace, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from .exact_search import question_vector, read_text
    from .hits import place_name, write_features
    from .index_store import load_index_encoder, open_index
    from .locate import PLACE_LEVEL, place_middles, places_of, scene_windows, similarity_map, write_map

    index = open_index(folder)
    scene_windows(index, options.scene)  # says which scenes there are, before the model is loaded
    encoder = load_index_encoder(index, options.model, options.device)
    query = question_vector(index, encoder, options.text, exclude=options.exclude)
    heat = similarity_map(index, query, options.scene)
    places = places_of(heat)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("place", "similarity", "mean", "cells"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("middle", no_wrap=True)
    for row, (lon, lat) in zip(places.to_pylist(), place_middles(places)):
        numbers = f"{row['similarity']:.4f}", f"{row['mean_similarity']:.4f}", f"{row['cells']:,}"
        table.add_row(str(row["rank"]), *numbers, place_name(lon, lat, heat.coordinates))
    Console().print(table)
    print(read_text(encoder, options.text).sentence())
    level = f"{heat.level:.4f}, {PLACE_LEVEL:.0%} of the way from the map's median to its peak"
    print(f"{heat.scene}: places exceed {level}.")
    if options.output:
        print(f"-> {write_map(heat, options.output)}")
    if options.places:
        print(f"-> {write_features(places, options.places, heat.coordinates)}")


# ---------------------------------------------------------------------------------------------------------------- serve


def add_serve(commands: argparse._SubParsersAction) -> None:
    """`geosearch serve`."""
    parser = commands.add_parser("serve", help="search an index in the browser, on a map")
    parser.add_argument("index", metavar="INDEX", help="folder that geosearch index made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen at (the first free one from 7860 on)")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    _add_model(parser)
    parser.set_defaults(run=run_serve)


def run_serve(options: argparse.Namespace) -> None:
    """Runs until it is interrupted."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install '.[geosearch,map]' in the clone.") from error
    from .app import serve

    where = {"host": options.host, "port": options.port, "inbrowser": not options.no_browser}
    serve(options.index, options.model, options.device, **where)
