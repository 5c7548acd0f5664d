"""
Test of the differences between two models for significance:
`python -m evaluation.compare A/results.json [B/results.json] [--a LABEL] [--b LABEL]`; with `--seeds A B C ...`, the mean
and the spread of each model over results of several seeds.

Paired bootstrap over images or queries, on data that must be the same ([`~evaluation.bootstrap.differences`]).
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.documents import read_json, refuse_malformed

from .bootstrap import LEVEL, RESAMPLES, differences
from .results import Column, Table, make_console, print_table


# What says that two results measured the same data, with what it is about.
HASHES = {"images_sha256": "images", "texts_sha256": "texts", "labels_sha256": "labels", "queries_sha256": "queries"}
SEEDS_NOTE = "Each seed is a run by itself: other weights to begin with, and where data are drawn, other data."
DIGITS = {"Rsu": 4, "Ras": 4, "Rda": 4, "Rmi": 4}  # others are percent


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("python -m evaluation.compare", __doc__)
    parser.add_argument(
        "results",
        metavar="RESULTS",
        nargs="+",
        help="results.json of evaluation.run, or its folder: A and B; one: its two models; with --seeds as many as ran",
    )
    parser.add_argument("--seeds", action="store_true", help="mean and spread of the same models with several seeds")
    parser.add_argument("--a", metavar="LABEL", help="model of A.json; default: each that B.json has too, or the only")
    parser.add_argument("--b", metavar="LABEL", help="model of B.json")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap ({RESAMPLES})")
    return parser.parse_args(arguments)


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments)
    if options.resamples < 100:
        raise ValueError(f"--resamples {options.resamples} must be at least 100 for a 95 % interval.")
    if options.seeds and (options.a or options.b):
        raise ValueError("--a and --b choose two models to compare; --seeds shows every model: leave out one of them.")
    if options.seeds:
        tables = spread_tables(options.results)
    else:
        if len(options.results) > 2:
            raise ValueError(f"{len(options.results)} results were given; two are compared, and more with --seeds.")
        tables = compare(*options.results, label_a=options.a, label_b=options.b, resamples=options.resamples)
    tables[-1].note = tables[-1].note or (
        f"Paired bootstrap, {options.resamples:,} resamples of images (retrieval, classification) or queries "
        "(localization); better: the interval is on one side of 0. Each row stands alone: of 20 rows without any "
        "difference, one is expected to look significant."
    )
    console = make_console()
    for table in tables:
        print_table(console, table)


def compare(
    first: str,
    second: str | None = None,
    label_a: str | None = None,
    label_b: str | None = None,
    resamples: int = RESAMPLES,
) -> list[Table]:
    """
    Tables of the differences between models, one for each task and data set that both were measured on.

    Args:
        first, second: a `results.json` or its folder; None: two models of the first.
        label_a, label_b: models, see [`pair_labels`].
        resamples: of the bootstrap.

    Returns:
        Tables without their notes, in the order of the first file.

    Raises:
        `ValueError`: for files that are no results, and models that cannot be compared.
    """
    documents = [read_results(first)]
    documents.append(read_results(second) if second else documents[0])
    named = " or ".join(dict.fromkeys(document["read_from"] for document in documents))
    advice = "name a results.json as evaluation.run wrote it"
    with refuse_malformed(named, advice):
        labels = pair_labels(*documents, label_a, label_b)
        pairs = [pair for two in labels for pair in pair_results(*documents, *two)]
    with refuse_malformed(named, advice, ValueError):
        return [comparison_table(*pair, resamples) for pair in pairs]


def spread_tables(paths: Sequence[str]) -> list[Table]:
    """
    Tables of the mean and the standard deviation of each model's figures over runs with several seeds, which may have
    drawn their data anew.

    Args:
        paths: two or more `results.json` or their folders, of models of the same names.

    Returns:
        A table for each task and data set, a row a model.

    Raises:
        `ValueError`: for files that are no results, and a result that one of them lacks.
    """
    if len(paths) < 2:
        raise ValueError(f"--seeds takes the results of two seeds or more, not {' '.join(paths)} alone.")
    documents = [read_results(path) for path in paths]
    tables: dict[tuple[str, str], Table] = {}
    with refuse_malformed(" or ".join(paths), "name results.json files as evaluation.run wrote them"):
        for result in documents[0]["results"]:
            key = {name: result[name] for name in ("task", "dataset", "model")}
            runs = [next((r for r in d["results"] if key.items() <= r.items()), None) for d in documents]
            if None in runs:
                lacking = documents[runs.index(None)]["read_from"]
                raise ValueError(f"{lacking} has no {key['task']} on {key['dataset']} of {key['model']}.")
            title = f"{key['task']} on {key['dataset']} · mean ± standard deviation of {len(runs)} seeds"
            columns = [Column(name) for name in ("model", *(short_name(metric) for metric in result["metrics"]))]
            table = tables.setdefault((key["task"], key["dataset"]), Table(title, columns))
            table.note = SEEDS_NOTE
            cells = []
            for metric in result["metrics"]:
                values, digits = [run["metrics"][metric] for run in runs], DIGITS.get(metric, 1)
                cells.append(f"{statistics.fmean(values):.{digits}f}±{statistics.stdev(values):.{digits}f}")
            table.rows.append([key["model"], *cells])
    return list(tables.values())


def short_name(metric: str) -> str:
    """Return a metric's name as it heads a narrow column: `text_to_image_R@1` is `t2i R@1`."""
    return metric.replace("text_to_image_", "t2i ").replace("image_to_text_", "i2t ")


def read_results(path: str) -> dict[str, Any]:
    """A `results.json`, or the folder that holds it; its `results` are checked to be there."""
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    document = read_json(file, "name a results.json of evaluation.run")
    if not document.get("results"):
        raise ValueError(f"{file} holds no results; name a results.json of evaluation.run.")
    return document | {"read_from": str(file)}


def pair_labels(
    first: dict[str, Any], second: dict[str, Any], label_a: str | None = None, label_b: str | None = None
) -> list[tuple[str, str]]:
    """
    Labels of the models to compare: those asked for, else the only two of one file, the labels of both files, the only
    model of each.

    Args:
        first, second: documents of [`read_results`].
        label_a, label_b: models asked for, of the first and of the second document.

    Returns:
        Pairs of labels.

    Raises:
        `ValueError`: for a label that is not there, or where it is not clear which models are meant.
    """
    labels = [list(dict.fromkeys(result["model"] for result in document["results"])) for document in (first, second)]
    for option, label, known, document in (("--a", label_a, labels[0], first), ("--b", label_b, labels[1], second)):
        if label is not None and label not in known:
            raise ValueError(f"{option} {label}: {document['read_from']} has {', '.join(known)}.")
    chosen = [[label] if label else known for label, known in zip((label_a, label_b), labels, strict=True)]
    if len(chosen[0]) == len(chosen[1]) == 1 and not (first is second and chosen[0] == chosen[1]):
        return [(chosen[0][0], chosen[1][0])]
    if first is second and label_a is label_b is None and len(labels[0]) == 2:
        return [(labels[0][0], labels[0][1])]
    both = [label for label in chosen[0] if label in chosen[1]]
    if first is second or not both:
        raise ValueError(
            f"choose the models with --a and --b; {first['read_from']} has {', '.join(labels[0])}, "
            f"{second['read_from']} has {', '.join(labels[1])}."
        )
    return [(label, label) for label in both]


def pair_results(
    first: dict[str, Any], second: dict[str, Any], label_a: str, label_b: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """
    Results of two models on the same task and data set.

    Args:
        first, second: documents of [`read_results`].
        label_a, label_b: the models, of the first and of the second document.

    Returns:
        Pairs of results.

    Raises:
        `ValueError`: where none is in both, or the data of one were not the same.
    """
    keyed = [
        {(result["task"], result["dataset"]): result for result in document["results"] if result["model"] == label}
        for document, label in ((first, label_a), (second, label_b))
    ]
    pairs = [(keyed[0][key], keyed[1][key]) for key in keyed[0] if key in keyed[1]]
    if not pairs:
        has = [", ".join(" on ".join(key) for key in results) for results in keyed]
        raise ValueError(f"no task and data set in common: {label_a} has {has[0]}; {label_b} has {has[1]}.")
    for a, b in pairs:
        if other := [what for name, what in HASHES.items() if a.get(name) != b.get(name)]:
            raise ValueError(
                f"{a['task']} on {a['dataset']}: {label_a} and {label_b} were not measured on the same "
                f"{' and '.join(other)}; measure both on the same data."
            )
    return pairs


def _measured_otherwise(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Names what differs between the two procedures; empty where nothing does."""
    pairs = {name: (first.get(name), second.get(name)) for name in ("protocol", "window_sizes", "reference_io")}
    differ = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
    if first.get("prompts", {}).get("sha256") != second.get("prompts", {}).get("sha256"):
        differ.append("prompts")
    return ", ".join(differ)


def comparison_table(first: dict[str, Any], second: dict[str, Any], resamples: int = RESAMPLES) -> Table:
    """
    Table of two results on the same data, a row per metric: both figures, B - A, its 95 % interval and p-value.

    Args:
        first, second: results A and B of `results.json`.
        resamples: of the bootstrap.

    Returns:
        [`Table`], without its note.
    """
    names = ("metric", "A", "B", "B - A", f"{100 * LEVEL:.0f} % interval", "p", "")
    title = f"{first['task']} on {first['dataset']} · A: {first['model']} · B: {second['model']}"
    if otherwise := _measured_otherwise(first, second):
        title += f" · not measured alike: {otherwise}"
    table = Table(title, [Column(name) for name in names])
    for metric, difference in differences(first, second, resamples).items():
        digits = DIGITS.get(metric, 1)
        better = (difference.difference > 0) != (metric == "Ras")  # the only one where lower is better
        table.rows.append(
            [
                metric,
                *(f"{value:.{digits}f}" for value in (difference.first, difference.second)),
                f"{difference.difference:+.{digits}f}",
                f"{difference.low:+.{digits}f} … {difference.high:+.{digits}f}",
                f"{difference.p_value:.3f}" if difference.p_value >= 0.001 else "< 0.001",
                ("B better" if better else "A better") if difference.significant else "not significant",
            ]
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
