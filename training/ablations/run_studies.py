"""Plans, trains, measures and reports the studies of `training.ablate`."""

import argparse
import json
import re
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import torch
from rich.console import Console

from evaluation.benchmarks.aerial_scenes.data_set import CLASS_NAMES, write_dataset
from evaluation.benchmarks.scene_mosaics import write_mosaics
from evaluation.results import environment, make_console, markdown, print_table
from evaluation.run import parse_arguments as evaluation_options
from evaluation.tasks import choose_tasks, load_benchmarks
from modeling_lrsclip.encoding import load_encoder
from modeling_lrsclip.files.atomic import replace_json, replace_text
from modeling_lrsclip.files.configuration import split_setting

from ..run_folder import git_state
from .figure import draw_study
from .models import PAPER_RECIPE, OwnModels, SmallModels
from .outcome import Outcome, Results
from .runs import Run, RunFolders, Source, Work, field_of, identify, read_recipe, with_starts
from .studies import TASKS, Ladders, choose_studies


SEEDS = {"quick": (0,), "full": (0, 1, 2)}
WEIGHTS = {"quick": (1, 3, 5, 8, 9), "full": (1, 2, 3, 4, 5, 6, 7, 8, 9)}  # tenths of the long texts' loss
IMAGE_SIZE = 96  # pixels along a drawn scene's side
SCENE_SEED, GENERAL_SEED, MOSAIC_TILES = 0, 1, 4
GENERAL_CLASSES = CLASS_NAMES[::2]  # those that pre-training sees
EVALUATION = "evaluation.json"  # beside a run's model


def ablate(options: argparse.Namespace) -> None:
    """Plan all runs, train those that are missing study by study, and report each study when its arms are there."""
    choose_studies(options.study, Ladders())  # says what is wrong with the names before anything is drawn
    settings = dict(parse_setting(setting) for setting in options.set)
    seeds = parse_seeds(options)
    console, output = make_console(), Path(options.output)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)
        console.file.flush()

    models, evaluation_data = _models(options, settings, output / "data", say)
    studies = choose_studies(options.study, models.ladders(WEIGHTS[options.mode]))
    plans = [[(arm, [models.run(arm, study.name, seed) for seed in seeds]) for arm in study.arms] for study in studies]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    measured = Measured(evaluation_data, device, say)
    folders = RunFolders(output / "arms", shlex.split(options.launch))
    work = Work(folders, say, with_starts([run for plan in plans for _, runs in plan for run in runs]))
    for study, plan in zip(studies, plans, strict=True):
        for run in with_starts([run for _, runs in plan for run in runs]):
            work.train(run)
        arms = {
            arm.name: [measured(folders.model(run), folders.folder(run) / EVALUATION) for run in runs]
            for arm, runs in plan
        }
        outcome = Outcome(study, arms, measured.left_out, models.remark(study.name), seeds)
        report(outcome, output / study.name, console, _record(options, outcome, plan, folders))


def parse_seeds(options: argparse.Namespace) -> tuple[int, ...]:
    """
    Raises:
        `ValueError`: for what is no list of whole numbers from 0 on.
    """
    if options.seeds is None:
        return SEEDS[options.mode]
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ValueError(f"--seeds {options.seeds} must be whole numbers from 0 on, such as 0,1,2.")
    return seeds


def parse_setting(setting: str) -> tuple[str, Any]:
    """
    Name and value of `optim.learning_rate=1e-4`, with numbers such as 1e-4 understood: arms compute with them.

    Raises:
        `ValueError`: for a word without name or value.
    """
    try:
        name, value = split_setting(setting)
    except ValueError as error:
        raise ValueError(f"--set {error}") from None
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return name, float(value) if number else value


# --------------------------------------------------------------------------------------------------------------- data


def _models(
    options: argparse.Namespace, settings: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> tuple[SmallModels | OwnModels, list[str]]:
    """Models and data of the arms, and the paths they are measured on."""
    named = field_of(read_recipe(options.config), "data.train") if options.config else None
    if options.data is None and named is None:
        for name in ("evaluation-data", "long-clip", "sizes"):
            if getattr(options, name.replace("-", "_")):
                raise ValueError(f"--{name} goes with your own --data; drawn scenes bring their own.")
        scenes, general, evaluation_data = draw_data(folder, options, say)
        return SmallModels(options.config, settings, scenes, general), evaluation_data
    train = options.data or named
    recipe = options.config or PAPER_RECIPE
    models = OwnModels(recipe, settings, Source(train, identify(train)), options.long_clip, options.sizes)
    evaluation_data = options.evaluation_data or [train] if isinstance(train, str) else options.evaluation_data
    if not evaluation_data:
        raise ValueError(
            "--evaluation-data is missing: the recipe has several training sources; name what to measure on."
        )
    if not options.evaluation_data:
        say(f"note: no --evaluation-data, so {train} is measured on: not held out, unless it has a test split")
    return models, evaluation_data


def draw_data(
    folder: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Source, Source, list[str]]:
    """
    Draw the scenes that are not there yet: those of the arms; general ones, of half of the classes, for what they start
    from; landscapes for localization.

    Args:
        folder: of all drawn data.
        options: how many of each.
        say: prints a line.

    Returns:
        the data of the arms, that of what they start from, and the paths to measure on.
    """
    scenes = folder / f"scenes-{options.scenes}-{options.test_scenes}"
    general = folder / f"general-{options.scenes}"
    mosaics = folder / f"mosaics-{options.mosaics}"
    if not (scenes / "scenes.json").is_file():
        say(f"drawing {options.scenes:,} scenes to train on and {options.test_scenes:,} to measure on")
        write_dataset(scenes, {"train": options.scenes, "test": options.test_scenes}, SCENE_SEED, IMAGE_SIZE)
    if not general.is_dir():
        kept = ", ".join(GENERAL_CLASSES)
        say(f"drawing {2 * options.scenes:,} scenes to pre-train on, of which those of {kept} stay")
        growing = folder / f".{general.name}"
        write_dataset(growing, {"train": 2 * options.scenes}, GENERAL_SEED, IMAGE_SIZE)
        rows = pyarrow.parquet.read_table(growing / "train.parquet")
        rows = rows.filter(pa.compute.is_in(rows["class_name"], value_set=pa.array(GENERAL_CLASSES)))
        pyarrow.parquet.write_table(rows, growing / "train.parquet", compression="zstd")
        growing.rename(general)
    if not (mosaics / "localization.jsonl").is_file():
        say(f"drawing {options.mosaics} landscapes to localize in")
        write_mosaics(mosaics, options.mosaics, SCENE_SEED, MOSAIC_TILES)
    sources = []
    for drawn in (scenes, general):
        pairs = pyarrow.parquet.read_metadata(drawn / "train.parquet").num_rows
        sources.append(Source(str(drawn.resolve()), f"{drawn.name} {(drawn / 'scenes.json').read_text()}", pairs))
    return *sources, [str(scenes / "test.parquet"), str(mosaics)]


# ----------------------------------------------------------------------------------------------------------- the work


class Measured:
    """The evaluation data, read once, and the measures of each run, kept beside its model."""

    def __init__(self, data: list[str], device: str, say: Callable[[str], None]):
        words = ["--model", "-", "--output", "-", "--data", *data, "--tokens-kept", "none", "--device", device]
        self.options, tasks = evaluation_options(words), choose_tasks("all")
        self.benchmarks = load_benchmarks(tasks, self.options, say)
        self.identity = [identify(source) for source in data]
        measured = {benchmark.task.name for benchmark in self.benchmarks}
        self.left_out = [TASKS[task.name] for task in tasks if task.name not in measured]

    def __call__(self, model: Path, kept: Path) -> Results:
        """Measure a model: by task, a result per data set; read from the file `kept` where it is of this very data."""
        if kept.is_file() and (document := json.loads(kept.read_text(encoding="utf-8")))["data"] == self.identity:
            return document["results"]
        started = time.perf_counter()
        encoder = load_encoder(str(model), self.options.device, batch_size=self.options.batch_size)
        results: Results = {}
        for benchmark in self.benchmarks:
            result = benchmark.measure(encoder)
            result.pop("examples", None)  # for galleries
            results.setdefault(benchmark.task.name, []).append(result)
        replace_json(kept, {"data": self.identity, "seconds": time.perf_counter() - started, "results": results})
        return results


# ------------------------------------------------------------------------------------------------------------- output


def report(outcome: Outcome, folder: Path, console: Console, record: dict[str, Any]) -> None:
    """
    Print a study's table and closing words, and write table.md, results.json and figure.png.

    Args:
        outcome: of the study.
        folder: of the study.
        console: to print on.
        record: the content of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, closing = outcome.table(), outcome.closing()
    print_table(console, table)
    console.print()
    for line in closing:
        console.print(line, markup=False)
    bars = (
        "mean ± s over the seeds" if len(outcome.seeds) > 1 else "one seed, 95 % interval over test images or queries"
    )
    here = {task: {arm: outcome.point(arm, task) for arm in outcome.arms} for task in outcome.tasks}
    figure = draw_study(outcome.study, here, outcome.paper, folder / "figure.png", bars)
    lines = [closing[0], "", *(f"- {line}" for line in closing[1:-1]), "", closing[-1], "", "![](figure.png)", ""]
    replace_text(folder / "table.md", markdown(table) + "\n" + "\n".join(lines))
    replace_json(folder / "results.json", record)
    for path in (folder / "table.md", folder / "results.json", figure):
        console.print(str(path), soft_wrap=True, markup=False)


def _record(options: argparse.Namespace, outcome: Outcome, plan: Any, folders: RunFolders) -> dict[str, Any]:
    """Content of a study's `results.json`."""
    arms = []
    for arm, runs in plan:
        arms.append(
            {
                "name": arm.name,
                "paper": outcome.paper and outcome.paper[arm.name],
                "mean": {task: statistics.fmean(outcome.values(arm.name, task)) for task in outcome.tasks},
                "runs": [_run_record(*pair, folders) for pair in zip(runs, outcome.arms[arm.name], strict=True)],
            }
        )
    return {
        "schema_version": 1,
        "study": outcome.study.name,
        "title": outcome.study.title,
        "command": options.command,
        "mode": options.mode,
        "seeds": list(outcome.seeds),
        "remark": outcome.remark,
        "left_out": outcome.left_out,
        "arms": arms,
        "orderings": [verdict.record() for verdict in outcome.verdicts],
        "environment": environment(),
        "git": git_state(Path(__file__).parent),
    }


def _run_record(run: Run, results: Results, folders: RunFolders) -> dict[str, Any]:
    seconds = json.loads((folders.folder(run) / EVALUATION).read_text(encoding="utf-8")).get("seconds")
    return {
        "label": run.label,
        "folder": str(folders.folder(run)),
        "starts_from": run.start and str(folders.model(run.start)),
        "seed": run.values["seed"],
        "recipe": run.values,
        "seconds": {"training": folders.seconds(run), "evaluation": seconds},
        "results": [
            {name: result[name] for name in ("task", "dataset", "metrics", "intervals")}
            for results_of_task in results.values()
            for result in results_of_task
        ],
    }
