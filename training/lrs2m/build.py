"""
Builds a data set in which every image has a long and a short caption, as a recipe says.

    python -m training.lrs2m.build --config RECIPE.yaml [RECIPE.yaml ...] --output DIR

DIR then holds `data/` (parquet shards or WebDataset tars), `manifest.json` (written last: where it stands, the rest is
complete), and lists of what was left out: `failed.jsonl`, `skipped.jsonl`, `duplicates.jsonl`, `unmatched.jsonl`. An
interrupted build goes on when the same command is run again; no answer of a captioner is asked for twice.

With `--part 3/16` only that part is built, in DIR/3-of-16; `python -m training.lrs2m.join` makes the whole of all parts.
`--on ray` does both on a cluster.
"""

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.atomic import replace_json
from modeling_lrsclip.files.configuration import plain_values, validate
from modeling_lrsclip.files.parts import parse_part, run_on_ray

from .captioners.captioner import AnswerStore, Captioner, Gate
from .captioners.prompts import load_prompts
from .checks.across_rows import drop_repeats
from .data_row import SPLITS, Record, split_of
from .output import (
    BATCH,
    DATA,
    LISTS,
    MANIFEST,
    PROGRESS,
    WORK,
    Output,
    Progress,
    begin_again,
    check_caps,
    check_whole,
    load_progress,
    only_builder,
    rows_seen,
    save_progress,
)
from .part import JOURNAL, Part, part_folder
from .pipeline import Duplicate, Outcome, Pipeline, Written
from .preflight import check_captioners, check_sources, describe
from .recipe import CaptionerConfig, Recipe, SourceConfig, public_recipe, read_recipe, recipe_hash, resolve
from .routes import Item, Writer
from .row_builder import RowMaker, TokenCounter
from .sources.captions_by_key import JoinedCaptions, Unmatched
from .sources.images import Skip
from .sources.labels import LabelReader
from .sources.records import read_source


class Build:
    """
    One run of a build.

    Args:
        recipe: what to build.
        folder: the data set's.
        root: where relative paths of the recipe start.
        part: which part of how many, from 1; near-duplicates in the set itself are left to the join of the parts.
        retry_failed: begin from the first row, with as many new attempts for every text that had no good answer.

    Raises:
        `ValueError`: for anything in the recipe that cannot be found or does not fit; nothing has been asked by then.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, root: Path, part: tuple[int, int] | None = None, retry_failed: bool = False
    ):
        self.recipe, self.folder, self.root = recipe, folder, root
        self.part = Part(*part) if part else None
        self.prompts = load_prompts(recipe, root)
        self.hash = recipe_hash(recipe, self.prompts)
        progress = load_progress(folder, "build") or Progress(self.hash, part=[*(part or (1, 1))])
        if (progress.recipe_hash, tuple(progress.part)) != (self.hash, part or (1, 1)):
            raise ValueError(
                f"{folder} was begun with another recipe or other prompts; take another --output, or begin again with "
                "--restart, which keeps the captioners' answers."
            )
        progress = begin_again(folder, progress) if retry_failed else progress
        self.finished = progress.complete and (folder / MANIFEST).exists()
        if self.finished:
            return
        check_sources(recipe, root)
        if retry_failed:  # which takes the finished set away
            check_captioners(recipe)
        self.counter = TokenCounter(recipe.tokenizer, root)
        self.gate = Gate()
        self.captioners = {name: build_captioner(config, self.gate) for name, config in recipe.used_captioners.items()}
        self.gate.captioners = [captioner for captioner in self.captioners.values() if hasattr(captioner, "waiting")]
        self.guard = self._build_guard()
        self.footprints = None
        if recipe.duplicates.footprints:
            from .duplicates.footprints import Footprints

            self.footprints = Footprints([resolve(file, root) for file in recipe.duplicates.footprints])
        self.choose = None
        if chosen := recipe.candidates:
            from .captioners.candidates import CandidateChooser

            self.choose = CandidateChooser(chosen.model, chosen.rotations, chosen.stability)
        self.answers = AnswerStore(folder / WORK / "answers.sqlite", self.gate)
        if retry_failed:  # on disk at once: after a kill the plain command goes on with it
            save_progress(folder, progress)
        # What stands between a part and the whole is parquet.
        form, journal = ("parquet", JOURNAL) if self.part else (recipe.format, None)
        self.output = Output(folder, form, (recipe.shard_rows, recipe.shard_bytes), progress, journal)
        if self.guard is not None:  # images that a checkpoint counts are known after a kill
            self.output.before_checkpoint = self.guard.commit
        self.silent = 0  # rows in a row that got no answer

    async def run(self) -> dict[str, Any]:
        """Go through what is left of the sources, finish the folder and return the manifest."""
        progress = self.output.progress
        try:
            if not progress.complete:
                for number in range(progress.source, len(self.recipe.sources)):
                    await self._run_source(number, progress.index if number == progress.source else 0)
                    self.output.checkpoint(number + 1, 0)
                if not self.part:
                    drop_repeats(self.output, self.recipe.checks)
                    check_whole(self.recipe, self.output)
            return self._finish()
        finally:
            self.answers.close()
            self.output.close()
            if self.guard is not None:
                self.guard.close()
            for captioner in self.captioners.values():
                await captioner.close()

    # --------------------------------------------------------------------------------------------------------- a source

    async def _run_source(self, number: int, done: int) -> None:
        source = self.recipe.sources[number]
        index_file = self.folder / WORK / f"join-{number}.sqlite"
        join = JoinedCaptions(source, self.root, index_file) if source.join else None
        records: Iterator[Record | Unmatched] = join.records() if join else read_source(source, self.root)
        records = self.part.choose(records) if self.part else records
        for _ in islice(records, done):
            if self.part:
                self.part.skip()
        index, batch = done, []
        maker = RowMaker(self.recipe, source, self._writer(source), self.counter)
        outcomes = self._pipeline(source, maker.writer).outcomes(records)
        with tqdm(desc=source.name, unit=" rows", initial=done, disable=None) as bar:
            async with aclosing(outcomes):  # what is under way ends before the file of answers is closed
                async for outcome in outcomes:
                    index += 1
                    bar.update()
                    if isinstance(outcome, Written):
                        batch.append(outcome)
                        self.silent = 0
                        for what in outcome.remarks():
                            self.output.count(source.name, what)
                    else:
                        self._leave_out(source, outcome)
                    if self.part:
                        split = self._split(outcome.item.picture.sha256) if isinstance(outcome, Written) else None
                        self.output.end_event(self.part.event(number, outcome, split))
                    if len(batch) >= min(BATCH, self.output.room):
                        self._add(maker, batch)
                        batch = []
                        if self.output.full:
                            self.output.checkpoint(number, index)
        self._add(maker, batch)
        if join:
            join.close()
        check_caps(self.recipe, source.name, self.output)

    def _add(self, maker: RowMaker, batch: list[Written]) -> None:
        for row in maker.rows(batch):
            self.output.add(row, self._split(row["image_sha256"]))

    def _split(self, image_sha256: str) -> str:
        return split_of(image_sha256, self.recipe.seed, self.recipe.validation_fraction)

    def _leave_out(self, source: SourceConfig, outcome: Outcome) -> None:
        """Lists and counts what does not become a row; stops a build that has gone wrong."""
        output = self.output
        if isinstance(outcome, Unmatched):
            output.list_entry("unmatched", {"source": source.name} | vars(outcome))
            output.count(source.name, f"unmatched {outcome.side}")
            return
        entry = {"id": outcome.record.id, "source": source.name, "image_key": outcome.record.image_key}
        if isinstance(outcome, Duplicate):
            match = vars(outcome.match) | {"against": Path(outcome.match.against).name}
            output.leave_out("duplicates", entry | match)
        elif isinstance(why := outcome.why, Skip):
            output.leave_out("skipped", entry | {"reason": why.reason, "detail": str(why)}, why.reason)
        else:
            reason, last = why.reason, why.attempts[-1]
            entry |= {"text": why.text, "reason": reason, "attempts": why.attempts}
            output.leave_out("failed", entry, reason if "detail" in last else "no answer")
            self.silent = self.silent + 1 if "answer" not in last else 0
            if self.silent >= self.recipe.max_failures_in_a_row:
                captioner = source.texts[why.text].captioner
                raise ValueError(
                    f"captioner {captioner} left {self.silent} rows in a row without an answer, the last: {reason}; see "
                    "that it runs, then run the same command again. Answers so far are kept."
                )
        check_caps(self.recipe, source.name, self.output, early=True)

    # ---------------------------------------------------------------------------------------------------------- the end

    def _finish(self) -> dict[str, Any]:
        from training.run_folder import git_state, versions  # not for --help and --check: torch

        used = [prompt for prompts in self.prompts.values() for prompt in prompts.values()]
        manifest = {
            **{name: getattr(self.recipe, name) for name in ("name", "format", "images")},
            "recipe_hash": self.hash,
            "recipe": public_recipe(self.recipe),
            "prompts": {prompt.id: asdict(prompt) | {"hash": prompt.hash} for prompt in used},
            "evaluation_sets": [Path(name).name for name in self._against()],
            "versions": versions(),
            "code": git_state(Path(__file__).parent),
        }
        if self.part:
            manifest["part"] = [self.part.number, self.part.count]
        self.output.finish(manifest)
        for index in (self.folder / WORK).glob("join-*.sqlite"):
            index.unlink()
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    # ------------------------------------------------------------------------------------------------------------ parts

    def _against(self, source: SourceConfig | None = None) -> list[str]:
        """Evaluation sets of a source, or of all of them: paths where there is such a file or folder, else names."""
        named = self.recipe.duplicates.against
        lists = [
            one.against if one.against is not None else named for one in ([source] if source else self.recipe.sources)
        ]
        paths = [(name, resolve(name, self.root)) for name in dict.fromkeys(name for names in lists for name in names)]
        return [str(path) if path.exists() else name for name, path in paths]

    def _build_guard(self) -> Any:
        config, against = self.recipe.duplicates, self._against()
        (self.folder / WORK).mkdir(parents=True, exist_ok=True)
        if not config.inside and not against:
            return None
        from .duplicates.workers import Guard

        inside, store = config.inside and not self.part, self.folder / WORK / "duplicates.sqlite"
        return Guard(against=against, inside=inside, distance=config.distance, crops=config.crops, store=store)

    def _writer(self, source: SourceConfig) -> Writer:
        prompts = self.prompts[source.name]
        count = self.counter.count_one
        again = self.output.progress.retries, self.output.progress.repeated
        return Writer(self.recipe, source, self.captioners, prompts, self.answers, count, self.choose, *again)

    def _pipeline(self, source: SourceConfig, writer: Writer) -> Pipeline:
        labels = LabelReader(source.labels, self.root) if source.labels else None
        look_up = self.guard is not None or self.footprints is not None
        check = partial(self._check, source, self._against(source)) if look_up else None
        return Pipeline(writer, labels, check, self.recipe.min_side, self._lookahead(source), self.gate)

    def _check(self, source: SourceConfig, against: list[str], items: list[Item]) -> list[Any]:
        """Tell of what each image is a near-duplicate, or whose ground it shares; None: of none."""
        matches: list[Any] = [None] * len(items)
        if self.footprints is not None:
            matches = [self.footprints.check(item.record, item.picture.size) for item in items]
        if self.guard is None:
            return matches
        from .duplicates.finder import Query
        from .duplicates.fingerprints import thumbnail

        new, queries = [number for number, match in enumerate(matches) if match is None], []
        for item in (items[number] for number in new):
            record = item.record
            name = f"{source.name}/{record.image_key or item.picture.sha256}"
            if self.part:
                self.part.names[record.id] = name
            queries.append(Query(record.id, thumbnail(item.picture.image), name, against))
        for number, match in zip(new, self.guard.check_all(queries), strict=True):
            matches[number] = match
        return matches

    def _lookahead(self, source: SourceConfig) -> int:
        """Rows at a time: enough that a slow one does not empty the others' captioners."""
        if self.recipe.lookahead:
            return self.recipe.lookahead
        asked = [self.recipe.captioners[text.captioner] for text in source.texts.values() if text.captioner]
        served = [8 * config.concurrency * len(config.base_urls) for config in asked if config.kind == "openai"]
        return max(served + [16 * config.batch_size for config in asked if config.kind != "openai"], default=1)


def build_captioner(config: CaptionerConfig, gate: Gate) -> Captioner:
    """The captioner of a recipe; only the engine that is asked for is imported."""
    if config.kind == "openai":
        from .captioners.openai_compatible import OpenAICaptioner

        return OpenAICaptioner(config)
    from .captioners.transformers_model import TransformersCaptioner

    return TransformersCaptioner(config, gate.settle)


def forget(folder: Path) -> None:
    """Takes a build back to its first row; the captioners' answers stay."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first: it tells that the rest is complete
    for name in (DATA, f"{WORK}/parts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    lists = [folder / f"{name}.jsonl" for name in (*LISTS, JOURNAL)]
    indices = [*(folder / WORK).glob("join-*.sqlite"), *(folder / WORK).glob("duplicates.*")]
    for path in (*lists, *indices, folder / WORK / PROGRESS):  # last: it tells that the data are a build's
        path.unlink(missing_ok=True)


def report(manifest: dict[str, Any]) -> str:
    """Summary of a build, a line a source."""
    lines = []
    for source, counts in manifest["counts"].items():
        kept = sum(counts.get(split, 0) for split in SPLITS)
        left = ", ".join(f"{name} {times}" for name, times in sorted(counts.items()) if name not in SPLITS)
        lines.append(f"{source}: {kept:,} rows of {rows_seen(counts):,}{f'; {left}' if left else ''}")
    return "\n".join(lines)


@command(status=1, interrupted="interrupted; run the same command again to go on.")
def main(argv: Iterable[str] | None = None) -> int:
    """Run the command; what goes wrong is one sentence on standard error and exit status 1."""
    parser = command_parser("training.lrs2m.build", __doc__)
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="RECIPE", help="recipe files (YAML)")
    add("--output", required=True, type=Path, help="folder of the data set")
    add("--root", type=Path, help="where relative paths of the recipe start; by default where you are")
    add(
        "--check",
        action="store_true",
        help="look at the first rows of every source and at the captioners, write nothing",
    )
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="override fields of the recipe")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--restart", action="store_true", help="begin from the first row; answers are kept and used")
    again.add_argument(
        "--retry-failed", action="store_true", help="ask again, with new seeds, for the texts of failed.jsonl"
    )
    add("--part", help="build only this part, such as 3/16; training.lrs2m.join unites them")
    add("--on", choices=("ray",), help="build the parts as tasks of a Ray cluster, and join them")
    add("--ray-address", help="of a running cluster (a new one on this machine)")
    add("--parts", type=int, help="with --on ray: into how many parts the work is cut")
    arguments = parser.parse_args(argv)
    folder, root = arguments.output, arguments.root or Path.cwd()
    recipe = read_recipe(arguments.config, arguments.set)
    if arguments.check:
        lines, mistakes = describe(recipe, load_prompts(recipe, root), root, folder)
        print("\n".join(lines))
        for mistake in mistakes:
            print(f"error: {mistake}", file=sys.stderr)
        return 1 if mistakes else 0
    if arguments.on:
        if arguments.part or arguments.restart or arguments.retry_failed:
            raise ValueError(
                "--on ray makes its own parts and goes on with those there are; --part, --restart and --retry-failed "
                "are for a build without it."
            )
        manifest = _build_on_ray(recipe, folder, root, arguments)
    else:
        if arguments.ray_address or arguments.parts:
            raise ValueError("--ray-address and --parts need --on ray.")
        part = parse_part(arguments.part) if arguments.part else None
        folder = part_folder(folder, part) if part else folder
        again = "restart" if arguments.restart else "retry" if arguments.retry_failed else None
        manifest = _build_locked(recipe, folder, root, part, again)
    print(f"{report(manifest)}\nData set: {folder / 'data'}")
    return 0


def _build_locked(
    recipe: Recipe, folder: Path, root: Path, part: tuple[int, int] | None = None, again: str | None = None
) -> dict[str, Any]:
    """Build in a folder that no other process builds in, and return the manifest."""
    with only_builder(folder):
        if again == "restart":
            forget(folder)
        build = Build(recipe, folder, root, part, again == "retry")
        replace_json(folder / WORK / "recipe.json", plain_values(recipe))  # a join goes by its caps
        if build.finished:
            print(f"{folder} is complete; --restart would build it again with the answers it has.")
            return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return asyncio.run(build.run())


def build_part(job: tuple[dict[str, Any], Path, Path], part: int, parts: int) -> None:
    """
    Build one part, as a task of Ray.

    Args:
        job: the recipe's values, the folder below which parts lie, and the root of relative paths.
        part, parts: which of how many, from 1.
    """
    values, folder, root = job
    _build_locked(validate(Recipe, values), part_folder(folder, (part, parts)), root, (part, parts))


def _build_on_ray(recipe: Recipe, folder: Path, root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from .join import join

    inner, joined = (folder / "parts").absolute(), folder / "parts-joined"
    shutil.rmtree(joined, ignore_errors=True)  # an earlier run may have been killed meanwhile
    if not inner.exists() and (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe_hash"] != recipe_hash(recipe, load_prompts(recipe, root)):
            raise ValueError(f"{folder} holds a data set of another recipe; take another --output.")
        return manifest
    load_progress(folder, "join")  # refuses the folder before anything is asked
    begun = {path.name.rpartition("-")[2] for path in inner.glob("*-of-*")}
    parts = int(begun.pop()) if begun else arguments.parts  # those that are there hold answers
    if not (folder / MANIFEST).exists():
        gpus = any(captioner.kind == "transformers" for captioner in recipe.captioners.values())
        job = plain_values(recipe), inner, root.absolute()
        run_on_ray(build_part, job, arguments.ray_address, parts, gpus=gpus)
    manifest = join([inner], folder)
    inner.rename(joined)  # never some of the parts only
    shutil.rmtree(joined)
    return manifest


if __name__ == "__main__":
    sys.exit(main())
