"""The number of the schema in which recipes and manifests are written, and how older ones are read.

A file without a number is of schema 1. The number rises when a file of an earlier one would be read
wrongly; `MIGRATIONS` then gains the function that turns a file of one number into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama2.errors import UserError

SCHEMA = 1
KEY = "schema"
Migration = Callable[[Mapping[str, Any]], dict[str, Any]]
MIGRATIONS: dict[int, Migration] = {}
"""schema -> the function that makes a file of the next one of it"""


def migrate(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a recipe or manifest as the present schema has it, without its number.

    Raise UserError for a number that is none, or is that of a later version.
    """
    number = values.get(KEY, 1)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(f"{path}: '{KEY}' is {number!r}", f"it is a number from 1 to {SCHEMA}")

    if number > SCHEMA:
        raise UserError(
            f"{path}: was written for schema {number}, and this version reads up to {SCHEMA}",
            "update llama2",
        )

    result = {key: value for key, value in values.items() if key != KEY}
    for earlier in range(number, SCHEMA):
        result = MIGRATIONS[earlier](result)

    return result
