"""What a run says of itself while it works: metrics, one line a logged step, and warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors
from llama2.runs.completion import METRICS, WARNINGS, suggest_cure


class MetricsLog:
    """The file metrics.jsonl of a run, appended to."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self._file: IO[str] | None = None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line."""
        with explain_os_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()

    def rewind(self, step: int) -> int:
        """Forget what was logged after `step`; return how many lines are damaged, and left out."""
        self.close()
        if not self.path.exists():
            return 0

        with explain_os_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")

        rows = [_parse_row(line) for line in lines]
        earlier = [
            line + b"\n"
            for line, row in zip(lines, rows)
            if row is not None and row["step"] <= step
        ]
        atomic.write_atomic(self.path, b"".join(earlier))

        return rows[:-1].count(None)  # the last is what a crash cut off, or nothing

    def close(self) -> None:
        """Close the file until the next line."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the metrics a run logged, [] where it logged none; a line that is not whole is left
    out."""
    file = path / METRICS
    if not file.exists():
        return []

    with explain_os_errors(file):
        rows = [_parse_row(line) for line in file.read_bytes().split(b"\n")]

    return [row for row in rows if row is not None]


def _parse_row(line: bytes) -> dict[str, float] | None:
    """Return a line of metrics; None for one that is not whole."""
    try:
        row = json_files.parse(line)
    except ValueError:
        return None

    if not isinstance(row, dict):
        return None
    if not all(isinstance(value, (int, float)) for value in row.values()):
        return None

    return row if math.isfinite(row.get("step", math.nan)) else None


def read_warnings(path: Path) -> list[str]:
    """Read what the user of a run was warned of."""
    file = path / WARNINGS
    return read_list(file, suggest_cure(path)) if file.is_file() else []


def read_list(file: Path, cure: str) -> list[str]:
    """Read the texts in a JSON file; UserError with `suggest_cure` where it is damaged."""
    texts: list[str] = json_files.read_list(file, cure)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file}: damaged: a list of texts was expected", cure)

    return texts
