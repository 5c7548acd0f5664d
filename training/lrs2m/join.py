"""
Makes one data set of the parts of a build.

    python -m training.lrs2m.join sets/fmow/* --output sets/fmow-whole

Each argument is a part's folder (such as 3-of-16) or a folder that holds some; copied from other machines or seen over a
shared disk. Near-duplicates are searched over all parts, manifest and statistics are written, and the files are those that
an undivided build would have written, to the byte. An interrupted join goes on when the same command is run again; the
parts are only read.
"""

import heapq
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.configuration import validate
from modeling_lrsclip.files.hashing import json_sha256

from .captioners.captioner import AnswerStore
from .checks.across_rows import drop_repeats
from .data_row import Row
from .output import BATCH, MANIFEST, WORK, Output, Progress, check_whole, load_progress, only_builder
from .part import JOURNAL
from .recipe import Recipe
from .shards import count_rows, read_manifest, read_rows
from .statistics import write


CHUNK = 64  # events whose images are checked together


@dataclass
class FinishedPart:
    folder: Path
    manifest: dict[str, Any]

    @property
    def number(self) -> int:
        return self.manifest["part"][0]

    def events(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Lines of the journal with the part's number, in the order of the sources."""
        with (self.folder / f"{JOURNAL}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line), self.number

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split, in the same order."""
        return (row for _, row in read_rows(self.folder, {"splits": {split: self.manifest["splits"][split]}}))


def find_parts(folders: Sequence[Path], output: Path) -> list[FinishedPart]:
    """
    Every part of one build in and below some folders, by number.

    Args:
        folders: parts, or folders that hold some.
        output: folder of the whole, which is none of them.

    Returns:
        All parts, from the first.

    Raises:
        `ValueError`: where parts are missing, unfinished, given twice or of different builds.
    """
    inner = [path for root in folders for path in [root, *sorted(root.glob("*-of-*"))]]
    parts = []
    for folder in dict.fromkeys(path.resolve() for path in inner if path.resolve() != output.resolve()):
        manifest = folder / MANIFEST
        content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
        if "part" in content:
            parts.append(FinishedPart(folder, content))
        elif (folder / WORK).is_dir():
            raise ValueError(f"{folder} is no finished part of a build; run its command again until it ends well.")
    if not parts:
        raise ValueError(f"{', '.join(map(str, folders))}: no finished part of a build is there; see build --part.")
    first, count = parts[0], parts[0].manifest["part"][1]
    for part in parts:
        if (part.manifest["recipe_hash"], part.manifest["part"][1]) != (first.manifest["recipe_hash"], count):
            raise ValueError(f"{first.folder} and {part.folder} are not parts of one build; give those of one.")
    by_number: dict[int, FinishedPart] = {}
    for part in parts:
        if (known := by_number.setdefault(part.number, part)) is not part:
            raise ValueError(f"{known.folder} and {part.folder} are the same part; give one of them.")
    missing = [str(number) for number in range(1, count + 1) if number not in by_number]
    if missing:
        raise ValueError(f"of {count} parts {', '.join(missing[:10])} are missing; build them, or name their folders.")
    return [by_number[number] for number in range(1, count + 1)]


def hash_parts(parts: Sequence[FinishedPart]) -> str:
    """SHA-256 of the manifests of parts, which a part that is built again changes."""
    return json_sha256([part.manifest for part in parts], sort_keys=True)


class Join:
    """
    One run of a join.

    Args:
        parts: all of one build.
        folder: the whole data set's.
    """

    def __init__(self, parts: list[FinishedPart], folder: Path):
        self.parts, self.folder = parts, folder
        recipe = json.loads((parts[0].folder / WORK / "recipe.json").read_text(encoding="utf-8"))
        self.recipe = validate(Recipe, recipe)
        self.hash = parts[0].manifest["recipe_hash"]
        progress = load_progress(folder, "join") or Progress(self.hash, command="join", parts_hash=hash_parts(parts))
        self.guard, self.stores = None, {}
        if self.recipe.duplicates.inside:
            from .duplicates.store import ImageStore
            from .duplicates.workers import Guard

            config, store = self.recipe.duplicates, folder / WORK / "duplicates.sqlite"
            self.guard = Guard(distance=config.distance, crops=config.crops, store=store)
            self.stores = {
                part.number: ImageStore(part.folder / WORK / "duplicates.sqlite", read_only=True) for part in parts
            }
        self.output = Output(folder, self.recipe.format, (self.recipe.shard_rows, self.recipe.shard_bytes), progress)
        if self.guard is not None:  # images that a checkpoint counts are known after a kill
            self.output.before_checkpoint = self.guard.commit

    def run(self) -> dict[str, Any]:
        """Take what is left of the parts, finish the folder and return the manifest."""
        try:
            if not self.output.progress.complete:
                self._take_all()
                drop_repeats(self.output, self.recipe.checks)
                check_whole(self.recipe, self.output)
            return self._finish()
        finally:
            self.output.close()
            for one in (self.guard, *self.stores.values()):
                if one is not None:
                    one.close()

    def _take_all(self) -> None:
        """Every event of the parts in the order of the sources, with the checkpoints of an undivided build."""
        rows = {(part.number, split): part.rows(split) for part in self.parts for split in part.manifest["splits"]}
        events = heapq.merge(
            *(part.events() for part in self.parts), key=lambda one: (one[0]["source"], one[0]["place"])
        )
        done, source, count, batch = self.output.progress.index, 0, 0, []
        bar = tqdm(events, "join", unit=" rows", disable=None)
        taken = (
            (event, number, next(rows[number, event["split"]]) if event["split"] else None) for event, number in bar
        )
        while chunk := list(islice(taken, CHUNK)):
            old, chunk = chunk[: max(0, done - count)], chunk[max(0, done - count) :]
            count += len(old)
            source = old[-1][0]["source"] if old else source
            for (event, _, row), match in zip(chunk, self._check(chunk), strict=True):
                if event["source"] != source:  # an undivided build ends its shards with every source
                    batch = self._add(batch)
                    self.output.checkpoint(0, count)
                    source = event["source"]
                count += 1
                if self._take(event, match) and row is not None:
                    batch.append((row, event["split"]))
                if len(batch) >= min(BATCH, self.output.room):
                    batch = self._add(batch)
                    if self.output.full:
                        self.output.checkpoint(0, count)
        self._add(batch)
        self.output.checkpoint(1, max(count, done))

    def _check(self, chunk: list[tuple[dict[str, Any], int, Row | None]]) -> list[Any]:
        """Tell of what the image of each event is a near-duplicate; None: of none."""
        matches: list[Any] = [None] * len(chunk)
        if self.guard is not None:
            from .duplicates.finder import Query

            asked = [place for place, (event, _, _) in enumerate(chunk) if event["checked"] is not None]
            queries = [
                Query(event["id"], self.stores[number].thumb_of(event["checked"]), event["checked"], [])
                for event, number, _ in (chunk[place] for place in asked)
            ]
            for place, match in zip(asked, self.guard.check_all(queries), strict=True):
                matches[place] = match
        return matches

    def _add(self, batch: list[tuple[Row, str]]) -> list[tuple[Row, str]]:
        for row, split in batch:
            self.output.add(row, split)
        return []

    def _take(self, event: dict[str, Any], match: Any) -> bool:
        """Count and list what became of a record; False where its image is nearly that of an earlier one."""
        source = self.recipe.sources[event["source"]].name
        if match is not None:
            entry = {"id": event["id"], "source": source, "image_key": event["image_key"]}
            self.output.leave_out("duplicates", entry | vars(match))
            return False
        for what, times in event["counts"]:
            self.output.count(source, what, times)
        for name, entry in event["entries"]:
            self.output.list_entry(name, entry)
        return True

    def _finish(self) -> dict[str, Any]:
        """Take what a build that goes on here needs, then finish: the parts may be removed afterwards."""
        work = self.folder / WORK
        shutil.copyfile(self.parts[0].folder / WORK / "recipe.json", work / "recipe.json")
        with closing(AnswerStore(work / "answers.sqlite")) as answers:
            for part in self.parts:
                answers.take(part.folder / WORK / "answers.sqlite")
        manifest = {name: value for name, value in self.parts[0].manifest.items() if name != "part"}
        self.output.finish(manifest | {"format": self.recipe.format})
        return read_manifest(self.folder)


def join(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """
    Unite the parts of a build in `output`, statistics included, and return the manifest.

    Raises:
        `ValueError`: one sentence for what cannot be done.
    """
    parts = find_parts(folders, output)
    progress = load_progress(output, "join")
    if progress and (progress.command, progress.parts_hash) != ("join", hash_parts(parts)):
        raise ValueError(
            f"{output} holds a {progress.command} that is not of these parts as they are now; take another --output, or "
            "remove it."
        )
    with only_builder(output, "join"):
        manifest = read_manifest(output) if (output / MANIFEST).is_file() else Join(parts, output).run()
        if count_rows(manifest):
            write(output)
        return manifest


@command(status=1, interrupted="interrupted; run the same command again to go on.")
def main(argv: Iterable[str] | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and exit status 1."""
    parser = command_parser("training.lrs2m.join", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="parts, or folders that hold them")
    parser.add_argument("--output", required=True, type=Path, help="folder of the data set")
    arguments = parser.parse_args(argv)
    manifest = join(arguments.folders, arguments.output)
    print(", ".join(f"{name} {times:,}" for name, times in manifest["totals"].items()))
    print(f"Data set: {arguments.output / 'data'}")


if __name__ == "__main__":
    sys.exit(main())
