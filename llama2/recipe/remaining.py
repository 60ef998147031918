"""The time that a recipe still takes: the steps ahead at the pace of those done, the running ones
by what they say."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2.terminal_text import fit_line

_BELIEF = 10.0
"""seconds for which the recipe's own weights count beside what is measured"""
_SURE = 0.2
"""share of a step from which on its own speed alone is believed"""
_OF = re.compile(r"(?<![\w./])(\d[\d,]*)(?:/| of )(\d[\d,]*)(?![\w/.])")
_PERCENT = re.compile(r"^[\w .-]*?(\d{1,3}(?:\.\d+)?) ?%")


@dataclass(frozen=True)
class StepProgress:
    """The state of a running step, by what it says."""

    weight: float
    """what the recipe thinks it takes, in proportion to other steps"""
    seconds: float
    """time in which it did `share`; without a share, time since it began"""
    share: float | None = None
    """of the whole step, what was done in that time; None where it does not say"""
    left: float = 1.0
    """of the whole step, what was left then"""
    since: float = 0.0
    """seconds since it last said so"""


def estimate_remaining(
    waiting: float,
    finished: Sequence[tuple[float, float]],
    running: Sequence[StepProgress],
    elapsed: float,
) -> float:
    """Return the seconds left, never the same for two moments while something runs.

    waiting: weight of the steps that have not begun. finished: weight and seconds of those done.
    elapsed: seconds since the first of them began; where steps run side by side they take more
    seconds than pass.
    """
    done = list(finished)
    worked = sum(seconds for _, seconds in finished)
    for step in running:
        worked += step.seconds + step.since
        if step.share is not None:
            done.append((step.weight * step.share, step.seconds))

    weight = sum(weight for weight, _ in done)
    seconds = sum(seconds for _, seconds in done)
    pace = (_BELIEF + seconds) / (_BELIEF + weight)
    each = [_estimate_step(step, pace) for step in running]
    overlap = min(1.0, elapsed / worked) if worked else 1.0
    return max([(sum(each) + waiting * pace) * overlap, *each])


def _estimate_step(step: StepProgress, pace: float) -> float:
    """Return the seconds of a running step: what was left when it last spoke, less what has passed,
    and never quite nothing."""
    expected = step.weight * pace * step.left
    if step.share is None:
        return _fade(expected, step.since + step.seconds)
    if step.share == 0:
        return _fade(expected, step.since)

    sure = min(1.0, step.share / _SURE)
    by_itself = step.seconds * step.left / step.share
    return _fade(sure * by_itself + (1 - sure) * expected, step.since)


def _fade(expected: float, passed: float) -> float:
    return expected * math.exp(-passed / expected) if expected > 0 else 0.0


class StepLog:
    """The log of a running step, which says how far it is. Times are of a clock that never goes
    back."""

    def __init__(self, path: Path, begin: float) -> None:
        self.path, self.begin = path, begin
        self.start = self._size(0)
        """bytes that an earlier attempt wrote to the same file"""
        self.size, self.grown = self.start, begin
        """the size when it was last looked at, and when it had changed"""
        self.first: tuple[float, float] | None = None
        """time and share of what this attempt began with"""

    def _size(self, otherwise: int) -> int:
        return self.path.stat().st_size if self.path.exists() else otherwise

    def tail(self) -> list[str]:
        """The newest lines of this attempt."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self.start, os.fstat(file.fileno()).st_size - 2000))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []

        lines = [line.strip() for line in re.split(r"[\r\n]", text)]
        return [line for line in lines if line]

    def last_line(self) -> str:
        """The newest line, fit for a terminal: a step says what it finds in files."""
        lines = self.tail()
        return fit_line(lines[-1]) if lines else ""

    def progress(self, weight: float, now: float) -> StepProgress:
        """Return how far the step is, by the newest line that says so."""
        lines, size = self.tail(), self._size(self.size)
        if size != self.size:  # by the clock of `now`, which nobody sets back as that of files
            self.size, self.grown = size, now

        shares = [share for share in map(read_share, lines) if share is not None]
        if not shares:
            return StepProgress(weight, now - self.begin)

        share = shares[-1]
        if self.first is None or share < self.first[1]:
            resumed = any(line.endswith(": resuming") for line in lines)
            self.first = (self.grown, share) if resumed else (self.begin, 0.0)

        begin, before = self.first
        seconds, since = max(self.grown - begin, 0.0), max(now - self.grown, 0.0)
        return StepProgress(weight, seconds, share - before, 1 - share, since)


def read_share(line: str) -> float | None:
    """Return the share done that a line of progress tells (`sft 20/80: ...`, `reading 25 %`), None
    for any other line."""
    for done, of in _OF.findall(line):
        part, total = int(done.replace(",", "")), int(of.replace(",", ""))
        if part <= total and total:
            return part / total

    percent = _PERCENT.match(line)
    return float(percent[1]) / 100 if percent and float(percent[1]) <= 100 else None
