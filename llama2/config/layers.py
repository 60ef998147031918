"""Recipes: files that hold only what differs, laid upon one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError
from llama2.reading import files
from llama2.schema_version import migrate


def read_layers(path: Path, inside: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """Read a recipe and those it `extends` (each a path relative to the file that names it), the
    lowest first."""
    if path.resolve() in inside:
        raise UserError(f"{path}: this recipe extends itself", "mend the key `extends`")

    values = migrate(read_yaml(path), path)
    base = values.pop("extends", None)
    if base is None:
        return [values]
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path}: 'extends' names no file (it is {base!r})", "give the path of one recipe"
        )

    under = read_layers(path.parent / files.expand_home(base), (*inside, path.resolve()))
    return [*under, values]


def merge(base: Any, over: Any, where: str = "") -> Any:
    """Lay `over` upon `base`: mappings key by key, list items by index (`--sources.0.weight 2`),
    the rest replaced."""
    if not isinstance(over, Mapping):
        return over

    prefix = f"{where}." if where else ""
    if isinstance(base, Mapping):
        merged = dict(base)
        for key, value in over.items():
            merged[key] = merge(base.get(key), value, f"{prefix}{key}")

        return merged

    if not isinstance(base, (list, tuple)) or not all(str(key).isdigit() for key in over):
        return over

    items = list(base)
    for key, value in over.items():
        if int(key) >= len(items):
            raise UserError(
                f"'{prefix}{key}': there are {len(items)} of them", "they are counted from 0"
            )

        items[int(key)] = merge(items[int(key)], value, f"{prefix}{key}")

    return items
