"""What may stand where in a configuration: the fields below a place, and what a word typed there
means.

A place is a list of names. Names of fields may be typed with dashes; names that users chose (of a
set of data, a step, a parameter) are kept letter by letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llama2.config import yaml12


@dataclass(frozen=True)
class Place:
    """Where a list of names leads: the names as they are spelt there, and the type of what stands
    there."""

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

    def typed(self) -> str:
        """Its value as it was typed, in quotes where it could not be seen otherwise."""
        text = " ".join(self.words)
        text = text if len(text) <= 100 else f"{text[:97]}..."
        return text if text.strip() and text.isprintable() else repr(text)


def kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: unions and `Annotated` taken apart."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kinds(arguments[0])
    if origin in (Union, UnionType):
        return tuple(kind for argument in arguments for kind in kinds(argument))

    return (annotation,)


def models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The configurations among the alternatives of an annotation."""
    return tuple(
        kind for kind in kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
    )


def key_of(name: str, field: FieldInfo) -> str:
    """How a field is called in a recipe."""
    return field.alias or name


def spelt(kind: type[BaseModel], name: str) -> tuple[str, FieldInfo] | None:
    """The field that `name` means, with dashes or underscores."""
    plain = name.replace("-", "_")
    for own, field in kind.model_fields.items():
        if plain in (key_of(own, field), key_of(own, field).rstrip("_")):
            return key_of(own, field), field

    return None


def inner(annotation: Any, name: str) -> tuple[str, Any, bool] | None:
    """One step down: the name as it is spelt there, the type of what stands there, and whether it
    is a field's."""
    for kind in kinds(annotation):
        if kind in models(kind):
            found = spelt(kind, name)
            if found is not None:
                return found[0], found[1].annotation, True
        elif get_origin(kind) is dict:
            return name, get_args(kind)[1], False
        elif get_origin(kind) in (tuple, list) and name.isdigit():
            return name, item(kind, int(name)), False
        elif kind is Any:
            return name, Any, False

    return None


def item(kind: Any, index: int) -> Any:
    """The type of one item of a list or tuple."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        return arguments[min(index, len(arguments) - 1)]

    return arguments[0]


def find(root: Any, names: Sequence[str], values: Mapping[str, Any]) -> Place:
    """Where `names` lead from the configuration `root`. A name that `values` has already may hold
    dots itself."""
    place, rest = Place((), root, ""), list(names)
    at: Any = values
    while rest:
        width = _width(place.kind, rest, at)
        found = inner(place.kind, ".".join(rest[:width]))
        if found is None:
            return Place((*place.names, *rest), None, ".".join(filter(None, (place.flag, *rest))))

        name, annotation, is_field = found
        spelling = (*place.names, name)
        at = at.get(name) if isinstance(at, Mapping) else None
        place = Place(
            spelling,
            root.kind_at(spelling, values) or annotation,
            ".".join(filter(None, (place.flag, dashed(name) if is_field else name))),
        )
        rest = rest[width:]

    return place


def _width(annotation: Any, rest: Sequence[str], at: Any) -> int:
    """How many of the names together are one key: several where the mapping has a key with dots in
    it."""
    if any(get_origin(kind) is dict for kind in kinds(annotation)) and isinstance(at, Mapping):
        return next((count for count in range(len(rest), 1, -1) if ".".join(rest[:count]) in at), 1)

    return 1


def dashed(*names: str) -> str:
    """Names of fields as they are typed behind a verb."""
    return ".".join(name.rstrip("_").replace("_", "-") for name in names)


def leaves(annotation: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place below `annotation` that holds a value, with its type; NAME stands for a name the
    user chooses."""
    inside = False
    for kind in kinds(annotation):
        if kind in models(kind):
            inside = True
            for name, field in kind.model_fields.items():
                yield from leaves(field.annotation, (*prefix, key_of(name, field)))
        elif get_origin(kind) is dict and get_args(kind)[1] is not Any:
            inside = True
            yield from leaves(get_args(kind)[1], (*prefix, "NAME"))

    if not inside and prefix:
        yield prefix, annotation


def usage(place: Place) -> str:
    """How a value is given to a place, or to the first key below it: `--dialogs.NAME.path PATH`."""
    below, kind = next(leaves(place.kind), ((), place.kind))
    flag = ".".join(filter(None, (place.flag, dashed(*below))))
    return f"--{flag} {metavar(kind)}{' ...' if takes_several(kind) and Any not in kinds(kind) else ''}"


_METAVARS = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}


def metavar(annotation: Any) -> str:
    """What stands for a value of this type in an example."""
    for kind in kinds(annotation):
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        if get_origin(kind) in (tuple, list):
            return metavar(item(kind, 0))
        if kind in _METAVARS:
            return _METAVARS[kind]

    return "VALUE"


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true or false",
    NoneType: "null",
}


def wanted(annotation: Any) -> str:
    """The values a place takes, in plain words."""
    words: list[str] = []
    for kind in kinds(annotation):
        if get_origin(kind) is Literal:
            words += [f"'{value}'" for value in get_args(kind)]
        elif get_origin(kind) in (tuple, list):
            words.append("a list")
        elif is_section(kind):
            words.append("a mapping")
        else:
            words.append(_WORDS.get(kind, "a value"))

    if "a number" in words:
        words = [word for word in words if word != "a whole number"]

    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# --- values
# ----------------------------------------------------------------------------------------------------------


def takes_several(annotation: Any) -> bool:
    """Whether several words may stand behind a flag."""
    return any(kind is Any or get_origin(kind) in (tuple, list) for kind in kinds(annotation))


def takes_none(annotation: Any) -> bool:
    """Whether a flag may stand without a value: one that is true or false and nothing else."""
    return set(kinds(annotation)) <= {bool, NoneType} and bool in kinds(annotation)


def is_section(annotation: Any) -> bool:
    """Whether keys stand below it."""
    return any(kind in models(kind) or get_origin(kind) is dict for kind in kinds(annotation))


def several(words: Sequence[str], annotation: Any) -> Any:
    """The values of several words."""
    lists = [kind for kind in kinds(annotation) if get_origin(kind) in (tuple, list)]
    return [
        value_of(word, item(lists[0], index) if lists else Any) for index, word in enumerate(words)
    ]


def value_of(word: str, annotation: Any) -> Any:
    """What `word` means where `annotation` stands: text where text is wanted, else what YAML makes
    of it."""
    options, value = kinds(annotation), yaml12.scalar(word)
    if word.lstrip()[:1] in ("{", "[") and (is_section(annotation) or takes_several(annotation)):
        return _in_brackets(word)
    if value is None and NoneType in options:
        return None
    if isinstance(value, bool) and bool in options:
        return value
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and {int, float} & set(options)
    ):
        # 1.10 is no 1.1 where both may be meant
        return word if str in options and str(value) != word else value
    if str in options or Path in options or any(get_origin(kind) is Literal for kind in options):
        return word

    lists = [kind for kind in options if get_origin(kind) in (tuple, list)]
    return [value_of(word, item(lists[0], 0))] if lists else value


def _in_brackets(word: str) -> Any:
    """`[a, b]` and `{a: b}`; anything else that only looks like it is text."""
    try:
        value = yaml12.load(word)
    except yaml.YAMLError:
        return word

    return value if isinstance(value, (dict, list)) else word
