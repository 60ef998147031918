"""Values that are what they say: true, 1 and "1" are three values, which pydantic takes for one
unless told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError, core_schema

from llama2 import model_packages
from llama2.config.yaml12 import read_scalar

_LARGEST = 2**63 - 1
"""of whole numbers: what libraries below take"""
_NO_SCHEMAS = ("default", "metadata", "serialization", "config")
"""keys of a pydantic schema that hold no schema"""


def make_exact(node: Any, alternative: bool = False) -> Any:
    """Return a pydantic schema in which true, 1 and "1" are three values, at every depth.

    Pydantic's own strict mode would refuse lists for tuples and texts for paths as well. Where only
    a number can be meant, not as one of several alternatives, a text is read as the number it
    holds. `~` and `package:NAME` are written out in paths.
    """
    if isinstance(node, (list, tuple)):
        return type(node)(make_exact(item, alternative) for item in node)
    if not isinstance(node, dict):
        return node

    kind = node.get("type")
    if kind in ("int", "float", "bool", "str"):
        strict = {**node, "strict": True}
        if kind == "int" and not {"lt", "le"} & node.keys():
            strict["le"] = _LARGEST
        if kind in ("bool", "str") or alternative or node.get("strict"):
            return strict

        read = _read_whole if kind == "int" else _read_number
        return core_schema.no_info_before_validator_function(read, strict)

    inside = alternative or kind == "union"
    exact = dict(node)
    for key in node.keys() - _NO_SCHEMAS:
        exact[key] = make_exact(node[key], inside)

    if node.get("custom_error_type") == "path_type":
        return core_schema.no_info_wrap_validator_function(_read_path, exact)

    return exact


def _read_path(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Path:
    """Return a path with its home directory written out, where there is one, and `package:NAME` as
    the file that it names. An empty text is no path, though Python takes it for the directory one
    is in."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("path_type", "a path is wanted")

    path: Path = model_packages.locate_installed(validate(value))
    if path.parts[:1] == ("~",) or (str(path).startswith("~") and not path.exists()):
        try:
            return path.expanduser()
        except (RuntimeError, ValueError):  # `build` refuses it
            return path

    return path


def _read_number(value: Any) -> Any:
    """Return the number that a text holds, anything else as it is."""
    number = read_scalar(value) if isinstance(value, str) else value
    return number if type(number) in (int, float) else value


def _read_whole(value: Any) -> Any:
    """Return a whole number for 2.0 or "2", anything else as it is."""
    number = _read_number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number
