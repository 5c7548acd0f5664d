"""Looks at what a build would read and ask before it begins: paths, the first rows of every source, the captioners."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from modeling_lrsclip.files.tables import TABLE_SUFFIXES

from .captioners.prompts import Prompts
from .data_row import Record
from .output import MANIFEST, load_progress
from .recipe import CaptionerConfig, ReadConfig, Recipe, SourceConfig, resolve
from .routes import Item, Writer
from .sources.images import Skip, read_picture
from .sources.labels import LabelReader
from .sources.records import SHOWN, TableRow, join_key, read_rows, read_source, stored_rows


ROWS = 20  # of every source that are looked at
SECONDS = 3.0  # after which all sources' rows that fit `where` are not looked for beyond the first `ROWS`
LARGEST_LABELS = 1 << 26  # bytes of one file with the labels of all images; reading more takes long


@dataclass
class FirstRows:
    """The first `ROWS` stored rows of a place, and others until the time is over, remembering what they were like."""

    rows: Iterable[TableRow]
    seconds: float
    columns: dict[str, None] = field(default_factory=dict)  # in their order
    last: TableRow = field(default_factory=dict)
    count: int = 0
    cut: bool = False  # the time was over before the last row

    def __iter__(self) -> Iterator[TableRow]:
        end = time.monotonic() + self.seconds
        for row in self.rows:
            if self.count >= ROWS and time.monotonic() > end:
                self.cut = True
                return
            self.last, self.count = row, self.count + 1
            self.columns |= dict.fromkeys(map(str, row))
            yield row


@dataclass
class Look:
    """The beginning of a source."""

    records: list[Record] = field(default_factory=list)
    keys: dict[str, list[str]] = field(default_factory=dict)  # of a join, by side
    notes: list[str] = field(default_factory=list)


def check_sources(recipe: Recipe, root: Path) -> None:
    """
    Look at the first rows of every source, for mistakes that would else show late; warn where none could be looked at.

    Args:
        recipe: what to build.
        root: where its relative paths start.

    Raises:
        `ValueError`: all mistakes, a line each.
    """
    mistakes = _absent_evaluation_sets(recipe, root)
    for number, source in enumerate(recipe.sources):
        try:
            look = look_at(source, root, number, SECONDS / len(recipe.sources))
            for note in look.notes:
                print(f"warning: {note}", file=sys.stderr)
            if recipe.max_skipped_fraction < 0.5:
                _check_images(look, number)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def check_captioners(recipe: Recipe) -> None:
    """
    Ask the servers of every captioner whether they are there.

    Raises:
        `ValueError`: a line each, for a captioner none of whose servers can be asked.
    """
    mistakes = []
    for name, config in recipe.used_captioners.items():
        answers = asyncio.run(_ping(name, config))
        mistakes += [line for line, _ in answers] if all(is_mistake for _, is_mistake in answers) else []
    if mistakes:
        raise ValueError("\n".join(mistakes))


def look_at(source: SourceConfig, root: Path, number: int, seconds: float) -> Look:
    """
    The first records of a source.

    Args:
        source: of the recipe.
        root: where relative paths start.
        number: of the source in the recipe, for the names of its fields.
        seconds: after which rows that fit `where` are no longer looked for.

    Returns:
        Records, and what else there is to say; without records where the time was over.

    Raises:
        `ValueError`: for a place that is not there or cannot be read, a folder of images that is missing, columns that
            the recipe names or the route needs and that are not there, and where no row fits.
    """
    folder = source.read.images
    if folder is not None and not resolve(folder, root).is_dir():
        raise ValueError(
            f"sources.{number}.read.images={folder} is not a folder; name the one that the image paths start at."
        )
    look, places = Look(), {"read": source.read, "join": source.join}
    wanted = [f"{which}_text" for which, text in source.texts.items() if not (text.captioner or text.template)]
    for name, read in places.items():
        if read is None:
            continue
        first = FirstRows(stored_rows(read, root), seconds / (1 + (source.join is not None)))
        stored, rows = _first_that_fit(read, root, first)
        if not rows:
            look.notes.append(
                f"none of the first {first.count:,} rows of {read.path} fits where; the rest was not read"
            )
            return look
        if name == "read":
            if not any(row.get("image") for row in rows):
                raise ValueError(_no_column("image", read, f"sources.{number}.read", first))
            look.records = list(read_source(source, root, stored))
        look.keys[name] = [key for row in rows if (key := join_key(row, read))]
        wanted = [column for column in wanted if not any(column in row for row in rows)]
        if wanted and (name == "join" or source.join is None):
            raise ValueError(_no_column(wanted[0], read, f"sources.{number}.{name}", first))
    return look


def _first_that_fit(read: ReadConfig, root: Path, first: FirstRows) -> tuple[list[TableRow], list[TableRow]]:
    """Up to `ROWS` rows that fit `where`, as they are stored and with the recipe's columns."""
    stored: list[TableRow] = []
    rows: list[TableRow] = []
    try:
        for row in read_rows(read, root, first):
            stored.append(first.last)
            rows.append(row)
            if len(rows) == min(ROWS, read.limit or ROWS):
                break
    except ValueError:
        if not first.cut:
            raise
    return stored, rows


def _no_column(name: str, read: ReadConfig, section: str, first: FirstRows) -> str:
    return (
        f"{read.path} has no column for {name}, which its source needs; it has {', '.join(first.columns)}. "
        f"Set {section}.columns.{name}."
    )


def _check_images(look: Look, number: int) -> None:
    files = [record.image for record in look.records if isinstance(record.image, Path)]
    if files and not any(file.exists() for file in files):
        shown = ", ".join(map(str, dict.fromkeys(files[:SHOWN])))
        raise ValueError(
            f"none of the first {len(files)} images of source {number} is there: {shown}; change sources.{number}.read."
            "images, or columns.image."
        )


def _absent_evaluation_sets(recipe: Recipe, root: Path) -> list[str]:
    """Sentences on sets of `against` that are paths and not there; other names are those of `evaluation.run`."""
    named = [(f"sources.{number}.against", source.against) for number, source in enumerate(recipe.sources)]
    absent = []
    for section, names in (("duplicates.against", recipe.duplicates.against), *named):
        for name in names or ():
            if _is_path(name) and not resolve(name, root).exists():
                absent.append(f"{section} names {name}, which does not exist; put the set there, or leave it out.")
    return list(dict.fromkeys(absent))


def _is_path(name: str) -> bool:
    """Tell a path from `owner/name` of the Hub and from the name of a known data set."""
    is_file = Path(name).suffix in (*TABLE_SUFFIXES, ".tar")  # another dot may be a version's
    return "/" in name and (name.count("/") != 1 or name[0] in "~./$" or is_file)


# ------------------------------------------------------------------------------------------------------------- --check


def describe(recipe: Recipe, prompts: Prompts, root: Path, folder: Path) -> tuple[list[str], list[str]]:
    """
    Describe a build, from the first rows of every source and a word with every captioner; nothing is written.

    Args:
        recipe: what to build.
        prompts: its prompts, by source and text.
        root: where its relative paths start.
        folder: of the data set.

    Returns:
        Lines that say it, and mistakes for which it would fail or stop.
    """
    lines, mistakes = [], _absent_evaluation_sets(recipe, root)
    pool = ThreadPoolExecutor(1)
    pings = pool.submit(asyncio.run, _ping_all(recipe.used_captioners))  # meanwhile
    for number, source in enumerate(recipe.sources):
        lines.append(f"{source.name}: {_route(recipe, source)}")
        try:
            look = look_at(source, root, number, SECONDS / len(recipe.sources))
            _check_images(look, number)
            lines += [f"  {line}" for line in _tell(recipe, source, prompts, root, look)]
        except ValueError as error:
            mistakes.append(str(error))
        lines += [f"  not verified: {one}" for one in source.not_verified]
    answers = pings.result()
    pool.shutdown()
    lines += [line for line, is_mistake in answers if not is_mistake]
    mistakes += [line for line, is_mistake in answers if is_mistake]
    sets = len(recipe.duplicates.against)
    inside = "of the set itself and " if recipe.duplicates.inside else ""
    lines.append(
        f"left out: near-duplicates {inside}of {sets} evaluation sets" if sets or inside else "kept: duplicates"
    )
    path = resolve(recipe.tokenizer, root)
    if not path.is_dir():
        if _is_path(recipe.tokenizer):
            mistakes.append(f"tokenizer {recipe.tokenizer} does not exist; name a folder, or one of the Hub.")
        elif not isinstance(try_to_load_from_cache(recipe.tokenizer, "tokenizer_config.json"), str):
            lines.append(f"tokenizer {recipe.tokenizer}: fetched from the Hub first")
    lines.append(f"written: {recipe.format} to {folder}, {_progress(folder)}")
    return lines, mistakes


def _route(recipe: Recipe, source: SourceConfig) -> str:
    parts = [f"route {source.route}"]
    for which, text in source.texts.items():
        if text.captioner:
            model = recipe.captioners[text.captioner].model
            parts.append(f"{which} text asked of {text.captioner} ({model}) with {text.prompt}")
        else:
            parts.append(f"{which} text {'from a template' if text.template else 'given'}")
    return ", ".join(parts)


def _tell(recipe: Recipe, source: SourceConfig, prompts: Prompts, root: Path, look: Look) -> list[str]:
    """Tell how the first records fare, up to the questions that captioners would be asked."""
    lines = list(look.notes)
    writer = Writer(recipe, source, {}, prompts[source.name], None, len)
    labels, unread = None, ""
    if source.labels:
        file = resolve(source.labels.path, root) if source.labels.path else None
        if file is not None and file.is_file() and file.stat().st_size > LARGEST_LABELS:
            unread = f"; labels were not looked at, {file} has {file.stat().st_size >> 20:,} MiB"
        else:
            labels = LabelReader(source.labels, root)
    reasons: Counter[str] = Counter()
    for record in look.records:
        try:
            picture = read_picture(record.image, recipe.min_side)
            item = Item(record, picture, labels.of(record, picture.size) if labels else [])
            if source.join is None and not unread:
                for which, text in source.texts.items():
                    if not text.captioner:
                        writer.ready_text(which, item)
        except Skip as why:
            reasons[why.reason] += 1
    bad = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    if look.records:
        lines.append(
            f"of the first {len(look.records)} rows {len(look.records) - reasons.total()} are good"
            + f"; {bad}" * bool(bad)
            + unread
        )
        shown = look.records[0]
        texts = [text for text in (shown.long_text, shown.short_text) if text]
        lines.append(f"first: {shown.image_key} {' | '.join(f'{text:.70}' for text in texts)}".rstrip())
        if reasons.total() == len(look.records):
            raise ValueError(f"none of the first {len(look.records)} rows of source {source.name} is good: {bad}.")
    for name, keys in look.keys.items() if source.join else ():
        lines.append(f"keys of {name}: {', '.join(keys[:SHOWN])}")
    return lines


async def _ping_all(configs: dict[str, CaptionerConfig]) -> list[tuple[str, bool]]:
    """A line for every server of the captioners, and whether it tells a mistake."""
    lists = await asyncio.gather(*(_ping(name, config) for name, config in configs.items()))
    return [line for lines in lists for line in lines]


async def _ping(name: str, config: CaptionerConfig) -> list[tuple[str, bool]]:
    if config.kind != "openai":
        return [(f"captioner {name}: {config.model} is loaded with the first batch", False)]
    from .captioners.openai_compatible import OpenAICaptioner

    captioner = OpenAICaptioner(config)
    try:
        pongs = await captioner.ping()
    finally:
        await captioner.close()
    lines = []
    for pong in pongs:
        fault = pong.fault
        if pong.models and config.model not in pong.models:
            fault = f"has no model {config.model}; it has {', '.join(pong.models[:SHOWN])}"
        lines.append((f"captioner {name}: {pong.url} {fault or 'answers'}", bool(fault)))
    return lines


def _progress(folder: Path) -> str:
    progress = load_progress(folder)
    if progress is None:
        return "where no build is yet"
    if progress.complete and (folder / MANIFEST).exists():
        return "where a build is complete"
    return f"where a build goes on at row {progress.index:,} of source {progress.source}"
