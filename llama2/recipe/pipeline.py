"""A whole recipe (§3.2): an ordered list of runs with lineage, finished or unfinished, resumable at
any point.

A recipe names its steps; a step is a verb and that verb's configuration, in which `${other}` stands
for the run directory of another step and `${name}` for a parameter of the recipe. Those references
are the lineage: a step starts when the steps it names are finished and enough cores are free, so
the two reward models of §3.2.2 train side by side.

    parameters: {data: /my/data}
    steps:
      sft:    {verb: sft, processes: 2, model: "${pretrain}", dialogs: {mine: {path: "${data}/sft.jsonl"}}}
      reward: {verb: reward, cores: 1, model: "${sft}", ...}
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any

from llama2 import atomic, interrupts, runs
from llama2.config import build, yaml12
from llama2.ranks import join
from llama2.recipe import launch
from llama2.recipe.board import Board
from llama2.recipe.steps import Config, Step, check_inputs, referred_to, steps_of
from llama2.records import dump
from llama2.stages.common.planning import Cluster, Lineage, total
from llama2.terminal_text import say

__all__ = ["Config", "plan", "run"]


def plan(recipe: Config, cluster: Cluster, lineage: Lineage) -> dict[str, Any]:
    """What a dry run shows beyond the recipe itself: every step's whole configuration, and what it
    would cost."""
    resolved, described = {}, {}
    for name, step in steps_of(recipe).items():
        module = launch.stage(step.verb)
        config = build(module.Config, step.values)
        machines = (
            cluster if cluster.ranks else cluster.model_copy(update={"ranks": step.processes})
        )
        resolved[name] = config.model_dump(mode="json")
        described[name] = {
            "verb": step.verb,
            "needs": sorted(step.needs),
            **(module.plan(config, machines, lineage) if hasattr(module, "plan") else {}),
        }

    return {"steps": resolved, "plan": described, "total": total(described)}


def run(recipe: Config) -> int:
    """Bring every step of a recipe to its end; finished ones are skipped, interrupted ones resumed.
    The exit status."""
    steps = steps_of(recipe)
    for step in steps.values():
        runs.check(step.verb, build(launch.stage(step.verb).Config, step.values))

    if recipe.step is not None:
        _run_one(recipe.step, recipe, steps)
        return 0

    check_inputs(recipe, steps)
    with runs.lock(recipe.out):
        return _run_all(recipe, steps)


def _run_all(recipe: Config, steps: dict[str, Step]) -> int:
    """Every step in processes of its own."""
    board = Board(recipe, steps)
    handlers = {
        kind: signal.signal(kind, board.on_signal)
        for kind in (*interrupts.requests(), signal.SIGINT)
        if threading.current_thread() is threading.main_thread()
    }
    try:
        launch.preload()
        _describe(recipe, steps)
        _note_gone(steps)

        with board.display():
            board.work()
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)

    return board.finish()


def _note_gone(steps: Mapping[str, Step]) -> None:
    """Say which steps are made again though what was made from them is there, before that takes
    hours."""
    behind: dict[str, frozenset[str]] = {}
    for name, step in steps.items():
        behind[name] = step.needs.union(*(behind[need] for need in step.needs))

    done = [name for name, step in steps.items() if (step.out / runs.COMPLETE).is_file()]
    for name, step in steps.items():
        users = [user for user in done if name in behind[user]]
        if users and not (step.out / runs.MANIFEST).is_file():
            say(
                f"{step.out}: gone, though {users[0]} was made from it, so it is made again, and must come out the "
                "same; if it was moved, stop this (Ctrl-C) and put it back, or a link to it"
            )


def _run_one(name: str, recipe: Config, steps: Mapping[str, Step]) -> None:
    """One step under whatever started this process: a recipe's own ranks all live on one
    machine."""
    step = steps[name]
    if join().is_main:
        _describe(recipe, steps)

    launch.execute(step.verb, build(launch.stage(step.verb).Config, step.values))


def _describe(recipe: Config, steps: Mapping[str, Step]) -> None:
    """Write the recipe beside its runs, for the reader and for the report: as one that can be run
    again."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    described = recipe.model_dump(mode="json", exclude={"step"})
    described["steps"] = {
        name: step for name, step in described["steps"].items() if step is not None
    }
    used = referred_to(described)
    described["parameters"] = {
        name: value for name, value in described["parameters"].items() if name in used
    }
    atomic.write_atomic(recipe.out / "recipe.yaml", yaml12.dump(described))
    atomic.write_atomic(recipe.out / "steps.json", dump(list(steps)))
