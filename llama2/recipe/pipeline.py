"""A whole recipe (§3.2): an ordered list of runs with lineage, finished or unfinished, resumable at
any point.

A recipe names its steps; a step is a verb and that verb's configuration, in which `${other}` stands
for the run directory of another step and `${name}` for a parameter of the recipe. Those references
are the lineage: a step starts when the steps it names are finished and enough cores are free, so
the two reward models of §3.2.2 train side by side.

    parameters: {data: /my/data}
    steps:
      sft:    {verb: sft, model: "${pretrain}", dialogs: {mine: {path: "${data}/sft.jsonl"}}, ...}
      reward: {verb: reward, cores: 1, model: "${sft}", ...}
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any

from llama2 import atomic, interrupts, runs
from llama2.config import yaml12
from llama2.ranks import join
from llama2.recipe import verbs
from llama2.recipe.board import Board
from llama2.recipe.config import Config, find_references
from llama2.recipe.steps import RecipeStep, check_inputs, resolve_steps
from llama2.recipe.workers import execute, preload
from llama2.records import dump
from llama2.stages.common.planning import Cluster, PlannedRuns, total
from llama2.terminal_text import say

__all__ = ["Config", "plan", "run"]


def plan(recipe: Config, cluster: Cluster, planned: PlannedRuns) -> dict[str, Any]:
    """Return what a dry run shows beyond the recipe itself: every step's whole configuration, and
    what it would cost."""
    configs: dict[str, Any] = {}
    plans: dict[str, dict[str, Any]] = {}
    seconds = 0.0

    for name, step in resolve_steps(recipe).items():
        module, machines = verbs.load(step.verb), cluster
        if not cluster.ranks:
            machines = cluster.model_copy(update={"ranks": step.keys.processes})

        configs[name] = step.config.model_dump(mode="json")
        plans[name] = {"verb": step.verb, "needs": sorted(step.needs)}
        if "seconds" in step.keys.model_fields_set:
            plans[name]["seconds"] = step.keys.seconds
            seconds += step.keys.weigh(recipe.cores)

        if hasattr(module, "plan"):
            plans[name] |= module.plan(step.config, machines, planned)

    summary = {**total(plans), "minutes": round(seconds / 60, 1)}
    return {"steps": configs, "plan": plans, "total": summary}


def run(recipe: Config) -> int:
    """Bring every step of a recipe to its end, and return the exit status. Finished steps are
    skipped, interrupted ones resumed."""
    steps = resolve_steps(recipe)
    for step in steps.values():
        runs.check(step.verb, step.config)

    if recipe.step is not None:
        _run_step(steps[recipe.step], recipe, steps)
        return 0

    check_inputs(recipe, steps)
    with runs.lock(recipe.out):
        return _run_all(recipe, steps)


def _run_step(step: RecipeStep, recipe: Config, steps: Mapping[str, RecipeStep]) -> None:
    """Carry out one step under whatever started this process: a recipe's own ranks all live on one
    machine."""
    if join().is_main:
        _describe(recipe, steps)

    execute(step.verb, step.config)


def _run_all(recipe: Config, steps: dict[str, RecipeStep]) -> int:
    """Carry out every step in processes of its own, and return the exit status."""
    board = Board(recipe, steps)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (*interrupts.list_stop_signals(), signal.SIGINT):
            handlers[number] = signal.signal(number, board.on_signal)

    try:
        preload()
        _describe(recipe, steps)
        _note_gone(steps)
        with board.display():
            board.work()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    return board.finish()


def _note_gone(steps: Mapping[str, RecipeStep]) -> None:
    """Say which steps are made again though what was made from them is there, before that takes
    hours."""
    ancestors: dict[str, frozenset[str]] = {}
    for name, step in steps.items():
        ancestors[name] = step.needs.union(*(ancestors[need] for need in step.needs))

    finished = [name for name, step in steps.items() if (step.out / runs.COMPLETE).is_file()]
    for name, step in steps.items():
        users = [user for user in finished if name in ancestors[user]]
        if users and not (step.out / runs.MANIFEST).is_file():
            say(
                f"{step.out}: gone, though {users[0]} was made from it, so it is made again, and "
                "must come out the same; if it was moved, stop this (Ctrl-C) and put it back, or "
                "a link to it"
            )


def _describe(recipe: Config, steps: Mapping[str, RecipeStep]) -> None:
    """Write the recipe beside its runs, for the reader and for the report: as one that can be run
    again."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    described = recipe.model_dump(mode="json", exclude={"step", "variants"})
    for section, names in (("steps", steps), ("parameters", find_references([described]))):
        values = described[section].items()
        described[section] = {name: value for name, value in values if name in names}

    atomic.write_atomic(recipe.out / "recipe.yaml", yaml12.dump(described))
    atomic.write_atomic(recipe.out / "steps.json", dump(list(steps)))
