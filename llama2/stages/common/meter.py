"""The progress of stages that sample, for whoever waits."""

from __future__ import annotations

import time

from llama2.ranks import Ranks
from llama2.terminal_text import format_clock, say


class Meter:
    """A `Progress` that says on stderr (rank 0), every so many seconds, how many answers there are
    and how long the others will take."""

    def __init__(self, title: str, ranks: Ranks, total: int = 0, seconds: float = 10.0) -> None:
        """`total`: answers of all calls together; 0: each call counts its own share."""
        self.title, self.ranks, self.total, self.seconds = title, ranks, total, seconds
        self._begin = self._reported = time.monotonic()
        self._initial: int | None = None  # answers that were there when the first call began
        # answers before this call; of this rank's share, there and in all
        self._before = self._seen = self._size = 0

    def begin(self, before: int) -> None:
        """Begin the next call, when so many answers are there."""
        self._before, self._seen, self._size = before, 0, 0
        if self._initial is None:
            self._initial, self._begin = before, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < self._seen:  # another call has begun
            self._before += self._size * self.ranks.data.size

        self._seen, self._size = done, total
        now = time.monotonic()
        if self.ranks.is_main and now - self._reported >= self.seconds:
            self._reported = now
            say(self.describe(now - self._begin))

    def describe(self, elapsed: float) -> str:
        """Return `title: 1,024 of 28,000 answers, 3:20 left`."""
        if not self.total:
            return f"{self.title}: {self._seen:,} of {self._size:,} answers"

        done = min(self._before + self._seen * self.ranks.data.size, self.total)
        fresh = done - (self._initial or 0)
        line = f"{self.title}: {done:,} of {self.total:,} answers"
        if fresh <= 0:
            return line

        return f"{line}, {format_clock(elapsed / fresh * (self.total - done))} left"
