"""
Measures models on tasks: `python -m evaluation.run --model M [M ...] --tasks all --data DATA [DATA ...] --output DIR`.

Prints a table per task and writes results.json, results.md, results.csv and figures.
"""

import argparse
import datetime
import functools
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from modeling_lrsclip.commands import say_once_that_the_hub_is_away
from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.files.atomic import make_folder, replace_json, replace_text
from modeling_lrsclip.files.cache_folder import cache_folder
from modeling_lrsclip.files.documents import first_line
from modeling_lrsclip.published.registry import label_models, resolve

from .benchmarks.class_names import WORDINGS
from .results import SCHEMA_VERSION, Table, csv_lines, environment, make_console, markdown, print_table
from .tasks import TASKS, Benchmark, choose_tasks, load_benchmarks


DTYPES = {"fp32": None, "bf16": torch.bfloat16}
TOKENS_KEPT = "20,40,77,120,160,200,248"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description="Measures CLIP models on tasks.")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        help="a row of the table each: a model folder (CLIP, LRSCLIP, SigLIP or another dual encoder, "
        "sentence-transformers, exported ONNX), a Hub id, a published checkpoint file, or a name such as "
        "remoteclip-vit-l-14; NAME=FILE says which published model a file is",
    )
    parser.add_argument("--tasks", default="all", help=f"comma-separated, of: {', '.join(TASKS)}; or all (default)")
    parser.add_argument(
        "--data", nargs="+", required=True, help="folders, files or Hub ids; each task takes those that hold its data"
    )
    parser.add_argument("--output", required=True, help="folder for results.json, results.md and the figures")
    parser.add_argument("--allow-missing", type=int, default=0, help="images a data set may lack (0)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts or images encoded at once, at most (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the towers; similarities are always fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (0: none beside this one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the towers: minutes first, faster then")
    parser.add_argument(
        "--cache",
        default=str(cache_folder("embeddings")),
        help="folder where embeddings are kept for later runs; none: nowhere",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that lies beside a model's weights; read it first"
    )
    parser.add_argument("--tokenizer", help="for checkpoint files: Hub id, folder or bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument(
        "--tokens-kept", default=TOKENS_KEPT, help=f"zcrl: for R@1 against tokens kept ({TOKENS_KEPT}); none: no curve"
    )
    parser.add_argument(
        "--templates", default="paper", help="zic: a set of prompts, or a file with one a line (paper)"
    )
    parser.add_argument("--class-names", choices=WORDINGS, default="human", help="zic: their wording (human)")
    parser.add_argument("--protocol", choices=("v1", "v2"), default="v1", help="selo: v1 is the paper's (v1)")
    parser.add_argument(
        "--reference-io", action="store_true", help="selo: windows and maps through JPEG, as the published loop does"
    )
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "evaluation.run", *words])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments)
    say_once_that_the_hub_is_away()
    transformers_logging.disable_progress_bar()
    try:
        evaluate(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """
    Measure all models on all benchmarks, and write and print the results. Everything that can be wrong with the input is
    checked before the first model is loaded. Under `accelerate launch` the processes share the encoding, and the first
    one writes and prints.

    Returns:
        `dict`: content of `results.json`.

    Raises:
        `ValueError`: one sentence on what is wrong with the options, the data or a model.
    """
    tasks = choose_tasks(options.tasks)
    for name, least in (("batch_size", 1), ("workers", 0), ("allow_missing", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}.")
    sources = [resolve(name_or_path) for name_or_path in options.model]
    labels = label_models(sources)
    processes = join_processes(options.device)
    main_process = processes is None or processes.is_main_process
    device = check_device(str(processes.device) if processes else options.device)
    output = prepare_output(options.output)
    console = make_console(quiet=not main_process)
    benchmarks = load_benchmarks(tasks, options, lambda text: console.print(text, markup=False))
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "data": options.data,
        "batch_size": options.batch_size,
        "processes": processes.num_processes if processes else 1,
        "environment": environment(),
        "models": [],
        "results": [],
    }
    for source, label in zip(sources, labels, strict=True):
        encoder = load_encoder(
            source,
            device,
            label,
            tokenizer=options.tokenizer,
            trust_remote_code=options.trust_remote_code,
            batch_size=options.batch_size,
            dtype=DTYPES[options.dtype],
            progress=True,
            workers=options.workers,
            compile=options.compile,
            cache_dir=None if options.cache == "none" else options.cache,
            distributed=processes is not None,
        )
        document["models"].append(encoder.describe() | {"revision": source.revision})
        for benchmark in benchmarks:
            started = time.perf_counter()
            result = benchmark.measure(encoder)
            seconds, task = time.perf_counter() - started, benchmark.task
            document["results"].append(result)
            headline = f"{task.headline} {result['metrics'][task.headline]:.{task.digits}f}"
            seen = ", seen in training" if "seen" in result else ""
            line = f"{label}: {task.name} on {benchmark.data.name} done in {seconds:.1f} s, {headline}{seen}"
            console.print(line, markup=False)
            if main_process:
                replace_json(output / "results.json", document, allow_nan=False)  # after each: what is done stays done
    if main_process:
        show(console, benchmarks, document, output)
    if processes:
        processes.destroy_process_group()
    return document


def show(console: Console, benchmarks: Sequence[Benchmark], document: dict[str, Any], output: Path) -> None:
    """
    Prints the tables, writes them and the figures, and names the files written.

    Args:
        console: where to print.
        benchmarks: what was measured.
        document: content of `results.json`, which is written already.
        output: folder to write to.
    """
    tables = make_tables(benchmarks, document)
    for table in tables:
        print_table(console, table)
    replace_text(output / "results.md", "\n".join(markdown(table) for table in tables))
    replace_text(output / "results.csv", csv_lines(document["results"]))
    written = [output / name for name in ("results.json", "results.md", "results.csv")]
    console.print()
    for path in [*written, *draw_figures(benchmarks, document, output)]:
        console.print(str(path), soft_wrap=True, markup=False)


# -------------------------------------------------------------------------------------------------------------- input


def join_processes(device: str) -> PartialState | None:
    """The other processes of an `accelerate launch`; None for a process by itself."""
    return PartialState(cpu=device == "cpu") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def check_device(name: str) -> str:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for what is not there
        raise ValueError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return name


def prepare_output(path: str) -> Path:
    """Makes the folder and tries to write to it."""
    output = make_folder(path)
    try:
        probe = output / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror or error}") from error
    return output


# ------------------------------------------------------------------------------------------------------------- output


def make_tables(benchmarks: Sequence[Benchmark], document: dict[str, Any]) -> list[Table]:
    """The tables of all tasks, in their order."""
    tables = []
    for task in dict.fromkeys(benchmark.task for benchmark in benchmarks):
        results = [result for result in document["results"] if result["task"] == task.name]
        names = dict.fromkeys(result["dataset"] for result in results)
        groups = [[result for result in results if result["dataset"] == name] for name in names]
        groups = [results] if task.one_table else groups
        tables += [table for group in groups for table in task.tables(task.title, group, document["models"])]
    return [table for table in tables if table]


def draw_figures(benchmarks: Sequence[Benchmark], document: dict[str, Any], output: Path) -> list[Path]:
    """
    Draw each task's pictures; their names tell the task and the data set where there are several.

    Args:
        benchmarks: what was measured.
        document: content of `results.json`.
        output: folder to write to.

    Returns:
        The files written.
    """
    paths: list[Path] = []
    tasks = list(dict.fromkeys(benchmark.task for benchmark in benchmarks))
    for benchmark in benchmarks:
        task, name = benchmark.task, benchmark.data.name
        wanted = {"task": task.name, "dataset": name}
        results = [result for result in document["results"] if wanted.items() <= result.items()]
        ending = f"-{name}" if sum(other.task == task for other in benchmarks) > 1 else ""
        if any(task.figures is earlier.figures for earlier in tasks[: tasks.index(task)]):
            ending += f"-{task.name}"
        path = functools.partial(_figure_path, output, ending)
        paths += task.figures(results, benchmark.data, document["models"], path)
    return paths


def _figure_path(folder: Path, ending: str, name: str) -> Path:
    return folder / re.sub(r"[^\w.-]", "_", f"{name}{ending}.png")


if __name__ == "__main__":
    sys.exit(main())
