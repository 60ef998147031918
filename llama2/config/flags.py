"""Flags behind a verb: `--section.some-key value`, read by what the configuration wants there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2.config import mistakes, schema
from llama2.config.layers import merge
from llama2.config.schema import Flag, Place
from llama2.errors import UserError


def read_flags(kind: Any, arguments: Sequence[str], under: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags as a nested mapping of `Flag`, spelt as the configuration `kind` spells its
    keys.

    Several values make a list. A flag without a value is true, and `--section.no-key` false, where
    the key is true or false and nothing else. `under` is what the flags are laid upon: a step that
    it has says what its keys are.
    """
    nested: dict[str, Any] = {}
    # a verb says what else there is
    for flag in sorted(_split(arguments), key=lambda flag: not flag.name.endswith(".verb")):
        place, value = _read(kind, flag, merge(under, nested))
        _refuse_second(place, flag, nested)
        _put(nested, place.names, replace(flag, value=value))

    return nested


def _split(arguments: Sequence[str]) -> list[Flag]:
    """Return each flag with its words; UserError for a word that belongs to none."""
    flags: list[Flag] = []
    closed = True  # `--key=value` takes no further words
    for argument in arguments:
        if argument.startswith("--") and argument != "--":
            name, equals, word = argument.partition("=")
            closed = bool(equals)
            flags.append(Flag(None, name, (word,) if closed else ()))
        elif closed or argument == "--":
            raise UserError(
                f"unexpected argument '{argument}'",
                "a recipe stands before all flags, and these look like --section.key value",
            )
        else:
            flags[-1] = replace(flags[-1], words=(*flags[-1].words, argument))

    return flags


def _read(kind: Any, flag: Flag, values: Mapping[str, Any]) -> tuple[Place, Any]:
    """Return where a flag leads and its value there; UserError where it has none or too many."""
    names = flag.name[2:].split(".")
    place = schema.find_place(kind, names, values)
    if place.kind is None and not flag.words and re.match("no[-_]", names[-1]):
        switch = schema.find_place(kind, [*names[:-1], names[-1][3:]], values)
        if schema.takes_none(switch.kind):
            return switch, False

    if place.kind is None:
        raise mistakes.explain_unknown_flag(kind, flag, values)
    if not flag.words and not schema.takes_none(place.kind):
        raise UserError(f"'{flag.name[2:]}' needs a value", f"write {schema.show_usage(place)}")
    if not flag.words:
        return place, True
    is_list = schema.takes_several(place.kind) or schema.is_section(place.kind)
    if len(flag.words) == 1 or is_list:
        return place, schema.read_words(flag.words, place.kind)

    cure = "a recipe stands before all flags; quote a value that has spaces"
    if re.match("-[A-Za-z]", flag.words[1]):
        cure = "flags begin with two dashes"

    raise UserError(
        f"unexpected argument '{flag.words[1]}' behind {flag.name} {flag.words[0]}", cure
    )


def _refuse_second(place: Place, flag: Flag, nested: Mapping[str, Any]) -> None:
    """UserError for a list or an input given twice; of any other flag given twice the last
    counts."""
    first: Any = nested
    for name in place.names:
        first = first.get(name) if isinstance(first, Mapping) else None

    if not isinstance(first, Flag):
        return

    message = f"{flag.name} is given twice ({first.spell()}, {flag.spell()})"
    if schema.find_lists(place.kind):
        raise UserError(message, f"give all behind one: {flag.name} {first.spell()} {flag.spell()}")
    if Path in schema.list_types(place.kind) and place.names != ("out",):
        raise UserError(message, "leave one out, or give the second another name")


def _put(nested: dict[str, Any], names: Sequence[str], flag: Flag) -> None:
    """Put a flag where its names lead; UserError where a value and keys below it are given."""
    *above, key = names
    for name in above:
        nested = nested.setdefault(name, {})
        if isinstance(nested, Flag):
            raise UserError(f"{flag.name} and {nested.name} are both given", "leave one out")

    if isinstance(nested.get(key), dict):
        raise UserError(f"{flag.name} and a key below it are both given", "leave one out")

    nested[key] = flag
