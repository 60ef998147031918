"""`llama2 verify RUN`: check whether finished runs still have everything they wrote, unchanged.

All content is read. Using a run reads only its small files, and those whose size or time differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llama2.errors import UserError
from llama2.runs import completion
from llama2.runs.recipe_runs import STEPS, read_steps


def list_runs(path: Path) -> list[Path]:
    """Return the finished run at a path, or those of the recipe there; UserError if none are."""
    if completion.find_run(path) == path:
        return [path]

    names = read_steps(path) if (path / STEPS).is_file() else []
    runs = [path / name for name in names if completion.find_run(path / name) == path / name]
    if not runs:
        raise UserError(
            f"{path}: no finished run, nor a recipe's directory with some in it",
            "give one, or two checkpoints to compare: llama2 verify A B",
        )

    return runs


def find_damage(run: Path) -> Iterator[str]:
    """Yield a line for everything that is not as the run wrote it."""
    try:
        yield from (fault.cause for fault in completion.find_faults(run, thorough=True))
    except UserError as error:  # the completion mark itself
        yield error.cause


def show(path: Path, as_json: bool) -> int:
    """Print the result on stdout; return the exit status, 1 if anything is damaged."""
    damage = {str(run): list(find_damage(run)) for run in list_runs(path)}
    damaged = any(damage.values())
    if as_json:
        print(json.dumps({"whole": not damaged, "runs": damage}, indent=1))
        return int(damaged)

    for run, faults in damage.items():
        print(*(faults or [f"{run}: all that this run wrote is there, unchanged"]), sep="\n")

    return int(damaged)
