"""Values that are what they say: true, 1 and "1" are three values, which pydantic takes for one
unless told."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError, core_schema

from llama2.config.yaml12 import scalar

_LARGEST = 2**63 - 1
"""of whole numbers: what libraries below take"""


def exact(node: Any, alternative: bool = False) -> Any:
    """A pydantic schema in which true, 1 and "1" are three values, at every depth.

    Where only a number can be meant, not as one of several alternatives, a text is read as the
    number it holds.
    """
    if isinstance(node, (list, tuple)):
        return type(node)(exact(item, alternative) for item in node)
    if not isinstance(node, dict):
        return node

    if node.get("type") in ("int", "float", "bool", "str"):
        strict = {**node, "strict": True}
        if node["type"] == "int" and not {"lt", "le"} & node.keys():
            strict["le"] = _LARGEST

        if node.get("strict") or alternative or node["type"] in ("bool", "str"):
            return strict

        return core_schema.no_info_before_validator_function(
            _whole if node["type"] == "int" else _number, strict
        )

    inside = alternative or node.get("type") == "union"
    made = {
        key: item
        if key in ("default", "metadata", "serialization", "config")
        else exact(item, inside)
        for key, item in node.items()
    }
    is_path = node.get("custom_error_type") == "path_type"

    return core_schema.no_info_before_validator_function(_not_blank, made) if is_path else made


def _not_blank(value: Any) -> Any:
    """A path is no empty text, which Python takes for the directory one is in."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("path_type", "a path is wanted")

    return value


def _number(value: Any) -> Any:
    """The number that a text holds, anything else as it is."""
    found = scalar(value) if isinstance(value, str) else value
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else value


def _whole(value: Any) -> Any:
    """A whole number from 2.0 or "2", anything else as it is."""
    found = _number(value)
    return int(found) if isinstance(found, float) and found.is_integer() else found
