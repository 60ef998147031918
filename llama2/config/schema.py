"""Places of a configuration: the fields below each, the values it takes, and the meaning of a word
typed there.

A place is a list of names. Names of fields may be typed with dashes; names that users chose (of a
set of data, a step, a parameter) are kept letter by letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from llama2.config import yaml12
from llama2.terminal_text import shorten

NAME = "NAME"
"""stands for a key that the user chooses"""
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("NUMBER", "a whole number"),
    float: ("NUMBER", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
    bool: ("true|false", "true or false"),
    NoneType: ("", "null"),
}
"""type -> what stands for a value of it in an example, and in a sentence"""


@dataclass(frozen=True)
class Place:
    """The end of a list of names: the names as they are spelt there, and the type of the value."""

    names: tuple[str, ...]
    kind: Any
    """an annotation, or None for a place that does not exist"""
    flag: str
    """the names as they are typed behind a verb, with dashes in those of fields"""


@dataclass(frozen=True)
class Flag:
    """The value a flag gives a key, and how it was typed: for messages."""

    value: Any
    name: str
    """with its dashes, without the value"""
    words: tuple[str, ...]

    def spell(self) -> str:
        """Its value as it was typed, in quotes where it could not be seen otherwise."""
        text = shorten(" ".join(self.words))
        return text if text.strip() and text.isprintable() else repr(text)


# --- types ---


def list_types(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: unions and `Annotated` taken apart."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return list_types(arguments[0])
    if origin in (Union, UnionType):
        return tuple(kind for argument in arguments for kind in list_types(argument))

    return (annotation,)


def find_lists(annotation: Any) -> list[Any]:
    """The lists and tuples among the alternatives of an annotation."""
    return [kind for kind in list_types(annotation) if get_origin(kind) in (tuple, list)]


def find_item_type(kind: Any, index: int) -> Any:
    """The type of one item of a list or tuple."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return arguments[min(index, len(arguments) - 1)]

    return arguments[0]


def is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether a type is a configuration."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def list_keys(annotation: Any) -> Iterator[tuple[str, Any]]:
    """Every key right below an annotation, with its type; NAME stands for one the user chooses."""
    for kind in list_types(annotation):
        if is_model(kind):
            for name, field in kind.model_fields.items():
                yield field.alias or name, field.annotation
        elif get_origin(kind) is dict:
            yield NAME, get_args(kind)[1]


def list_leaves(
    annotation: Any, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place below `annotation` that holds a value, with its type."""
    below = [child for child in list_keys(annotation) if child != (NAME, Any)]
    for key, kind in below:
        yield from list_leaves(kind, (*prefix, key))

    if prefix and not below:
        yield prefix, annotation


def is_section(annotation: Any) -> bool:
    """Return whether keys stand below it."""
    return any(True for _ in list_keys(annotation))


def takes_several(annotation: Any) -> bool:
    """Return whether several words may stand behind a flag."""
    return bool(find_lists(annotation)) or Any in list_types(annotation)


def takes_none(annotation: Any) -> bool:
    """Return whether a flag may stand without a value: one that is true or false and nothing
    else."""
    return set(list_types(annotation)) in ({bool}, {bool, NoneType})


# --- places ---


def find_place(root: Any, names: Sequence[str], values: Mapping[str, Any]) -> Place:
    """Return where `names` lead from the configuration `root`; a name that `values` has already may
    hold dots itself."""
    place, rest = Place((), root, ""), list(names)
    inside: Any = values
    while rest:
        width = _width(place.kind, rest, inside)
        place = _step_down(place, ".".join(rest[:width]))
        rest = rest[width:]
        if place.kind is None:
            return Place((*place.names, *rest), None, ".".join((place.flag, *rest)))

        inside = inside.get(place.names[-1]) if isinstance(inside, Mapping) else None
        place = replace(place, kind=root.find_kind(place.names, values) or place.kind)

    return place


def _step_down(place: Place, name: str) -> Place:
    """Return the place one name below another."""
    spelling, dashed, kind = name, name, None
    for key, below in list_keys(place.kind):
        if name.replace("-", "_") in (key, key.rstrip("_")):
            spelling, dashed, kind = key, spell_flag(key), below
            break
        if key == NAME:
            kind = below

    if kind is None and name.isdigit() and (several := find_lists(place.kind)):
        kind = find_item_type(several[0], int(name))
    if kind is None and Any in list_types(place.kind):
        kind = Any

    return Place((*place.names, spelling), kind, f"{place.flag}.{dashed}".lstrip("."))


def _width(annotation: Any, rest: Sequence[str], inside: Any) -> int:
    """Return how many of the names are one key: several where the mapping has a key with dots."""
    if isinstance(inside, Mapping) and NAME in dict(list_keys(annotation)):
        for count in range(len(rest), 1, -1):
            if ".".join(rest[:count]) in inside:
                return count

    return 1


def spell_flag(*names: str) -> str:
    """Return names of fields as they are typed behind a verb."""
    return ".".join(name.rstrip("_").replace("_", "-") for name in names)


# --- words ---


def show_usage(place: Place) -> str:
    """Return how a value is given to a place, or to the first key below it: `--dialogs.NAME.path
    PATH`."""
    below, kind = next(list_leaves(place.kind), ((), place.kind))
    flag = ".".join(filter(None, (place.flag, spell_flag(*below))))
    return f"--{flag} {spell_metavar(kind)}{' ...' if find_lists(kind) else ''}"


def spell_metavar(annotation: Any) -> str:
    """Return the word for a value of this type in an example."""
    for kind in list_types(annotation):
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        if find_lists(kind):
            return spell_metavar(find_item_type(kind, 0))
        if kind in _WORDS and kind is not NoneType:
            return _WORDS[kind][0]

    return "VALUE"


def describe_type(annotation: Any) -> str:
    """Return the values a place takes, in plain words."""
    words: list[str] = []
    for kind in list_types(annotation):
        if get_origin(kind) is Literal:
            words += [f"'{value}'" for value in get_args(kind)]
        elif find_lists(kind):
            words.append("a list")
        elif is_section(kind):
            words.append("a mapping")
        else:
            words.append(_WORDS.get(kind, ("", "a value"))[1])

    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")

    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def read_words(words: Sequence[str], annotation: Any) -> Any:
    """Return the value of what stands behind a flag: several words make a list."""
    if len(words) == 1:
        return read_word(words[0], annotation)

    kinds = find_lists(annotation) or [list[Any]]
    return [read_word(word, find_item_type(kinds[0], index)) for index, word in enumerate(words)]


def read_word(word: str, annotation: Any) -> Any:
    """Return what `word` means where `annotation` stands: text where text is wanted, else what YAML
    makes of it."""
    kinds, value = list_types(annotation), yaml12.read_scalar(word)
    if word.lstrip()[:1] in ("{", "[") and (is_section(annotation) or takes_several(annotation)):
        return _read_brackets(word)
    if type(value) in kinds and isinstance(value, (bool, NoneType)):
        return value
    if type(value) in (int, float) and {int, float} & set(kinds):
        # 1.10 is no 1.1 where both may be meant
        return word if str in kinds and str(value) != word else value
    if {str, Path} & set(kinds) or any(get_origin(kind) is Literal for kind in kinds):
        return word

    several = find_lists(annotation)
    return [read_word(word, find_item_type(several[0], 0))] if several else value


def _read_brackets(word: str) -> Any:
    """Return the value of `[a, b]` and `{a: b}`; what only looks like it is text."""
    try:
        value = yaml12.load(word)
    except yaml.YAMLError:
        return word

    return value if isinstance(value, (dict, list)) else word
