"""
The paper's ablations (Tables VI to IX, Figs. 7 to 10), each by one command.

    python -m training.ablate --study pcm                                   # on drawn scenes, one seed
    python -m training.ablate --study all --full                            # three seeds
    python -m training.ablate --study init --data your/tiles                 # your pairs, OpenAI's CLIP

Below --output, each study gets a folder with table.md, results.json and figure.png; the trained arms lie in `arms/`,
shared by all studies, and are never trained twice. An interrupted command is given again and goes on.
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from rich.console import Console
from transformers.utils import logging

from evaluation.benchmarks.aerial_scenes.data_set import CLASS_NAMES, write_dataset
from evaluation.benchmarks.scene_mosaics import write_mosaics
from evaluation.bootstrap import LEVEL, RESAMPLES, Sums, draws, sums_of
from evaluation.paper import ARXIV, ablation_figures, paper_tables
from evaluation.results import Column, Table, environment, make_console, markdown, print_table, write_json
from evaluation.run import parse_arguments as evaluation_options
from evaluation.tasks import choose_tasks, load_benchmarks
from modeling_lrsclip.encoding.encoder import load_encoder
from modeling_lrsclip.files.atomic import replace_text

from .ablations.figure import Point, draw_study
from .ablations.models import PAPER_RECIPE, OwnModels, SmallModels
from .ablations.options import WEIGHTS, parse_arguments, parse_seeds, parse_setting
from .ablations.runs import Run, RunFolders, Source, Work, field_of, identify, read_recipe, with_starts
from .ablations.studies import TASKS, Ladders, Ordering, Study, Verdict, choose_studies
from .run_record import git_state


IMAGE_SIZE = 96  # pixels along a drawn scene's side
SCENE_SEED, GENERAL_SEED, MOSAIC_TILES = 0, 1, 4
GENERAL_CLASSES = CLASS_NAMES[::2]  # those that pre-training sees
METRICS = {"zcrl": "mR", "zcrs": "mR", "zic": "accuracy", "selo": "Rmi"}
DIGITS = {"zcrl": 1, "zcrs": 1, "zic": 1, "selo": 4}
EVALUATION = "evaluation.json"  # beside a run's model
INTERRUPTED = 130  # exit status, as shells count it

Results = dict[str, list[dict[str, Any]]]  # of a run: by task, a result per data set


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments, __doc__)
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run in progress is told, too
    try:
        ablate(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    return 0


def ablate(options: argparse.Namespace) -> None:
    """Plans all runs, trains those that are missing study by study, and reports each study when its arms are there."""
    choose_studies(options.study, Ladders())  # says what is wrong with the names before anything is drawn
    settings = dict(parse_setting(given) for given in options.set)
    seeds = parse_seeds(options)
    console, output = make_console(), Path(options.output)
    say = _sayer(console)
    models, evaluation_data = _models(options, settings, output / "data", say)
    studies = choose_studies(options.study, models.ladders(WEIGHTS[options.mode]))
    plans = [[(arm, [models.run(arm, study.name, seed) for seed in seeds]) for arm in study.arms] for study in studies]
    measured = Measured(evaluation_data, options.device, say)
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


def _sayer(console: Console) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)
        console.file.flush()

    return say


# --------------------------------------------------------------------------------------------------------------- data


def _models(
    options: argparse.Namespace, settings: dict[str, Any], folder: Path, say: Callable[[str], None]
) -> tuple[SmallModels | OwnModels, list[str]]:
    """What the arms are made of, and the paths they are measured on."""
    named = field_of(read_recipe(options.config), "data.train") if options.config else None
    if options.data is None and named is None:
        for name in ("evaluation_data", "long_clip", "sizes"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} goes with your own --data; drawn scenes bring their own."
                )
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
    Draws what is not there yet: the scenes of the arms; general scenes, of half of the classes, for what they start
    from; landscapes for localization.
    """
    scenes = folder / f"scenes-{options.scenes}-{options.test_scenes}"
    general = folder / f"general-{options.scenes}"
    mosaics = folder / f"mosaics-{options.mosaics}"
    if not (scenes / "scenes.json").is_file():
        say(f"drawing {options.scenes:,} scenes to train on and {options.test_scenes:,} to measure on")
        write_dataset(scenes, options.scenes, options.test_scenes, 0, SCENE_SEED, IMAGE_SIZE)
    if not general.is_dir():
        say(
            f"drawing {2 * options.scenes:,} scenes to pre-train on, of which those of {', '.join(GENERAL_CLASSES)} stay"
        )
        growing = folder / f".{general.name}"
        write_dataset(growing, 2 * options.scenes, 0, 0, GENERAL_SEED, IMAGE_SIZE)
        rows = pyarrow.parquet.read_table(growing / "train.parquet")
        rows = rows.filter(pa.compute.is_in(rows["class_name"], value_set=pa.array(GENERAL_CLASSES)))
        pyarrow.parquet.write_table(rows, growing / "train.parquet", compression="zstd")
        growing.rename(general)
    if not (mosaics / "localization.jsonl").is_file():
        say(f"drawing {options.mosaics} landscapes to localize in")
        write_mosaics(mosaics, options.mosaics, SCENE_SEED, MOSAIC_TILES)
    sources = []
    for place in (scenes, general):
        pairs = pyarrow.parquet.read_metadata(place / "train.parquet").num_rows
        sources.append(Source(str(place.resolve()), f"{place.name} {(place / 'scenes.json').read_text()}", pairs))
    return *sources, [str(scenes / "test.parquet"), str(mosaics)]


# ----------------------------------------------------------------------------------------------------------- the work


class Measured:
    """The evaluation data, read once, and the measures of each run, kept beside its model."""

    def __init__(self, data: list[str], device: str, say: Callable[[str], None]):
        words = ["--model", "-", "--output", "-", "--data", *data, "--tokens-kept", "none", "--device", device]
        self.options, tasks = evaluation_options(words), choose_tasks("all")
        self.benchmarks = load_benchmarks(tasks, self.options, say)
        self.identity = [identify(source) for source in data]
        there = {benchmark.task.name for benchmark in self.benchmarks}
        self.left_out = [TASKS[task.name] for task in tasks if task.name not in there]

    def __call__(self, model: Path, kept: Path) -> Results:
        """By task, a result per data set; read from the file `kept` where it is of this very data."""
        if kept.is_file() and (document := json.loads(kept.read_text(encoding="utf-8")))["data"] == self.identity:
            return document["results"]
        started = time.perf_counter()
        encoder = load_encoder(str(model), self.options.device, batch_size=self.options.batch_size)
        results: Results = {}
        for benchmark in self.benchmarks:
            result = benchmark.measure(encoder)
            result.pop("examples", None)  # for galleries
            results.setdefault(benchmark.task.name, []).append(result)
        write_json(kept, {"data": self.identity, "seconds": time.perf_counter() - started, "results": results})
        return results


# -------------------------------------------------------------------------------------------------------- the outcome


def judge(ordering: Ordering, better: Sequence[Results], worse: Sequence[Results]) -> Verdict:
    """
    Compares two arms, each a run per seed, by a paired bootstrap: images (queries, for localization) are drawn anew,
    the same for both arms and all seeds; the difference is the mean over seeds and data sets.
    """
    task, measured, drawn = ordering.task, [], []
    for place in range(len(better[0][task])):
        pairs = [(sums_of(a[task][place]), sums_of(b[task][place])) for a, b in zip(better, worse, strict=True)]
        items = pairs[0][0].items
        measured.append(_differences(pairs, task, np.ones((1, items)))[:, 0])  # (seeds,)
        drawn.append(
            np.concatenate([_differences(pairs, task, counts).mean(axis=0) for counts in draws(items)])
        )  # (R,)
    by_seed = np.mean(measured, axis=0)
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Verdict(ordering, float(by_seed.mean()), float(low), float(high), by_seed.tolist())


def _differences(pairs: Sequence[tuple[Sums, Sums]], task: str, counts: np.ndarray) -> np.ndarray:
    """(R, items) how often each item counts -> (seeds, R) differences of the task's metric."""
    column = list(pairs[0][0].columns).index(METRICS[task])
    return np.stack([(a.metrics(counts) - b.metrics(counts))[:, column] for a, b in pairs])


class Outcome:
    """A study's measures: by arm, a run per seed; and what becomes of the paper's orderings."""

    def __init__(
        self, study: Study, arms: dict[str, list[Results]], left_out: list[str], remark: str, seeds: Sequence[int]
    ):
        self.study, self.arms, self.left_out, self.seeds = study, arms, left_out, seeds
        self.remark = " ".join(text for text in (study.remark, remark) if text)
        self.tasks = [task for task in TASKS if task in next(iter(arms.values()))[0]]
        self.verdicts = [
            judge(ordering, arms[ordering.better], arms[ordering.worse])
            for ordering in study.orderings
            if ordering.task in self.tasks
        ]
        self.paper = ablation_figures(study.name)

    def values(self, arm: str, task: str) -> list[float]:
        """A figure per seed, the mean over the data sets."""
        return [
            statistics.fmean(result["metrics"][METRICS[task]] for result in results[task])
            for results in self.arms[arm]
        ]

    def point(self, arm: str, task: str) -> Point:
        """Mean and s over the seeds; of one seed, the 95 % interval over images or queries."""
        values = self.values(arm, task)
        mean = statistics.fmean(values)
        if len(values) > 1:
            spread = statistics.stdev(values)
            return Point(mean, mean - spread, mean + spread)
        ends = [result["intervals"][METRICS[task]] for result in self.arms[arm][0][task]]
        return Point(mean, *(statistics.fmean(end[side] for end in ends) for side in (0, 1)))

    def table(self) -> Table:
        source = paper_tables()["ablations"][self.study.name]["source"]
        columns = [Column(self.study.axis)]
        for task in TASKS:
            columns += [Column("here", TASKS[task])] + [Column("paper", TASKS[task])] * bool(self.paper)
        table = Table(f"{self.study.title} ({source.partition(',')[0]})", columns)
        for arm in self.study.arms:
            row = [arm.name]
            for task in TASKS:
                row.append(self._cell(arm.name, task) if task in self.tasks else None)
                if self.paper:
                    row.append(f"{self.paper[arm.name][task]:.{4 if task == 'selo' else 2}f}")
            table.rows.append(row)
        table.note = "\n".join(self._notes())
        return table

    def _cell(self, arm: str, task: str) -> str:
        values = self.values(arm, task)
        spread = f" ± {statistics.stdev(values):.{DIGITS[task]}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{DIGITS[task]}f}{spread}"

    def _notes(self) -> list[str]:
        first = next(iter(self.arms.values()))[0]
        sets = [f"{TASKS[task]}: {', '.join(result['dataset'] for result in first[task])}" for task in self.tasks]
        seeds = f"mean ± s over the seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) > 1 else "one seed"
        notes = [f"here: {seeds}; {'; '.join(sets)}. paper: as printed in {ARXIV}."]
        notes += [f"{name}: no data for it among the evaluation data." for name in self.left_out]
        stated = paper_tables()["ablations"][self.study.name].get("stated")
        notes += [f"The paper prints no figures here and says: {stated}"] if stated else []
        return notes + ([self.remark] if self.remark else [])

    def closing(self) -> list[str]:
        """Which orderings of the paper appear, which do not, which differences are within noise; and by which test."""
        words = [verdict.word for verdict in self.verdicts]
        lines = [
            f"Orderings of the paper: {len(words)}. Appear here: {words.count('appears')}; reversed: "
            f"{words.count('reversed')}; differ where the paper has them alike (≈): {words.count('differs')}; within "
            f"noise: {words.count('within noise')}."
        ]
        for verdict in self.verdicts:
            told, digits = verdict.ordering, DIGITS[verdict.ordering.task]
            numbers = [f"{value:+.{digits}f}" for value in (verdict.difference, verdict.low, verdict.high)]
            seeds = f"; by seed {', '.join(f'{value:+.{digits}f}' for value in verdict.by_seed)}"
            lines.append(
                f"{TASKS[told.task]}, {told.better} {'≈' if told.alike else '>'} {told.worse}: {verdict.word} "
                f"({numbers[0]}, 95 % interval {numbers[1]} … {numbers[2]}{seeds if len(self.seeds) > 1 else ''})"
            )
        lines.append(
            f"Test: paired bootstrap over test images (queries for SeLo), {RESAMPLES:,} resamples; a difference is beyond "
            "noise when its 95 % interval leaves 0 out"
            + (", and so does the t interval of the seeds' differences." if len(self.seeds) > 1 else ".")
            + ("" if len(self.seeds) > 1 else " One seed: how far training itself varies is not in it (--full).")
        )
        return lines


# ------------------------------------------------------------------------------------------------------------- output


def report(outcome: Outcome, folder: Path, console: Console, record: dict[str, Any]) -> None:
    """Prints a study's table and closing words, and writes table.md, results.json and figure.png."""
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
    write_json(folder / "results.json", record)
    for path in (folder / "table.md", folder / "results.json", figure):
        console.print(str(path), soft_wrap=True, markup=False)


def _record(options: argparse.Namespace, outcome: Outcome, plan: Any, folders: RunFolders) -> dict[str, Any]:
    """What `results.json` says of a study."""
    arms = []
    for arm, runs in plan:
        own = outcome.arms[arm.name]
        arms.append(
            {
                "name": arm.name,
                "paper": outcome.paper and outcome.paper[arm.name],
                "mean": {task: statistics.fmean(outcome.values(arm.name, task)) for task in outcome.tasks},
                "runs": [_run_record(run, results, folders) for run, results in zip(runs, own, strict=True)],
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
        "orderings": [
            verdict.ordering.__dict__
            | {"outcome": verdict.word, "difference": verdict.difference, "interval": [verdict.low, verdict.high]}
            | {"by_seed": verdict.by_seed}
            for verdict in outcome.verdicts
        ],
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
            for own in results.values()
            for result in own
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
