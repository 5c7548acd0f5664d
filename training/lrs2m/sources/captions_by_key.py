"""Captions of one table looked up for the images of another by their key, on disk, at any size."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..data_row import Record
from ..recipe import ReadConfig, SourceConfig
from .records import SHOWN, caption_of, join_key, key_source, read_rows, read_source


_BATCH = 4096  # rows a transaction


@dataclass(frozen=True)
class Unmatched:
    """A row without a partner, or without a key (None)."""

    side: str  # images or captions
    key: str | None
    position: int  # of the row in its table, from 0


class JoinedCaptions:
    """
    The captions of a source's `join` by key, in a SQLite file that is made once and read on a restart.

    Args:
        source: with a `join`.
        root: where relative paths of the recipe start.
        file: where the index is kept.

    Raises:
        `ValueError`: for a table that cannot be read; where no key is on both sides; where the recipe's steps make one
            key of two names of a side, so that captions would go to another image.
    """

    def __init__(self, source: SourceConfig, root: Path, file: Path):
        self.source, self.root, self.file = source, root, file
        if not file.exists():
            self._index()
        self.database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self.database.execute("PRAGMA query_only = true")
        self.database.execute("PRAGMA cache_size = -65536")  # KiB

    def close(self) -> None:
        self.database.close()

    def _index(self) -> None:
        assert self.source.join is not None
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        database = sqlite3.connect(unfinished, isolation_level=None)
        # What is lost by a crash is made again, so nothing needs to be safe before the rename.
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"
            "CREATE TABLE captions (key TEXT, name TEXT, position INTEGER, long_text TEXT, short_text TEXT);"
            "CREATE TABLE images (key TEXT, name TEXT);"
            "CREATE TABLE nameless (side TEXT, position INTEGER);"
        )
        _insert(database, "captions", self._keyed_rows("captions", self.source.join, database))
        _insert(database, "images", self._keyed_rows("images", self.source.read, database))
        # Indexed at the end: sorting is sequential on disk, inserting keys in their random order is not.
        database.executescript(
            "CREATE INDEX by_key ON captions (key, name, position); CREATE INDEX by_image ON images (key, name);"
        )
        try:
            self._check_keys(database)
        finally:
            database.close()
        unfinished.replace(self.file)

    def _check_keys(self, database: sqlite3.Connection) -> None:
        sides = {"images": self.source.read, "captions": self.source.join}
        for side, read in sides.items():
            if database.execute(f"SELECT NOT EXISTS (SELECT * FROM {side})").fetchone()[0]:
                field = "read" if side == "images" else "join"
                raise ValueError(f"none of the rows of {read.path} has a key; set {field}.columns.key.")
            twice = f"SELECT MIN(name), MAX(name), key FROM {side} GROUP BY key HAVING MIN(name) < MAX(name) LIMIT 1"
            if pair := database.execute(twice).fetchone():
                raise ValueError(
                    f"source {self.source.name}: {pair[0]} and {pair[1]} of {read.path} have the same key, {pair[2]}, so "
                    "captions would go to another image; keep more of the name: leave out a step of key (lower, stem, "
                    "basename), or keep a folder with key.replace."
                )
        on_both = "SELECT EXISTS (SELECT * FROM images WHERE key IN (SELECT key FROM captions))"
        if not database.execute(on_both).fetchone()[0]:
            shown = []
            for side, read in sides.items():
                keys = database.execute(f"SELECT key FROM {side} ORDER BY rowid LIMIT {SHOWN}").fetchall()
                shown.append(f"{read.path} has {', '.join(key for (key,) in keys)}")
            raise ValueError(
                f"source {self.source.name}: no key is on both sides: {'; '.join(shown)}. Change read.key and join.key "
                "until they are alike."
            )

    def _keyed_rows(self, side: str, read: ReadConfig, database: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
        """Rows of the table `captions` or `images`; the places of those without a key are noted."""
        for position, row in enumerate(read_rows(read, self.root)):
            key = join_key(row, read)
            if key is None:
                database.execute("INSERT INTO nameless VALUES (?, ?)", (side, position))
            elif side == "images":
                yield key, key_source(row)
            else:
                texts = (caption_of(row[name])[0] if name in row else None for name in ("long_text", "short_text"))
                yield key, key_source(row), position, *texts
            if read.limit is not None and position + 1 >= read.limit:
                return

    def records(self) -> Iterator[Record | Unmatched]:
        """
        Records of the images' table with both captions, a record for every pair of the same key; among them, where they
        come up, images without a caption, and at the end captions without an image and rows without a key.
        """
        position = 0
        for record in read_source(self.source, self.root):
            key = join_key({"key": record.image_key}, self.source.read)
            query = "SELECT long_text, short_text FROM captions WHERE key = ? ORDER BY position"
            captions = self.database.execute(query, (key,)).fetchall() if key is not None else []
            if not captions and key is not None:
                yield Unmatched("images", key, record.position)
            for texts in captions:
                joined = {name: text for name, text in zip(("long_text", "short_text"), texts) if text is not None}
                yield replace(record, position=position, **joined)
                position += 1
        query = "SELECT key, position FROM captions WHERE key NOT IN (SELECT key FROM images) ORDER BY position"
        for key, row in self.database.execute(query):
            yield Unmatched("captions", key, row)
        for side, row in self.database.execute("SELECT side, position FROM nameless ORDER BY side, position"):
            yield Unmatched(side, None, row)


def _insert(database: sqlite3.Connection, table: str, rows: Iterator[tuple[Any, ...]]) -> None:
    while batch := list(islice(rows, _BATCH)):
        database.execute("BEGIN")
        database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(batch[0]))})", batch)
        database.execute("COMMIT")
