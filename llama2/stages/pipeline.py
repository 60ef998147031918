"""A whole recipe (§3.2): an ordered list of runs with lineage, finished or unfinished, resumable at any point.

A recipe names its steps; a step is a verb and that verb's configuration, in which `${other}` stands for the run
directory of another step and `${name}` for a parameter of the recipe. Those references are the lineage: a step starts
when the steps it names are finished and enough cores are free, so the two reward models of §3.2.2 train side by side.

    parameters: {data: /my/data}
    steps:
      sft:    {verb: sft, processes: 2, model: "${pretrain}", dialogs: {mine: {path: "${data}/sft.jsonl"}}}
      reward: {verb: reward, cores: 1, model: "${sft}", ...}
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console
from rich.live import Live
from rich.text import Text

from llama2 import mesh, runs
from llama2.config import StageConfig, build
from llama2.errors import UserError, did_you_mean
from llama2.records import dump
from llama2.stages import launch
from llama2.stages.planning import Cluster, Lineage, total

_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_]+)\}")


class Config(StageConfig):
    """An ordered list of steps: steps.NAME.verb, .processes, .cores, .seconds, and the verb's own keys."""

    cores: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), gt=0)
    """processor cores the steps may use together"""
    parameters: dict[str, str | int | float] = {}
    """values for `${name}` in the steps; `${out}` is the recipe's own directory"""
    steps: dict[str, dict[str, Any] | None]
    """name -> {verb, processes, cores, seconds, and the verb's own keys}; null leaves a step out"""
    step: str | None = None
    """carry out this one step, in this process and the ranks torchrun started with it"""


class Step(StageConfig):
    """One run of a recipe."""

    name: str
    verb: str
    processes: int = Field(1, gt=0)
    """data-parallel ranks on this machine"""
    cores: int = Field(0, ge=0)
    """cores it takes; 0 means all"""
    seconds: float = Field(1.0, gt=0)
    """how long it takes, relative to the other steps: weighs the ETA"""
    values: dict[str, Any]
    """the verb's configuration, references resolved"""
    needs: frozenset[str]
    """the steps whose output it reads"""


def steps_of(recipe: Config) -> dict[str, Step]:
    """The recipe's steps with every reference resolved and every configuration checked, before any work."""
    steps: dict[str, Step] = {}
    for name, given in recipe.steps.items():
        if given is None:
            continue
        if name in recipe.parameters:
            raise UserError(f"'{name}' is both a step and a parameter", f"leave out the step: --steps.{name} null")
        values = dict(given)
        needs: set[str] = set()
        own: dict[str, Any] = {key: values.pop(key) for key in ("processes", "cores", "seconds") if key in values}
        verb = values.pop("verb", None)
        if verb not in launch.VERBS or not launch.VERBS[verb].makes_run:
            raise UserError(f"steps.{name}: unknown verb '{verb}'",
                            did_you_mean(str(verb), [v for v, entry in launch.VERBS.items() if entry.makes_run]))
        values = {"seed": recipe.seed, **_resolved(values, recipe, steps, needs, f"steps.{name}"),
                  "out": str(recipe.out / name)}
        build(launch.stage(verb).Config, values, f"steps.{name}")
        steps[name] = build(Step, {"name": name, "verb": verb, "out": recipe.out / name, "values": values,
                                   "needs": frozenset(needs), **own}, f"steps.{name}")
    return steps


def _resolved(value: Any, recipe: Config, steps: Mapping[str, Step], needs: set[str], where: str) -> Any:
    """`value` with its `${references}` replaced; the names of steps are added to `needs`."""
    if isinstance(value, Mapping):
        return {key: _resolved(item, recipe, steps, needs, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, recipe, steps, needs, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match[1]
        if name == "out":
            return str(recipe.out)
        if name in recipe.parameters:
            return str(recipe.parameters[name])
        if name not in steps:
            raise UserError(f"{where}: '${{{name}}}' is neither a parameter nor an earlier step",
                            did_you_mean(name, [*steps, *recipe.parameters]))
        needs.add(name)
        return str(recipe.out / name)

    whole = _REFERENCE.fullmatch(value)
    if whole and whole[1] in recipe.parameters:
        return recipe.parameters[whole[1]]
    return _REFERENCE.sub(lookup, value)


def plan(recipe: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """What a dry run shows beyond the recipe itself: every step's whole configuration, and what it would cost."""
    resolved, described = {}, {}
    for name, step in steps_of(recipe).items():
        module = launch.stage(step.verb)
        config = build(module.Config, step.values)
        machines = cluster if cluster.ranks else cluster.model_copy(update={"ranks": step.processes})
        resolved[name] = config.model_dump(mode="json")
        described[name] = {"verb": step.verb, "needs": sorted(step.needs),
                           **(module.plan(config, machines, lineage) if hasattr(module, "plan") else {})}
    return {"steps": resolved, "plan": described, "total": total(described)}


def run(recipe: Config) -> None:
    """Bring every step of a recipe to its end; finished ones are skipped, interrupted ones resumed."""
    steps = steps_of(recipe)
    for step in steps.values():
        runs.check(step.verb, build(launch.stage(step.verb).Config, step.values))
    if recipe.step is not None:
        _run_one(recipe.step, recipe, steps)
        return
    with runs.lock(recipe.out):
        _run_all(recipe, steps)


def _run_all(recipe: Config, steps: dict[str, Step]) -> None:
    """Every step in processes of its own."""
    launch.preload()
    _describe(recipe, steps)
    board = Board(recipe, steps)
    handlers = {kind: signal.signal(kind, board.on_signal)
                for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
                if threading.current_thread() is threading.main_thread()}
    try:
        with board.display():
            board.work()
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
    board.finish()


def _run_one(name: str, recipe: Config, steps: Mapping[str, Step]) -> None:
    """One step under whatever started this process: a recipe's own ranks all live on one machine."""
    if name not in steps:
        raise UserError(f"the recipe has no step '{name}'", did_you_mean(name, steps))
    step = steps[name]
    mesh.init()
    if mesh.is_main():
        _describe(recipe, steps)
    launch.execute(step.verb, build(launch.stage(step.verb).Config, step.values))


def _describe(recipe: Config, steps: Mapping[str, Step]) -> None:
    """Write the recipe beside its runs, for the reader and for the report."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    described = recipe.model_dump(mode="json", exclude={"step"})
    runs.write_atomic(recipe.out / "recipe.yaml", yaml.safe_dump(described, sort_keys=False))
    runs.write_atomic(recipe.out / "steps.json", dump(list(steps)))


class Board:
    """Which steps wait, run and are finished, and what the screen says about them."""

    def __init__(self, recipe: Config, steps: dict[str, Step]) -> None:
        self.recipe, self.steps = recipe, steps
        self.waiting = list(steps)
        self.running: dict[str, tuple[launch.Workers, float]] = {}
        self.finished: dict[str, float] = {}
        self.skipped = 0.0  # weight of steps that were finished before we began
        self.error = ""
        self.stopping = False
        self.begin = time.time()
        self.console = Console(stderr=True)
        self.live: Live | None = None

    # --- work ---

    def work(self) -> None:
        """Start what can start, wait for what runs, until nothing is left or something failed."""
        spoken = time.time()
        while self.running or (self.waiting and not self.error and not self.stopping):
            if not self.error and not self.stopping:
                self._start_ready()
            self._collect()
            if self.live:
                self.live.update(self._picture())
            elif time.time() - spoken > 30:
                spoken = time.time()
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
                done = runs.is_finished(step.verb, build(launch.stage(step.verb).Config, step.values))
            except UserError as error:
                self._fail(name, str(error))
                return
            if done:
                self.finished[name] = 0.0
                self.skipped += step.seconds
                continue
            free -= self._cores(step)
            threads = max(1, self._cores(step) // step.processes)
            log = self.recipe.out / "logs" / f"{name}.log"
            workers = launch.Workers.start(step.verb, step.values, step.processes, threads, log)
            self.running[name] = (workers, time.time())
            if self.stopping:  # the signal came meanwhile
                workers.stop()
                return

    def _collect(self) -> None:
        for name, (workers, begin) in list(self.running.items()):
            if workers.alive():
                continue
            del self.running[name]
            outcome = workers.result()
            if outcome == "done":
                self.finished[name] = time.time() - begin
                self.console.print(f"[{len(self.finished):2}/{len(self.steps)}] {name:24} "
                                   f"{_clock(time.time() - begin):>6}  {_last_line(workers.log)}",
                                   highlight=False, markup=False, soft_wrap=True)
            elif outcome == "stopped":
                self.stopping = True
            else:
                self._fail(name, outcome)

    def _fail(self, name: str, why: str) -> None:
        """Remember the first error; what runs beside it saves and stops."""
        self.error = self.error or f"step {name}: {why}"
        for workers, _ in self.running.values():
            workers.stop()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """First signal: every step saves and stops. Second: kill them."""
        for workers, _ in self.running.values():
            workers.kill() if self.stopping else workers.stop()
        self.stopping = True

    def finish(self) -> None:
        """Say how it ended."""
        if self.error:
            raise UserError(self.error, "mend it and repeat the command: finished steps are kept")
        took = _clock(time.time() - self.begin)
        if len(self.finished) < len(self.steps):
            ending = f"stopped after {len(self.finished)} of {len(self.steps)} steps; the same command resumes"
        else:
            ending = f"all {len(self.steps)} steps done in {took}"
        self.console.print(f"{self.recipe.out}: {ending}", highlight=False, markup=False, soft_wrap=True)

    # --- the screen ---

    def display(self) -> Live | threading.Lock:
        """A live picture on a terminal; elsewhere a line now and then."""
        if not self.console.is_terminal:
            return threading.Lock()
        self.live = Live(self._picture(), console=self.console, refresh_per_second=4, transient=True)
        return self.live

    def _picture(self) -> Text:
        now = time.time()
        lines = [f"{len(self.finished)}/{len(self.steps)} steps  {_clock(now - self.begin)} elapsed  ETA {self._eta()}"]
        for name, (workers, begin) in self.running.items():
            lines.append(f"  {name:24} {_clock(now - begin):>6}  {_last_line(workers.log)[:100]}")
        return Text("\n".join(lines))

    def _eta(self) -> str:
        """Remaining weight at the speed measured so far."""
        elapsed = time.time() - self.begin
        total = sum(step.seconds for step in self.steps.values()) - self.skipped
        done = sum(self.steps[name].seconds for name, took in self.finished.items() if took)
        speed = max(done / elapsed, 0.2) if elapsed > 5 and done else 1.0
        for name, (_, begin) in self.running.items():
            done += min((time.time() - begin) * speed, 0.95 * self.steps[name].seconds)
        return _clock(max(total - done, 0) / speed)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _last_line(log: Path) -> str:
    """The newest line a step wrote."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
