"""Long work in parts: what is finished is on disk, and is not done again after an interruption.

Stages that sample (§3.2, §4.2.4) answer their prompts part by part. The parts are the same whether
or not a run was interrupted, and so is all that is made of them, bit for bit. Memory holds one part
at a time.

A line of `<run>/checkpoints/parts/<name>.jsonl` is one part: its first item, how many they are, its
rows, and a checksum of it all. A line that a crash cut off, and whatever stands behind it, counts
for nothing. Since a line says which items it is of, work may go on in parts of another size (on
other ranks).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from llama2 import json_files
from llama2.errors import explain_os_errors
from llama2.runs import CHECKPOINTS, Run
from llama2.terminal_text import say

T = TypeVar("T")
Work = Callable[[Sequence[T], int], Sequence[Any]]


def work_in_parts(
    run: Run, name: str, items: Sequence[T], size: int, work: Work[T]
) -> Iterator[Any]:
    """Give the rows (plain JSON) that `work(some, first)` makes of `items`, `size` of them at a
    time, in order.

    `first` is the place of `some[0]` in `items`. Every rank calls this alike, does its share inside
    `work`, and gets all rows. A finished part is read back, never made again. UserError where the
    disk refuses.
    """
    path = run.path / CHECKPOINTS / "parts" / f"{name}.jsonl"
    file = _Finished(path, len(items)) if run.ranks.is_main else None
    try:
        done = run.ranks.broadcast(file.end if file else 0)
        first = 0
        while first < len(items):
            if first < done:
                count, rows = run.ranks.broadcast(file.read() if file else (0, []))
            else:
                some = items[first : first + size]
                count, rows = len(some), list(work(some, first))
                if file:
                    file.append(first, count, rows)

            first += count
            yield from rows
    finally:
        if file:
            file.close()


class _Finished:
    """The parts in a file: read from the front, then appended to. `end` is the first of `items`
    that is in none."""

    def __init__(self, path: Path, items: int) -> None:
        self.path, self.end = path, 0
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115
            self._file.seek(0)
            end = 0  # in bytes

            while (
                (line := self._file.readline())
                and (part := _part(line, self.end))
                and self.end + part[0] <= items
            ):
                self.end, end = self.end + part[0], end + len(line)

            if line.endswith(b"\n"):  # a line that a crash cut off is nothing to speak of
                say(
                    f"{path}: damaged behind the first {self.end} of {items}; "
                    "the rest is made again"
                )

            self._file.truncate(end)
            self._file.seek(0)

        self._next = 0

    def read(self) -> tuple[int, list[Any]]:
        """Return how many items the next finished part is of, and its rows."""
        part = _part(self._file.readline(), self._next)
        assert part is not None  # it was checked when the file was opened
        self._next += part[0]

        return part

    def append(self, first: int, count: int, rows: Sequence[Any]) -> None:
        """Put a finished part on the disk."""
        text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
        line = json.dumps(
            {"first": first, "items": count, "sum": _sum(first, count, text), "rows": text}
        )
        with explain_os_errors(self.path):
            self._file.seek(0, os.SEEK_END)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _part(line: bytes, first: int) -> tuple[int, list[Any]] | None:
    """Return the number of items and the rows in a line of the file; None if it is not whole, or
    does not begin at `first`."""
    try:
        part = json_files.parse(line)
        text, count = str(part["rows"]), int(part["items"])
        follows = line.endswith(b"\n") and part["first"] == first and count > 0
        if not follows or part["sum"] != _sum(first, count, text):
            return None

        rows: list[Any] = json_files.parse(text)
        return count, rows
    except (ValueError, KeyError, TypeError):
        return None


def _sum(first: int, count: int, rows: str) -> int:
    return zlib.crc32(f"{first} {count} {rows}".encode("utf-8", "surrogatepass"))
