"""Every answer of a captioner, kept from the moment it arrives, so that none is asked and paid for twice."""

import sqlite3
import time
from pathlib import Path

from .captioner import Answer


SYNC_EVERY = 1.0  # seconds between two times that answers are forced to disk


class Journal:
    """
    Answers by the key of their request, in a SQLite file.

    An answer is written before it is used: a killed process loses none that it had received. They are forced to disk
    every second, so a machine that loses its power loses a second's at most; the file stays readable in any case.
    """

    def __init__(self, file: Path):
        self.file = file
        self.database = sqlite3.connect(file, isolation_level=None)
        self.database.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 0;"
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, finished INTEGER) WITHOUT ROWID;"
        )
        self._synced = time.monotonic()

    def find(self, key: str) -> Answer | None:
        found = self.database.execute("SELECT text, finished FROM answers WHERE key = ?", (key,)).fetchone()
        return Answer(found[0], bool(found[1])) if found else None

    def store(self, key: str, answer: Answer) -> Answer:
        """Keeps an answer and returns the one that is kept: the first, where equal requests were under way together."""
        # Surrogates, which JSON allows in an answer, are not text that can be stored.
        text = answer.text.encode("utf-8", "replace").decode()
        insert = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
        new = self.database.execute(insert, (key, text, answer.finished)).rowcount
        if time.monotonic() - self._synced > SYNC_EVERY:
            self.sync()
        return Answer(text, answer.finished) if new else self.find(key)

    def sync(self) -> None:
        """Forces what was stored to disk."""
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return self.database.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        self.sync()
        self.database.close()
