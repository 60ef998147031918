"""Run directories: what was asked, what it was made from, and whether it is finished.

    <out>/config.yaml      the resolved configuration
    <out>/manifest.json    verb, seed, code version, fingerprints of all inputs, machine
    <out>/metrics.jsonl    one line a logged step
    <out>/warnings.json    what the user was warned of, a list of lines; absent if of nothing
    <out>/COMPLETE         written last: fingerprints of the outputs (`outputs`), seconds

A finished run is skipped; an unfinished one is resumed; one whose configuration or inputs have
changed is refused and the difference is named, unless it has done nothing yet: a mistake found at
the start may be mended. One process writes a run at a time (an advisory lock). Only rank 0 touches
the disk.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llama2 import atomic, interrupts
from llama2.config import StageConfig
from llama2.errors import UserError
from llama2.ranks import Ranks
from llama2.records import dump
from llama2.results import StageResult
from llama2.runs import completion
from llama2.runs.completion import CHECKPOINTS, COMPLETE, MANIFEST, METRICS, WARNINGS
from llama2.runs.locks import LOCK, lock
from llama2.runs.logs import MetricsLog
from llama2.runs.manifest import SECONDS, is_only_begun, prepare
from llama2.tally import Tally
from llama2.terminal_text import say

_CHECKPOINT = re.compile(r"(\.partial-|\.discarded-)?step-\d+|parts|answers|best")


class Stopped(Exception):
    """Training was asked to stop and has saved its state: no failure, but Ctrl-C (`interrupted`)
    ends scripts too."""

    def __init__(self, step: int, checkpoint: Path | None, interrupted: bool = False) -> None:
        self.step, self.checkpoint = step, checkpoint
        self.exit_code = interrupts.STATUS if interrupted else 0
        rest = "; the same command resumes" if checkpoint else ", nothing was saved"
        super().__init__(f"stopped after step {step}{rest}")


class Run:
    """An open run directory, and the ranks that work on it (this process alone unless given)."""

    def __init__(self, path: Path, finished: bool, ranks: Ranks | None = None) -> None:
        self.path, self.finished = path, finished
        self.ranks = ranks or Ranks.alone()
        self.tallies: dict[str, Tally] = {}
        self.warnings: list[str] = []
        self.results: list[str] = []
        self._metrics = MetricsLog(path)

    def tally(self, name: str) -> Tally:
        """Return the counts of one set of records that this run reads; what they come to is said
        when the run ends."""
        return self.tallies.setdefault(name, Tally())

    def warn(self, line: str) -> None:
        """Say, and keep in warnings.json, what makes this run worth less than its user may think
        (rank 0)."""
        if line not in self.warnings:
            self.warnings.append(line)
            self._say(f"warning: {line}")
            self.write_json(WARNINGS, self.warnings)

    def conclude(self, line: str) -> None:
        """Have `line`, what this run came to, said when it ends: last, after its counts."""
        self.results.append(line)

    def end(self) -> None:
        """Say what was read, kept and left out, and what the run came to (rank 0)."""
        counts = [f"{name}: {tally.line()}" for name, tally in self.tallies.items() if tally.read]
        for line in counts + self.results:
            self._say(line)

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            say(f"{self.path}: {line}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics (rank 0)."""
        if self.ranks.is_main:
            self._metrics.append(step, metrics)

    def rewind(self, step: int) -> None:
        """Forget metrics logged after `step`, when resuming from a checkpoint taken there."""
        damaged = self._metrics.rewind(step) if self.ranks.is_main else 0
        if damaged:
            self._say(f"{METRICS}: damaged: {damaged} lines of it cannot be read and are left out")

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as a JSON file of the run (rank 0)."""
        if self.ranks.is_main:
            atomic.write_atomic(self.path / name, dump(value))

    def write_result(self, result: StageResult) -> None:
        """Write what the stage came to, as the file that the result names (rank 0)."""
        self.write_json(result.file, result.dump())

    def close(self) -> None:
        """Close the files of this run."""
        self._metrics.close()


@contextmanager
def open_run(verb: str, config: StageConfig, ranks: Ranks | None = None) -> Iterator[Run]:
    """Open `config.out` for one stage on these ranks (this process alone unless given); mark it
    complete when the block ends without an exception."""
    path, ranks = config.out, ranks or Ranks.alone()
    new = [directory for directory in (path, *path.parents) if not directory.exists()]
    held = lock(path) if ranks.is_main else None

    try:
        finished = ranks.broadcast(prepare(verb, config, ranks) if ranks.is_main else False)
        run = Run(path, finished, ranks)
        if finished:
            if ranks.is_main:
                say(f"{path}: already finished, skipped")
                _remove_leftovers(path)  # it may have died behind its completion mark

            yield run
        else:
            with _attempt(run):
                yield run
    except UserError:
        if held is not None and is_only_begun(path):
            _clear(path, new)
        elif held is not None and not (path / MANIFEST).is_file():  # it is no run directory
            (path / LOCK).unlink(missing_ok=True)

        raise
    finally:
        if held is not None:
            held.close()


@contextmanager
def _attempt(run: Run) -> Iterator[None]:
    """Count the time of an attempt, and end the run if it succeeds."""
    path, is_main = run.path, run.ranks.is_main
    begin = time.monotonic()
    if is_main:
        # an attempt that was given up may have had another configuration
        (path / WARNINGS).unlink(missing_ok=True)
        begin -= _read_seconds(path / SECONDS)

    try:
        yield
    except BaseException:
        if is_main:
            with suppress(UserError):  # on a full disk what stopped the run is what counts
                atomic.write_atomic(path / SECONDS, f"{time.monotonic() - begin:.2f}")

        raise
    finally:
        run.close()

    run.ranks.barrier()
    if is_main:
        mark = completion.make_mark(path, round(time.monotonic() - begin, 2))
        atomic.write_atomic(path / COMPLETE, mark)  # last of all
        _remove_leftovers(path)
        run.end()

    run.ranks.barrier()


def _read_seconds(file: Path) -> float:
    """Return the seconds that earlier attempts took; 0 where that is not known."""
    if not file.is_file():
        return 0.0

    try:
        seconds = float(file.read_text("utf-8"))
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    except (OSError, ValueError):
        pass

    print(f"{file}: damaged: how long earlier attempts took is not counted", file=sys.stderr)
    return 0.0


def _remove_leftovers(run: Path) -> None:
    """Delete what a run needed until its end.

    Where the folder of checkpoints, or one in it, was moved to another disk and linked, what the
    run itself wrote there is deleted.
    """
    (run / SECONDS).unlink(missing_ok=True)
    folder = run / CHECKPOINTS
    for path in [*folder.iterdir()] if folder.is_dir() else []:
        linked = folder.is_symlink() or path.is_symlink()
        if path.is_dir() and (not linked or _CHECKPOINT.fullmatch(path.name)):
            shutil.rmtree(path.resolve(), ignore_errors=True)

    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)

    if folder.exists():
        print(f"{folder}: could not be deleted, and is no longer needed", file=sys.stderr)


def _clear(path: Path, new: Sequence[Path]) -> None:
    """Take away what was begun in a run directory that holds nothing else, and the directories made
    for it."""
    for entry in sorted(path.rglob("*"), reverse=True):  # what lies deeper comes first
        if entry.is_dir() and not entry.is_symlink():
            entry.rmdir()
        else:
            entry.unlink()

    with suppress(OSError):  # somebody else has put something there
        for directory in new:
            directory.rmdir()
