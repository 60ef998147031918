"""`llama2 verify RUN`: whether a finished run, or every finished one of a recipe, still holds what
it wrote.

All content is read. Using a run reads only its small files, and those whose size or time differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llama2.errors import UserError
from llama2.runs import completion
from llama2.runs.recipe_runs import STEPS, read_steps


def runs_at(path: Path) -> list[Path]:
    """The finished run at a path, or those of the recipe there; UserError if there are none."""
    if completion.find_run(path) == path:
        return [path]

    names = read_steps(path) if (path / STEPS).is_file() else []
    found = [path / name for name in names if completion.find_run(path / name) == path / name]
    if not found:
        raise UserError(
            f"{path}: no finished run, nor a recipe's directory with some in it",
            "give one, or two checkpoints to compare: llama2 verify A B",
        )

    return found


def damage(path: Path) -> dict[str, list[str]]:
    """For every run what is not as it was written, a line each."""
    return {str(run): list(_damage(run)) for run in runs_at(path)}


def _damage(run: Path) -> Iterator[str]:
    try:
        yield from (fault.cause for fault in completion.find_faults(run, thorough=True))
    except UserError as error:  # the completion mark itself
        yield error.cause


def show(path: Path, as_json: bool) -> int:
    """Print the result on stdout; the exit status, 1 if anything is damaged."""
    found = damage(path)
    if as_json:
        print(json.dumps({"whole": not any(found.values()), "runs": found}, indent=1))
    else:
        for run, lines in found.items():
            print(*(lines or [f"{run}: all that this run wrote is there, unchanged"]), sep="\n")

    return 1 if any(found.values()) else 0
