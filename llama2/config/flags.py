"""Flags behind a verb: `--section.some-key value`, read by what the configuration wants there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from llama2.config import mistakes, schema
from llama2.config.layers import merge
from llama2.config.schema import Flag
from llama2.errors import UserError


def overrides(kind: Any, arguments: Sequence[str], under: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as a nested mapping of `Flag`, spelt as the configuration `kind` spells its keys.

    Several values make a list. A flag without a value is true, and `--section.no-key` false, where
    the key is true or false and nothing else. `under` is what the flags are laid upon: a step that
    it has says what its keys are.
    """
    nested: dict[str, Any] = {}
    given = _split(arguments)
    # a verb says what else there is
    for flag in sorted(given, key=lambda flag: not flag.name.endswith(".verb")):
        below = merge(under, nested)
        place, value = _read(kind, flag, below)
        _refuse_second(place, flag, nested)
        _put(nested, place.names, Flag(value, flag.name, flag.words))

    return nested


def _split(arguments: Sequence[str]) -> list[Flag]:
    """Each flag with its words; UserError for a word that belongs to none."""
    found: list[Flag] = []
    closed = True  # `--key=value` takes no further words
    for argument in arguments:
        if argument.startswith("--") and argument != "--":
            name, closed, word = (
                argument.partition("=")[0],
                "=" in argument,
                argument.partition("=")[2],
            )
            found.append(Flag(None, name, (word,) if closed else ()))
        elif closed or argument == "--":
            raise UserError(
                f"unexpected argument '{argument}'",
                "a recipe stands before all flags, and these look like --section.key value",
            )
        else:
            found[-1] = Flag(None, found[-1].name, (*found[-1].words, argument))

    return found


def _read(kind: Any, flag: Flag, below: Mapping[str, Any]) -> tuple[schema.Place, Any]:
    """Where a flag leads and what it says there; UserError where it says nothing or too much."""
    names = flag.name[2:].split(".")
    place = schema.find(kind, names, below)
    if not flag.words:
        return _switched(kind, flag, names, place, below)
    if place.kind is None:
        raise mistakes.unknown_flag(kind, flag, below)
    if len(flag.words) == 1:
        return place, schema.value_of(flag.words[0], place.kind)
    if not schema.takes_several(place.kind) and not schema.is_section(place.kind):
        raise UserError(
            f"unexpected argument '{flag.words[1]}' behind {flag.name} {flag.words[0]}",
            "flags begin with two dashes"
            if re.match("-[A-Za-z]", flag.words[1])
            else "a recipe stands before all flags; quote a value that has spaces",
        )

    return place, schema.several(flag.words, place.kind)


def _switched(
    kind: Any, flag: Flag, names: list[str], place: schema.Place, below: Mapping[str, Any]
) -> tuple[schema.Place, bool]:
    """A flag without a value: true for its key, or false for the key behind `no-`."""
    last = names[-1].replace("_", "-")
    if place.kind is None and last.startswith("no-"):
        other = schema.find(kind, [*names[:-1], names[-1][3:]], below)
        if other.kind is not None and schema.takes_none(other.kind):
            return other, False

    if place.kind is None:
        raise mistakes.unknown_flag(kind, flag, below)
    if not schema.takes_none(place.kind):
        raise UserError(f"'{flag.name[2:]}' needs a value", f"write {schema.usage(place)}")

    return place, True


def _refuse_second(place: schema.Place, flag: Flag, nested: Mapping[str, Any]) -> None:
    """Of a flag given twice the last counts; but two lists, or two inputs, are meant together."""
    there: Any = nested
    for name in place.names:
        there = there.get(name) if isinstance(there, Mapping) else None

    lists = [kind for kind in schema.kinds(place.kind) if get_origin(kind) in (tuple, list)]
    if (
        isinstance(there, Flag)
        and (lists or Path in schema.kinds(place.kind))
        and place.names != ("out",)
    ):
        raise UserError(
            f"{flag.name} is given twice ({there.typed()}, {flag.typed()})",
            f"give all behind one: {flag.name} {there.typed()} {flag.typed()}"
            if lists
            else "leave one out, or give the second another name",
        )


def _put(nested: dict[str, Any], names: Sequence[str], flag: Flag) -> None:
    *sections, key = names
    for section in sections:
        nested = nested.setdefault(section, {})
        if isinstance(nested, Flag):
            raise UserError(f"{flag.name} and {nested.name} are both given", "leave one out")

    if isinstance(nested.get(key), dict):
        raise UserError(f"{flag.name} and a key below it are both given", "leave one out")

    nested[key] = flag
