"""Configuration: frozen pydantic models, YAML recipes that hold only differences from the defaults, flag overrides.

A recipe and the flags behind it are merged first and checked once, so `learning_rat: 1e-4` in a file and
`--optimizer.learning-rat 1e-4` on the command line fail alike: one line, before any work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from llama2.errors import UserError, did_you_mean, explain_os_errors


class Config(BaseModel):
    """Base of every configuration: frozen, and a key nobody declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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


def overrides(flags: Sequence[str]) -> dict[str, Any]:
    """`--section.some-key value` pairs as a nested mapping; a flag without a value means true."""
    nested: dict[str, Any] = {}
    index = 0
    while index < len(flags):
        flag = flags[index]
        if not flag.startswith("--") or flag == "--":
            raise UserError(f"unexpected argument '{flag}'", "overrides look like --section.key value")
        name, equals, value = flag[2:].partition("=")
        index += 1
        if not equals:
            if index < len(flags) and not flags[index].startswith("--"):
                value, index = flags[index], index + 1
            else:
                value = "true"
        *sections, key = name.replace("-", "_").split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = _scalar(value)
    return nested


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def merge(base: Any, over: Any) -> Any:
    """`over` laid upon `base`: mappings key by key, list items by index (`--sources.0.weight 2`), the rest replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    if isinstance(base, list) and isinstance(over, Mapping) and all(key.isdigit() for key in over):
        return [merge(item, over.get(str(index), item)) for index, item in enumerate(base)]
    return over


def build(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """The checked configuration, or a `UserError` that names the first bad key."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise _explained(kind, error.errors()[0], where) from None


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
    return UserError(f"{prefix}'{'.'.join(keys)}': {message}{shown}", "mend the value")


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
    """`[recipe.yaml] --section.key value ...` as a checked configuration. `--help` prints every key and its default."""
    flags, values, where = list(arguments), {}, ""
    if "-h" in flags or "--help" in flags:
        tyro.cli(kind, prog=f"{prog} [recipe.yaml]", args=["--help"])
    if flags and not flags[0].startswith("-"):
        where = flags.pop(0)
        values = read_yaml(Path(where))
    return build(kind, merge(values, overrides(flags)), where)


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
