"""From a source's records to outcomes in the same order: images read by threads, texts asked for many rows at a time."""

import asyncio
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .captioners.captioner import Gate
from .data_row import Record
from .routes import Failed, Item, Text, Writer
from .sources.captions_by_key import Unmatched
from .sources.images import Skip, read_picture
from .sources.labels import LabelReader


CHUNK = 32  # records that a thread prepares at a time
WORKERS = 8  # threads at most: what they prepare ahead is in memory
AHEAD_BYTES = 2**30  # of prepared images, about, beyond which fewer chunks are prepared ahead


@dataclass
class Written:
    item: Item
    long: Text
    short: Text

    def remarks(self) -> list[str]:
        """List what is counted of its texts beside the row: answers asked again and warnings, each with the check's name."""
        refused = [f"asked again: {name}" for name in (*self.long.refused, *self.short.refused)]
        return refused + [f"warned: {name}" for name in (*self.long.warnings, *self.short.warnings)]


@dataclass
class Duplicate:
    """A record whose image is nearly that of an evaluation image or of an earlier row."""

    record: Record
    match: Any  # training.lrs2m.duplicates.Match


@dataclass
class Left:
    """A record that cannot be used (Skip) or whose text no attempt brought (Failed)."""

    record: Record
    why: Skip | Failed


Outcome = Written | Duplicate | Left | Unmatched
Prepared = Item | Duplicate | Left | Unmatched


@dataclass
class Pipeline:
    """Outcomes of one source's records."""

    writer: Writer  # of the texts
    labels: LabelReader | None  # of the source, where it has any
    # Tells of what each of some items is a near-duplicate; called in the order of the records.
    check: Callable[[list[Item]], list[Any]] | None
    min_side: int  # pixels of an image, at least
    lookahead: int  # rows whose texts are worked on at a time
    gate: Gate  # shared with captioners that gather batches

    async def outcomes(self, records: Iterable[Record | Unmatched]) -> AsyncIterator[Outcome]:
        """One outcome a record, in the order of the records."""
        chunks = self._prepared(iter(records))
        tasks: deque[asyncio.Task | Outcome] = deque()
        reading = None
        try:
            while True:
                reading = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
                if (chunk := await asyncio.shield(reading)) is None:
                    break
                for prepared in chunk:
                    while len(tasks) >= self.lookahead:
                        yield await self._first(tasks)
                    if isinstance(prepared, Item):
                        self.gate.rows += 1
                        tasks.append(asyncio.create_task(self._write(prepared)))
                    else:
                        tasks.append(prepared)
                while tasks and not isinstance(tasks[0], asyncio.Task):
                    yield tasks.popleft()
            while tasks:
                yield await self._first(tasks)
        finally:
            running = [task for task in tasks if isinstance(task, asyncio.Task)]
            for task in running:
                task.cancel()
            waited = [*running, reading] if reading is not None else running  # a thread cannot be stopped halfway
            await asyncio.gather(*waited, return_exceptions=True)
            chunks.close()

    async def _first(self, tasks: deque) -> Outcome:
        """The outcome at the head; while it is waited for, no other row comes in."""
        if isinstance(head := tasks[0], asyncio.Task):
            if not head.done():
                self.gate.full = True
                await asyncio.sleep(0)  # lets rows that have just started reach their captioner
                self.gate.settle()
            try:
                head = await head
            finally:
                self.gate.full = False
        tasks.popleft()
        return head

    async def _write(self, item: Item) -> Outcome:
        try:
            return Written(item, *await self.writer.texts(item))
        except (Skip, Failed) as why:
            return Left(item.record, why)
        finally:
            self.gate.rows -= 1
            self.gate.settle()

    def _prepared(self, records: Iterator[Record | Unmatched]) -> Iterator[list[Prepared | Written]]:
        """Chunks of prepared records in order; a few are ahead of the one that is asked for, of large images fewer."""
        workers = min(WORKERS, os.cpu_count() or 1)
        most = 2 * workers
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[Future] = deque()
            try:
                while True:
                    while len(ahead) < most and (chunk := list(itertools.islice(records, CHUNK))):
                        ahead.append(pool.submit(lambda chunk: [self._prepare(record) for record in chunk], chunk))
                    if not ahead:
                        return
                    prepared = ahead.popleft().result()
                    size = sum(one.picture.memory for one in prepared if isinstance(one, Item))
                    most = min(2 * workers, max(1, AHEAD_BYTES // max(1, size)))
                    yield self._checked(prepared)
            finally:
                for future in ahead:
                    future.cancel()

    def _prepare(self, record: Record | Unmatched) -> Prepared:
        if isinstance(record, Unmatched):
            return record
        try:
            picture = read_picture(record.image, self.min_side)
            return Item(record, picture, self.labels.of(record, picture.size) if self.labels else [])
        except Skip as why:
            return Left(record, why)

    def _checked(self, chunk: list[Prepared]) -> list[Prepared | Written]:
        """After the check for duplicates, which needs the order; and the texts, where no captioner is asked."""
        items = [one for one in chunk if isinstance(one, Item)]
        matches = iter(self.check(items) if self.check else [None] * len(items))
        return [self._decided(one, next(matches)) if isinstance(one, Item) else one for one in chunk]

    def _decided(self, item: Item, match: Any) -> Prepared | Written:
        if match is not None:
            return Duplicate(item.record, match)
        if self.writer.asks:
            return item
        try:
            return Written(item, *(self.writer.ready_text(which, item) for which in self.writer.source.texts))
        except Skip as why:
            return Left(item.record, why)
