"""Finished completions on disk, so that a job that was killed or failed asks for none twice.

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llama2 import json_files
from llama2.errors import explain_os_errors
from llama2.generate.generator import Completion

Append = Callable[[str, Completion], None]


class CompletionJournal:
    """Completions by the key of their request, written down by one `rank`; without a `directory`
    none is kept."""

    def __init__(self, directory: Path | None, rank: int = 0) -> None:
        self._directory, self._rank = directory, rank

    @property
    def is_kept(self) -> bool:
        """Completions are written down."""
        return self._directory is not None

    def find(self, prompts: Mapping[str, tuple[int, ...]]) -> dict[str, Completion]:
        """Return the completions that are there for some requests: `prompts` by key."""
        completions: dict[str, Completion] = {}
        for file in sorted(self._directory.glob("*.jsonl")) if self._directory else ():
            with explain_os_errors(file), open(file, "rb") as lines:
                for line in lines:
                    completions |= _read_line(line, prompts)

        return completions

    @contextmanager
    def open(self) -> Iterator[Append]:
        """Give a function that writes down one completion at once."""
        if self._directory is None:
            yield lambda key, completion: None
            return

        file = self._directory / f"{self._rank}.jsonl"
        with explain_os_errors(file):
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(file, "ab+") as sink:
                _end_line(sink)

                def append(key: str, completion: Completion) -> None:
                    sink.write(_make_line(key, completion))
                    sink.flush()

                yield append


def _end_line(sink: IO[bytes]) -> None:
    """End a line that a crash cut off."""
    if sink.seek(0, os.SEEK_END):
        sink.seek(-1, os.SEEK_END)
        if sink.read(1) != b"\n":
            sink.write(b"\n")


def _make_line(key: str, completion: Completion) -> bytes:
    row = {
        "key": key,
        "tokens": completion.tokens,
        # JSON has no NaN
        "logprobs": [None if math.isnan(value) else value for value in completion.logprobs],
        "finish": completion.finish,
    }
    return json.dumps({**row, "sum": _checksum(row)}, separators=(",", ":")).encode() + b"\n"


def _read_line(line: bytes, prompts: Mapping[str, tuple[int, ...]]) -> dict[str, Completion]:
    """Return the completion of one line by its key; nothing if it is damaged or not wanted."""
    with suppress(ValueError, KeyError, TypeError):
        row = json_files.parse(line)
        prompt = prompts[row["key"]]
        if row.pop("sum") == _checksum(row):
            logprobs = (math.nan if value is None else float(value) for value in row["logprobs"])
            completion = Completion(prompt, tuple(row["tokens"]), tuple(logprobs), row["finish"])
            return {row["key"]: completion}

    return {}


def _checksum(row: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(row, separators=(",", ":")).encode())
