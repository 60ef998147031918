"""A recipe at work: the steps that wait, run and are finished, and the screen."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llama2 import runs
from llama2.errors import UserError
from llama2.interrupts import STATUS, let_go_of_terminal
from llama2.recipe.config import Config
from llama2.recipe.remaining import StepLog, estimate_remaining
from llama2.recipe.steps import RecipeStep
from llama2.recipe.workers import Workers
from llama2.terminal_text import fit_line, format_clock

_REPEAT = "mend it and repeat the command: finished steps are kept"
_RESUME = "the same command resumes"
_LIMITS = "see `ulimit -a` and what else runs here; the same command resumes"


@dataclass(frozen=True)
class Work:
    """A running step."""

    workers: Workers
    log: StepLog


class Board:
    """The steps that wait, run and are finished, and what the screen says about them."""

    def __init__(self, recipe: Config, steps: dict[str, RecipeStep]) -> None:
        self.recipe, self.steps = recipe, steps
        self.waiting = list(steps)
        self.running: dict[str, Work] = {}
        self.finished: dict[str, float] = {}
        """seconds a step took; 0 if it was finished before we began"""
        self.error: UserError | None = None
        self.stopping = 0
        """the number of the signal that asked for it"""
        self.begin = time.monotonic()
        self.console = Console(stderr=True)
        self.live: Live | None = None

    # --- work ---

    def work(self) -> None:
        """Start what can start, wait for what runs, until nothing is left or something failed."""
        printed = time.monotonic()
        while self.running or (self.waiting and not self.error and not self.stopping):
            if not self.error and not self.stopping:
                self._start_ready()

            self._collect()
            if self.live:
                self.live.update(self._picture())
            elif time.monotonic() - printed > 30:
                printed = time.monotonic()
                self.console.print(self._picture(), soft_wrap=True)

            time.sleep(0.05)

    def _cores(self, name: str) -> int:
        return self.steps[name].keys.count_cores(self.recipe.cores)

    def _start_ready(self) -> None:
        """Start every step whose inputs are finished, as far as the cores go."""
        free = self.recipe.cores - sum(map(self._cores, self.running))
        for name in list(self.waiting):
            step, cores = self.steps[name], self._cores(name)
            if step.needs - self.finished.keys() or cores > free:
                continue

            self.waiting.remove(name)
            try:
                if runs.is_finished(step.verb, step.config):
                    self.finished[name] = 0.0
                    continue
            except UserError as error:
                self._fail(name, str(error))
                return

            if not self._start(step, cores):
                return

            free -= cores

    def _start(self, step: RecipeStep, cores: int) -> bool:
        """Start the processes of a step; return whether others may start as well."""
        log = StepLog(self.recipe.out / "logs" / f"{step.name}.log", time.monotonic())
        ranks = step.keys.processes
        threads = max(1, cores // ranks)
        try:
            workers = Workers.start(step.verb, step.values, ranks, threads, log.path)
        # a signal to the whole group, or a machine without memory, ended what starts processes
        except EOFError:
            self._fail(
                step.name, "the process that starts others was killed (out of memory?)", _RESUME
            )
            return False
        except OSError as error:  # BlockingIOError, too: no more processes
            reason = os.strerror(error.errno or 0).lower()
            self._fail(step.name, f"no process could be started ({reason})", _LIMITS)
            return False

        self.running[step.name] = Work(workers, log)
        if self.stopping:  # the signal came meanwhile
            workers.stop()

        return not self.stopping

    def _collect(self) -> None:
        """Note how steps ended."""
        for name, work in list(self.running.items()):
            if work.workers.are_alive():
                continue

            del self.running[name]
            result = work.workers.result()
            if result == "done":
                self.finished[name] = time.monotonic() - work.log.begin
                self._print_finished(name, work.log)
            elif result == "stopped":
                self.stopping = self.stopping or signal.SIGTERM
            else:
                self._fail(name, result, _RESUME if work.workers.killed else _REPEAT)

    def _fail(self, name: str, cause: str, cure: str = _REPEAT) -> None:
        """Remember the first error; what runs beside it saves and stops."""
        self.error = self.error or UserError(f"step {name}: {cause}", cure)
        for work in self.running.values():
            work.workers.stop()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Let every step save and stop; kill them at a second signal."""
        let_go_of_terminal(number)
        for work in self.running.values():
            work.workers.kill() if self.stopping else work.workers.stop()

        self.stopping = number

    def finish(self) -> int:
        """Say how it ended, and return the exit status: 130 for a recipe that Ctrl-C left
        unfinished."""
        if self.error:
            raise self.error

        done, total = len(self.finished), len(self.steps)
        ending = f"all {total} steps done in {format_clock(time.monotonic() - self.begin)}"
        if done < total:
            ending = f"stopped after {done} of {total} steps; the same command resumes"

        self._print(fit_line(f"{self.recipe.out}: {ending}"))
        return STATUS if self.stopping == signal.SIGINT and done < total else 0

    # --- the screen ---

    def display(self) -> AbstractContextManager[object]:
        """Show a live picture on a terminal; elsewhere a line now and then."""
        if not self.console.is_terminal:
            return nullcontext()

        self.live = Live(
            self._picture(), console=self.console, refresh_per_second=4, transient=True
        )
        return self.live

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _print_finished(self, name: str, log: StepLog) -> None:
        count = f"[{len(self.finished):2}/{len(self.steps)}]"
        self._print(f"{count} {name:24} {format_clock(self.finished[name]):>6}  {log.last_line()}")
        for warning in runs.read_warnings(self.steps[name].out):
            self._print(f"        {name}: warning: {fit_line(warning)}")

    def _picture(self) -> Text:
        now = time.monotonic()
        done = f"{len(self.finished)}/{len(self.steps)} steps"
        lines = [f"{done}  {format_clock(now - self.begin)} elapsed  ETA {self._eta(now)}"]
        for name, work in self.running.items():
            elapsed = format_clock(now - work.log.begin)
            lines.append(f"  {name:24} {elapsed:>6}  {work.log.last_line()[:100]}")

        return Text("\n".join(lines))

    def _eta(self, now: float) -> str:
        """Return the time left, at the pace of what was done here and by what running steps say."""
        weights = {name: step.keys.weigh(self.recipe.cores) for name, step in self.steps.items()}
        waiting = sum(weights[name] for name in self.waiting)
        finished = [(weights[name], took) for name, took in self.finished.items() if took]
        running = [work.log.progress(weights[name], now) for name, work in self.running.items()]
        return format_clock(estimate_remaining(waiting, finished, running, now - self.begin))
