"""
Statistics of a built data set: Table I of the paper for it, token lengths (Fig. 6), vocabulary, duplicates, a map.

    python -m training.lrs2m.statistics DIR

writes statistics.json, statistics.md and the figures into DIR, from one pass over the rows. Memory does not grow with
them, but for 8 bytes a row that tell images apart.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import ArrowInvalid, parquet
from tqdm import tqdm

from evaluation.paper import paper_tables
from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.atomic import replace_json

from .data_row import GIVEN
from .output import LISTS
from .shards import count_rows, data_hash, read_manifest, read_shard


STATISTICS, TABLES, PICTURES = "statistics.json", "statistics.md", ("token_lengths.png", "map.png")
CUTS = (77, 248)  # tokens beyond which CLIP and LRSCLIP cut
HAND_READ = "hand_read.json"  # rates of false captions, which training.lrs2m.verify reads from a filled-in sheet
SCORES = {  # columns whose means are told, in words
    "label_precision": "classes named that are labelled",
    "label_recall": "labelled classes that are named",
    "long_similarity": "similarity of the long text to the image",
    "short_similarity": "similarity of the short text to the image",
    "claims_confirmed": "claims that a second captioner confirmed",
}
LONGEST = 1024  # tokens; what is longer is counted with it in the histogram
COLUMNS = [
    *("source", "route", "licence", "long_text", "short_text", "long_captioner", "short_captioner"),
    *("long_tokens", "short_tokens", "short_words", "image_sha256", "longitude", "latitude"),
    *SCORES,
]
COUNTED = ("route", "licence", "long_captioner", "short_captioner")  # columns whose values are counted by source
Columns = dict[str, list[Any]]
_BATCH = 4096  # rows
_WORD = re.compile(r"[a-z]+(?:['’-][a-z]+)*")


@dataclass
class SourceTally:
    """Counts of one source."""

    rows: int = 0
    tokens: Counter = field(default_factory=Counter)  # of the `long` and of the `short` texts
    values: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in COUNTED})  # by column

    def add(self, columns: Columns, indices: Sequence[int]) -> None:
        self.rows += len(indices)
        for name, counter in self.values.items():
            counter.update(columns[name][index] for index in indices)
        for which in ("long", "short"):
            self.tokens[which] += sum(columns[f"{which}_tokens"][index] for index in indices)


class Tally:
    """Counts of a whole data set, from rows in batches."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceTally] = {}
        self.splits: Counter[str] = Counter()
        self.lengths = {which: np.zeros(LONGEST + 1, np.int64) for which in ("long", "short")}
        self.tokens, self.words = Counter(), Counter()
        self.vocabulary: dict[str, set[str]] = {"long": set(), "short": set()}
        self.places = np.zeros((180, 360), np.int64)  # rows by degree of latitude, from the south, and of longitude
        self.scores = {name: [0, 0.0] for name in SCORES}  # rows that have one, their sum
        self._images: list[np.ndarray] = []  # 64 bits of each row's image hash

    def add(self, split: str, columns: Columns) -> None:
        """Takes some rows, as a list a column."""
        by_source: dict[str, list[int]] = {}
        for index, source in enumerate(columns["source"]):
            by_source.setdefault(source, []).append(index)
        for source, indices in by_source.items():
            self.sources.setdefault(source, SourceTally()).add(columns, indices)
        self.splits[split] += len(columns["source"])
        for which, lengths in self.lengths.items():
            tokens = np.asarray(columns[f"{which}_tokens"])
            self.tokens[which] += int(tokens.sum())
            lengths += np.bincount(np.minimum(tokens, LONGEST), minlength=LONGEST + 1)
            words = _WORD.findall(" ".join(columns[f"{which}_text"]).lower())
            self.words[which] += len(words)
            self.vocabulary[which].update(words)
        hashes = "".join(value[:16] for value in columns["image_sha256"])
        self._images.append(np.frombuffer(bytes.fromhex(hashes), np.uint64))
        for name, totals in self.scores.items():
            scores = [score for score in columns[name] if score is not None]
            totals[0] += len(scores)
            totals[1] += sum(scores)
        known = [pair for pair in zip(columns["latitude"], columns["longitude"], strict=True) if None not in pair]
        if known:
            degrees = np.floor(np.array(known)).astype(int) + [90, 180]
            np.add.at(self.places, tuple(np.clip(degrees, 0, [179, 359]).T), 1)

    @property
    def images(self) -> int:
        """Distinct images."""
        self._images = [np.unique(np.concatenate(self._images))] if self._images else []
        return len(self._images[0]) if self._images else 0


def tally(folder: Path, manifest: dict[str, Any]) -> Tally:
    """Reads every row of a finished data set once, without its pixels."""
    counts = Tally()
    with tqdm(total=count_rows(manifest), unit=" rows", disable=None, leave=False) as bar:
        for split, described in manifest["splits"].items():
            for file in described["files"]:
                for columns in _batches(folder / file["path"]):
                    counts.add(split, columns)
                    bar.update(len(columns["source"]))
    return counts


def _batches(path: Path) -> Iterator[Columns]:
    if path.suffix == ".parquet":
        try:
            with parquet.ParquetFile(path) as file:
                present = [name for name in COLUMNS if name in file.schema_arrow.names]
                for batch in file.iter_batches(batch_size=_BATCH, columns=present):
                    columns = dict.fromkeys(COLUMNS, [None] * len(batch))  # of an older build some are absent
                    yield columns | batch.to_pydict()
        except (OSError, ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read ({error}); build the data set again.") from error
        return
    rows = ({name: row.get(name) for name in COLUMNS} for row in read_shard(path))  # without the pixels
    while batch := list(islice(rows, _BATCH)):
        yield {name: [row[name] for row in batch] for name in COLUMNS}


# ------------------------------------------------------------------------------------------------------------- results


def statistics(folder: Path) -> dict[str, Any]:
    """
    The statistics of a finished data set.

    Raises:
        `ValueError`: for a folder without a manifest, or a file that cannot be read.
    """
    return describe(tally(folder, manifest := read_manifest(folder)), manifest, hand_read(folder, manifest))


def hand_read(folder: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Rates of false captions by a person, where a sheet of this very data was read back."""
    path = folder / HAND_READ
    rates = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return rates if rates.get("data_sha256") == data_hash(manifest) else None


def describe_checks(totals: dict[str, int]) -> dict[str, dict[str, int]]:
    """Answers asked again, rows left out and rows warned of, by check, the most frequent first."""
    columns = {"asked again": "asked_again", "failed": "failed", "warned": "warned"}
    by_check: dict[str, dict[str, int]] = {}
    for name, times in totals.items():
        kind, _, check = name.partition(": ")
        if check and kind in columns:
            by_check.setdefault(check, dict.fromkeys(columns.values(), 0))[columns[kind]] += times
    return dict(sorted(by_check.items(), key=lambda one: (-sum(one[1].values()), one[0])))


def describe(counts: Tally, manifest: dict[str, Any], read: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    Counts as values for JSON.

    Args:
        counts: of the rows.
        manifest: of the build.
        read: rates of false captions by a person.

    Returns:
        Values by name.
    """
    rows = sum(counts.splits.values())
    duplicates = manifest["totals"].get("duplicates", 0)
    unmatched = {name: count for name, count in manifest["totals"].items() if name.startswith("unmatched ")}
    return {
        "name": manifest["name"],
        "data_sha256": data_hash(manifest),
        "rows": rows,
        "splits": dict(counts.splits),
        "images": counts.images,
        "sources": [_describe_source(name, one, manifest) for name, one in counts.sources.items()],
        "long": _describe_text("long", counts, rows),
        "short": _describe_text("short", counts, rows),
        "vocabulary": len(counts.vocabulary["long"] | counts.vocabulary["short"]),
        "left_out": {name: manifest["totals"].get(name, 0) for name in LISTS if name != "unmatched"} | unmatched,
        "duplicate_rate": duplicates / max(1, rows + duplicates),
        "evaluation_sets": manifest.get("evaluation_sets", []),
        "with_coordinates": int(counts.places.sum()),
        "checks": describe_checks(manifest["totals"]),
        "scores": {name: {"rows": n, "mean": total / n} for name, (n, total) in counts.scores.items() if n},
        "hand_read": read,
    }


def _describe_source(name: str, counts: SourceTally, manifest: dict[str, Any]) -> dict[str, Any]:
    recipe = next((one for one in manifest["recipe"]["sources"] if one["name"] == name), {})
    images = recipe.get("images") or manifest["images"]
    described = {"name": name, "route": list(counts.values["route"])[0], "rows": counts.rows}
    for which in ("long", "short"):
        captioners = sorted(counts.values[f"{which}_captioner"].items(), key=lambda item: (-item[1], str(item[0])))
        described[f"{which}_from"] = ", ".join(captioner or GIVEN for captioner, _ in captioners)
        described[f"{which}_mean_tokens"] = counts.tokens[which] / counts.rows
    described["licence"] = "; ".join(sorted(filter(None, counts.values["licence"])))
    described |= {"licence_url": recipe.get("licence_url"), "images": "yes" if images == "embed" else "no"}
    paper = paper_row(recipe.get("paper_source") or name)
    return described | ({"paper": paper} if paper else {})


def paper_row(name: str) -> dict[str, Any] | None:
    """The row of the paper's Table I that a source is named after."""
    table = paper_tables()["lrs2m"]
    for known, row in table["rows"].items():
        if re.sub(r"[\W_]", "", known).lower() == re.sub(r"[\W_]", "", name).lower():
            return {"name": known} | dict(zip(table["columns"], row, strict=True))
    return None


def _describe_text(which: str, counts: Tally, rows: int) -> dict[str, Any]:
    lengths = counts.lengths[which]
    histogram = np.trim_zeros(lengths, "b").tolist()  # texts by tokens
    over = {f"over_{limit}": float(lengths[limit + 1 :].sum() / max(1, rows)) for limit in CUTS}
    return {
        "mean_tokens": counts.tokens[which] / max(1, rows),
        "median_tokens": int(np.searchsorted(np.cumsum(lengths), (rows + 1) // 2)) if rows else 0,
        "longest": max(0, len(histogram) - 1),  # LONGEST stands for it and more
        "mean_words": counts.words[which] / max(1, rows),
        "vocabulary": len(counts.vocabulary[which]),
        "histogram": histogram,
    } | over


# -------------------------------------------------------------------------------------------------------------- report


def report(statistics: dict[str, Any]) -> str:
    """The statistics as Markdown."""
    head = ["source", "route", "rows", "long captions from", "mean tokens", "short captions from", "mean tokens"]
    rows = []
    for one in statistics["sources"]:
        paper = one.get("paper")
        cells = [one["name"], one["route"], f"{one['rows']:,}", one["long_from"], f"{one['long_mean_tokens']:.2f}"]
        cells += [one["short_from"], f"{one['short_mean_tokens']:.2f}"]
        beside = ("pairs", "long_text_mean_tokens", "short_text_mean_tokens")
        rows.append(cells + ([f"{paper[name]:,}" for name in beside] if paper else ["", "", ""]))
    long, short, stated = statistics["long"], statistics["short"], paper_tables()["lrs2m"]["stated"]
    total = ["**all**", "", f"{statistics['rows']:,}"]
    total += ["", f"{long['mean_tokens']:.2f}", "", f"{short['mean_tokens']:.2f}"]
    rows.append([*total, *(f"{stated[name]:,}" for name in stated if name != "pairs_by_route")])
    lines = [f"# {statistics['name']}", "", *_table([*head, "paper: pairs", "long", "short"], "llrlrlrrrr", rows)]
    lines += ["", "Paper: Table I as printed; its last row is what its text says.", ""]
    measures = (
        ("tokens, median", "median_tokens", "{:,}"),
        ("tokens, most", "longest", "{:,}"),
        ("words, mean", "mean_words", "{:.1f}"),
        ("over 77 tokens, which CLIP cuts", "over_77", "{:.1%}"),
        ("over 248 tokens, which LRSCLIP cuts", "over_248", "{:.1%}"),
        ("different words", "vocabulary", "{:,}"),
    )
    rows = [[name, form.format(long[key]), form.format(short[key])] for name, key, form in measures]
    lines += _table(["", "long", "short"], "lrr", rows)
    against = ", ".join(statistics["evaluation_sets"]) or "no evaluation set"
    splits, left_out = (
        ", ".join(f"{name} {count:,}" for name, count in statistics[counts].items())
        for counts in ("splits", "left_out")
    )
    lines += [
        "",
        f"- {statistics['images']:,} distinct images in {statistics['rows']:,} rows ({splits}).",
        f"- {statistics['vocabulary']:,} different words in both kinds of text.",
        f"- Left out: {left_out}.",
        f"- Near-duplicates: {statistics['duplicate_rate']:.2%} of what was read; compared with {against}.",
        f"- {statistics['with_coordinates']:,} rows know where on Earth they are.",
    ]
    if read := statistics["hand_read"]:
        lines.append(f"- Read by a person: {false_captions(read)}.")
    if statistics["scores"]:
        scores = statistics["scores"].items()
        rows = [[f"{one['mean']:.3f}", f"{one['rows']:,}", SCORES[name]] for name, one in scores]
        lines += ["", *_table(["mean", "rows", ""], "rrl", rows)]
    if statistics["checks"]:
        rows = [[name, *(f"{times:,}" for times in one.values())] for name, one in statistics["checks"].items()]
        lines += ["", *_table(["check", "answers asked again", "rows left out", "rows warned of"], "lrrr", rows)]
    return "\n".join(lines) + "\n"


def false_captions(read: dict[str, Any]) -> str:
    """Rates of false captions in words: `of 200 rows, 12.0 % of the long captions hold a false statement (95 % interval …)`."""
    rates = (
        f"{100 * read[which]['rate']:.1f} % of the {which} captions (95 % interval {100 * read[which]['low']:.1f} to "
        f"{100 * read[which]['high']:.1f} %)"
        for which in ("long", "short")
    )
    return f"of {read['rows']:,} rows, a false statement stands in {' and in '.join(rates)}"


def _table(head: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown, each column on the left (l) or the right (r) side."""
    marks = [{"l": ":--", "r": "--:"}[side] for side in sides]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


def write(folder: Path) -> dict[str, Any]:
    """Writes statistics.json, statistics.md and the figures into a data set's folder, and returns the statistics."""
    counts = tally(folder, manifest := read_manifest(folder))
    statistics = describe(counts, manifest, hand_read(folder, manifest))
    if not statistics["rows"]:
        raise ValueError(f"{folder} has no rows; see failed.jsonl and skipped.jsonl there.")
    from .statistics_figures import draw_map, draw_token_lengths  # matplotlib, which --help does without

    histograms = {which: statistics[which]["histogram"] for which in ("long", "short")}
    draw_token_lengths(histograms, folder / PICTURES[0], statistics["name"])
    if statistics["with_coordinates"]:
        draw_map(counts.places, folder / PICTURES[1], statistics["name"])
    (folder / TABLES).write_text(report(statistics), encoding="utf-8")
    replace_json(folder / STATISTICS, statistics)
    return statistics


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 2."""
    parser = command_parser("python -m training.lrs2m.statistics", __doc__)
    parser.add_argument("folder", type=Path, help="a finished data set")
    folder = parser.parse_args(arguments).folder
    print(report(write(folder)))
    files = [name for name in (STATISTICS, TABLES, *PICTURES) if (folder / name).exists()]
    print(f"written: {', '.join(str(folder / name) for name in files)}")


if __name__ == "__main__":
    sys.exit(main())
