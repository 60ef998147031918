"""Lineage of a model: the runs behind it, and what came from outside, found by content.

A manifest keeps the fingerprint of every input. A run is an ancestor only if what lies on the disk
has the very fingerprint that was read: directories may have been moved or renamed since, and one
that was made anew under the same name is not taken for the old one. Where an input is not found,
its fingerprint is all that is known of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from llama2 import runs
from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError
from llama2.formats.checkpoint import CONFIG, INDEX, WEIGHTS
from llama2.results import StageResult
from llama2.runs.recipe_runs import Recipe, StepRun, read_manifest, read_recipe

RECIPE = "recipe.yaml"
_CHECKPOINTS = (
    "model",
    "policy",
    "policies",
    "critic",
    "candidate",
    "predecessor",
    "rewards",
    "judge",
    "tokenizer",
)


R = TypeVar("R", bound=StageResult)


@dataclass(frozen=True)
class Input:
    """Something that a stage read."""

    key: str
    """its dotted key in the configuration"""
    digest: str
    """the fingerprint of what it held"""
    stage: str | None
    """the stage of the lineage that made it; None for what came from outside"""
    place: str
    """where the papers of a release say it lies: runs/<stage>/..., or inputs/<name> for what came
    from outside"""

    @property
    def is_base(self) -> bool:
        """True for a checkpoint or a tokenizer, false for data."""
        return self.key.partition(".")[0] in _CHECKPOINTS


@dataclass(frozen=True)
class Stage:
    """One run of the lineage with what it read."""

    name: str
    step: StepRun
    inputs: tuple[Input, ...]

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights it left (of their index, where there are several files); None if
        it made no model."""
        return find_weights(self.step)

    @property
    def origins(self) -> set[str | None]:
        """Names of the stages that made its inputs; None stands for what came from outside."""
        return {source.stage for source in self.inputs}

    @property
    def device_hours(self) -> float:
        """Cores or accelerators times hours."""
        return self.step.devices * (self.step.seconds or 0.0) / 3600


@dataclass(frozen=True)
class Lineage:
    """The runs behind a model in an order in which they can be made; the last one is the model's
    own."""

    recipe: Recipe
    name: str
    """what the recipe is called; empty where there is none"""
    stages: tuple[Stage, ...]

    @property
    def released(self) -> Stage:
        """The run of the model itself."""
        return self.stages[-1]

    def of(self, *verbs: str) -> list[Stage]:
        """Return the stages of the given verbs."""
        return [stage for stage in self.stages if stage.step.verb in verbs]

    def results(self, kind: type[R]) -> list[tuple[Stage, R]]:
        """Return one kind of result with the stages that wrote it."""
        results = [(stage, stage.step.result(kind)) for stage in self.of(kind.stage)]
        return [(stage, result) for stage, result in results if result is not None]

    @cached_property
    def outside(self) -> list[tuple[Stage, Input]]:
        """Inputs that no run of the lineage made, each once, under the first stage that read it."""
        sources: dict[str, tuple[Stage, Input]] = {}
        for stage in self.stages:
            for source in stage.inputs:
                if source.stage is None:
                    sources.setdefault(source.place, (stage, source))

        return list(sources.values())

    @cached_property
    def bases(self) -> list[Input]:
        """Checkpoints and tokenizers from outside."""
        return [source for _, source in self.outside if source.is_base]

    @cached_property
    def checkpoints(self) -> list[Input]:
        """Checkpoints from outside."""
        return [source for source in self.bases if source.key != "tokenizer"]

    def describe(self, step: StepRun) -> Stage:
        """Return a run beside the model's own, such as its evaluation, as a stage."""
        tracer = _Tracer(self.recipe)
        return tracer.stages[tracer.visit(step.path.resolve())]

    @property
    def digests(self) -> set[str]:
        """The fingerprints of everything that any stage read."""
        return {source.digest for stage in self.stages for source in stage.inputs}

    @property
    def synthetic(self) -> bool:
        """True where all that was learnt from is text that `llama2 world` wrote."""
        return bool(self.of("world")) and not self.outside


def find_weights(step: StepRun) -> str | None:
    """Return the SHA-256 of a finished run's weights, as it recorded it."""
    outputs = step.recorded
    return (outputs.get(INDEX) or outputs.get(WEIGHTS)) if CONFIG in outputs else None


def trace(run: Path) -> Lineage:
    """Trace how the model of a finished run was made.

    UserError for what is no run, is not finished, or holds no model.
    """
    manifest = read_manifest(run)
    if not manifest:
        raise UserError(
            f"{run}: this is no run directory",
            "give the directory that a stage such as sft or ppo wrote",
        )
    if not (run / runs.COMPLETE).is_file():
        raise UserError(f"{run}: this run is not finished", "finish it first: repeat its command")

    recipe = read_recipe(run.resolve().parent)
    tracer = _Tracer(recipe)
    name = tracer.visit(run.resolve())
    stages = list(tracer.stages.values())

    if find_weights(tracer.stages[name].step) is None:
        raise UserError(
            f"{run}: a run of '{manifest.get('verb')}' holds no model",
            "give a run of pretrain, sft, ppo, select or reward",
        )

    recipe_name = read_name(recipe.path)
    order = [step.name for step in recipe.steps]
    # without a recipe, runs are listed by when they began
    if recipe_name and all(stage.name in order for stage in stages):
        stages.sort(key=lambda stage: order.index(stage.name))

    return Lineage(recipe, recipe_name, tuple(stages))


def read_name(directory: Path) -> str:
    """Return a recipe's own name, wherever its directory was moved to; empty where no recipe was
    run."""
    file = directory / RECIPE
    if not file.is_file():
        return ""

    try:
        return Path(read_yaml(file)["out"]).name
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{file}: this is no recipe", "repeat `llama2 run`, which writes it"
        ) from None


class _Tracer:
    """Walks from a run to the runs whose output it read."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages: dict[str, Stage] = {}
        self.places: dict[str, str] = {}

    def visit(self, run: Path) -> str:
        """Add a run after everything that it was made from, and return its name."""
        inside = run.parent == self.recipe.path.resolve()
        name = run.name if inside else f"{run.parent.name}-{run.name}"
        while name in self.stages and self.stages[name].step.path != run:
            name += "-2"

        if name in self.stages:
            return name

        step = StepRun(name, run, read_manifest(run))
        recorded: Mapping[str, str] = step.manifest.get("inputs") or {}
        paths = [(key, path) for key, path in sorted(list_texts(step.config)) if key in recorded]
        inputs = [self._find_input(run, key, path, recorded[key]) for key, path in paths]

        self.stages[name] = Stage(name, step, tuple(inputs))
        return name

    def _find_input(self, run: Path, key: str, path: str, digest: str) -> Input:
        file, home = locate(run, path, digest)
        if file is None or home is None:
            return Input(key, digest, None, self._place_outside(path))

        name = self.visit(home)
        place = Path("runs", name) / file.relative_to(home)
        return Input(key, digest, name, place.as_posix())

    def _place_outside(self, path: str) -> str:
        """Return a name of its own below inputs/ for something from outside, of which only the last
        part is told."""
        if path not in self.places:
            name = Path(path).name or "input"
            stem, dot, end = name.partition(".")
            place, number = f"inputs/{name}", 1
            while place in self.places.values():
                number += 1
                place = f"inputs/{stem}-{number}{dot}{end}"

            self.places[path] = place

        return self.places[path]


def locate(run: Path, path: str, digest: str) -> tuple[Path | None, Path | None]:
    """Return where an input of `run` lies now and the finished run that it is a part of.

    None, None if it is not found. It counts as found if it is a part of a finished run and has the
    fingerprint that was read.
    """
    for candidate in _candidates(run, path):
        home = _find_home(candidate)
        if home is None or home == run or not candidate.exists():
            continue

        if runs.read_fingerprint(home, candidate.relative_to(home).as_posix()) == digest:
            return candidate, home

    return None, None


def _candidates(run: Path, path: str) -> Iterator[Path]:
    """Yield where an input may lie now: in a run beside this one, below a directory above it, or
    where it lay then."""
    parts = Path(path).parts
    for index in reversed(range(len(parts))):
        if (run.parent / parts[index] / runs.MANIFEST).is_file():
            yield run.parent.joinpath(*parts[index:])

    if Path(path).is_absolute():
        yield Path(path)
    else:
        yield from (directory / path for directory in run.parents)


def _find_home(path: Path) -> Path | None:
    """Return the finished run that a path is, or lies in."""
    for directory in (path, *path.parents):
        if (directory / runs.COMPLETE).is_file() and (directory / runs.MANIFEST).is_file():
            return directory

    return None


def list_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a configuration with its dotted key, as `config.paths` names the inputs
    of a run."""
    if isinstance(value, str):
        yield key, value

    items: Iterable[tuple[object, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)

    for name, item in items:
        yield from list_texts(item, f"{key}.{name}".removeprefix("."))
