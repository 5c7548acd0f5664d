"""Rows that cannot be used: counted, named once each in a file, and capped for all processes together."""

import contextlib
import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from modeling_lrsclip.encoding.imagery import ImageError, image_name

from ..distributed import cpu_group, largest
from .rows import Row


SKIPPED = "skipped.jsonl"  # below a run folder
FEW = 10  # rows that may always be skipped: a share of the first few batches says nothing yet


class SkippedFile:
    """
    `skipped.jsonl` in a run folder: one line for each row that could not be used, with its `id`, the `file` it lies in
    and the `reason`. A later epoch, a resumed run or a validation that meets the row again adds nothing.
    """

    def __init__(self, folder: Path):
        self.path, self._named, self._size = folder / SKIPPED, set(), 0

    def add(self, rows: list[dict[str, str]]) -> None:
        """Write down those rows that are not named yet; a line that a kill fell into is taken out."""
        if self.path.exists() and self.path.stat().st_size != self._size:  # another has written since
            *whole, cut = self.path.read_bytes().split(b"\n")  # a reason may hold U+2028
            if cut:
                self.path.write_bytes(b"".join(line + b"\n" for line in whole))
            self._named = set()
            for line in whole:
                with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):  # damaged: named anew
                    self._named.add(str(json.loads(line)["id"]))
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                if row["id"] not in self._named:
                    self._named.add(row["id"])
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._size = self.path.stat().st_size


def skipped_row(row: Row, location: str, reason: Exception) -> dict[str, str]:
    """
    Describe a row that cannot be used.

    Args:
        row: as its source stores it.
        location: the file that the row itself, maybe with its image, lies in.
        reason: why it cannot be used.

    Returns:
        a line of `skipped.jsonl`: `id`, `file` and `reason`.
    """
    file = image_name(row.image) if isinstance(reason, ImageError) else None
    return {"id": row.id, "file": file or location, "reason": str(reason)}


def check_share(skipped: int, visited: int, allowed: float, last: dict[str, str]) -> None:
    """
    Check that few enough rows were skipped: some always may be, see `FEW`, unless none is allowed.

    Args:
        skipped: rows that could not be used.
        visited: rows tried.
        allowed: share of them that may be skipped, from 0 to 1.
        last: line of `skipped.jsonl` of the last one, an example for the message.

    Raises:
        `ValueError`: when they are too many.
    """
    if skipped > allowed * visited and (skipped > FEW or allowed == 0):
        raise ValueError(
            f"{skipped} of {visited} rows visited cannot be used ({skipped / visited:.1%}), more than "
            f"data.max_skipped_fraction={allowed:g} allows; the last one is {last['id']}: {last['reason']} "
            f"All of them are in {SKIPPED} of the run folder; mend or remove them, or raise data.max_skipped_fraction."
        )


class SkippedRows:
    """
    Count of the rows that a run could not use, on all of its processes: written to [`SkippedFile`], and the run ended for all
    when they are too many (see [`check_share`]). The place in the batch is taken by the row after it (training/data/pairs.py).

    Args:
        folder: the run folder.
        allowed: `data.max_skipped_fraction`, from 0 to 1, of the rows visited so far.
        writes: whether this is the process that writes the file.
    """

    def __init__(self, folder: Path, allowed: float, writes: bool):
        self.file, self.allowed, self.writes = SkippedFile(folder), allowed, writes
        self._group = cpu_group()

    def take(self, batch: dict[str, Any], before: int, used: int) -> int:
        """
        Note what the reading of a batch left out; every process must call it for every batch. While nothing is left
        out, that costs one number sent between the processes' CPUs.

        Args:
            batch: of this process, with `skipped` and, where no row at all could be found, `fault`.
            before: visits of unusable rows before this batch.
            used: pairs that the run has been given, those of this global batch included.

        Returns:
            Visits of unusable rows so far.

        Raises:
            `ValueError`: past the cap, or without a usable row, on every process.
        """
        if not largest(len(batch["skipped"]), self._group):
            return before
        skipped = gather_object(batch["skipped"])
        faults = gather_object([batch["fault"]] if "fault" in batch else [])
        if self.writes:
            self.file.add(skipped)
        if faults:
            raise ValueError(f"{faults[0]} All of them are in {self.file.path}.")
        check_share(before + len(skipped), before + len(skipped) + used, self.allowed, skipped[-1])
        return before + len(skipped)
