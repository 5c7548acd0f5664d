"""The folder of a data set in the making: shards, lists of what was left out, and the point a restart goes on from."""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.atomic import replace_json, replacing, sync
from modeling_lrsclip.files.hashing import file_sha256
from modeling_lrsclip.files.locks import only_process

from .data_row import SPLITS, Row
from .recipe import Recipe
from .shards import MANIFEST, SUFFIXES, ShardWriter, open_shard, read_shard


PROGRESS, WORK, DATA = "progress.json", "work", "data"
EARLY_ROWS, EARLY_FACTOR = 1000, 10  # rows of a source from which on, and times its cap by which, a build stops early
LISTS = ("failed", "unmatched", "skipped", "duplicates")  # each a JSON lines file
BATCH = 128  # rows that are added together


@dataclass
class Progress:
    """The point a restart goes on from: everything up to here is on disk."""

    recipe_hash: str
    source: int = 0  # place in the recipe of the source at work
    index: int = 0  # records of its stream that are done
    files: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})  # of rows
    lists: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LISTS, 0))  # bytes
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # by source
    part: list[int] = field(default_factory=lambda: [1, 1])  # which of how many
    compared: bool = False  # rows of all parts were compared with each other
    complete: bool = False  # all rows are in files
    retries: int = 0  # times that `--retry-failed` was given
    # By record: retries before which its answers were others' too.
    repeated: dict[str, int] = field(default_factory=dict)
    command: str = "build"  # that makes the folder: build, join, verify or rejoin
    parts_hash: str | None = None  # of the manifests of the parts that a join takes


class Output:
    """
    Rows and list entries, taken in a stable order and made durable at checkpoints.

    Rows go to files below `work/`; a checkpoint closes the open ones, forces them and the lists to disk and writes
    `progress.json` in one step. After a kill, what came after the last checkpoint is cut off and made again.
    """

    def __init__(
        self, folder: Path, form: str, limits: tuple[int, int], progress: Progress, journal: str | None = None
    ):
        self.folder, self.form, self.progress = folder, form, progress
        self.shard_rows, self.shard_bytes = limits
        self._writers: dict[str, ShardWriter] = {}
        self._work = folder / WORK / "parts"
        self._work.mkdir(parents=True, exist_ok=True)
        if not progress.complete and (folder / WORK / PROGRESS).exists():  # of a build that is made again
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder / DATA, ignore_errors=True)
        known = {file["file"] for files in progress.files.values() for file in files}
        for stale in self._work.iterdir():
            if stale.name not in known:
                stale.unlink()
        self.before_checkpoint: Callable[[], None] = lambda: None  # makes durable what others keep of the rows so far
        self.journal = journal  # name of a further list, of all that is counted and listed
        # Counted and listed since the journal's last line.
        self._event: dict[str, list] = {"counts": [], "entries": []}
        names = (*LISTS, journal) if journal else LISTS
        self._lists = {name: _open_at(folder / f"{name}.jsonl", progress.lists.get(name, 0)) for name in names}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return self.progress.counts

    def count(self, source: str, what: str, times: int = 1) -> None:
        """
        Count what became of rows of a source.

        Args:
            source: its name.
            what: the counter.
            times: is added.
        """
        counts = self.counts.setdefault(source, {})
        counts[what] = counts.get(what, 0) + times
        if self.journal and what not in SPLITS:  # the journal tells a row's split by itself
            self._event["counts"].append([what, times])

    def add(self, row: Row, split: str) -> None:
        if split not in self._writers:
            number = len(self.progress.files[split])
            self._writers[split] = open_shard(self._work / f"{split}-{number:05d}{SUFFIXES[self.form]}")
        self._writers[split].add(row)
        self.count(row["source"], split)

    def list_entry(self, name: str, entry: dict[str, Any]) -> None:
        self._write(name, entry)
        if self.journal:
            self._event["entries"].append([name, entry])

    def leave_out(self, name: str, entry: dict[str, Any], reason: str | None = None) -> None:
        """
        List what does not become a row, and count it.

        Args:
            name: of the list and of the counter.
            entry: for the list, with its `source`.
            reason: that it is counted by, too.
        """
        self.list_entry(name, entry)
        self.count(entry["source"], name)
        if reason:
            self.count(entry["source"], f"{name}: {reason}")

    def refuse_row(self, row: Row, reason: str, detail: str) -> None:
        """
        Leave a finished row out for its long text.

        Args:
            row: with its texts.
            reason: in a word or two, as it is counted.
            detail: of it.
        """
        attempt = {"reason": reason, "detail": detail, "answer": row["long_text"][:300]}
        entry = {"id": row["id"], "source": row["source"], "image_key": row["image_key"], "text": "long"}
        self.leave_out("failed", entry | {"reason": reason, "attempts": [attempt]}, reason)

    def end_event(self, event: dict[str, Any]) -> None:
        """Write a line of the journal: the event with what was counted and listed since the last one."""
        assert self.journal
        self._write(self.journal, event | self._event)
        self._event = {"counts": [], "entries": []}

    def _write(self, name: str, entry: dict[str, Any]) -> None:
        self._lists[name].write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    @property
    def room(self) -> int:
        """Rows that the open files can still take, whatever their split; 0 when it is time for a checkpoint."""
        writers = self._writers.values()
        if any(writer.size >= self.shard_bytes for writer in writers):
            return 0
        return self.shard_rows - max((writer.rows for writer in writers), default=0)

    @property
    def full(self) -> bool:
        return self.room <= 0

    def checkpoint(self, source: int, index: int) -> None:
        """Makes all so far durable: up to record `index` of source number `source`."""
        self.before_checkpoint()
        for split, writer in self._writers.items():
            writer.close()
            self.progress.files[split].append(_closed(writer))
        self._writers = {}
        for name, stream in self._lists.items():
            stream.flush()
            os.fsync(stream.fileno())
            self.progress.lists[name] = stream.tell()
        sync(self._work)
        self.progress.source, self.progress.index = source, index
        save_progress(self.folder, self.progress)

    @property
    def rows_written(self) -> int:
        """Rows in closed files."""
        return sum(file["rows"] for files in self.progress.files.values() for file in files)

    def written_rows(self, columns: list[str]) -> Iterator[Row]:
        """Rows of all closed files, split by split, at least with these columns."""
        for files in self.progress.files.values():
            for file in files:
                yield from read_shard(self._work / file["file"], columns)

    def replace_rows(self, touched: Sequence[bool], change: Callable[[int, Row], Row | None]) -> None:
        """
        Change rows of closed files, in one durable step with what was counted and listed meanwhile.

        Args:
            touched: by place among the rows of all files, whether it is looked at; files without such rows stay.
            change: from place and row to the row to be kept, or None.
        """
        start = 0
        for split, files in self.progress.files.items():
            for number, file in enumerate(files):
                end = start + file["rows"]
                if any(touched[start:end]):
                    source = self._work / file["file"]
                    writer = open_shard(source.with_name(f"changed-{source.name}"))
                    for index, row in enumerate(read_shard(source), start):
                        kept = change(index, row) if touched[index] else row
                        if kept is None:
                            self.count(row["source"], split, -1)
                        else:
                            writer.add(kept)
                    writer.close()
                    files[number] = _closed(writer)
                start = end
        self.progress.files = {
            split: [file for file in files if file["rows"]] for split, files in self.progress.files.items()
        }
        self.progress.compared = True
        self.checkpoint(self.progress.source, self.progress.index)

    def copy_lists(self, folder: Path) -> None:
        """Take over what the build of another data set left out."""
        for name in LISTS:
            with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    self.list_entry(name, json.loads(line))

    def close(self) -> None:
        for stream in self._lists.values():
            stream.close()

    def finish(self, manifest: dict[str, Any]) -> None:
        """
        Move the files to their places below `data/` and write the manifest, last, with counts, shards and lists. Can be
        repeated after a kill.
        """
        self.progress.complete = True
        save_progress(self.folder, self.progress)
        self.close()
        data = self.folder / DATA
        data.mkdir(exist_ok=True)
        splits = {split: self._place(split, data) for split in SPLITS}
        lists = {name: _describe(self.folder / f"{name}.jsonl", self.folder) for name in LISTS}
        sync(data)
        counted = {"counts": self.counts, "totals": totals(self.counts)}
        replace_json(self.folder / MANIFEST, manifest | counted | {"splits": splits, "lists": lists})
        shutil.rmtree(self._work)

    def _place(self, split: str, data: Path) -> dict[str, Any]:
        groups = self._groups(split)
        files = []
        for number, group in enumerate(groups):
            target = data / f"{split}-{number:05d}-of-{len(groups):05d}{SUFFIXES[self.form]}"
            if not target.exists():
                self._join([self._work / file["file"] for file in group], target)
            files.append(_describe(target, self.folder) | {"rows": sum(file["rows"] for file in group)})
        return {"rows": sum(file["rows"] for file in files), "files": files}

    def _groups(self, split: str) -> list[list[dict[str, Any]]]:
        """Neighbouring files that fit into one shard; every checkpoint leaves a small one of the smaller split."""
        groups: list[list[dict[str, Any]]] = []
        for file in self.progress.files[split]:
            together = [*groups[-1], file] if groups else []
            rows, size = (sum(one[what] for one in together) for what in ("rows", "size"))
            if together and rows <= self.shard_rows and size <= self.shard_bytes:
                groups[-1].append(file)
            else:
                groups.append([file])
        return groups

    def _join(self, files: list[Path], target: Path) -> None:
        if len(files) == 1:
            os.replace(files[0], target)
            return
        with replacing(target) as growing:
            writer = open_shard(growing, target.suffix)
            for file in files:
                for row in read_shard(file):
                    writer.add(row)
            writer.close()


@contextlib.contextmanager
def only_builder(folder: Path, command: str | None = None) -> Iterator[None]:
    """
    Hold the folder of a data set, which is made, for a command that writes it.

    Args:
        folder: the data set's.
        command: as of [`load_progress`].

    Raises:
        `ValueError`: where another process is at work there, and as [`load_progress`], before anything is made.
    """
    load_progress(folder, command)
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    busy = f"another command is at work in {folder}; wait for it, or take another --output."
    with only_process(folder / WORK / "lock", busy):
        yield


def save_progress(folder: Path, progress: Progress) -> None:
    replace_json(folder / WORK / PROGRESS, vars(progress))


def begin_again(folder: Path, progress: Progress) -> Progress:
    """
    Progress of a build that starts over to ask again for what failed; nothing is written.

    Args:
        folder: of the data set.
        progress: of the build so far, whose list of failed rows tells those that had one answer for many images.

    Returns:
        The progress at the first row.
    """
    file, size = folder / "failed.jsonl", progress.lists.get("failed", 0)
    lines = file.read_bytes()[:size].splitlines() if size else []
    entries = [entry for entry in map(json.loads, lines) if entry["reason"] == "repeated_answer"]
    repeated = progress.repeated | {entry["id"]: progress.retries for entry in entries}
    return Progress(progress.recipe_hash, retries=progress.retries + 1, part=progress.part, repeated=repeated)


def load_progress(folder: Path, command: str | None = None) -> Progress | None:
    """
    Return how far the command that makes a folder has come; None where none has begun.

    Args:
        folder: the data set's.
        command: that goes on there, where it is to be no other's unfinished work.

    Returns:
        The progress.

    Raises:
        `ValueError`: for the unfinished work of another command, or data that none of them is making.
    """
    path = folder / WORK / PROGRESS
    if path.is_file():
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        if command not in (None, progress.command) and not progress.complete:
            raise ValueError(
                f"{folder} holds an unfinished {progress.command}; run that again until it ends well, or take another "
                "--output."
            )
        return progress
    if taken := [name for name in (DATA, MANIFEST) if (folder / name).exists()]:
        raise ValueError(f"{folder} holds {' and '.join(taken)} of something else; take another --output.")
    return None


def totals(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    """Counts summed over the sources."""
    total: Counter[str] = Counter()
    for one in counts.values():
        total.update(one)
    return dict(total)


def rows_seen(counts: dict[str, int]) -> int:
    """Rows of a source that came to an end: in the data set, skipped, duplicates or failed."""
    return sum(counts.get(what, 0) for what in (*SPLITS, "skipped", "duplicates", "failed"))


def check_caps(recipe: Recipe, source: str, output: Output, early: bool = False) -> None:
    """
    Refuse a source of which too much is left out.

    Args:
        recipe: with the caps.
        source: its name.
        output: with its counts so far.
        early: the source goes on, so that many times the cap is allowed, or half of the rows where that is less.

    Raises:
        `ValueError`: with the counts and the list to look into.
    """
    counts = output.counts.get(source, {})
    seen = rows_seen(counts)
    if not seen or (early and seen < EARLY_ROWS):
        return
    for what, cap in (("skipped", recipe.max_skipped_fraction), ("failed", recipe.max_failed_fraction)):
        count = counts.get(what, 0)
        if count > (max(cap, min(0.5, EARLY_FACTOR * cap)) if early else cap) * seen:
            reasons = {name: times for name, times in counts.items() if name.startswith(f"{what}: ")}
            listed = "; ".join(f"{name.partition(': ')[2]} {times}" for name, times in sorted(reasons.items()))
            raise ValueError(
                f"{count} of {seen} rows of {source} {what}{f' ({listed})' if listed else ''}, more than "
                f"max_{what}_fraction={cap:g} allows; {what}.jsonl in {output.folder} lists them. Mend them, or raise it "
                "and run the command again (before a join, that of every part)."
            )


def check_whole(recipe: Recipe, output: Output) -> None:
    """Raise a `ValueError` where a whole set lacks too much of a source, or has no row though neither cap is 1."""
    for source in recipe.sources:
        check_caps(recipe, source.name, output)
    if not output.rows_written and 1 not in (recipe.max_skipped_fraction, recipe.max_failed_fraction):
        left_out = ", ".join(f"{times} {what}" for what, times in totals(output.counts).items() if times)
        raise ValueError(
            f"no row is left for the data set{f' ({left_out})' if left_out else ''}; the lists in {output.folder} say why."
        )


def _closed(writer: ShardWriter) -> dict[str, Any]:
    return {"file": writer.path.name, "rows": writer.rows, "size": writer.size}


def _describe(path: Path, folder: Path) -> dict[str, Any]:
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _open_at(path: Path, size: int) -> Any:
    """A file to append to, cut to the bytes that the last checkpoint knew."""
    stream = path.open("ab")
    if stream.tell() < size:
        raise ValueError(f"{path} is shorter than the last checkpoint says; it was changed. Use --restart.")
    stream.truncate(size)
    stream.seek(0, os.SEEK_END)
    return stream
