"""
Intervals of figures and of differences between two models: percentile bootstrap (Efron and Tibshirani 1993, chapters 13 and 16).

Drawn anew is what could have been other: the images of a retrieval or classification benchmark, each with all
its texts, since texts of one image succeed and fail together; the queries of semantic localization. A metric is a ratio
of sums over these items, so that a resample is a vector of how often each item was drawn.

Shapes: I items, R resamples, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


KS = (1, 5, 10)  # of recall at k
RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
BLOCK = 2**22  # numbers of draws held at once


@dataclass(frozen=True)
class Sums:
    """
    Metrics of one result as parts that items add up to: metric = `scale` * mean over columns of (sum of `above` / sum
    of `below`), columns without any item left out.
    """

    above: np.ndarray  # (I, columns)
    below: np.ndarray  # (I, columns)
    columns: dict[str, list[int]]  # the columns of each metric
    scale: float = 100.0  # percent

    @property
    def items(self) -> int:
        return len(self.above)

    def metrics(self, counts: np.ndarray) -> np.ndarray:
        """(R, I) how often each item counts -> (R, metrics)."""
        below = counts @ self.below  # (R, columns)
        with np.errstate(invalid="ignore"):
            ratios = np.where(below > 0, counts @ self.above / below, np.nan)
        means = [np.nanmean(ratios[:, columns], axis=1) for columns in self.columns.values()]
        return self.scale * np.stack(means, axis=1)


def sums_of(result: dict[str, Any]) -> Sums:
    """
    The items of a result of `results.json`.

    Raises:
        `ValueError`: for a result that does not hold its values per text, image or query.
    """
    if "ranks" in result and "image_of_text" in result:
        return _retrieval_sums(result)
    if "correct" in result and "labels" in result:
        return _classification_sums(result)
    if "per_query" in result:
        values = np.array(list(result["per_query"].values()), dtype=float).T  # (I, columns)
        columns = {name: [index] for index, name in enumerate(result["per_query"])}
        return Sums(values, np.ones_like(values), columns, scale=1.0)
    where = " ".join(str(result.get(name, "?")) for name in ("model", "task", "dataset"))
    raise ValueError(
        f"the result of {where} holds no ranks with image_of_text, correct with labels, or per_query; "
        "measure it again with this version of evaluation.run."
    )


def _retrieval_sums(result: dict[str, Any]) -> Sums:
    owners = np.array(result["image_of_text"])
    text_ranks, image_ranks = (np.array(result["ranks"][name]) for name in ("text_to_image", "image_to_text"))
    images = len(image_ranks)
    above = [np.bincount(owners, weights=text_ranks < k, minlength=images) for k in KS]
    above += [image_ranks < k for k in KS]
    below = [np.bincount(owners, minlength=images)] * len(KS) + [np.ones(images)] * len(KS)
    names = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in KS]
    columns = {name: [index] for index, name in enumerate(names)} | {"mR": list(range(len(names)))}
    return Sums(np.stack(above, 1).astype(float), np.stack(below, 1).astype(float), columns)


def _classification_sums(result: dict[str, Any]) -> Sums:
    """The first column is over all images, the others one a class."""
    labels, correct = np.array(result["labels"]), np.array(result["correct"], dtype=float)
    one_hot = np.eye(labels.max() + 1)[labels]  # (I, C)
    below = np.concatenate([np.ones((len(labels), 1)), one_hot], axis=1)
    columns = {"accuracy": [0], "mean_per_class_accuracy": list(range(1, below.shape[1]))}
    return Sums(correct[:, None] * below, below, columns)


def draws(items: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[np.ndarray]:
    """
    Draw as many items as there are, with replacement, again and again.

    Args:
        items: I, their number.
        resamples: R, times to draw them.
        seed: of the random numbers.

    Yields:
        Blocks of (r, I) float64 counts of how often each item was drawn, R rows in all.
    """
    generator, rows = np.random.default_rng(seed), max(1, BLOCK // items)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        places = generator.integers(items, size=(count, items)) + items * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * items).reshape(count, items).astype(float)


def intervals(result: dict[str, Any], resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, list[float]]:
    """
    95 % intervals of a result's metrics.

    Args:
        result: of `results.json`: of retrieval (`ranks`, `image_of_text`), classification (`correct`, `labels`) or
            semantic localization (`per_query`).
        resamples: draws; the ends of an interval are themselves unsure by a few hundredths of its width.

    Returns:
        `dict`: `[low, high]` by metric, in the metric's unit.
    """
    sums = sums_of(result)
    drawn = np.concatenate([sums.metrics(counts) for counts in draws(sums.items, resamples, seed)])  # (R, metrics)
    ends = _ends(drawn)
    return {name: ends[:, index].tolist() for index, name in enumerate(sums.columns)}


@dataclass(frozen=True)
class Difference:
    """Second minus first model on one metric."""

    first: float
    second: float
    low: float  # 95 % interval of the difference
    high: float
    p_value: float  # two-sided: how often a resample's difference has not the sign of most, doubled

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def significant(self) -> bool:
        """0 is outside the interval."""
        return self.low > 0 or self.high < 0


def differences(
    first: dict[str, Any], second: dict[str, Any], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Difference]:
    """
    Paired differences of two results on the same data, by metric: both are measured on the same resamples, so that
    what is hard for both does not blur the difference.

    Args:
        first, second: results of `results.json`, as for [`intervals`].
        resamples: draws.
        seed: of the draws.

    Returns:
        `dict`: [`Difference`] by metric.

    Raises:
        `ValueError`: for results of different kinds or numbers of items.
    """
    sums = sums_of(first), sums_of(second)
    if sums[0].items != sums[1].items or sums[0].columns != sums[1].columns:
        raise ValueError(
            f"the results of {first.get('model')} and {second.get('model')} hold {sums[0].items} and {sums[1].items} "
            "items, or different metrics; compare results on the same data."
        )
    everything = np.ones((1, sums[0].items))
    measured = [model_sums.metrics(everything)[0] for model_sums in sums]
    blocks = draws(sums[0].items, resamples, seed)
    drawn = np.concatenate([sums[1].metrics(counts) - sums[0].metrics(counts) for counts in blocks])  # (R, metrics)
    low, high = _ends(drawn)
    rarer = np.minimum((drawn <= 0).sum(axis=0), (drawn >= 0).sum(axis=0))
    p_values = np.minimum(1, 2 * (rarer + 1) / (len(drawn) + 1))
    values = zip(*(array.tolist() for array in (*measured, low, high, p_values)), strict=True)
    return {name: Difference(*row) for name, row in zip(sums[0].columns, values, strict=True)}


def _ends(drawn: np.ndarray) -> np.ndarray:
    """(R, metrics) -> (2, metrics)."""
    return np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
