"""How far a long copy is: a bar at a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def bytes_done(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of `total` bytes are done, how fast they go and how long the rest will take.

    Gives a function that is told of every so many bytes; any thread may call it.
    """
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                   TextColumn("ETA"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, begin, printed = 0, time.monotonic(), time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done, now = done + count, time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES:
            rate = done / (now - begin)
            print(f"{title} {done / 1e9:.1f}/{total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, "
                  f"ETA {round((total - done) / rate)} s", file=sys.stderr, flush=True)
            printed = now

    yield advance
