"""Show how much of a checkpoint has been read."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from llama2.formats.stored_model import StoredModel, StoredTensor, observe

SECONDS_BETWEEN_LINES = 10.0


class ReadingBar(Progress):
    """A bar with ETA on standard error, or a line every ten seconds where that is no terminal.

    It follows the tensors of the models that `watch` returns; `total` is how many of their bytes
    will be read.
    """

    def __init__(self, title: str, total: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self.begin = self.printed = time.monotonic()
        self.add_task(title, total=max(total, 1))

    def watch(self, model: StoredModel) -> StoredModel:
        """Return the same checkpoint; reading it moves the bar."""
        return observe(model, self._advance)

    def _advance(self, stored: StoredTensor, tensor: Tensor) -> None:
        task, now = self.tasks[0], time.monotonic()
        total = task.total or 1
        done = min(task.completed + stored.count_bytes(), total)
        self.update(task.id, completed=done)

        if self.disable and now - self.printed >= SECONDS_BETWEEN_LINES:
            left = (now - self.begin) / done * (total - done)
            print(
                f"{task.description}: {done / total:.0%}, ETA {left:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            self.printed = now
