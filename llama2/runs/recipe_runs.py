"""The runs of a recipe and their results, read leniently: a report may be wanted while half of them
are missing."""

from __future__ import annotations

import calendar
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from llama2 import json_files
from llama2.devices import CPU, is_cpu
from llama2.errors import UserError
from llama2.results import AttentionResult, EvaluateResult, SelectResult, StageResult
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
from llama2.terminal_text import show_value

STEPS = "steps.json"
NOT_KEPT = "not kept"
_LARGEST = 1e30  # what a chart can still be drawn of
_REPEAT = "repeat the step that wrote it"

R = TypeVar("R", bound=StageResult)


def read_result(run: Path, kind: type[R]) -> R | None:
    """Return what a run wrote of one kind of result, None if it did not; UserError names a file
    that is damaged."""
    file = run / kind.file
    completion.check_file(file)
    if not file.is_file():
        return None

    content = json_files.read_json(file, _REPEAT)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        mistake = error.errors()[0]
        place = ".".join(map(str, mistake["loc"])) or "content"
        raise UserError(
            f"{file}: damaged: {show_value(place)}: {mistake['msg']}", _REPEAT
        ) from None


@dataclass(frozen=True)
class StepRun:
    """One run directory of a recipe."""

    name: str
    path: Path
    manifest: Mapping[str, Any]
    made_from: tuple[str, ...] = ()
    _results: dict[type[StageResult], StageResult | None] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def verb(self) -> str:
        """The command that made it."""
        return str(self.manifest.get("verb", ""))

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration, as plain JSON."""
        return self.manifest.get("config") or {}

    @property
    def rewards(self) -> list[str]:
        """Names of the run directories of the reward models it used."""
        rewards = self.config.get("rewards") or {}
        return [Path(str(path)).name for path in rewards.values()]

    def result(self, kind: type[R]) -> R | None:
        """Return what the run wrote of one kind of result, None if it did not."""
        if kind not in self._results:
            self._results[kind] = read_result(self.path, kind)

        result = self._results[kind]
        assert result is None or isinstance(result, kind)
        return result

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings that its user saw."""
        completion.check_file(self.path / WARNINGS)
        return read_warnings(self.path)

    @cached_property
    def seconds(self) -> float | None:
        """Duration of the run, interruptions left out; None while it is unfinished."""
        if not (self.path / COMPLETE).is_file():
            return None

        return completion.read_mark(self.path).get("seconds")

    @cached_property
    def recorded(self) -> Mapping[str, str]:
        """The hash of each output of a finished run; {} of others."""
        return completion.read_hashes(self.path) if (self.path / COMPLETE).is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The logged lines; one that a crash cut off is left out."""
        completion.check_file(self.path / METRICS)
        return read_metrics(self.path)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        rows = [row for row in self.metrics if _is_drawable(row.get(key), row["step"])]
        steps = [row["step"] for row in rows]
        return steps, [row[key] for row in rows]

    def mean(self, key: str) -> float | None:
        """Return the mean of one metric, None where it was not logged."""
        _, values = self.series(key)
        return sum(values) / len(values) if values else None

    @property
    def device(self) -> str:
        """The kind of device the run computed on: cpu, cuda, ..."""
        return str(self.manifest.get("device", CPU))

    @property
    def on_cpu(self) -> bool:
        """True if the run computed on CPU cores."""
        return is_cpu(self.device)

    @property
    def started(self) -> str:
        """When the run began, UTC: 2026-01-31T12:00:00Z; empty where that is not known."""
        return str(self.manifest.get("started", ""))

    @property
    def code(self) -> str | None:
        """The code version that began the run."""
        code = self.manifest.get("code")
        return None if code is None else str(code)

    @property
    def devices(self) -> int:
        """Cores or accelerators the run kept busy."""
        threads = self.manifest.get("threads", 1) if self.on_cpu else 1
        return int(self.manifest.get("ranks", 1)) * int(threads)

    @property
    def span(self) -> tuple[float, float] | None:
        """Begin and end in seconds since the epoch, as if the run had not been interrupted."""
        if self.seconds is None:
            return None

        try:
            begin = calendar.timegm(time.strptime(self.started, "%Y-%m-%dT%H:%M:%SZ"))
        except ValueError:
            return None

        return begin, begin + self.seconds


@dataclass(frozen=True)
class Recipe:
    """All runs of a recipe, in its order."""

    path: Path
    steps: list[StepRun]
    waiting: int = 0
    """steps that have not begun"""

    def of(self, *verbs: str) -> list[StepRun]:
        """The steps of the given verbs."""
        return [step for step in self.steps if step.verb in verbs]

    def results(self, kind: type[R]) -> list[tuple[StepRun, R]]:
        """Return one kind of result with the steps that wrote it, in the recipe's order."""
        pairs = ((step, step.result(kind)) for step in self.of(kind.stage))
        return [(step, result) for step, result in pairs if result is not None]

    @cached_property
    def evaluation(self) -> EvaluateResult | None:
        """The finished evaluation that compares the most versions, the last of several."""
        evaluations = [
            result for step, result in self.results(EvaluateResult) if step.seconds is not None
        ]
        return max(reversed(evaluations), key=lambda result: len(result.versions), default=None)

    @cached_property
    def attention(self) -> AttentionResult | None:
        """The newest heat map."""
        maps = [result for _, result in self.results(AttentionResult)]
        return maps[-1] if maps else None

    @cached_property
    def notes(self) -> dict[str, str]:
        """Evaluated versions that were not kept, or in whose place their predecessor was ("=
        V2")."""
        if self.evaluation is None:
            return {}

        selections = self.results(SelectResult)
        rejected = [(step, result) for step, result in selections if result.kept == "predecessor"]
        candidates = {result.candidate for _, result in rejected}
        steps = {step.name for step, _ in rejected}
        notes, before = {}, ""

        for name in self.evaluation.versions:
            run = Path(self.evaluation.checkpoints.get(name, name)).name
            if run in candidates:
                notes[name] = NOT_KEPT
            elif run in steps:
                notes[name] = f"= {before}"

            before = name

        return notes

    @cached_property
    def kept(self) -> list[str]:
        """Names of the evaluated versions without those that were rejected."""
        versions = self.evaluation.versions if self.evaluation else []
        return [name for name in versions if self.notes.get(name) != NOT_KEPT]

    @property
    def finished(self) -> bool:
        """True if nothing is left to do."""
        return not self.waiting and all(step.seconds is not None for step in self.steps)

    @property
    def simulated(self) -> bool:
        """True for a recipe in the microworld, where the truth is known and annotators are
        simulated."""
        versions = self.evaluation.results.values() if self.evaluation else ()
        return bool(self.of("world")) or any(version.truth for version in versions)

    @property
    def wall_seconds(self) -> float:
        """Time during which at least one step was at work: steps side by side count once."""
        total, reached = 0.0, -math.inf
        for begin, end in sorted(step.span for step in self.steps if step.span is not None):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)

        return total


def read_steps(path: Path) -> list[str]:
    """Read the names of a recipe's runs, in its order."""
    cure = "repeat `llama2 run`, which writes it"
    names = read_list(path / STEPS, cure)
    for name in names:
        if not json_files.is_file_name(name):
            raise UserError(
                f"{path / STEPS}: damaged: {show_value(name)} is the name of no run", cure
            )

    return names


def read_recipe(path: Path) -> Recipe:
    """Read the runs below `path`: those of its steps.json in that order, else all, by their
    start."""
    if not path.is_dir():
        raise UserError(f"{path}: no such directory", "give the output directory of a recipe")

    if (path / STEPS).is_file():
        names = read_steps(path)
    else:
        runs = [file.parent for file in path.glob(f"*/{MANIFEST}")]
        runs.sort(key=lambda run: (str(read_manifest(run).get("started")), run.name))
        names = [run.name for run in runs]

    manifests = {}
    waiting = 0
    for name in names:
        manifest = read_manifest(path / name)
        # the report of a recipe may stand inside it; it does not report on itself
        if manifest and manifest.get("verb") != "report":
            manifests[name] = manifest
        elif not manifest and name != "report":
            waiting += 1

    if not manifests:
        raise UserError(
            f"{path}: holds no run",
            f"give the output directory of a recipe; each step is a directory with a {MANIFEST}",
        )

    steps = []
    for name, manifest in manifests.items():
        made_from = _find_ancestors(manifest, path, list(manifests), name)
        steps.append(StepRun(name, path / name, manifest, made_from))

    return Recipe(path, steps, waiting)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read what a run wrote down when it began, {} where there is none; UserError if it is
    damaged."""
    completion.check_file(directory / MANIFEST)
    return completion.read_manifest(directory) if (directory / MANIFEST).is_file() else {}


def _find_ancestors(
    manifest: Mapping[str, Any], recipe: Path, names: list[str], name: str
) -> tuple[str, ...]:
    """Find the steps whose output the run `name` reads: those its configuration names by path."""
    ancestors = set()
    root = recipe.resolve().name  # the recipe may have been moved since: its last name is enough
    for text in _strings(manifest.get("config")):
        for folder, inside in pairwise(Path(text).parts):
            if folder == root:
                ancestors.add(inside)

    return tuple(other for other in names if other in ancestors and other != name)


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in plain JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _is_drawable(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and abs(value) < _LARGEST for value in values)
