"""Long work in parts: what is finished is on disk, and is not done again after an interruption.

Stages that sample (§3.2, §4.2.4) answer their prompts part by part. The parts are the same whether or not a run was
interrupted, and so is all that is made of them, bit for bit. Memory holds one part at a time.

A line of `<run>/checkpoints/parts/<name>.jsonl` is one part: its number, its rows, and a checksum of them. A line that
a crash cut off, and whatever stands behind it, counts for nothing.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from llama2 import mesh
from llama2.errors import explain_os_errors
from llama2.runs import CHECKPOINTS, Run

T = TypeVar("T")
Work = Callable[[Sequence[T], int], Sequence[Any]]


def in_parts(run: Run, name: str, items: Sequence[T], size: int, work: Work[T]) -> Iterator[Any]:
    """The rows (plain JSON) that `work(some, first)` makes of `items`, `size` of them at a time, in order.

    `first` is the place of `some[0]` in `items`. Every rank calls this alike, does its share inside `work`, and gets
    all rows. A finished part is read back, never made again. UserError where the disk refuses.
    """
    path = run.path / CHECKPOINTS / "parts" / f"{name}.jsonl"
    starts = range(0, len(items), size)
    found = _Finished(path) if mesh.is_main() else None
    try:
        done = mesh.broadcast(min(found.count, len(starts)) if found else 0)
        for part, first in enumerate(starts):
            if part < done:
                rows = mesh.broadcast(found.read() if found else [])
            else:
                rows = list(work(items[first : first + size], first))
                if found:
                    found.append(part, rows)
            yield from rows
    finally:
        if found:
            found.close()


class _Finished:
    """The parts in a file: read from the front, then appended to."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - lives as long as the work
            self._file.seek(0)
            whole = 0
            while (line := self._file.readline()) and _rows(line, self.count) is not None:
                self.count, whole = self.count + 1, whole + len(line)
            self._file.truncate(whole)
            self._file.seek(0)
        self._read = 0

    def read(self) -> list[Any]:
        """The rows of the next finished part."""
        rows = _rows(self._file.readline(), self._read)
        assert rows is not None  # it was checked when the file was opened
        self._read += 1
        return rows

    def append(self, part: int, rows: Sequence[Any]) -> None:
        """Put a finished part on the disk."""
        text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
        line = json.dumps({"part": part, "sum": zlib.crc32(text.encode("utf-8", "surrogatepass")), "rows": text})
        with explain_os_errors(self.path):
            self._file.seek(0, os.SEEK_END)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows(line: bytes, part: int) -> list[Any] | None:
    """The rows in a line of the file; None if it is not whole, or not that of this part."""
    try:
        found = json.loads(line)
        text = str(found["rows"])
        whole = line.endswith(b"\n") and found["part"] == part
        if not whole or found["sum"] != zlib.crc32(text.encode("utf-8", "surrogatepass")):
            return None
        rows: list[Any] = json.loads(text)
        return rows
    except (ValueError, KeyError, TypeError):
        return None
