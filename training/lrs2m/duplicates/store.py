"""The memory of a search for near-duplicates: hashes and answers in SQLite, thumbnails in a file beside it."""

import contextlib
import io
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .fingerprints import SIDE


INSIDE = ""  # the owner of rows of the set itself
VERSION = 2
PATIENCE = 60.0  # seconds until a search of a build that was killed, which ends its work in hand, lets go of the store
_TABLES = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE IF NOT EXISTS images (
    number INTEGER PRIMARY KEY, owner TEXT, id TEXT, hashes BLOB, match TEXT, UNIQUE (owner, id));
CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, signature TEXT);
"""


class ImageStore:
    """
    Images by number: whose they are, and of those to be found their hashes and their thumbnail, which lies at `number`
    thumbnails from the start of its file: hundreds are read for every image that is asked about.

    Args:
        path: SQLite file; thumbnails lie beside it with the suffix `.thumbs`. None: in memory.
        read_only: of a store that is there, and is not to be changed.

    Raises:
        `ValueError`: for a store of an earlier version.
        `OSError`, `sqlite3.OperationalError`: with `read_only`, where there is none.
    """

    def __init__(self, path: str | Path | None, read_only: bool = False):
        self._thumbs_file = Path(path).with_suffix(".thumbs") if path else None
        if read_only:
            self._database = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        else:
            self._database = sqlite3.connect(path or ":memory:", PATIENCE, check_same_thread=False)
        ((tables,), (version,)) = (
            self._database.execute(query).fetchone()
            for query in ("SELECT COUNT(*) FROM sqlite_master", "PRAGMA user_version")
        )
        if tables and version != VERSION:
            raise ValueError(
                f"{path} was written by an earlier version; build again with --restart, which keeps the captioners' answers."
            )
        if read_only:
            self.open_again()
            return
        self._database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
        if self._thumbs_file:
            self._thumbs_file.touch()
            self._thumbs = self._thumbs_file.open("r+b", buffering=0)
        else:
            self._thumbs = io.BytesIO()

    def open_again(self) -> None:
        """Read thumbnails through a file of one's own, as a forked process must."""
        self._thumbs = self._thumbs_file.open("rb", buffering=0)

    def commit(self) -> None:
        """Force everything so far to disk."""
        self._commit()
        self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Writes what is pending."""
        self._commit()
        self._database.close()
        self._thumbs.close()

    def _commit(self) -> None:
        if self._thumbs_file and self._thumbs.writable():
            os.fsync(self._thumbs.fileno())  # first: what the tables know is there
        self._database.commit()

    def answer(self, name: str) -> tuple[str | None] | None:
        """The match that an image of the set was given, as JSON or None, in a tuple; None of one that was never shown."""
        query = "SELECT match FROM images WHERE owner = ? AND id = ?"
        return self._database.execute(query, (INSIDE, name)).fetchone()

    def add(
        self,
        number: int,
        owner: str,
        name: str,
        hashes: np.ndarray | None = None,
        thumb: np.ndarray | None = None,
        match: str | None = None,
    ) -> None:
        """
        Remember an image.

        Args:
            number: a new one.
            owner: its evaluation set; `INSIDE` for a row of the set itself.
            name: of the image there.
            hashes (P,): of its parts; None: it is not to be found.
            thumb (S, S): kept where there are hashes.
            match: the answer it was given, as JSON.
        """
        blob = None
        if hashes is not None:
            blob = hashes.tobytes()
            self._thumbs.seek(number * SIDE * SIDE)
            self._thumbs.write(thumb.tobytes())
        self._database.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (number, owner, name, blob, match))

    def owner_of(self, number: int) -> tuple[str, str]:
        """Whose image that is, and its name."""
        return self._database.execute("SELECT owner, id FROM images WHERE number = ?", (number,)).fetchone()

    def thumbs(self, numbers: Iterable[int]) -> np.ndarray:
        """(n, S, S) uint8: thumbnails by their images' numbers."""
        contents = []
        for number in numbers:
            self._thumbs.seek(number * SIDE * SIDE)
            contents.append(self._thumbs.read(SIDE * SIDE))
        return np.frombuffer(b"".join(contents), np.uint8).reshape(-1, SIDE, SIDE)

    def thumb_of(self, name: str) -> np.ndarray | None:
        """
        The thumbnail of an image of the set; None of one without anything to compare.

        Raises:
            `ValueError`: for an image that was never shown.
        """
        query = "SELECT number, hashes IS NOT NULL FROM images WHERE owner = ? AND id = ?"
        row = self._database.execute(query, (INSIDE, name)).fetchone()
        if row is None:
            raise ValueError(f"the store of a part knows no image {name}; build the part again.")
        number, comparable = row
        return self.thumbs([number])[0] if comparable else None

    def images(self) -> Iterator[list[tuple[int, str, bytes | None]]]:
        """Number, owner and hashes of all images by number, in pieces."""
        rows = self._database.execute("SELECT number, owner, hashes FROM images ORDER BY number")
        while piece := rows.fetchmany(65536):
            yield piece

    def set_evaluation(
        self, owner: str, signature: str, images: Iterable[tuple[str, np.ndarray | None, np.ndarray]]
    ) -> None:
        """
        Take the images of an evaluation set, all or none, unless they are there already.

        Args:
            owner: the set.
            signature: of its files.
            images: name, hashes (None: not to be found) and thumbnail of each.
        """
        known = self._database.execute("SELECT signature FROM owners WHERE owner = ?", (owner,)).fetchone()
        if known == (signature,):
            return
        (last,) = self._database.execute("SELECT COALESCE(MAX(number), -1) FROM images").fetchone()
        with self._database:  # which leaves the old images, and their thumbnails, where it is interrupted
            self._database.execute("DELETE FROM images WHERE owner = ?", (owner,))
            for number, (name, hashes, thumb) in enumerate(images, start=last + 1):
                self.add(number, owner, name, hashes, thumb)
            self._database.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (owner, signature))
            self._commit()

    def count_shown(self) -> int:
        """Images of the set itself."""
        return self._database.execute("SELECT COUNT(*) FROM images WHERE owner = ?", (INSIDE,)).fetchone()[0]


def count_images(path: str | Path, inside: bool) -> int:
    """Images in a store, with or without those of the set itself; 0 where there is none."""
    if not Path(path).exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as database, contextlib.suppress(sqlite3.OperationalError):
        return database.execute("SELECT COUNT(*) FROM images WHERE owner != ? OR ?", (INSIDE, inside)).fetchone()[0]
    return 0  # killed before it had tables
