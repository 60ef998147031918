"""Configuration: frozen pydantic models, YAML recipes that hold only differences from the defaults, flag overrides.

A recipe and the flags behind it are merged first and checked once, so `learning_rat: 1e-4` in a file and
`--optimizer.learning-rat 1e-4` on the command line fail alike: one line, before any work. Whatever is not said stays
at the default, at every depth: `training: {optimizer: {eps: 1e-8}}` leaves the rest of a stage's training as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llama2.errors import UserError, did_you_mean, explain_os_errors


class Config(BaseModel):
    """Base of every configuration: frozen, and a key nobody declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    incidental: ClassVar[frozenset[str]] = frozenset()
    """keys that say how the work is done and change nothing of the result: a run may be resumed with others"""

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """A section that is given in part differs from this class's default for it, not from that section's own."""
        if not isinstance(values, Mapping):
            return values
        sections = {name: field.default for name, field in cls.model_fields.items()
                    if isinstance(field.default, BaseModel) and isinstance(values.get(name), Mapping)}
        return {**values, **{name: merge(default.model_dump(), values[name]) for name, default in sections.items()}}


class StageConfig(Config):
    """What every stage knows: where to write, and its seed."""

    out: Path
    """run directory; a finished run there is not repeated, an unfinished one is resumed"""
    seed: int = 0
    """source of all randomness"""


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text and lets a repeated key win silently; this loader does neither."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`: its keys may be overridden
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)):
            raise yaml.MarkedYAMLError(problem="a list or mapping is no key", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; a syntax error is reported with file and line."""
    with explain_os_errors(path):
        text = path.read_bytes()
    try:
        value = yaml.load(text.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})",
                        "mend the line") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values", "write `key: value` lines")
    return value


def read_recipe(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe laid upon the one it `extends` (a path relative to its own), so that it holds only what differs."""
    if path.resolve() in inside:
        raise UserError(f"{path}: this recipe extends itself", "mend the key `extends`")
    values = read_yaml(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    under: dict[str, Any] = merge(read_recipe(path.parent / str(base), (*inside, path.resolve())), values)
    return under


@dataclass(frozen=True)
class Flag:
    """The value of a flag: what YAML makes of it, and as it was typed, should text be wanted (None for several)."""

    value: Any
    text: str | None


def overrides(flags: Sequence[str]) -> dict[str, Any]:
    """`--section.some-key value` pairs as a nested mapping of `Flag`.

    Several values make a list; a flag without a value means true, and `--section.no-key` means false.
    """
    nested: dict[str, Any] = {}
    index = 0
    while index < len(flags):
        flag = flags[index]
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"unexpected argument '{flag}'", "overrides look like --section.key value")
        name, equals, given = flag[2:].partition("=")
        index += 1
        words = [given] if equals else []
        while not equals and index < len(flags) and not flags[index].startswith("--"):
            words.append(flags[index])
            index += 1
        *sections, key = name.replace("-", "_").split(".")
        if not words:
            words, key = ["false" if key.startswith("no_") else "true"], key.removeprefix("no_")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if isinstance(place, Flag):
                raise UserError(f"--{name} and --{name.rpartition('.')[0]} are both given", "leave one out")
        place[key] = Flag(_value(words[0]), words[0]) if len(words) == 1 else Flag([_value(w) for w in words], None)
    return nested


def _value(text: str) -> Any:
    """A number, true, false, null, or [a, b] and {a: b} in brackets; anything else is text, colons and all."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    if isinstance(value, (dict, list)) and text.lstrip()[:1] in ("{", "["):
        return value
    return value if text and isinstance(value, (bool, int, float, type(None))) else text


def merge(base: Any, over: Any, where: str = "") -> Any:
    """`over` laid upon `base`: mappings key by key, list items by index (`--sources.0.weight 2`), the rest replaced."""
    prefix = f"{where}." if where else ""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {**base, **{key: merge(base.get(key), value, f"{prefix}{key}") for key, value in over.items()}}
    if isinstance(base, (list, tuple)) and isinstance(over, Mapping) and all(str(key).isdigit() for key in over):
        if beyond := [key for key in over if int(key) >= len(base)]:
            raise UserError(f"'{prefix}{beyond[0]}': there are {len(base)} of them", "they are counted from 0")
        return [merge(item, over.get(str(index), item), f"{prefix}{index}") for index, item in enumerate(base)]
    return over


def build(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """The checked configuration, or a `UserError` that names the first bad key. Flags take the type wanted."""
    wanted: dict[tuple[int | str, ...], Any] = {}
    while True:
        try:
            return kind.model_validate(_plain(values, wanted))
        except ValidationError as error:
            # a misspelt key leaves its right spelling missing as well: the misspelling is the one to name
            first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
            place, flag = first["loc"], _at(values, first["loc"])
            if not isinstance(flag, Flag) or flag.text is None or place in wanted or first["type"] not in _READINGS:
                raise _explained(kind, first, where) from None
            wanted[place] = flag.text if _READINGS[first["type"]] == "text" else [flag.value]


_READINGS = {"string_type": "text", "path_type": "text", "tuple_type": "list", "list_type": "list"}


def _plain(value: Any, wanted: Mapping[tuple[int | str, ...], Any], place: tuple[int | str, ...] = ()) -> Any:
    """`value` with each `Flag` replaced by its value, or by the reading of it that `wanted` holds for its place."""
    if isinstance(value, Flag):
        return wanted.get(place, value.value)
    if isinstance(value, Mapping):
        return {key: _plain(item, wanted, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, wanted, (*place, index)) for index, item in enumerate(value)]
    return value


def _at(value: Any, place: Sequence[int | str]) -> Any:
    """What stands at `place`, or at the last part of it that exists: a place inside a flag's value is that flag's."""
    for key in place:
        if not isinstance(value, Mapping) or key not in value:
            break
        value = value[key]
    return value


def _explained(kind: type[BaseModel], detail: ErrorDetails, where: str) -> UserError:
    keys = [str(part) for part in detail["loc"]]
    prefix = f"{where}: " if where else ""
    if detail["type"] == "extra_forbidden":
        return UserError(f"{prefix}unknown key '{'.'.join(keys)}'", did_you_mean(keys[-1], _known(kind, keys[:-1])))
    if detail["type"] == "missing":
        return UserError(f"{prefix}'{'.'.join(keys)}' is required",
                         f"give --{'.'.join(keys).replace('_', '-')} or set it in the recipe")
    message = detail["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(detail["input"], dict) else f" (it is {detail['input']!r})"
    place = f"'{'.'.join(keys)}': " if keys else ""
    return UserError(f"{prefix}{place}{message}{shown}", "mend the value")


def _known(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys allowed at `path` below `kind`, for the did-you-mean."""
    for key in path:
        if key in kind.model_fields:
            inner = [t for t in _types(kind.model_fields[key].annotation) if issubclass(t, BaseModel)]
            kind = inner[0] if inner else kind
    return list(kind.model_fields)


def _types(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _types(argument)


def parse(kind: type[C], arguments: Sequence[str], prog: str) -> C:
    """`[recipe.yaml ...] --section.key value ...` as a checked configuration, each recipe laid upon those before it.

    `--help` prints every key and its default.
    """
    flags, where = list(arguments), ""
    values: dict[str, Any] = {}
    if "-h" in flags or "--help" in flags:
        tyro.cli(kind, prog=f"{prog} [recipe.yaml]", default=_example(kind), args=["--help"],
                 config=(tyro.conf.AvoidSubcommands,))
    while flags and not flags[0].startswith("-") and (not where or flags[0].endswith((".yaml", ".yml"))):
        where = flags.pop(0)
        values = merge(values, read_recipe(Path(where)))
    return build(kind, merge(values, overrides(flags)), where)


def _example(kind: type[BaseModel]) -> Any:
    """Every default, with `NAME` for the names a user gives: what the help shows."""
    return kind.model_construct(**{name: _shown(field) for name, field in kind.model_fields.items()})


def _shown(field: FieldInfo) -> Any:
    origin, arguments = get_origin(field.annotation), get_args(field.annotation)
    if origin is dict and isinstance(arguments[1], type) and issubclass(arguments[1], BaseModel):
        return {"NAME": _example(arguments[1])}
    if origin is dict and field.is_required():
        return {}
    default = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
    if default is tyro.MISSING or default is None:
        for inner in _types(field.annotation):
            if issubclass(inner, BaseModel):
                return _example(inner)
    return default


def incidentals(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted key of everything in a configuration that is incidental (see `Config`)."""
    if isinstance(config, Config):
        yield from (f"{prefix}{name}" for name in config.incidental)
    for name in type(config).model_fields:
        value = getattr(config, name)
        for key, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(item, BaseModel):
                yield from incidentals(item, ".".join(filter(None, (f"{prefix}{name}", str(key)))) + ".")


def paths(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every path inside a configuration except `out`, with its dotted key: the inputs of a run."""
    for name in type(config).model_fields:
        yield from _paths(getattr(config, name), f"{prefix}{name}") if name != "out" else ()


def _paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel):
        yield from paths(value, f"{key}.")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _paths(item, f"{key}.{index}")
