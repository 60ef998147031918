"""What a model was made from: the runs behind it, and what came from outside, found by content.

A manifest keeps the fingerprint of every input. A run is an ancestor only if what lies on the disk
has the very fingerprint that was read: directories may have been moved or renamed since, and one
that was made anew under the same name is not taken for the old one. Where an input is not found,
its fingerprint is all that is known of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2 import runs
from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError
from llama2.formats.checkpoint import CONFIG, INDEX, WEIGHTS
from llama2.runs.recipe_runs import Recipe, Step, read_manifest, read_recipe

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


@dataclass(frozen=True)
class Input:
    """Something a stage read: its dotted key in the configuration, and the fingerprint of what it
    held."""

    key: str
    digest: str
    stage: str | None
    """the stage of the lineage that made it; None for what came from outside"""
    inside: str
    """what of that stage was read, relative to its directory; empty for all of it"""
    place: str
    """where the papers of a release say it lies: runs/<stage>/..., or inputs/<name> for what came
    from outside"""
    found: Path | None
    """where it lies here, if it is a part of a run that was found"""


@dataclass(frozen=True)
class Stage:
    """One run of the lineage with what it read."""

    name: str
    step: Step
    inputs: tuple[Input, ...]

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights it left (of their index, where there are several files); None if
        it made no model."""
        return weights_of(self.step)

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
        return self.stages[-1]

    def of(self, *verbs: str) -> list[Stage]:
        """The stages of the given verbs."""
        return [stage for stage in self.stages if stage.step.verb in verbs]

    @cached_property
    def outside(self) -> list[tuple[Stage, Input]]:
        """What no run of the lineage made, each thing once, under the first stage that read it."""
        seen: dict[str, tuple[Stage, Input]] = {}
        for stage in self.stages:
            for one in stage.inputs:
                if one.stage is None:
                    seen.setdefault(one.place, (stage, one))

        return list(seen.values())

    @cached_property
    def bases(self) -> list[tuple[Stage, Input]]:
        """Checkpoints and tokenizers from outside."""
        return [
            (stage, one) for stage, one in self.outside if one.key.partition(".")[0] in _CHECKPOINTS
        ]

    def describe(self, step: Step) -> Stage:
        """A run beside the model's own, such as its evaluation, as a stage."""
        tracer = _Tracer(self.recipe)
        return tracer.stages[tracer.visit(step.path.resolve())]

    @property
    def digests(self) -> set[str]:
        """The fingerprints of everything that any stage read."""
        return {one.digest for stage in self.stages for one in stage.inputs}

    @property
    def synthetic(self) -> bool:
        """Whether all that was learnt from is text that `llama2 world` wrote."""
        return bool(self.of("world")) and not self.outside


def weights_of(step: Step) -> str | None:
    """SHA-256 of a finished run's weights, as it recorded it."""
    outputs = step.recorded
    return (outputs.get(INDEX) or outputs.get(WEIGHTS)) if CONFIG in outputs else None


def trace(run: Path) -> Lineage:
    """Everything known about how the model of a finished run was made.

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

    if weights_of(tracer.stages[name].step) is None:
        raise UserError(
            f"{run}: a run of '{manifest.get('verb')}' holds no model",
            "give a run of pretrain, sft, ppo, select or reward",
        )

    called, order = recipe_name(recipe.path), [step.name for step in recipe.steps]
    # without a recipe, runs are listed by when they began
    if called and all(stage.name in order for stage in stages):
        stages.sort(key=lambda stage: order.index(stage.name))

    return Lineage(recipe, called, tuple(stages))


def recipe_name(directory: Path) -> str:
    """A recipe's own name, wherever its directory was moved to; empty where no recipe was run."""
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
        """Add a run after everything that it was made from; its name."""
        inside = run.parent == self.recipe.path.resolve()
        name = run.name if inside else f"{run.parent.name}-{run.name}"
        while name in self.stages and self.stages[name].step.path != run:
            name += "-2"

        if name in self.stages:
            return name

        step = Step(name, run, read_manifest(run))
        recorded: Mapping[str, str] = step.manifest.get("inputs") or {}
        inputs = []

        for key, path in sorted(leaves(step.config)):
            if key in recorded:
                inputs.append(self._input(run, key, path, recorded[key]))

        self.stages[name] = Stage(name, step, tuple(inputs))
        return name

    def _input(self, run: Path, key: str, path: str, digest: str) -> Input:
        found, home = locate(run, path, digest)
        if found is None or home is None:
            return Input(key, digest, None, "", self._outside(path), None)

        name = self.visit(home)
        inside = found.relative_to(home).as_posix()
        place = f"runs/{name}" if inside == "." else f"runs/{name}/{inside}"

        return Input(key, digest, name, "" if inside == "." else inside, place, found)

    def _outside(self, path: str) -> str:
        """A name of its own below inputs/ for something from outside, of which only the last part
        is told."""
        if path not in self.places:
            name, taken = Path(path).name or "input", set(self.places.values())
            stem, dot, end = name.partition(".")
            place = f"inputs/{name}"

            for number in range(2, len(taken) + 3):
                if place not in taken:
                    break

                place = f"inputs/{stem}-{number}{dot}{end}"

            self.places[path] = place

        return self.places[path]


def locate(run: Path, path: str, digest: str) -> tuple[Path | None, Path | None]:
    """Where an input of `run` lies now and the finished run that it is a part of; None, None if it
    is not found.

    It counts as found if it is a part of a finished run and has the fingerprint that was read.
    """
    for candidate in _candidates(run, path):
        home = _home(candidate)
        if (
            home is not None
            and home != run
            and candidate.exists()
            and (runs.recorded(home, candidate.relative_to(home).as_posix()) == digest)
        ):
            return candidate, home

    return None, None


def _candidates(run: Path, path: str) -> Iterator[Path]:
    """Where an input may lie now: in a run beside this one, below a directory above it, or where it
    lay then."""
    parts = Path(path).parts
    for place in range(len(parts) - 1, -1, -1):
        if (run.parent / parts[place] / runs.MANIFEST).is_file():
            yield run.parent.joinpath(*parts[place:])

    if not Path(path).is_absolute():
        yield from (directory / path for directory in run.parents)
    else:
        yield Path(path)


def _home(path: Path) -> Path | None:
    """The finished run that a path is, or lies in."""
    return next(
        (
            directory
            for directory in (path, *path.parents)
            if (directory / runs.COMPLETE).is_file() and (directory / runs.MANIFEST).is_file()
        ),
        None,
    )


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration with its dotted key, as `config.paths` names the inputs of a
    run."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{key}.{index}")
