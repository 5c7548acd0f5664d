"""One part of a build: the records it takes, and the journal from which `training.lrs2m.join` makes the whole."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data_row import Record
from .sources.captions_by_key import Unmatched


JOURNAL = "journal"


def part_folder(output: Path, part: tuple[int, int]) -> Path:
    """The folder of a part (which, of how many) below the one that the command names."""
    return output / f"{part[0]}-of-{part[1]}"


@dataclass
class Part:
    """
    The records of one part: those whose image's key, or where there is none whose place in the source, falls to it. All
    rows of an image are so in one part, and a record's part hangs on nothing but its key and the number of parts.

    Args:
        number, count: which of how many, from 1.
    """

    number: int
    count: int
    names: dict[str, str] = field(default_factory=dict)  # by record, under which its image was checked for duplicates
    _places: deque[int] = field(default_factory=deque)  # in the source's stream, of records that are on their way

    def choose(self, records: Iterable[Record | Unmatched]) -> Iterator[Record | Unmatched]:
        """This part's records of a source."""
        self._places.clear()
        for position, record in enumerate(records):
            key = (record.image_key if isinstance(record, Record) else record.key) or str(record.position)
            digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
            if int.from_bytes(digest[:8], "big") % self.count == self.number - 1:
                self._places.append(position)
                yield record

    def skip(self) -> None:
        """Forget the place of a record that an earlier run has done."""
        self._places.popleft()

    def event(self, source: int, outcome: Any, split: str | None) -> dict[str, Any]:
        """
        A line of the journal, but for what was counted and listed.

        Args:
            source: place in the recipe.
            outcome: of the record at the head of those on their way.
            split: of its row, where it became one.

        Returns:
            The source, the place in its stream, the record's id, its split or None, and the name under which the set
            itself is still to be searched for its image, or where that matched an evaluation image, counts it; None where it
            was not checked.
        """
        record = None if isinstance(outcome, Unmatched) else outcome.item.record if split else outcome.record
        event = {"source": source, "place": self._places.popleft(), "split": split}
        if record is None:
            return event | dict.fromkeys(("id", "image_key", "checked"))
        return event | {"id": record.id, "image_key": record.image_key, "checked": self.names.pop(record.id, None)}
