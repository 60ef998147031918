"""JSON objects that carry a checksum of their content, so that damage is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.errors import UserError
from llama2.hashing import hash_content
from llama2.records import dump

_SUM = "sum"


def seal(values: Mapping[str, Any]) -> str:
    """Return a JSON object with the hash of its content."""
    return dump({**values, _SUM: hash_content(dump(values))})


def unseal(path: Path, cure: str) -> dict[str, Any]:
    """Read what `seal` wrote, or any JSON object without such a hash; UserError with `cure` where
    it is damaged."""
    values = json_files.read_object(path, cure)
    expected = values.pop(_SUM, None)
    if expected is not None and expected != hash_content(dump(values)):
        raise UserError(f"{path}: damaged: its content does not fit its checksum", cure)

    return values
