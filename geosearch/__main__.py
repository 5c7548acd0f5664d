"""`geosearch`: find a place by describing it, in imagery of one's own. Also `python -m geosearch`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import add_locate, add_search, add_serve


# Nothing heavy is imported before a command runs: the help is there at once.


def add_index(commands: argparse._SubParsersAction) -> None:
    """`geosearch index`."""
    parser = commands.add_parser(
        "index",
        help="encode scenes into an index, or add scenes to one",
        description="Encodes windows of georeferenced scenes. Run again after an interruption, it goes on where it was; "
        "with other scenes, it adds them. Under accelerate launch all processes share the work.",
    )
    add = parser.add_argument
    add(
        "scenes",
        nargs="+",
        help="GeoTIFF, COG, VRT, JPEG 2000, PNG, JPEG; folders and patterns of them; STAC items, collections, item "
        "collections (.json); tables with a column of paths (.csv, .parquet)",
    )
    add("--output", required=True, type=Path, help="folder of the index")
    add("--model", help="model folder, Hub id, published name or checkpoint file (that of the index)")
    add("--tokenizer", help="for checkpoint files: Hub id, folder or bpe_simple_vocab_16e6.txt.gz")
    add(
        "--window",
        type=_windows,
        help="side of a window in pixels (224) or metres (500m); several scales with commas (the model's input, one pixel "
        "for one)",
    )
    add("--stride", type=float, help="step between windows as a share of their side (0.5)")
    add("--bands", type=_bands, help="red, green, blue as numbers or names: 4,3,2; one for grey")
    levels = "values that become black and white: 0,3000 or 1%%,99%% (8 bits as stored, others 2%%,98%% of each scene)"
    add("--range", type=_range, help=levels)
    add("--nodata", type=float, help="value that stands for nothing (what the file declares)")
    add("--max-empty", type=float, help="windows with a larger share of nothing than this are left out (0.5)")
    add("--asset", help="asset to take from STAC items (visual, or the only image)")
    add("--max-skipped", type=int, default=100, help="scenes that may be unreadable (100)")
    add("--drop-missing", action="store_true", help="take out scenes that are no longer on disk")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the towers (float16 on a GPU, else float32)")
    add("--batch-size", type=int, default=64, help="windows encoded at once, at most (64)")
    add("--readers", type=int, help="threads that read ahead (by the number of cores)")
    add("--shard", type=_shard, help="encode only this part, such as 3/16; geosearch merge unites them")
    add("--on", choices=("ray",), help="run shards as tasks of a Ray cluster")
    add("--ray-address", help="of a running cluster (a new one on this machine)")
    add("--shards", type=int, help="with --on ray: into how many parts the work is cut")
    parser.set_defaults(run=run_index)


def add_merge(commands: argparse._SubParsersAction) -> None:
    """`geosearch merge`."""
    parser = commands.add_parser("merge", help="unite the shards of an index")
    parser.add_argument("index", type=Path, help="folder that was the --output of all shards")
    parser.add_argument("others", nargs="*", type=Path, help="folders with shards copied from other machines")
    parser.set_defaults(run=run_merge)


COMMANDS = [add_index, add_merge, add_search, add_locate, add_serve]


def run_index(options: argparse.Namespace) -> None:
    """Builds or extends an index as the arguments say."""
    from .index import IndexJob, build_index
    from .shards import build_by_processes, build_on_ray, launched_processes, run_shard

    for name in ("batch_size", "readers", "shards"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    if options.shard and options.on:
        raise ValueError("--shard and --on exclude each other: Ray makes its own shards.")
    if options.on is None and (options.ray_address or options.shards):
        raise ValueError("--ray-address and --shards need --on ray.")
    windows = {name: getattr(options, name) for name in ("stride", "bands", "nodata", "max_empty")}
    windows |= {"sizes": options.window, "value_range": options.range}
    names = ("device", "dtype", "batch_size", "readers", "max_skipped", "drop_missing", "asset", "tokenizer")
    settings = {name: getattr(options, name) for name in names}
    job = IndexJob(options.scenes, options.output, options.model, windows, **settings)
    if options.on == "ray":
        content = build_on_ray(job, options.ray_address, options.shards)
    elif launched_processes()[1] > 1:
        content = build_by_processes(job, options.shard or (1, 1))
    elif options.shard:
        came = run_shard(job, *options.shard)
        print(f"shard {options.shard[0]} of {options.shard[1]} is done: {came['encoded']:,} windows encoded")
        content = None
    else:
        content = build_index(job)
    if content:
        _tell_index(options.output, content)


def run_merge(options: argparse.Namespace) -> None:
    """Unites shards."""
    from .shards import merge_shards

    _tell_index(options.index, merge_shards(options.index, options.others))


def _tell_index(folder: Path, content: dict) -> None:
    encoded = ""
    if content.get("encoded"):
        encoded = f", {content['encoded']:,} encoded now ({content['encoded'] / max(content['seconds'], 1e-9):,.1f} a second)"
    print(f"{folder}: {content['rows']:,} windows of {len(content['sources'])} scenes{encoded}")


def _windows(text: str) -> tuple:
    from .windows import WindowSize

    return _checked(lambda: tuple(WindowSize.parse(part) for part in text.split(",")))


def _bands(text: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _range(text: str):
    from modeling_lrsclip.encoding.rasters import ValueRange

    return _checked(lambda: ValueRange.parse(text))


def _shard(text: str) -> tuple[int, int]:
    from modeling_lrsclip.files.parts import parse_part

    return _checked(lambda: parse_part(text, "shard"))


def _checked(parse):
    """The parser's own way to refuse an argument, with our sentence."""
    try:
        return parse()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="geosearch", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    try:
        options = parser.parse_args(arguments)
        options.run(options)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install '.[geosearch]' in the clone", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that takes no file
        print(f"error: {error}; what is finished stays, run the command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is finished stays, run the command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
