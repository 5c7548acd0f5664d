"""An ablation's measures beside the paper's, and what becomes of its orderings: which appear, beyond noise or not."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from evaluation.bootstrap import LEVEL, RESAMPLES, Sums, draws, sums_of
from evaluation.paper import ARXIV, ablation_figures, paper_tables
from evaluation.results import Column, Table

from .figure import Point
from .studies import TASKS, Ordering, Study


METRICS = {"zcrl": "mR", "zcrs": "mR", "zic": "accuracy", "selo": "Rmi"}
DIGITS = {"zcrl": 1, "zcrs": 1, "zic": 1, "selo": 4}

Results = dict[str, list[dict[str, Any]]]  # of a run: by task, a result per data set


class Verdict(NamedTuple):
    """Outcome of an ordering of the paper in runs of one or more seeds."""

    ordering: Ordering
    difference: float  # better minus worse, mean over the seeds, in the task's unit
    low: float  # ends of its 95 % interval
    high: float
    by_seed: list[float]

    @property
    def certain(self) -> bool:
        """Whether the difference is beyond noise: 0 is outside the interval and, of several seeds, outside the 95 % t interval of their differences."""
        outside = self.low > 0 or self.high < 0
        seeds = len(self.by_seed)
        if seeds == 1:
            return outside
        margin = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * stats.sem(self.by_seed)
        return outside and abs(self.difference) > margin

    def record(self) -> dict[str, Any]:
        """Return the ordering and what became of it, as `results.json` has them."""
        measured = {"difference": self.difference, "interval": [self.low, self.high], "by_seed": self.by_seed}
        return vars(self.ordering) | {"outcome": self.word} | measured

    @property
    def word(self) -> str:
        """The verdict in a word or two."""
        if self.ordering.alike:
            return "differs" if self.certain else "appears"
        if not self.certain:
            return "within noise"
        return "appears" if self.difference > 0 else "reversed"


def judge(ordering: Ordering, better: Sequence[Results], worse: Sequence[Results]) -> Verdict:
    """
    Compare two arms by a paired bootstrap: images (queries, for localization) are drawn anew, the same for both arms and
    all seeds; the difference is the mean over seeds and data sets.

    Args:
        ordering: of the paper.
        better, worse: results of the arms that it names, a run per seed.

    Returns:
        the difference with its interval, in the unit of the task's metric.
    """
    task, measured, drawn = ordering.task, [], []
    for data_set in range(len(better[0][task])):
        pairs = [(sums_of(a[task][data_set]), sums_of(b[task][data_set])) for a, b in zip(better, worse, strict=True)]
        items = pairs[0][0].items
        measured.append(_differences(pairs, task, np.ones((1, items)))[:, 0])  # (seeds,)
        resampled = [_differences(pairs, task, counts).mean(axis=0) for counts in draws(items)]
        drawn.append(np.concatenate(resampled))  # (R,)
    by_seed = np.mean(measured, axis=0)
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Verdict(ordering, float(by_seed.mean()), float(low), float(high), by_seed.tolist())


def _differences(pairs: Sequence[tuple[Sums, Sums]], task: str, counts: np.ndarray) -> np.ndarray:
    """Differences of the task's metric (seeds, R); `counts` (R, items) says how often each item counts."""
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
        judged = [ordering for ordering in study.orderings if ordering.task in self.tasks]
        self.verdicts = [judge(ordering, arms[ordering.better], arms[ordering.worse]) for ordering in judged]
        self.paper = ablation_figures(study.name)

    def values(self, arm: str, task: str) -> list[float]:
        """A figure per seed, the mean over the data sets."""
        metric, runs = METRICS[task], self.arms[arm]
        return [statistics.fmean(result["metrics"][metric] for result in results[task]) for results in runs]

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
        """Our figures beside the paper's, an arm a row."""
        source = paper_tables()["ablations"][self.study.name]["source"]
        columns = [Column(self.study.axis)]
        for task in TASKS:
            columns += [Column("here", TASKS[task])] + [Column("paper", TASKS[task])] * bool(self.paper)
        table = Table(f"{self.study.title} ({source.partition(',')[0]})", columns)
        for arm in self.study.arms:
            row = [arm.name]
            for task in TASKS:
                values, digits = self.values(arm.name, task) if task in self.tasks else [], DIGITS[task]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                row.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else None)
                if self.paper:
                    row.append(f"{self.paper[arm.name][task]:.{4 if task == 'selo' else 2}f}")
            table.rows.append(row)
        table.note = "\n".join(self._notes())
        return table

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
        """Lines that say which orderings of the paper appear, which do not, which differences are within noise; and by which test."""
        words = [verdict.word for verdict in self.verdicts]
        lines = [
            f"Orderings of the paper: {len(words)}. Appear here: {words.count('appears')}; reversed: "
            f"{words.count('reversed')}; differ where the paper has them alike (≈): {words.count('differs')}; within "
            f"noise: {words.count('within noise')}."
        ]
        for verdict in self.verdicts:
            ordering, digits = verdict.ordering, DIGITS[verdict.ordering.task]
            numbers = [f"{value:+.{digits}f}" for value in (verdict.difference, verdict.low, verdict.high)]
            seeds = f"; by seed {', '.join(f'{value:+.{digits}f}' for value in verdict.by_seed)}"
            lines.append(
                f"{TASKS[ordering.task]}, {ordering.better} {'≈' if ordering.alike else '>'} {ordering.worse}: {verdict.word} "
                f"({numbers[0]}, 95 % interval {numbers[1]} … {numbers[2]}{seeds if len(self.seeds) > 1 else ''})"
            )
        lines.append(
            f"Test: paired bootstrap over test images (queries for SeLo), {RESAMPLES:,} resamples; a difference is beyond "
            "noise when its 95 % interval leaves 0 out"
            + (", and so does the t interval of the seeds' differences." if len(self.seeds) > 1 else ".")
            + ("" if len(self.seeds) > 1 else " One seed: how far training itself varies is not in it (--full).")
        )
        return lines
