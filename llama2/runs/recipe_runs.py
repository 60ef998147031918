"""What the runs of a recipe left behind, read leniently: a report may be wanted while half of them
are missing."""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.devices import CPU, is_cpu
from llama2.errors import UserError
from llama2.runs import (
    COMPLETE,
    MANIFEST,
    METRICS,
    WARNINGS,
    completion,
    read_list,
    read_metrics,
    read_warnings,
)
from llama2.terminal_text import shown

STEPS = "steps.json"
NOT_KEPT = "not kept"
_LARGEST = 1e30  # what a chart can still be drawn of


def read_json(path: Path) -> Any:
    """A JSON file's content, None where there is no such file; one that is not what its run wrote
    is named."""
    completion.check_file(path)
    return json_files.json_value(path, "repeat the step that wrote it") if path.is_file() else None


@dataclass(frozen=True)
class Step:
    """One run directory of a recipe."""

    name: str
    path: Path
    manifest: Mapping[str, Any]
    made_from: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        return str(self.manifest.get("verb", ""))

    @property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.manifest.get("config") or {}
        return config

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object the run wrote, {} if it did not."""
        value = read_json(self.path / name)
        return value if isinstance(value, dict) else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.read("summary.json")

    @cached_property
    def warnings(self) -> list[str]:
        """What the user was warned of while it ran."""
        completion.check_file(self.path / WARNINGS)
        return read_warnings(self.path)

    @cached_property
    def seconds(self) -> float | None:
        """How long the run took, interruptions left out; None while it is unfinished."""
        return (
            completion.completed(self.path).get("seconds")
            if (self.path / COMPLETE).is_file()
            else None
        )

    @cached_property
    def recorded(self) -> Mapping[str, str]:
        """The hash of each output of a finished run; {} of others."""
        return completion.recorded(self.path) if (self.path / COMPLETE).is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The logged lines; one that a crash cut off is left out."""
        completion.check_file(self.path / METRICS)
        return read_metrics(self.path)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        points = [
            (row["step"], row[key])
            for row in self.metrics
            if _finite(row.get(key)) and _finite(row["step"])
        ]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def device(self) -> str:
        """The kind of device the run used."""
        return str(self.manifest.get("device", CPU))

    @property
    def devices(self) -> int:
        """Cores or accelerators the run kept busy."""
        each = self.manifest.get("threads", 1) if is_cpu(self.device) else 1
        return int(self.manifest.get("ranks", 1)) * int(each)

    @property
    def span(self) -> tuple[float, float] | None:
        """Begin and end in seconds since the epoch, as if the run had not been interrupted."""
        try:
            begin = calendar.timegm(
                time.strptime(str(self.manifest.get("started")), "%Y-%m-%dT%H:%M:%SZ")
            )
        except ValueError:
            return None

        return None if self.seconds is None else (begin, begin + self.seconds)


@dataclass(frozen=True)
class Recipe:
    """All runs of a recipe, in its order."""

    path: Path
    steps: list[Step]
    waiting: int = 0
    """steps that have not begun"""

    def of(self, *verbs: str) -> list[Step]:
        """The steps of the given verbs."""
        return [step for step in self.steps if step.verb in verbs]

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The evaluation that compares the most versions, the last of several; {} if there is
        none."""
        return max(
            (
                step.read("evaluation.json")
                for step in reversed(self.of("evaluate"))
                if step.seconds is not None
            ),
            key=lambda found: len(found.get("versions", ())),
            default={},
        )

    @cached_property
    def attention(self) -> dict[str, Any]:
        """The newest heat map."""
        return next(
            (
                found
                for step in reversed(self.of("evaluate"))
                if (found := step.read("attention.json"))
            ),
            {},
        )

    @cached_property
    def selections(self) -> list[dict[str, Any]]:
        """Verdicts of the select steps: {step, candidate, predecessor, kept, reason, win_rate}."""
        return [
            step.read("verdict.json") | {"step": step.name}
            for step in self.of("select")
            if step.read("verdict.json")
        ]

    @cached_property
    def notes(self) -> dict[str, str]:
        """Evaluated versions that were not kept, or in whose place their predecessor was ("=
        V2")."""
        rejected = [one for one in self.selections if one.get("kept") == "predecessor"]
        candidates, steps = ({one.get(key) for one in rejected} for key in ("candidate", "step"))
        found, before = {}, ""

        for name in self.evaluation.get("versions", []):
            run = Path(str(self.evaluation.get("checkpoints", {}).get(name, name))).name
            if run in candidates:
                found[name] = NOT_KEPT
            elif run in steps:
                found[name] = f"= {before}"

            before = name

        return found

    @cached_property
    def kept(self) -> list[str]:
        """Names of the evaluated versions without those that were rejected."""
        return [
            name for name in self.evaluation.get("versions", []) if self.notes.get(name) != NOT_KEPT
        ]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and all(step.seconds is not None for step in self.steps)

    @property
    def simulated(self) -> bool:
        """Whether the recipe runs in the microworld, where the truth is known and annotators are
        simulated."""
        return bool(self.of("world")) or any(
            "truth" in one for one in self.evaluation.get("results", {}).values()
        )

    @property
    def wall_seconds(self) -> float:
        """Time during which at least one step was at work: steps side by side count once."""
        total, reached = 0.0, -math.inf
        for begin, end in sorted(step.span for step in self.steps if step.span is not None):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)

        return total


def read_steps(path: Path) -> list[str]:
    """The names of a recipe's runs, in its order."""
    cure = "repeat `llama2 run`, which writes it"
    names = read_list(path / STEPS, cure)
    for name in names:
        if not json_files.is_own(name):
            raise UserError(f"{path / STEPS}: damaged: {shown(name)} is the name of no run", cure)

    return names


def read_recipe(path: Path) -> Recipe:
    """The runs below `path`: those of its steps.json in that order, else all, by their start."""
    if not path.is_dir():
        raise UserError(f"{path}: no such directory", "give the output directory of a recipe")

    if (path / STEPS).is_file():
        names = read_steps(path)
    else:
        directories = [one.parent for one in path.glob(f"*/{MANIFEST}")]
        directories.sort(key=lambda one: (str(read_manifest(one).get("started")), one.name))
        names = [one.name for one in directories]

    # The report of a recipe may stand inside it; it does not report on itself.
    manifests = {
        name: found
        for name in names
        if (found := read_manifest(path / name)) and found.get("verb") != "report"
    }
    if not manifests:
        raise UserError(
            f"{path}: holds no run",
            f"give the output directory of a recipe; each step is a directory with a {MANIFEST}",
        )

    waiting = sum(not (path / name / MANIFEST).is_file() and name != "report" for name in names)
    return Recipe(
        path,
        [
            Step(name, path / name, manifest, _ancestors(manifest, path, list(manifests), name))
            for name, manifest in manifests.items()
        ],
        waiting,
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """What the run in a directory wrote down when it began, {} where there is none; UserError if it
    is damaged."""
    completion.check_file(directory / MANIFEST)
    return completion.manifest(directory) if (directory / MANIFEST).is_file() else {}


def _ancestors(
    manifest: Mapping[str, Any], recipe: Path, names: list[str], own: str
) -> tuple[str, ...]:
    """The steps whose output a run reads: those its configuration names by path."""
    found = set()
    for text in _strings(manifest.get("config")):
        parts = Path(text).parts
        # The recipe may have been moved since: its last name is enough.
        for place in (i for i, part in enumerate(parts) if part == recipe.resolve().name):
            if place + 1 < len(parts) and parts[place + 1] in names:
                found.add(parts[place + 1])

    return tuple(name for name in names if name in found and name != own)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < _LARGEST
