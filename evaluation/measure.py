"""Models measured on tasks: what `evaluation.run` does once its options are read."""

import argparse
import contextlib
import datetime
import functools
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers.utils import logging as transformers_logging

from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.files.atomic import make_folder, replace_json, replace_text
from modeling_lrsclip.files.documents import first_line
from modeling_lrsclip.files.locks import only_process
from modeling_lrsclip.published.registry import ModelSource, label_models, resolve

from .results import SCHEMA_VERSION, Table, csv_lines, environment, make_console, markdown, print_table
from .tasks import Benchmark, Task, choose_tasks, load_benchmarks


DTYPES = {"fp32": None, "bf16": torch.bfloat16}


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
    transformers_logging.disable_progress_bar()
    tasks = choose_tasks(options.tasks)
    for name, least in (("batch_size", 1), ("workers", 0), ("allow_missing", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}.")
    sources = [resolve(name_or_path) for name_or_path in options.model]
    labels = label_models(sources)
    wanted = options.device or default_device()
    processes = join_processes(wanted)
    main_process = processes is None or processes.is_main_process
    device = check_device(str(processes.device) if processes else wanted)
    output = prepare_output(options.output)
    busy = f"--output {output} is being written by another evaluation; wait for it, or name another folder."
    with only_process(output / ".lock", busy) if main_process else contextlib.nullcontext():
        return measure_all(options, tasks, dict(zip(labels, sources, strict=True)), device, processes)


def measure_all(
    options: argparse.Namespace,
    tasks: Sequence[Task],
    sources: dict[str, ModelSource],
    device: str,
    processes: PartialState | None,
) -> dict[str, Any]:
    """
    Measure models as [`evaluate`] does, once their names and the output folder are known to be usable.

    Args:
        options: of the command line.
        tasks: that `--tasks` names.
        sources: of the models, by label.
        device: that they run on.
        processes: of an `accelerate launch`; None for one by itself.

    Returns:
        `dict`: content of `results.json`.
    """
    output, main_process = Path(options.output), processes is None or processes.is_main_process
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
    for label, source in sources.items():
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


def default_device() -> str:
    """The graphics card where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
