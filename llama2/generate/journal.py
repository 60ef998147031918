"""Finished completions on disk, so that a job that was killed or failed asks for nothing twice.

A directory holds one file of JSON Lines for each rank, to which a line is appended when a
completion is finished. All files are read, so a job may go on with another number of ranks. A line
cut off by a crash counts for nothing; one that was damaged later is known by its checksum, and its
completion is asked for again.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llama2 import json_files
from llama2.errors import explain_os_errors
from llama2.generate.engine import Completion

Keep = Callable[[str, Completion], None]


class Journal:
    """Completions by the key of what was asked, written down by one `rank`; without a `directory`
    nothing is kept."""

    def __init__(self, directory: Path | None, rank: int = 0) -> None:
        self._directory, self._rank = directory, rank

    def find(self, asked: Mapping[str, tuple[int, ...]]) -> dict[str, Completion]:
        """The completions that are there of what is asked now: key to prompt."""
        found = {}
        for file in sorted(self._directory.glob("*.jsonl")) if self._directory else ():
            with explain_os_errors(file), open(file, "rb") as lines:
                for line in lines:
                    key, completion = _read(line, asked)
                    if completion is not None:
                        found[key] = completion

        return found

    @contextmanager
    def open(self) -> Iterator[Keep]:
        """A function that writes down one completion at once."""
        if self._directory is None:
            yield lambda key, completion: None
            return

        file = self._directory / f"{self._rank}.jsonl"
        with explain_os_errors(file):
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(file, "ab+") as sink:
                _begin_line(sink)

                def keep(key: str, completion: Completion) -> None:
                    sink.write(_line(key, completion))
                    sink.flush()

                yield keep


def _begin_line(sink: IO[bytes]) -> None:
    """End the line that a crash cut off."""
    if sink.seek(0, os.SEEK_END):
        sink.seek(-1, os.SEEK_END)
        if sink.read(1) != b"\n":
            sink.write(b"\n")


def _line(key: str, completion: Completion) -> bytes:
    logprobs = [None if math.isnan(value) else value for value in completion.logprobs]
    row = {
        "key": key,
        "tokens": completion.tokens,
        "logprobs": logprobs,
        "finish": completion.finish,
    }
    return json.dumps({**row, "sum": _sum(row)}, separators=(",", ":")).encode() + b"\n"


def _sum(row: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(row, separators=(",", ":")).encode())


def _read(line: bytes, asked: Mapping[str, tuple[int, ...]]) -> tuple[str, Completion | None]:
    try:
        row = json_files.parsed(line)
        key = row["key"]
        if row.pop("sum") != _sum(row):
            return "", None
        if key not in asked:
            return key, None

        logprobs = tuple(math.nan if value is None else float(value) for value in row["logprobs"])
        return key, Completion(asked[key], tuple(row["tokens"]), logprobs, row["finish"])
    except (ValueError, KeyError, TypeError):
        return "", None
