"""A recipe at work: which steps wait, run and are finished, and what the screen says about them."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llama2 import runs
from llama2.config import build
from llama2.errors import UserError
from llama2.interrupts import STATUS, let_go_of_terminal
from llama2.recipe import launch
from llama2.recipe.remaining import Log, remaining
from llama2.recipe.steps import Config, Step
from llama2.terminal_text import clock, line

MEND = "mend it and repeat the command: finished steps are kept"
RESUMES = "the same command resumes"
LIMITS = "see `ulimit -a` and what else runs here; the same command resumes"


@dataclass(frozen=True)
class Work:
    """A running step."""

    workers: launch.Workers
    log: Log


class Board:
    """Which steps wait, run and are finished, and what the screen says about them."""

    def __init__(self, recipe: Config, steps: dict[str, Step]) -> None:
        self.recipe, self.steps = recipe, steps
        self.waiting = list(steps)
        self.running: dict[str, Work] = {}
        # seconds it took; 0 if it was finished before we began
        self.finished: dict[str, float] = {}
        self.error: UserError | None = None
        self.stopping = 0  # the number of the signal
        self.begin = time.monotonic()
        self.console = Console(stderr=True)
        self.live: Live | None = None

    # --- work ---

    def work(self) -> None:
        """Start what can start, wait for what runs, until nothing is left or something failed."""
        spoken = time.monotonic()
        while self.running or (self.waiting and not self.error and not self.stopping):
            if not self.error and not self.stopping:
                self._start_ready()

            self._collect()
            if self.live:
                self.live.update(self._picture())
            elif time.monotonic() - spoken > 30:
                spoken = time.monotonic()
                self.console.print(self._picture(), soft_wrap=True)

            time.sleep(0.05)

    def _cores(self, step: Step) -> int:
        return min(max(step.cores or self.recipe.cores, step.processes), self.recipe.cores)

    def _start_ready(self) -> None:
        free = self.recipe.cores - sum(self._cores(self.steps[name]) for name in self.running)
        for name in list(self.waiting):
            step = self.steps[name]
            if step.needs - self.finished.keys() or self._cores(step) > free:
                continue

            self.waiting.remove(name)
            try:
                done = runs.is_finished(
                    step.verb, build(launch.stage(step.verb).Config, step.values)
                )
            except UserError as error:
                self._fail(name, str(error))
                return

            if done:
                self.finished[name] = 0.0
                continue

            free -= self._cores(step)
            threads = max(1, self._cores(step) // step.processes)
            log = Log(self.recipe.out / "logs" / f"{name}.log", time.monotonic())

            try:
                workers = launch.Workers.start(
                    step.verb, step.values, step.processes, threads, log.path
                )
            # a signal to the whole group, or a machine without memory, ended what starts processes
            except EOFError:
                self._fail(
                    name, "the process that starts others was killed (out of memory?)", RESUMES
                )
                return
            except OSError as error:  # BlockingIOError, too: no more processes
                self._fail(
                    name,
                    f"no process could be started ({os.strerror(error.errno or 0).lower()})",
                    LIMITS,
                )
                return

            self.running[name] = Work(workers, log)
            if self.stopping:  # the signal came meanwhile
                workers.stop()
                return

    def _collect(self) -> None:
        for name, work in list(self.running.items()):
            if work.workers.alive():
                continue

            del self.running[name]
            outcome = work.workers.result()
            if outcome == "done":
                self.finished[name] = time.monotonic() - work.log.begin
                self.console.print(
                    f"[{len(self.finished):2}/{len(self.steps)}] {name:24} "
                    f"{clock(self.finished[name]):>6}  {work.log.last_line()}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
                for warning in runs.read_warnings(self.steps[name].out):
                    self.console.print(
                        f"        {name}: warning: {line(warning)}",
                        highlight=False,
                        markup=False,
                        soft_wrap=True,
                    )
            elif outcome == "stopped":
                self.stopping = self.stopping or signal.SIGTERM
            else:
                self._fail(name, outcome, RESUMES if work.workers.killed else MEND)

    def _fail(self, name: str, why: str, cure: str = MEND) -> None:
        """Remember the first error; what runs beside it saves and stops."""
        self.error = self.error or UserError(f"step {name}: {why}", cure)
        for work in self.running.values():
            work.workers.stop()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """First signal: every step saves and stops. Second: kill them."""
        let_go_of_terminal(number)
        for work in self.running.values():
            work.workers.kill() if self.stopping else work.workers.stop()

        self.stopping = number

    def finish(self) -> int:
        """Say how it ended; the exit status: 130 for a recipe that Ctrl-C left unfinished."""
        if self.error:
            raise self.error

        took = clock(time.monotonic() - self.begin)
        if len(self.finished) < len(self.steps):
            ending = f"stopped after {len(self.finished)} of {len(self.steps)} steps; the same command resumes"
        else:
            ending = f"all {len(self.steps)} steps done in {took}"

        self.console.print(
            line(f"{self.recipe.out}: {ending}"), highlight=False, markup=False, soft_wrap=True
        )
        interrupted = self.stopping == signal.SIGINT and len(self.finished) < len(self.steps)
        return STATUS if interrupted else 0

    # --- the screen ---

    def display(self) -> Live | threading.Lock:
        """A live picture on a terminal; elsewhere a line now and then."""
        if not self.console.is_terminal:
            return threading.Lock()

        self.live = Live(
            self._picture(), console=self.console, refresh_per_second=4, transient=True
        )
        return self.live

    def _picture(self) -> Text:
        now = time.monotonic()
        done = f"{len(self.finished)}/{len(self.steps)} steps"
        lines = [f"{done}  {clock(now - self.begin)} elapsed  ETA {self._eta(now)}"]

        for name, work in self.running.items():
            lines.append(
                f"  {name:24} {clock(now - work.log.begin):>6}  {work.log.last_line()[:100]}"
            )

        return Text("\n".join(lines))

    def _eta(self, now: float) -> str:
        """What is left, at the pace of what was done here and by what the running steps say."""
        waiting = sum(self.steps[name].seconds for name in self.waiting)
        finished = [
            (self.steps[name].seconds, took) for name, took in self.finished.items() if took
        ]
        running = [
            work.log.running(self.steps[name].seconds, now) for name, work in self.running.items()
        ]

        return clock(remaining(waiting, finished, running, now - self.begin))
