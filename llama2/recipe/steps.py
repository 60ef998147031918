"""The steps of a recipe, with every reference resolved and every configuration checked before any
work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.config import StageConfig, build, check_names, derive_seed, list_paths, mistakes
from llama2.config.schema import Place, find_place
from llama2.errors import UserError, did_you_mean
from llama2.reading import files
from llama2.recipe import inputs, verbs
from llama2.recipe.config import (
    REFERENCE,
    Config,
    StepKeys,
    check_new_step,
    make_step_kind,
    makes_run,
)

_RESERVED = {"out", "logs", "recipe.yaml", "steps.json", "report.html"}


@dataclass(frozen=True)
class RecipeStep:
    """One run of a recipe."""

    name: str
    keys: StepKeys
    values: dict[str, Any]
    """the verb's configuration as it is written, references resolved"""
    config: StageConfig
    """the same, checked"""
    needs: frozenset[str]
    """the steps whose output it reads"""

    @property
    def verb(self) -> str:
        """The stage that it carries out."""
        return self.keys.verb

    @property
    def out(self) -> Path:
        """Its run directory."""
        return self.config.out


def resolve_steps(recipe: Config) -> dict[str, RecipeStep]:
    """Return the steps of a recipe by name; UserError for the first that cannot be carried out."""
    _check_names(recipe.steps, "steps")
    _check_names(recipe.parameters, "parameters")
    steps: dict[str, RecipeStep] = {}
    for name, given in recipe.steps.items():
        if given is not None:
            steps[name] = _resolve_step(name, given, recipe, steps)

    if not steps:
        raise UserError("the recipe has no steps", "give some: steps: {NAME: {verb: VERB}}")
    if recipe.step is not None and recipe.step not in steps:
        raise UserError(f"the recipe has no step '{recipe.step}'", did_you_mean(recipe.step, steps))

    _resolve(list(recipe.awaits), "awaits", recipe, steps)
    return steps


def _check_names(names: Mapping[str, Any], place: str) -> None:
    """Refuse names that no step and no parameter may have."""
    check_names(names, place)
    for name in names:
        if name.lower() in _RESERVED:
            raise UserError(
                f"{place}: the name '{name}' is taken in every recipe", "choose another"
            )
        if re.search(r"[${}]", name):
            raise UserError(
                f"{place}: nothing can refer to '{name}'", "choose a name without $, { and }"
            )


def _resolve_step(
    name: str, given: Mapping[str, Any], recipe: Config, earlier: Mapping[str, RecipeStep]
) -> RecipeStep:
    """Return one step, checked; its seed is its own, made of the recipe's and its name."""
    where = f"steps.{name}"
    if name in recipe.parameters:
        raise UserError(
            f"'{name}' is both a step and a parameter", f"leave out the step: --steps.{name} null"
        )
    if "out" in given:
        raise UserError(
            f"{where}: a step writes to the recipe's directory, so it has no 'out'", "leave it out"
        )

    check_new_step(name, given, list(recipe.steps))
    verb = given["verb"]
    if not makes_run(verb):
        raise _explain_verb(str(verb), where)

    values = _resolve(dict(given), where, recipe, earlier)
    needs = earlier.keys() & REFERENCE.findall(repr(given))
    keys = {key: values.pop(key) for key in StepKeys.model_fields if key in values}
    values = {"seed": derive_seed(recipe.seed, name), **values, "out": str(recipe.out / name)}

    kind = verbs.load(verb).Config
    for key in values:
        if find_place(kind, [key], {}).kind is None:
            meant = Place((), make_step_kind(verb), "")
            cure = mistakes.suggest(make_step_kind(verb), meant, [key], as_flag=False)
            raise UserError(f"{where}: unknown key '{key}'", cure)

    config = build(kind, values, where)
    return RecipeStep(name, build(StepKeys, keys, where), values, config, frozenset(needs))


def _explain_verb(verb: str, where: str) -> UserError:
    """Return the error for a verb that no step may have."""
    cause = f"{where}: unknown verb '{verb}'"
    if verb in verbs.VERBS:
        return UserError(
            f"{cause} for a step: it leaves no run that others could read",
            "call it behind the recipe",
        )

    return UserError(cause, did_you_mean(verb, filter(makes_run, verbs.VERBS)))


def _resolve(value: Any, where: str, recipe: Config, earlier: Mapping[str, RecipeStep]) -> Any:
    """Return `value`, which stands at the key `where`, with its references replaced."""
    if isinstance(value, Mapping):
        resolved = {}
        for key, item in value.items():
            _refuse_leftover(str(key), str(key), where)
            resolved[key] = _resolve(item, f"{where}.{key}", recipe, earlier)

        return resolved

    if isinstance(value, list):
        return [_resolve(item, where, recipe, earlier) for item in value]
    if not isinstance(value, str):
        return value

    directories = {name: str(recipe.out / name) for name in earlier}
    names = {"out": str(recipe.out), **directories, **recipe.parameters}
    for name in REFERENCE.findall(value):
        if name not in names:
            raise _explain_reference(name, where, recipe, earlier)

    match = REFERENCE.fullmatch(value)
    if match and not isinstance(names[match[1]], str):
        return names[match[1]]

    text = REFERENCE.sub(lambda part: _spell(names[part[1]]), value)
    _refuse_leftover(text, value, where)
    return text


def _explain_reference(
    name: str, where: str, recipe: Config, earlier: Mapping[str, RecipeStep]
) -> UserError:
    """Return the error for a name that stands for nothing."""
    known = [*earlier, *recipe.parameters]
    all_known = f"known: {', '.join(sorted(known)) or 'none'}"
    cure = did_you_mean(name, known)
    if name in recipe.steps and recipe.steps[name] is None:
        cure = f"that step is left out: give what it would have made, --parameters.{name} PATH"
    elif where.startswith(f"steps.{name}."):
        cure = f"{all_known}; it is this step itself"
    elif name in recipe.steps:
        cure = f"{all_known}; that step comes later: put it before this one"

    return UserError(f"{where}: '${{{name}}}' is neither a parameter nor an earlier step", cure)


def _spell(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_leftover(resolved: str, written: str, where: str) -> None:
    if "${" in resolved:
        raise UserError(
            f"{where}: a reference is left over in '{resolved}'"
            if resolved != written
            else f"{where}: '{written}' holds what is no reference",
            "write ${name}; a parameter's value and a key hold none",
        )


def check_inputs(recipe: Config, steps: Mapping[str, RecipeStep]) -> None:
    """UserError that names every input which no step makes, nobody makes later, and which is not
    there."""
    awaited = _resolve(list(recipe.awaits), "awaits", recipe, steps)
    later = [recipe.out, *map(files.expand_home, awaited)]
    needed: list[tuple[str, Path]] = []
    for name, step in steps.items():
        inputs.check(step.config, complete=False, later=later)
        for key, path in list_paths(step.config):
            if not any(path.is_relative_to(place) for place in later):
                needed.append((f"steps.{name}.{key}", path))

    inputs.refuse_missing(needed)
