"""The configuration of a recipe, and the keys that a step has in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import Field, create_model

from llama2.config import Config as Section
from llama2.config import StageConfig
from llama2.config.layers import merge
from llama2.config.schema import Flag
from llama2.cpu_tuning import count_cores
from llama2.errors import UserError, did_you_mean
from llama2.recipe import verbs

REFERENCE = re.compile(r"\$\{([^{}]*)\}")


class StepKeys(Section):
    """The keys that a step has beside its verb's own."""

    verb: str
    processes: int = Field(1, gt=0)
    """data-parallel ranks on this machine"""
    cores: int = Field(0, ge=0)
    """cores it takes; 0 means all"""
    seconds: float = Field(1.0, gt=0)
    """how long it takes, relative to the other steps: weighs the ETA"""

    def count_cores(self, cores: int) -> int:
        """Return the cores it takes, of `cores` that there are."""
        return min(max(self.cores or cores, self.processes), cores)

    def weigh(self, cores: int) -> float:
        """Return its part in the time of a recipe on so many cores: steps that take half of them
        run two at a time."""
        return self.seconds * self.count_cores(cores) / cores


class Config(StageConfig):
    """An ordered list of steps: steps.NAME.verb, .processes, .cores, .seconds, and the verb's own
    keys."""

    cores: int = Field(default_factory=count_cores, gt=0)
    """processor cores the steps may use together"""
    parameters: dict[str, str | int | float | bool] = {}
    """values for `${name}` in the steps; `${out}` is the recipe's own directory"""
    variants: dict[str, dict[str, dict[str, Any]]] = {}
    """parameter -> each value that it may have -> the keys of the recipe which that value changes:
    sizes of one recipe, such as `scale: {small: {steps: {...}}, full: {}}`"""
    awaits: tuple[str, ...] = ()
    """files and directories that are made by hand while the recipe runs: they need not be there
    when it begins"""
    steps: dict[str, dict[str, Any] | None]
    """name -> {verb, processes, cores, seconds, and the verb's own keys}; null leaves a step out"""
    step: str | None = None
    """carry out this one step, in this process and the ranks torchrun started with it"""

    @classmethod
    def find_kind(cls, names: tuple[str, ...], values: Mapping[str, Any]) -> Any:
        """Return the keys of a step: those of its verb."""
        if len(names) != 2 or names[0] != "steps":
            return None

        verb: Any = values
        for name in (*names, "verb"):
            verb = verb.get(name) if isinstance(verb, Mapping) else None

        verb = _value(verb)
        return make_step_kind(verb) | None if makes_run(verb) else None

    @classmethod
    def arrange_layers(cls, layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Lay what the parameters choose upon the recipe that has the variants, below the recipes
        and flags that lie upon it."""
        arranged = list(layers)
        parameters: dict[str, Any] = {}
        for layer in layers:
            given = layer.get("parameters")
            parameters |= given if isinstance(given, Mapping) else {}

        for place in reversed(range(len(layers))):
            variants = layers[place].get("variants")
            if isinstance(variants, Mapping):
                arranged.insert(place + 1, _choose(variants, parameters))

        return arranged

    @classmethod
    def check_layers(cls, layers: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a change to a step that no recipe has, and a parameter that none refers to."""
        known: dict[str, None] = {}
        parameters: dict[str, None] = {}
        variants: set[str] = set()
        for layer in layers:
            steps, given = layer.get("steps"), layer.get("parameters")
            steps = steps if isinstance(steps, Mapping) else {}
            parameters |= dict.fromkeys(given if isinstance(given, Mapping) else ())
            variants |= set(layer.get("variants") or ())
            for name, step in steps.items():
                if name not in known:
                    check_new_step(name, step, [*known, *steps])

            known |= dict.fromkeys(steps)

        used = find_references(layers) | variants
        for name in parameters:
            if name not in used:
                raise UserError(
                    f"parameters.{name}: no step refers to '${{{name}}}'",
                    did_you_mean(name, used - known.keys() - {"out"}),
                )


def _choose(variants: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the values of parameters with variants change in a recipe."""
    changes: Mapping[str, Any] = {}
    for name, choices in variants.items():
        if not isinstance(choices, Mapping):
            continue  # refused when all is checked

        value = str(_value(parameters.get(name)))
        if value not in choices:
            raise UserError(
                f"parameters.{name}: no variant of this recipe is called '{value}'",
                did_you_mean(value, choices),
            )

        changes = merge(changes, choices[value] or {})

    return changes


def find_references(recipe: Sequence[Mapping[str, Any]]) -> set[str]:
    """Every name that the steps and `awaits` of some recipes refer to."""
    places = [[layer.get("steps"), layer.get("awaits")] for layer in recipe]
    return set(REFERENCE.findall(repr(places)))


def makes_run(verb: Any) -> bool:
    """Return whether a value names a verb that a step may have: one that leaves a run to others."""
    return isinstance(verb, str) and verb in verbs.VERBS and verbs.VERBS[verb].makes_run


@cache
def make_step_kind(verb: str) -> Any:
    """The configuration of a step of this verb, as a recipe has it."""
    return create_model(f"{verb} step", __base__=(verbs.load(verb).Config, StepKeys))


def check_new_step(name: str, step: Any, known: Sequence[str]) -> None:
    """Refuse what changes a step that is not there: a new one has a verb."""
    others = [other for other in known if other != name]
    step = _value(step)
    if step is None:
        raise UserError(
            f"steps.{name}: there is no such step to leave out", did_you_mean(name, others)
        )

    if isinstance(step, Mapping) and step.get("verb") is None:
        raise UserError(
            f"steps.{name}: there is no such step, and a new one needs a verb",
            did_you_mean(name, others),
        )


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Flag) else value
