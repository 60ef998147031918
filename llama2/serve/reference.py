"""The reference at /docs: the OpenAPI document as one plain page, without scripts and with nothing
fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document: every path, and every field of what may be sent there."""
    schemas = document.get("components", {}).get("schemas", {})
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(document['info']['title'])}</title>",
        f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
        f"<p>{escape(document['info'].get('description', ''))}</p>",
        "<p><a href=openapi.json>openapi.json</a> is the same for programs.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                f"<p>{escape(operation.get('description', ''))}</p>"
            )
            content = (
                operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            )
            parts += _fields(_resolved(content.get("schema", {}), schemas))

    return "\n".join(parts)


def _fields(kind: Mapping[str, Any]) -> Iterator[str]:
    if "properties" not in kind:
        return

    required = kind.get("required", ())
    yield "<table border=1 cellpadding=4><tr><th>field<th>type<th>"
    for name, field in kind["properties"].items():
        note = "required. " if name in required else ""
        yield (
            f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
            f"<td>{escape(note + field.get('description', ''))}"
        )

    yield "</table>"


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]

    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(kind for option in field[union] if (kind := _type(option)) != "null")

    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"

    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = ", ".join(f"{sign} {field[name]:g}" for name, sign in bounds.items() if name in field)
    return f"{field.get('type', 'any')}{f' ({said})' if said else ''}"


def _resolved(kind: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    name = str(kind.get("$ref", "")).rpartition("/")[2]
    found: Mapping[str, Any] = schemas.get(name, kind)
    return found
