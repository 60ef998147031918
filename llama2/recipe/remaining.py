"""How long a recipe still takes: the steps ahead at the pace of those done, the running ones by
what they say."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2.terminal_text import line

_BELIEF = 10.0
"""seconds for which the recipe's own weights count beside what is measured"""
_SURE = 0.2
"""share of a step from which on its own speed alone is believed"""
_OF = re.compile(r"(?<![\w./])(\d[\d,]*)(?:/| of )(\d[\d,]*)(?![\w/.])")
_PERCENT = re.compile(r"^[\w .-]*?(\d{1,3}(?:\.\d+)?) ?%")


@dataclass(frozen=True)
class Running:
    """How far one step is."""

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


def remaining(
    waiting: float,
    finished: Sequence[tuple[float, float]],
    running: Sequence[Running],
    elapsed: float,
) -> float:
    """Seconds left, never the same for two moments while something runs.

    waiting: weight of the steps that have not begun. finished: weight and seconds of those done.
    elapsed: seconds since the first of them began; where steps run side by side they take more
    seconds than pass.
    """
    told = [(one.weight * one.share, one.seconds) for one in running if one.share is not None]
    weight = sum(done for done, _ in (*finished, *told))
    seconds = sum(took for _, took in (*finished, *told))
    pace = (_BELIEF + seconds) / (_BELIEF + weight)
    own = [_left(one, pace) for one in running]
    worked = sum(took for _, took in finished) + sum(one.seconds + one.since for one in running)
    overlap = min(1.0, elapsed / worked) if worked else 1.0

    return max([(sum(own) + waiting * pace) * overlap, *own])


def _left(one: Running, pace: float) -> float:
    """Seconds of a running step: what was left when it last spoke, less what has passed, and never
    quite nothing."""
    expected = one.weight * pace * one.left
    if not one.share:
        return _fading(expected, one.since + (0.0 if one.share is not None else one.seconds))

    sure = min(1.0, one.share / _SURE)
    return _fading(sure * one.seconds * one.left / one.share + (1 - sure) * expected, one.since)


def _fading(expected: float, passed: float) -> float:
    return expected * math.exp(-passed / expected) if expected > 0 else 0.0


class Log:
    """What a running step writes, and how far it says it is. Times are of a clock that never goes
    back."""

    def __init__(self, path: Path, begin: float) -> None:
        self.path, self.begin = path, begin
        # an earlier attempt wrote to the same file
        self.from_byte = path.stat().st_size if path.exists() else 0
        # the size when it was last looked at, and when it had changed
        self.size, self.grown = self.from_byte, begin
        # time and share of what this attempt began with
        self.first: tuple[float, float] | None = None

    def tail(self) -> list[str]:
        """The newest lines of this attempt."""
        try:
            with open(self.path, "rb") as file:
                file.seek(max(self.from_byte, os.fstat(file.fileno()).st_size - 2000))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []

        return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]

    def last_line(self) -> str:
        """The newest line, fit for a terminal: a step says what it finds in files."""
        lines = self.tail()
        return line(lines[-1]) if lines else ""

    def _written(self, now: float) -> float:
        """When the newest line was seen first. By the clock of `now`, which nobody sets back as
        they do that of files.
        """
        size = self.path.stat().st_size if self.path.exists() else self.size
        if size != self.size:
            self.size, self.grown = size, now

        return self.grown

    def running(self, weight: float, now: float) -> Running:
        """How far the step is, by the newest line that says so."""
        lines, at = self.tail(), self._written(now)
        share = next(
            (found for line in reversed(lines) if (found := share_of(line)) is not None), None
        )
        if share is None:
            return Running(weight, now - self.begin)

        if self.first is None or share < self.first[1]:
            resumed = any(line.endswith(": resuming") for line in lines)
            self.first = (at, share) if resumed else (self.begin, 0.0)

        begin, before = self.first
        return Running(weight, max(at - begin, 0.0), share - before, 1 - share, max(now - at, 0.0))


def share_of(line: str) -> float | None:
    """The share done that a line of progress tells (`sft 20/80: ...`, `reading 25 %`), None for any
    other line."""
    for done, of in _OF.findall(line):
        part, whole = int(done.replace(",", "")), int(of.replace(",", ""))
        if 0 <= part <= whole and whole:
            return part / whole

    percent = _PERCENT.match(line)
    return float(percent[1]) / 100 if percent and float(percent[1]) <= 100 else None
