"""
Measures models on tasks: `python -m evaluation.run --model DIR [DIR ...] --tasks zcrl,zcrs --data DATA --output DIR`.

Prints a table per task and writes results.json, results.md and figures.
"""

import argparse
import datetime
import difflib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from .embedding import load_encoder
from .figures import draw_recall_vs_tokens, draw_retrieval_gallery
from .paper import beside_paper
from .report import (
    SCHEMA_VERSION,
    Table,
    environment,
    make_console,
    markdown,
    print_table,
    retrieval_table,
    tokens_table,
    write_file,
    write_json,
)
from .retrieval import RetrievalTask


TASKS = {
    task.name: task
    for task in (
        RetrievalTask("zcrl", "Long-text retrieval (ZCRL)", "long_text", studies_tokens=True),
        RetrievalTask("zcrs", "Short-text retrieval (ZCRS)", "short_text"),
    )
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
MODELS_ARE = "--model takes folders that save_pretrained wrote, or Hub ids"
TOKENS_KEPT = "20,40,77,120,160,200,248"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.run", description="Measures CLIP models on tasks.")
    parser.add_argument("--model", nargs="+", required=True, help="model folders or Hub ids, a row of the table each")
    parser.add_argument("--tasks", default="all", help=f"comma-separated, of: {', '.join(TASKS)}; or all (default)")
    parser.add_argument(
        "--data", required=True, help="folder with test.parquet, a .parquet/.jsonl/.json/.csv, or a Hub id"
    )
    parser.add_argument("--output", required=True, help="folder for results.json, results.md and the figures")
    parser.add_argument("--batch-size", type=int, default=64, help="texts or images encoded at once (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the towers; similarities are always fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tokens-kept", default=TOKENS_KEPT, help=f"for R@1 against tokens kept ({TOKENS_KEPT}); none: no curve"
    )
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "evaluation.run", *words])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    try:
        evaluate(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that can be wrong with the input is checked before the first model is loaded."""
    tasks = choose_tasks(options.tasks)
    tokens_kept = parse_tokens(options.tokens_kept)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1.")
    labels = label_models(options.model)
    device = check_device(options.device)
    output = prepare_output(options.output)
    console = make_console()
    data = {task.name: task.load(options.data) for task in tasks}
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "data": options.data,
        "batch_size": options.batch_size,
        "environment": environment(),
        "models": [],
        "results": [],
    }
    for path, label in zip(options.model, labels, strict=True):
        encoder = load_encoder(
            path, device, label, batch_size=options.batch_size, dtype=DTYPES[options.dtype], progress=True
        )
        document["models"].append(encoder.describe())
        for task in tasks:
            started = time.perf_counter()
            result = task.evaluate(encoder, data[task.name], tokens_kept)
            seconds = time.perf_counter() - started
            result = {"model": label, "task": task.name, "dataset": data[task.name].name} | result
            document["results"].append(result | beside_paper(result))
            console.print(f"{label}: {task.name} done in {seconds:.1f} s, mR {result['metrics']['mR']:.1f}")
        write_json(output / "results.json", document)  # after each model: what is done stays done
    tables = make_tables(tasks, document)
    for table in tables:
        print_table(console, table)
    write_file(output / "results.md", "\n".join(markdown(table) for table in tables))
    written = [output / "results.json", output / "results.md", *draw_figures(tasks, document, data, output)]
    console.print()
    for path in written:
        console.print(str(path), soft_wrap=True)
    return document


# -------------------------------------------------------------------------------------------------------------- input


def choose_tasks(names: str) -> list[RetrievalTask]:
    """`zcrl,zcrs` or `all` -> tasks, in the order given."""
    wanted = list(TASKS) if names == "all" else [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown task {name!r}; --tasks takes {', '.join(TASKS)} or all.{hint}")
    if not wanted:
        raise ValueError(f"no task given; --tasks takes {', '.join(TASKS)} or all.")
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def parse_tokens(values: str) -> list[int]:
    if values.strip().lower() in ("", "none"):
        return []
    try:
        kept = [int(value) for value in values.split(",") if value.strip()]
    except ValueError:
        raise ValueError(f"--tokens-kept {values!r} must be whole numbers, such as {TOKENS_KEPT}, or none.") from None
    if min(kept, default=0) < 2:
        raise ValueError(f"--tokens-kept {values} must be at least 2: the start and the end token count.")
    return kept


def label_models(paths: Sequence[str]) -> list[str]:
    """Folder names, with as many parent folders as it takes to tell them apart."""
    for path in paths:
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if not Path(path).is_dir() and (looks_local or Path(path).parent.is_dir()):
            raise ValueError(f"model folder {path} does not exist; {MODELS_ARE}.")
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise ValueError(f"model folder {path} has no config.json; {MODELS_ARE}.")
    parts = [_telling_parts(Path(path).absolute().parts) for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError("the same model is given twice with --model.")
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return ["/".join(own[-depth:]) for own in parts]


def _telling_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """A training run leaves its models in `RUN/final` and `RUN/best`: the run's name says more."""
    if parts[-1] == "final":
        return parts[:-1]
    return (*parts[:-2], "/".join(parts[-2:])) if parts[-1] == "best" else parts


def check_device(name: str) -> str:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either for what is not there
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def prepare_output(path: str) -> Path:
    """Makes the folder and tries to write to it."""
    output = Path(path)
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written: {error.strerror or error}") from error
    return output


# ------------------------------------------------------------------------------------------------------------- output


def make_tables(tasks: Sequence[RetrievalTask], document: dict[str, Any]) -> list[Table]:
    tables = []
    for task in tasks:
        results = [result for result in document["results"] if result["task"] == task.name]
        tables += [retrieval_table(task.title, results, document["models"]), tokens_table(task.title, results)]
    return [table for table in tables if table]


def draw_figures(
    tasks: Sequence[RetrievalTask], document: dict[str, Any], data: dict[str, Any], output: Path
) -> list[Path]:
    """The curve, where one was measured, and the gallery of the best model at the first task."""
    paths = []
    positions = {model["label"]: model["positions"] for model in document["models"]}
    curves = [result for result in document["results"] if result.get("curve")]
    if curves:
        lines = {result["model"]: result["curve"] for result in curves}
        path = output / "recall_vs_tokens.png"
        title = f"{curves[0]['dataset']}, {curves[0]['texts']:,} texts"
        paths.append(draw_recall_vs_tokens(lines, path, title, curves[0]["tokens"]["longest"]))
    results = [result for result in document["results"] if result["task"] == tasks[0].name]
    best = max(reversed(results), key=lambda result: result["metrics"]["mR"])
    path, label = output / "retrieval_gallery.png", best["model"]
    images = data[tasks[0].name].images
    return [*paths, draw_retrieval_gallery(best["examples"], images, path, label, positions[label])]


if __name__ == "__main__":
    sys.exit(main())
