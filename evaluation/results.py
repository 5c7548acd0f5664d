"""Results as tables on the terminal and in `results.md`, as CSV, and as the pictures that tasks draw."""

import csv
import importlib.metadata
import io
import itertools
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from modeling_lrsclip.files.atomic import replace_text

from .paper import paper_note


SCHEMA_VERSION = 1
SEEN = "†"  # beside figures of a model that was trained on the data set
VERSIONS_OF = ("torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")


# -------------------------------------------------------------------------------------------------------------- files


def environment() -> dict[str, Any]:
    """Versions and machine, for whoever wants to repeat a figure."""
    import torch  # slow, and of no use to the commands that print tables

    versions = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"python": platform.python_version(), "platform": platform.platform()}
    return machine | {"cpu_threads": torch.get_num_threads(), "cuda_device": cuda, "versions": versions}


CSV_COLUMNS = ("model", "task", "dataset", "metric", "value", "low", "high", "paper", "gap", "seen")


def csv_lines(results: Sequence[dict[str, Any]]) -> str:
    """A line per model, task, data set and metric: the value, its 95% interval, the paper's figure and the gap."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        for metric, value in result["metrics"].items():
            low, high = result["intervals"].get(metric, ("", ""))
            beside = {name: result.get(name, {}).get(metric, "") for name in ("paper", "gap")}
            named = {name: result[name] for name in ("model", "task", "dataset")} | {"seen": result.get("seen", "")}
            writer.writerow(named | {"metric": metric, "value": value, "low": low, "high": high} | beside)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Column:
    """Column of a table; `group` is a heading that neighbouring columns share."""

    name: str
    group: str = ""
    digits: int | None = None  # of numbers; None: shown as they are
    best: bool = False  # the highest value is set in bold


class Aside(float):
    """A number of the paper: shown like the others, but it does not compete for the bold one."""


class Gap(Aside):
    """Measured minus paper: shown with its sign."""


@dataclass
class Table:
    title: str
    columns: list[Column]
    rows: list[list[Any]] = field(default_factory=list)  # str, numbers, or None for a dash
    note: str = ""

    def cells(self, extra_digits: int = 0) -> list[list[tuple[str, bool]]]:
        """(text, bold) of every cell."""
        best = []
        for index, column in enumerate(self.columns):
            numbers = [row[index] for row in self.rows if isinstance(row[index], int | float)]
            values = [number for number in numbers if not isinstance(number, Aside)]
            best.append(max(values) if column.best and values and max(values) > min(values) else None)
        return [
            [
                (_format(value, column, extra_digits), value == best[index] and not isinstance(value, Aside | None))
                for index, (value, column) in enumerate(zip(row, self.columns, strict=True))
            ]
            for row in self.rows
        ]


def _format(value: Any, column: Column, extra_digits: int) -> str:
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    sign = "+" if isinstance(value, Gap) else ""
    return f"{value:{sign}.{column.digits + extra_digits}f}" if column.digits is not None else str(value)


def rows_beside(result: dict[str, Any]) -> list[tuple[str, type[Aside], dict[str, float]]]:
    """(name, kind, figures) of the rows below a result: the paper's and others', each with the gap where there is one."""
    entries = [("paper", result["paper"], result["gap"])] if "paper" in result else []
    entries += [(other["source"], other["figures"], other.get("gap")) for other in result.get("others", [])]
    rows = [(name, kind, values) for name, *both in entries for kind, values in zip((Aside, Gap), both) if values]
    return [(name if kind is Aside else "gap", kind, values) for name, kind, values in rows]


def marked_name(result: dict[str, Any]) -> str:
    """Name of a result's model, with a mark where it was trained on the data."""
    return result["model"] + (f" {SEEN}" if "seen" in result else "")


def seen_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines below a table on what the marked models have seen, each once."""
    return list(dict.fromkeys(f"{SEEN} seen, not zero-shot: {each['seen']}." for each in results if "seen" in each))


def retrieval_table(title: str, results: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> Table:
    """
    Table with a row per model, in the order of the paper's Tables II and III; below it the paper's row and the gap.

    Args:
        title: of the task.
        results: of one data set, a model each.
        models: their descriptions, as `results.json` holds them.

    Returns:
        The table, with its remarks.
    """
    positions = {model["label"]: model["positions"] for model in models}
    keys = [key for key in results[0]["metrics"] if key != "mR"]
    columns = [Column("model"), Column("tokens", "reads")]
    for direction in ("text_to_image", "image_to_text"):
        group = direction.replace("_", " ")
        columns += [Column(key.rpartition("_")[2], group, 1, True) for key in keys if key.startswith(direction)]
    columns += [Column("mR", "", 1, True), Column("cut %", "texts", 1)]
    images, texts = results[0]["images"], results[0]["texts"]
    table = Table(f"{title} · {results[0]['dataset']}: {images:,} images, {texts:,} texts", columns)
    for result in results:
        values = [result["metrics"][key] for key in [*keys, "mR"]]
        read, cut = positions[result["model"]], 100 * result["share_truncated"]
        table.rows.append([marked_name(result), read, *values, cut])
        for name, kind, figures in rows_beside(result):
            row = [kind(figures[key]) if key in figures else None for key in [*keys, "mR"]]
            table.rows.append([f"  {name}", "", *row, ""])
    tokens = "Tokens a text: {mean:.0f} on average, {longest} at most.".format(**results[0]["tokens"])
    first = f"Recall in %; guessing: R@1 {100 / images:.2g}. {tokens}"
    table.note = "\n".join([first, *paper_note(results), *seen_notes(results)])
    return table


def tokens_table(title: str, results: Sequence[dict[str, Any]]) -> Table | None:
    """R@1 text to image by tokens kept; None where no result has the curve."""
    curves = {result["model"]: {point["tokens"]: point for point in result.get("curve", [])} for result in results}
    kept = sorted({tokens for curve in curves.values() for tokens in curve})
    if not kept:
        return None
    columns = [Column("model"), *(Column(str(count), "", 1, True) for count in kept)]
    table = Table(f"{title} · {results[0]['dataset']}: text to image R@1 by tokens kept", columns)
    for label, curve in curves.items():
        table.rows.append([label, *(curve[n]["text_to_image_R@1"] if n in curve else None for n in kept)])
    table.note = "Token ids are cut, end-of-text put back. – : beyond the model's positions."
    return table


def make_console(file: Any = None, quiet: bool = False) -> Console:
    """A terminal as it is; a pipe or a file gets 100 columns without colour."""
    console = Console(file=file, highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(file=file, highlight=False, quiet=quiet, width=100)


def print_table(console: Console, table: Table) -> None:
    """Shows a table at 80 columns or more."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="not bold")
    for index, (column, above) in enumerate(zip(table.columns, _spread(table.columns), strict=True)):
        header = f"{above}\n{column.name}" if any(column.group for column in table.columns) else column.name
        first = bool(column.group) and (index == 0 or table.columns[index - 1].group != column.group)
        justify = "left" if index == 0 else "right"
        shown.add_column(header, justify=justify, overflow="fold", no_wrap=index > 0, min_width=7 if first else None)
    for row in table.cells():
        shown.add_row(*(Text(text, style="bold" if bold else "") for text, bold in row))
    console.print()
    console.print(Text(table.title, style="bold"))
    console.print(shown)
    if table.note:
        console.print(Text(table.note, style="dim"))


def _spread(columns: Sequence[Column]) -> list[str]:
    """The words of each group's heading over its columns, one a column, so that they read across."""
    above: list[str] = []
    for group, run in itertools.groupby(columns, key=lambda column: column.group):
        words, width = group.split(), len(list(run))
        above += words + [""] * (width - len(words)) if len(words) <= width else [group] + [""] * (width - 1)
    return above


def markdown(table: Table) -> str:
    """The table for a README, with one decimal more."""
    names = [f"{column.group} {column.name}".strip() for column in table.columns]
    lines = [f"### {table.title}", "", "| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join([":--"] + ["--:"] * (len(names) - 1)) + "|")
    for row in table.cells(extra_digits=1):
        cells = [f"**{text}**" if bold else text for text, bold in row]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", table.note, ""])


# ------------------------------------------------------------------------------------------------ of a whole evaluation


def show(console: Console, benchmarks: Sequence[Any], document: dict[str, Any], output: Path) -> None:
    """
    Prints the tables, writes them and the figures, and names the files written.

    Args:
        console: where to print.
        benchmarks: what was measured.
        document: content of `results.json`, which is written already.
        output: folder to write to.
    """
    for table in (tables := make_tables(benchmarks, document)):
        print_table(console, table)
    replace_text(output / "results.md", "\n".join(markdown(table) for table in tables))
    replace_text(output / "results.csv", csv_lines(document["results"]))
    written = [output / name for name in ("results.json", "results.md", "results.csv")]
    console.print()
    for path in [*written, *draw_figures(benchmarks, document, output)]:
        console.print(str(path), soft_wrap=True, markup=False)


def make_tables(benchmarks: Sequence[Any], document: dict[str, Any]) -> list[Table]:
    """The tables of all tasks, in their order."""
    tables = []
    for task in dict.fromkeys(benchmark.task for benchmark in benchmarks):
        results = [result for result in document["results"] if result["task"] == task.name]
        names = dict.fromkeys(result["dataset"] for result in results)
        groups = [[result for result in results if result["dataset"] == name] for name in names]
        for group in [results] if task.one_table else groups:
            tables += filter(None, task.tables(task.title, group, document["models"]))
    return tables


def draw_figures(benchmarks: Sequence[Any], document: dict[str, Any], output: Path) -> list[Path]:
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
        keys = {"task": task.name, "dataset": name}.items()
        results = [result for result in document["results"] if keys <= result.items()]
        ending = f"-{name}" if sum(other.task == task for other in benchmarks) > 1 else ""
        if any(task.figures is earlier.figures for earlier in tasks[: tasks.index(task)]):
            ending += f"-{task.name}"

        def path_of(figure: str, ending: str = ending) -> Path:
            return output / re.sub(r"[^\w.-]", "_", f"{figure}{ending}.png")

        paths += task.figures(results, benchmark.data, document["models"], path_of)
    return paths
