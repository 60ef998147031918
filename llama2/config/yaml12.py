"""YAML as its version 1.2 reads it: the core schema (https://yaml.org/spec/1.2.2/, section 10.3.2).

PyYAML reads version 1.1, where `yes` is true, `010` is 8, `4:20` is 260 and `1e-4` is text. Here a
word is a number, true, false or null where the core schema says so, and text everywhere else. Keys
are names: `2023:` and `null:` are text, as they were written. A key given twice is an error, and so
is a file that grows beyond measure when its aliases are written out. Merge keys (`<<: *other`) are
kept from version 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
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
_NULL = re.compile(r"^(~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """The core schema, with names as keys."""

    yaml_implicit_resolvers = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node of the tree, whose depth and size with all aliases written out are bounded."""
        if self.depth == DEEPEST:
            raise _error(f"more than {DEEPEST} levels of nesting", self.get_mark())

        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1

        if node is not None:
            self.sizes[id(node)] = size = 1 + sum(
                self.sizes.get(id(child), 1) for child in _children(node)
            )
            if size > MOST:
                raise _error(
                    f"with its aliases written out it holds more than {MOST:,} values",
                    node.start_mark,
                )

        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]

    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _error("this is no mapping", node.start_mark)

    seen: set[Hashable] = set()
    for key, _ in node.value:
        if key.tag == f"{_TAG}merge":  # `<<: *other`: its keys may be overridden
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a list or mapping is no key", key.start_mark)
        if key.value in seen:
            raise _error(f"the key '{key.value}' is given twice", key.start_mark)

        seen.add(_text(loader, key))

    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _error("this is no list", node.start_mark)

    return [loader.construct_object(item, deep=True) for item in node.value]


def _word(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error("a list or mapping where its tag says otherwise", node.start_mark)

    return str(node.value)


def _text(loader: _Loader, node: yaml.Node) -> str:
    text = _word(node)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _error("half of a character, written as \\ud800 to \\udfff", node.start_mark)

    return text


def _null(loader: _Loader, node: yaml.Node) -> None:
    text = _word(node)
    if not _NULL.match(text):
        raise _error(f"'{text[:40]}' is not null", node.start_mark)


def _bool(loader: _Loader, node: yaml.Node) -> bool:
    text = _word(node)
    if not _BOOL.match(text):
        raise _error(f"'{text[:40]}' is neither true nor false", node.start_mark)

    return text.lower() == "true"


def _int(loader: _Loader, node: yaml.Node) -> int:
    text = _word(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text[2:] if base != 10 else text, base)
    except ValueError:  # a tag that does not fit, or more digits than Python takes
        raise _error(f"'{text[:40]}' is no whole number", node.start_mark) from None


def _float(loader: _Loader, node: yaml.Node) -> float:
    text = _word(node).lower()
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text))
    except ValueError:
        raise _error(f"'{text[:40]}' is no number", node.start_mark) from None


def _foreign(loader: _Loader, node: yaml.Node) -> Any:
    raise _error(
        f"a recipe has no use for the tag '{node.tag.replace(_TAG, '!!')}'", node.start_mark
    )


_Loader.yaml_constructors = {
    f"{_TAG}null": _null,
    f"{_TAG}bool": _bool,
    f"{_TAG}int": _int,
    f"{_TAG}float": _float,
    f"{_TAG}str": _text,
    f"{_TAG}seq": _list,
    f"{_TAG}map": _mapping,
    None: _foreign,
}
for _name, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("^<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that version 1.1 or 1.2 would take for something else."""


for _name, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _pattern, list("-+.0123456789"))


def load(text: str) -> Any:
    """The value of a YAML text; `yaml.YAMLError` where it is none."""
    try:
        return yaml.load(text, _Loader)
    except (OverflowError, ValueError):  # chr of what PyYAML read behind \\U
        raise yaml.YAMLError("an escape \\U that names no character") from None


def dump(value: Any, **how: Any) -> str:
    """`value` as YAML in its own order, which both versions read alike."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **how))


def scalar(text: str) -> Any:
    """What a single word means: a number, true, false or null, else the text itself."""
    kinds = ((_NULL, "null"), (_BOOL, "bool"), (_INT, "int"), (_FLOAT, "float"))
    if text and any(pattern.match(text) for pattern, _ in kinds):
        try:
            return load(text)
        except yaml.YAMLError:
            return text

    return text


def _explained(path: Path, text: str, error: yaml.YAMLError) -> UserError:
    """What is wrong with a recipe, with its line, in the words of whoever writes one."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return UserError(
            f"{path}:{line}: a character that no text has (code {error.character})", "take it out"
        )

    mark, problem = (
        getattr(error, "problem_mark", None),
        getattr(error, "problem", None) or str(error),
    )
    cure = "mend the line"
    if "found another document" in problem:
        problem, cure = "a second document begins here", "a recipe is one: take out the line '---'"
    elif "'\\t'" in problem:
        problem, cure = "a tab stands where YAML takes spaces alone", "write spaces"

    return UserError(
        f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML ({problem})", cure
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; a syntax error is reported with file and line."""
    text = json_files.content(path, LARGEST)
    try:
        value = load(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise _explained(path, text.decode("utf-8"), error) from None

    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values", "write `key: value` lines"
        )

    return value
