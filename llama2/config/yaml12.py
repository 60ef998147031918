"""YAML as its version 1.2 reads it: the core schema (https://yaml.org/spec/1.2.2/, section 10.3.2).

PyYAML reads version 1.1, where `yes` is true, `010` is 8, `4:20` is 260 and `1e-4` is text. Here a
word is a number, true, false or null where the core schema says so, and text everywhere else. Keys
are names: `2023:` and `null:` are text, as they were written. A key given twice is an error, and so
is a file that grows beyond measure when its aliases are written out. Merge keys (`<<: *other`) are
kept from version 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llama2 import json_files
from llama2.errors import UserError

DEEPEST = 50
"""levels of nesting"""
MOST = 100_000
"""values of a file, every alias counted as often as it is used"""
LARGEST = 4 << 20
"""bytes of a file"""

_TAG = "tag:yaml.org,2002:"


def _read_int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, 10) if base == 10 else int(text[2:], base)


def _read_float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))


_SCALARS: dict[str, tuple[re.Pattern[str], list[str], Callable[[str], Any], str]] = {
    "null": (
        re.compile(r"^(~|null|Null|NULL|)$"),
        ["~", "n", "N", ""],
        lambda text: None,
        "is not null",
    ),
    "bool": (
        re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
        [*"tTfF"],
        lambda text: text.lower() == "true",
        "is neither true nor false",
    ),
    "int": (
        re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
        [*"-+0123456789"],
        _read_int,
        "is no whole number",
    ),
    "float": (
        re.compile(
            r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
        [*"-+.0123456789"],
        _read_float,
        "is no number",
    ),
}
"""name of a tag -> the texts that have it, how they begin, their value, and what others are"""


class _Loader(yaml.SafeLoader):
    """The core schema, with names as keys."""

    yaml_implicit_resolvers = {}
    yaml_constructors = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return a node of the tree, whose depth and size with all aliases written out are
        bounded."""
        if self.depth == DEEPEST:
            raise _error(f"more than {DEEPEST} levels of nesting", self.get_mark())

        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None

        size = 1 + sum(self.sizes.get(id(child), 1) for child in _children(node))
        self.sizes[id(node)] = size
        if size > MOST:
            raise _error(
                f"with its aliases written out it holds more than {MOST:,} values", node.start_mark
            )

        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]

    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _construct_mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _error("this is no mapping", node.start_mark)

    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == f"{_TAG}merge":  # `<<: *other`: its keys may be overridden
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a list or mapping is no key", key.start_mark)
        if key.value in seen:
            raise _error(f"the key '{key.value}' is given twice", key.start_mark)

        seen.add(_construct_text(loader, key))

    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _construct_list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _error("this is no list", node.start_mark)

    return [loader.construct_object(item, deep=True) for item in node.value]


def _construct_text(loader: _Loader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error("a list or mapping where its tag says otherwise", node.start_mark)
    if re.search("[\ud800-\udfff]", node.value):
        raise _error("half of a character, written as \\ud800 to \\udfff", node.start_mark)

    return str(node.value)


def _construct_scalar(loader: _Loader, node: yaml.Node) -> Any:
    text = _construct_text(loader, node)
    pattern, _, read, otherwise = _SCALARS[node.tag.removeprefix(_TAG)]
    try:
        if pattern.match(text):
            return read(text)
    except ValueError:  # more digits than Python takes
        pass

    raise _error(f"'{text[:40]}' {otherwise}", node.start_mark)


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise _error(
        f"a recipe has no use for the tag '{node.tag.replace(_TAG, '!!')}'", node.start_mark
    )


class _Dumper(yaml.SafeDumper):
    """Quotes every text that version 1.1 or 1.2 would take for something else."""


for _name, (_pattern, _first, *_) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)
    _Loader.add_constructor(f"{_TAG}{_name}", _construct_scalar)
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)

_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor(f"{_TAG}str", _construct_text)
_Loader.add_constructor(f"{_TAG}seq", _construct_list)
_Loader.add_constructor(f"{_TAG}map", _construct_mapping)
_Loader.add_constructor(None, _refuse_tag)


def load(text: str) -> Any:
    """Return the value of a YAML text; `yaml.YAMLError` where it is none."""
    try:
        return yaml.load(text, _Loader)
    except (OverflowError, ValueError):  # chr of what PyYAML read behind \\U
        raise yaml.YAMLError("an escape \\U that names no character") from None


def dump(value: Any, **how: Any) -> str:
    """Return `value` as YAML in its own order, which both versions read alike."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **how))


def read_scalar(text: str) -> Any:
    """Return what a single word means: a number, true, false or null, else the text itself."""
    for pattern, _, read, _ in _SCALARS.values():
        if text and pattern.match(text):
            try:
                return read(text)
            except ValueError:  # more digits than Python takes
                return text

    return text


def _explain(path: Path, text: str, error: yaml.YAMLError) -> UserError:
    """Return what is wrong with a recipe, with its line, in the words of whoever writes one."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return UserError(
            f"{path}:{line}: a character that no text has (code {error.character})", "take it out"
        )

    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    cure = "mend the line"
    if "found another document" in problem:
        problem, cure = "a second document begins here", "a recipe is one: take out the line '---'"
    elif "'\\t'" in problem:
        problem, cure = "a tab stands where YAML takes spaces alone", "write spaces"

    place = f"{path}:{mark.line + 1}" if mark else path
    return UserError(f"{place}: not valid YAML ({problem})", cure)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a syntax error is reported with file and line."""
    text = json_files.read_bytes(path, LARGEST)
    try:
        value = load(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise _explain(path, text.decode("utf-8"), error) from None

    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values", "write `key: value` lines"
        )

    return value
