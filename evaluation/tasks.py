"""
The tasks of `evaluation.run`, where each finds its data, how it measures, its tables and its pictures; and what the
command does with them once its options are read.
"""

import argparse
import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from modeling_lrsclip.encoding import Encoder, load_encoder
from modeling_lrsclip.encoding.imagery import survey_lines
from modeling_lrsclip.files.atomic import make_folder, replace_json
from modeling_lrsclip.files.configuration import choose_names
from modeling_lrsclip.files.documents import first_line
from modeling_lrsclip.files.locks import only_process
from modeling_lrsclip.published.registry import ModelSource, label_models, resolve

from .benchmarks.retrieval_data import KINDS
from .benchmarks.tables import NotHere, Unusable
from .bootstrap import intervals
from .classification import ClassificationTask, classification_table
from .figures.classification import draw_confusion_matrix
from .figures.localization import draw_localization
from .figures.retrieval import draw_recall_vs_tokens, draw_retrieval_gallery, draw_token_lengths
from .localization import LocalizationTask, localization_table
from .paper import beside_paper
from .results import SCHEMA_VERSION, Table, environment, make_console, retrieval_table, show, tokens_table
from .retrieval import RetrievalTask


DTYPES = {"fp32": None, "bf16": torch.bfloat16}
Results = Sequence[dict[str, Any]]
HASH_DIGITS = 16  # hexadecimal, of an image's SHA-256 in run.json


@dataclass(frozen=True)
class Task:
    """
    A row of the registry.

    Args:
        make: from the command's options, which it checks, the object with `find_sources(path)`, which lists what holds
            the task's data in a path or under a Hub id and raises `NotHere` where nothing does,
            `load(source, allow_missing)` and `evaluate(encoder, data)`.
        tables: results of one data set (of all, with `one_table`) and the models' descriptions -> tables.
        figures: results of one data set, its data, the models' descriptions, and a function from a figure's name to its
            path -> paths written.
        headline: the metric that is printed when a model is done.
    """

    name: str
    title: str
    make: Callable[[argparse.Namespace], Any]
    tables: Callable[[str, Results, Results], list[Table | None]]
    figures: Callable[[Results, Any, Results, Callable[[str], Path]], list[Path]]
    headline: str
    digits: int = 1  # of the headline
    one_table: bool = False  # for all data sets together


def _retrieval(name: str, title: str, column: str, studies_tokens: bool) -> Task:
    return Task(
        name,
        title,
        make=lambda options: RetrievalTask(
            column, parse_tokens(options.tokens_kept) if studies_tokens else (), parse_columns(options.columns)
        ),
        tables=lambda title, results, models: [retrieval_table(title, results, models), tokens_table(title, results)],
        figures=_draw_retrieval,
        headline="mR",
    )


def _draw_retrieval(results: Results, data: Any, models: Results, path: Callable[[str], Path]) -> list[Path]:
    """R@1 against tokens kept where it was measured, the lengths of the texts, and the gallery of the best model."""
    positions = {model["label"]: model["positions"] for model in models}
    paths = []
    tokens, title = results[0]["tokens"], f"{data.name}, {len(data.texts):,} texts"
    if curves := {result["model"]: result["curve"] for result in results if result.get("curve")}:
        paths.append(draw_recall_vs_tokens(curves, path("recall_vs_tokens"), title, tokens["longest"]))
    paths.append(draw_token_lengths(tokens["histogram"], path("token_lengths"), data.name))
    best, label = _best(results, "mR")
    gallery, read = path("retrieval_gallery"), positions[best["model"]]
    return [*paths, draw_retrieval_gallery(best["examples"], data.images, gallery, label, read)]


def _draw_classification(results: Results, data: Any, models: Results, path: Callable[[str], Path]) -> list[Path]:
    """The confusion matrix of the best model."""
    best, label = _best(results, "accuracy")
    return [draw_confusion_matrix(best, path("confusion_matrix"), label, data.name)]


def _draw_localization(results: Results, data: Any, models: Results, path: Callable[[str], Path]) -> list[Path]:
    """Scenes, maps and regions of the best model."""
    best, label = _best(results, "Rmi")
    return [draw_localization(best, data, path("localization"), label)]


def _best(results: Results, metric: str) -> tuple[dict[str, Any], str]:
    """The result that is drawn, and its model's name, which says why it is this one where there are several."""
    best = max(reversed(results), key=lambda result: result["metrics"][metric])
    return best, best["model"] + (f" (best {metric} of {len(results)} models)" if len(results) > 1 else "")


TASKS = {
    task.name: task
    for task in (
        _retrieval("zcrl", "Long-text retrieval (ZCRL)", "long_text", studies_tokens=True),
        _retrieval("zcrs", "Short-text retrieval (ZCRS)", "short_text", studies_tokens=False),
        Task(
            "zic",
            "Zero-shot classification (ZIC)",
            make=lambda options: ClassificationTask(options.templates, options.class_names),
            tables=lambda title, results, models: [classification_table(title, results)],
            figures=_draw_classification,
            headline="accuracy",
            one_table=True,
        ),
        Task(
            "selo",
            "Semantic localization (SeLo)",
            make=lambda options: LocalizationTask(options.protocol, options.reference_io),
            tables=lambda title, results, models: [localization_table(title, results)],
            figures=_draw_localization,
            headline="Rmi",
            digits=4,
        ),
    )
}


def choose_tasks(names: str) -> list[Task]:
    """`zcrl,zcrs` or `all` -> tasks, in the order given."""
    return [TASKS[name] for name in choose_names(names, TASKS, "task", "--tasks")]


def parse_columns(settings: Sequence[str]) -> dict[str, str]:
    """`["long=description", "image=tile"]` -> names of columns by their kind."""
    columns: dict[str, str] = {}
    for setting in settings:
        kind, _, name = setting.partition("=")
        if kind not in KINDS or not name or kind in columns:
            raise ValueError(f"--columns {setting} must be KIND=NAME, each KIND of {', '.join(KINDS)} once at most.")
        columns[kind] = name
    return columns


def parse_tokens(values: str) -> list[int]:
    """`20,40,77` or `none` -> numbers of tokens to keep."""
    if values.strip().lower() in ("", "none"):
        return []
    try:
        kept = [int(value) for value in values.split(",") if value.strip()]
    except ValueError:
        raise ValueError(f"--tokens-kept {values!r} must be whole numbers, such as 20,77,248, or none.") from None
    if min(kept, default=0) < 2:
        raise ValueError(f"--tokens-kept {values} must be at least 2: the start and the end token count.")
    return kept


@dataclass(frozen=True)
class Benchmark:
    """Data set, and the task by which models are measured on it."""

    task: Task
    method: Any  # made by `task.make`
    source: str  # path or Hub id that the data was read from
    data: Any

    def measure(self, encoder: Encoder) -> dict[str, Any]:
        """The result of one model, as `results.json` holds it."""
        result = self.method.evaluate(encoder, self.data)
        named = {"model": encoder.label, "task": self.task.name, "dataset": self.data.name, "source": self.source}
        result = named | result | {"imagery": self.data.images.imagery}
        result["intervals"] = intervals(result)
        result |= beside_paper(result)
        known = trained_images(encoder)
        if common := sum(digest[:HASH_DIGITS] in known for digest in self.data.images.digests):
            count = f"at least {common:,} of its {len(self.data.images):,} images"
            result["seen"] = f"{self.data.name}: the model was trained on {count} (its run.json), so this is no test"
        return result


def trained_images(encoder: Encoder) -> set[str]:
    """First `HASH_DIGITS` digits of the SHA-256 of images that a model was trained on, as `run.json` beside it knows them."""
    path = Path(encoder.path) / "run.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if not isinstance(record, dict) or record.get("weights", {}).get("sha256") != encoder.weights_sha256:
        return set()
    images: set[str] = set()
    while record:  # and what it started from
        images.update(record.get("data", {}).get("images_sha256", ()))
        record = record.get("init_run")
    return images


def load_benchmarks(tasks: Sequence[Task], options: argparse.Namespace, say: Callable[[str], None]) -> list[Benchmark]:
    """
    Load the data of all tasks; with `--tasks all`, a task without data is left out, which is said.

    Args:
        tasks: in the order of the results.
        options: of the command.
        say: prints a line.

    Returns:
        The data sets that `--data` holds, task by task.

    Raises:
        `ValueError`: one sentence for a task that was asked for by name and has no data, a source that no task can
            use, and whatever is wrong with the data.
    """
    used, benchmarks = set(), []
    absent: dict[str, NotHere] = {}
    for task in tasks:
        method, loaded = task.make(options), []
        for path in options.data:
            try:
                sources = method.find_sources(path)
            except NotHere as error:
                absent[task.name] = error
                continue
            for source in sources:
                try:
                    loaded.append(Benchmark(task, method, source, method.load(source, options.allow_missing)))
                    used.add(path)
                except NotHere as error:
                    absent[task.name] = error
                    if isinstance(error, Unusable) and options.tasks == "all":
                        used.add(path)
                        say(f"{task.name} leaves out {source}: {error}")
                    elif isinstance(error, Unusable):
                        raise
        if not loaded and options.tasks != "all":
            raise absent[task.name]
        names = [benchmark.data.name for benchmark in loaded]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"--data has {twice.pop()} for {task.name} twice; name one of them otherwise.")
        for benchmark in loaded:
            say(f"{task.name}: {benchmark.data.summary}")
            for line in survey_lines(benchmark.data.images.imagery, benchmark.data.name):
                say(line)
        benchmarks += loaded
    if unused := [path for path in options.data if path not in used]:
        reason = "; ".join(f"{name}: {str(error).rstrip('.')}" for name, error in absent.items())
        raise ValueError(f"--data {unused[0]} holds nothing for {', '.join(task.name for task in tasks)} ({reason}).")
    measured = {benchmark.task.name for benchmark in benchmarks}
    for task in tasks:
        if task.name not in measured:
            say(f"{task.name} is left out: {absent[task.name]}")
    return benchmarks


# ------------------------------------------------------------------------------------------------------------ command


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
    parse_columns(options.columns)  # also where no task takes them
    for name, least in (("batch_size", 1), ("workers", 0), ("allow_missing", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}.")
    sources = [resolve(name_or_path) for name_or_path in options.model]
    labels = label_models(sources)
    wanted, world_size = options.device or default_device(), int(os.environ.get("WORLD_SIZE", "1"))
    processes = PartialState(cpu=wanted == "cpu") if world_size > 1 else None  # of an `accelerate launch`
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
    as_given = ("tokenizer", "trust_remote_code", "batch_size", "workers", "compile")
    encoding = {name: getattr(options, name) for name in as_given}
    encoding |= {"dtype": DTYPES[options.dtype], "progress": True, "distributed": processes is not None}
    encoding["cache_dir"] = None if options.cache == "none" else options.cache
    for label, source in sources.items():
        encoder = load_encoder(source, device, label, **encoding)
        document["models"].append(encoder.describe() | {"revision": source.revision})
        for benchmark in benchmarks:
            started, task = time.perf_counter(), benchmark.task
            result = benchmark.measure(encoder)
            document["results"].append(result)
            line = f"{label}: {task.name} on {benchmark.data.name} done in {time.perf_counter() - started:.1f} s, "
            line += f"{task.headline} {result['metrics'][task.headline]:.{task.digits}f}"
            console.print(line + (", seen in training" if "seen" in result else ""), markup=False)
            if main_process:
                replace_json(output / "results.json", document, allow_nan=False)  # after each: what is done stays done
    if main_process:
        show(console, benchmarks, document, output)
    if processes:
        processes.destroy_process_group()
    return document


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
