"""What a recipe says: its steps, with every reference resolved and every configuration checked
before any work."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from llama2.config import Config as Section
from llama2.config import StageConfig, build, check_names, derive, mistakes, paths, schema
from llama2.config.schema import Flag
from llama2.cpu_tuning import cores
from llama2.errors import UserError, did_you_mean
from llama2.reading import files
from llama2.recipe import inputs, launch

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_RESERVED = {"out", "logs", "recipe.yaml", "steps.json", "report.html"}


class StepKeys(Section):
    """What a step has beside its verb's own keys."""

    verb: str
    processes: int = Field(1, gt=0)
    """data-parallel ranks on this machine"""
    cores: int = Field(0, ge=0)
    """cores it takes; 0 means all"""
    seconds: float = Field(1.0, gt=0)
    """how long it takes, relative to the other steps: weighs the ETA"""


class Config(StageConfig):
    """An ordered list of steps: steps.NAME.verb, .processes, .cores, .seconds, and the verb's own
    keys."""

    cores: int = Field(default_factory=cores, gt=0)
    """processor cores the steps may use together"""
    parameters: dict[str, str | int | float | bool] = {}
    """values for `${name}` in the steps; `${out}` is the recipe's own directory"""
    awaits: tuple[str, ...] = ()
    """files and directories that are made by hand while the recipe runs: they need not be there
    when it begins"""
    steps: dict[str, dict[str, Any] | None]
    """name -> {verb, processes, cores, seconds, and the verb's own keys}; null leaves a step out"""
    step: str | None = None
    """carry out this one step, in this process and the ranks torchrun started with it"""

    @classmethod
    def kind_at(cls, names: tuple[str, ...], values: Mapping[str, Any]) -> Any:
        """The keys of a step are those of its verb."""
        steps = values.get("steps")
        step = (
            steps.get(names[1])
            if len(names) == 2 and names[0] == "steps" and isinstance(steps, Mapping)
            else None
        )
        verb = step.get("verb") if isinstance(step, Mapping) else None
        verb = verb.value if isinstance(verb, Flag) else verb

        return _kind(verb) | None if isinstance(verb, str) and _makes_run(verb) else None

    @classmethod
    def heed(cls, given: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a change to a step that no recipe has, and a parameter that none refers to."""
        known: dict[str, None] = {}
        used: set[str] = set()
        parameters: dict[str, None] = {}

        for layer in given:
            steps = layer.get("steps")
            steps = steps if isinstance(steps, Mapping) else {}
            for name, step in steps.items():
                if name not in known:
                    _check_new(name, step, [*known, *steps])

            known |= dict.fromkeys(steps)
            used |= referred_to(layer)
            given_here = layer.get("parameters")
            parameters |= dict.fromkeys(given_here if isinstance(given_here, Mapping) else ())

        for name in parameters:
            if name not in used:
                raise UserError(
                    f"parameters.{name}: no step refers to '${{{name}}}'",
                    did_you_mean(name, used - known.keys() - {"out"}),
                )


class Step(StepKeys, StageConfig):
    """One run of a recipe."""

    name: str
    values: dict[str, Any]
    """the verb's configuration, references resolved"""
    needs: frozenset[str]
    """the steps whose output it reads"""


@cache
def _kind(verb: str) -> Any:
    """The keys that a step of this verb has."""
    return create_model(f"{verb} step", __base__=(launch.stage(verb).Config, StepKeys))


def _makes_run(verb: str) -> bool:
    return verb in launch.VERBS and launch.VERBS[verb].makes_run


def _check_new(name: str, step: Any, known: Sequence[str]) -> None:
    """Refuse what changes a step that is not there: a new one has a verb."""
    others = [other for other in known if other != name]
    value = step.value if isinstance(step, Flag) else step
    if value is None:
        raise UserError(
            f"steps.{name}: there is no such step to leave out", did_you_mean(name, others)
        )

    if isinstance(value, Mapping) and value.get("verb") is None:
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        raise UserError(
            f"steps.{name}: there is no such step, and a new one needs a verb",
            f"did you mean '{close[0]}'?" if close else f"known: {', '.join(others)}",
        )


def referred_to(layer: Mapping[str, Any]) -> set[str]:
    """Every name that a recipe's steps and what it awaits refer to."""
    return set(_names_in([layer.get("steps"), layer.get("awaits")]))


def _names_in(value: Any) -> Iterator[str]:
    """Every name that a reference in `value` holds."""
    if isinstance(value, Flag):
        value = value.value

    if isinstance(value, Mapping):
        value = list(value.values())

    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _names_in(item)
    elif isinstance(value, str):
        yield from _REFERENCE.findall(value)


# --- steps
# -----------------------------------------------------------------------------------------------------------


def steps_of(recipe: Config) -> dict[str, Step]:
    """The recipe's steps with every reference resolved and every configuration checked, before any
    work."""
    check_names(recipe.steps, "steps")
    check_names(recipe.parameters, "parameters")
    for name in (*recipe.steps, *recipe.parameters):
        _check_name(name, "steps" if name in recipe.steps else "parameters")

    steps: dict[str, Step] = {}
    for name, given in recipe.steps.items():
        if given is not None:
            steps[name] = _step(name, given, recipe, steps)

    if not steps:
        raise UserError("the recipe has no steps", "give some: steps: {NAME: {verb: VERB}}")
    if recipe.step is not None and recipe.step not in steps:
        raise UserError(f"the recipe has no step '{recipe.step}'", did_you_mean(recipe.step, steps))

    for text in recipe.awaits:
        _resolved(text, recipe, steps, set(), "awaits")

    return steps


def _check_name(name: str, place: str) -> None:
    if name.lower() in _RESERVED:
        raise UserError(f"{place}: the name '{name}' is taken in every recipe", "choose another")
    if re.search(r"[${}]", name):
        raise UserError(
            f"{place}: nothing can refer to '{name}'", "choose a name without $, { and }"
        )


def _step(name: str, given: Mapping[str, Any], recipe: Config, earlier: Mapping[str, Step]) -> Step:
    """One step, checked; its seed is its own, made of the recipe's and its name."""
    where = f"steps.{name}"
    if name in recipe.parameters:
        raise UserError(
            f"'{name}' is both a step and a parameter", f"leave out the step: --steps.{name} null"
        )
    if "out" in given:
        raise UserError(
            f"{where}: a step writes to the recipe's directory, so it has no 'out'", "leave it out"
        )

    verb = given.get("verb")
    if verb is None:
        _check_new(name, given, list(recipe.steps))

    if isinstance(verb, str) and verb in launch.VERBS and not _makes_run(verb):
        raise UserError(
            f"{where}: unknown verb '{verb}' for a step: it leaves no run that others could read",
            "call it behind the recipe",
        )
    if not isinstance(verb, str) or not _makes_run(verb):
        raise UserError(
            f"{where}: unknown verb '{verb}'",
            did_you_mean(str(verb), [v for v, entry in launch.VERBS.items() if entry.makes_run]),
        )

    needs: set[str] = set()
    values = _resolved(dict(given), recipe, earlier, needs, where)
    own = {key: values.pop(key) for key in StepKeys.model_fields if key in values}
    values = {"seed": derive(recipe.seed, name), **values, "out": str(recipe.out / name)}

    if unknown := next(
        (key for key in values if schema.spelt(launch.stage(verb).Config, key) is None), None
    ):
        meant = schema.Place((), _kind(verb), "")
        raise UserError(
            f"{where}: unknown key '{unknown}'",
            mistakes.suggestion(_kind(verb), meant, [unknown], as_flag=False),
        )

    build(launch.stage(verb).Config, values, where)
    return build(
        Step,
        {
            "name": name,
            "out": recipe.out / name,
            "values": values,
            "needs": frozenset(needs),
            **own,
        },
        where,
    )


def _resolved(
    value: Any, recipe: Config, steps: Mapping[str, Step], needs: set[str], where: str
) -> Any:
    """`value` with its `${references}` replaced; the names of steps are added to `needs`."""
    if isinstance(value, Mapping):
        for key in value:
            _refuse_leftover(str(key), str(key), where)

        return {
            key: _resolved(item, recipe, steps, needs, f"{where}.{key}")
            for key, item in value.items()
        }

    if isinstance(value, list):
        return [_resolved(item, recipe, steps, needs, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match[1]
        if name == "out":
            return str(recipe.out)
        if name in recipe.parameters:
            return _text(recipe.parameters[name])
        if name not in steps:
            raise _no_reference(name, recipe, steps, where)

        needs.add(name)
        return str(recipe.out / name)

    whole = _REFERENCE.fullmatch(value)
    if whole and whole[1] in recipe.parameters and not isinstance(recipe.parameters[whole[1]], str):
        return recipe.parameters[whole[1]]

    resolved = _REFERENCE.sub(lookup, value)
    _refuse_leftover(resolved, value, where)
    return resolved


def _no_reference(name: str, recipe: Config, steps: Mapping[str, Step], where: str) -> UserError:
    """Why `${name}` stands for nothing."""
    known = [*steps, *recipe.parameters]
    cure = did_you_mean(name, known)
    if name in recipe.steps and recipe.steps[name] is None:
        cure = f"that step is left out: give what it would have made, --parameters.{name} PATH"
    elif where.startswith(f"steps.{name}."):
        cure = f"known: {', '.join(sorted(known)) or 'none'}; it is this step itself"
    elif name in recipe.steps:
        cure = f"known: {', '.join(sorted(known)) or 'none'}; that step comes later: put it before this one"

    return UserError(f"{where}: '${{{name}}}' is neither a parameter nor an earlier step", cure)


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_leftover(resolved: str, written: str, where: str) -> None:
    if "${" in resolved:
        raise UserError(
            f"{where}: a reference is left over in '{resolved}'"
            if resolved != written
            else f"{where}: '{written}' holds what is no reference",
            "write ${name}; a parameter's value and a key hold none",
        )


# --- inputs
# ----------------------------------------------------------------------------------------------------------


def check_inputs(recipe: Config, steps: Mapping[str, Step]) -> None:
    """UserError that names every input which no step makes, nobody makes later, and which is not
    there."""
    later = [
        recipe.out,
        *(files.at_home(_resolved(text, recipe, steps, set(), "awaits")) for text in recipe.awaits),
    ]
    needed: list[tuple[str, Path]] = []
    for name, step in steps.items():
        config = build(launch.stage(step.verb).Config, step.values)
        inputs.check(config, complete=False, later=later)
        needed += [
            (f"steps.{name}.{key}", path)
            for key, path in paths(config)
            if not any(path.is_relative_to(place) for place in later)
        ]

    inputs.refuse_missing(needed)
