"""A bar for work that reads a checkpoint: as much of it is done as bytes have been read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llama2.formats.stored_model import StoredModel, observe

SECONDS_BETWEEN_LINES = 10.0


class Reading:
    """A bar with ETA on standard error, or a line every ten seconds where that is no terminal.

    It follows the tensors of the sources that `watched` gives out; `total` is how many bytes will
    be read of them.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, max(total, 1), 0
        self.begin = self.printed = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Reading:
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.bar.add_task(self.title, total=self.total)

        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def watched(self, source: StoredModel) -> StoredModel:
        """The same checkpoint; what is read of it moves the bar."""
        return observe(source, lambda stored, tensor: self._advance(stored.nbytes))

    def _advance(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
            return

        now = time.monotonic()
        if now - self.printed >= SECONDS_BETWEEN_LINES:
            left = (now - self.begin) / self.done * (self.total - self.done)
            print(
                f"{self.title}: {self.done / self.total:.0%}, ETA {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            self.printed = now


def size(sources: Iterable[StoredModel]) -> int:
    """The bytes of all tensors of some checkpoints."""
    return sum(stored.nbytes for source in sources for stored in source.tensors.values())
