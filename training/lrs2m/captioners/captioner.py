"""Requests to a captioner, their answers, and the file that keeps each answer, whichever engine is behind it."""

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modeling_lrsclip.files.hashing import json_sha256

from ..recipe import CaptionerConfig
from ..sources.images import Picture


SYNC_EVERY = 1.0  # seconds between two times that answers are forced to disk


class NoAnswer(Exception):
    """A request that stays without an answer; the row is set aside with this reason."""


class CaptionerDown(ValueError):
    """A captioner that cannot answer any request, such as one whose key is refused; the build stops."""


@dataclass(frozen=True)
class Sampling:
    temperature: float  # 0: the likeliest token each time
    top_p: float
    max_tokens: int  # of the captioner's tokenizer
    seed: int


@dataclass(frozen=True)
class Request:
    system: str
    user: str
    picture: Picture | None
    sampling: Sampling

    def key(self, identity: str) -> str:
        """SHA-256 of all that decides the answer, which a restart so finds again; `identity` is the captioner's."""
        image = self.picture.sha256 if self.picture else None
        return json_sha256([identity, self.system, self.user, image, vars(self.sampling)])


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool  # the captioner ended by itself, not at max_tokens


class Captioner(Protocol):
    id: str  # stored with every row; never holds a path of this machine
    identity: str  # all of it that decides an answer

    async def ask(self, request: Request) -> Answer:
        """Raises [`NoAnswer`] for this request, [`CaptionerDown`] for all."""

    async def close(self) -> None: ...


def captioner_id(config: CaptionerConfig) -> str:
    """`Qwen/Qwen2-VL-7B-Instruct` or, of a local folder, its name."""
    return Path(config.model).name if Path(config.model).expanduser().is_dir() else config.model


def captioner_identity(config: CaptionerConfig) -> str:
    """All of a captioner, but for what a request holds, that decides an answer: answers of another one are not its own."""
    return json.dumps([config.model, config.revision, config.dtype, config.max_image_side, config.extra])


class AnswerStore:
    """
    Answers by the key of their request, in a SQLite file.

    An answer is written before it is used: a killed process loses none that it had received. They are forced to disk
    every second, so a machine that loses its power loses a second's at most; the file stays readable in any case.

    Args:
        file: where they are kept; made where it is not there.
        gate: knows the rows that are worked on; a row that waits for another row's answer is none of them.
    """

    def __init__(self, file: Path, gate: "Gate | None" = None):
        self.file, self.gate = file, gate or Gate()
        self._under_way: dict[str, _UnderWay] = {}
        self.database = sqlite3.connect(file, isolation_level=None)
        with self._readable():
            self.database.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 0;"
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, finished INTEGER) WITHOUT ROWID;"
            )
        self._synced = time.monotonic()

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what SQLite says of a damaged file, or of another program's, into a `ValueError` that names it."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "full" in str(error) or "I/O" in str(error):  # of the disk
                raise
            raise ValueError(
                f"{self.file} cannot be read as the answers of a build ({error}); put back a copy of it, or remove it "
                "and its answers are asked for again."
            ) from error

    def _rows(self, query: str, *values: Any) -> list[tuple]:
        return self.database.execute(query, values).fetchall()

    async def ask(self, captioner: Captioner, request: Request) -> Answer:
        """
        The answer to a request: the kept one, or else the captioner's, which is kept from then on. Of equal requests
        that are under way together one is sent, and all get its answer.

        Raises:
            [`NoAnswer`], [`CaptionerDown`]: as the captioner does.
        """
        key = request.key(captioner.identity)
        if (answer := self.find(key)) is not None:
            return answer
        if (equal := self._under_way.get(key)) is not None:
            equal.sharers += 1
            self.gate.rows -= 1
            self.gate.settle()
            return await asyncio.shield(equal.answer)
        equal = self._under_way[key] = _UnderWay(asyncio.get_running_loop().create_future())
        try:
            answer = self.store(key, await captioner.ask(request))
            equal.answer.set_result(answer)
            return answer
        except asyncio.CancelledError:
            equal.answer.cancel()
            raise
        except BaseException as error:
            equal.answer.set_exception(error)
            equal.answer.exception()  # seen: nobody else may wait for it
            raise
        finally:
            del self._under_way[key]
            self.gate.rows += equal.sharers

    def find(self, key: str) -> Answer | None:
        """The answer kept under a request's key."""
        with self._readable():
            rows = self._rows("SELECT text, finished FROM answers WHERE key = ?", key)
        return Answer(str(rows[0][0]), bool(rows[0][1])) if rows else None

    def store(self, key: str, answer: Answer) -> Answer:
        """Keep an answer and return the one that is kept: the first, where equal requests were under way together."""
        # Surrogates, which JSON allows in an answer, are not text that can be stored.
        text = answer.text.encode("utf-8", "replace").decode()
        insert = "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)"
        with self._readable():
            new = self.database.execute(insert, (key, text, answer.finished)).rowcount
        if time.monotonic() - self._synced > SYNC_EVERY:
            self.sync()
        return Answer(text, answer.finished) if new else self.find(key)

    def take(self, other: Path) -> None:
        """Copy the answers of another file."""
        with self._readable():
            self.database.execute("ATTACH ? AS other", (str(other),))
            self.database.execute("INSERT OR IGNORE INTO answers SELECT * FROM other.answers")
            self.database.execute("DETACH other")

    def sync(self) -> None:
        """Force what was stored to disk."""
        with self._readable():
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")
        self._synced = time.monotonic()

    def __len__(self) -> int:
        with self._readable():
            return self._rows("SELECT count(*) FROM answers")[0][0]

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self.database.close()


@dataclass
class _UnderWay:
    """A request that was sent, for the equal ones that come before its answer."""

    answer: asyncio.Future
    sharers: int = 0  # rows that wait for it beside the one that sent it


class Gate:
    """
    The moment at which batches go: as soon as every row that is worked on waits for a batch and no other may come in.
    Batches so depend on the rows alone, not on the clock.
    """

    def __init__(self) -> None:
        self.rows = 0  # worked on
        self.full = False  # no other row may come in before one is done
        self.captioners: list = []  # those that gather batches

    def settle(self) -> None:
        waiting = sum(len(captioner.waiting) for captioner in self.captioners)
        if self.full and waiting and waiting == self.rows:
            max(self.captioners, key=lambda captioner: len(captioner.waiting)).release()
