"""Recipes: files that hold only what differs, laid upon one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.config.yaml12 import read_yaml
from llama2.errors import UserError
from llama2.reading import files
from llama2.schema_version import migrate


def layers(path: Path, inside: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A recipe and those it `extends` (each a path relative to the file that names it), the lowest
    first."""
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

    under = layers(path.parent / files.at_home(base), (*inside, path.resolve()))
    return [*under, values]


def merge(base: Any, over: Any, where: str = "") -> Any:
    """`over` laid upon `base`: mappings key by key, list items by index (`--sources.0.weight 2`),
    the rest replaced."""
    prefix = f"{where}." if where else ""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {
            **base,
            **{key: merge(base.get(key), value, f"{prefix}{key}") for key, value in over.items()},
        }

    if (
        isinstance(base, (list, tuple))
        and isinstance(over, Mapping)
        and all(str(key).isdigit() for key in over)
    ):
        if beyond := [key for key in over if int(key) >= len(base)]:
            raise UserError(
                f"'{prefix}{beyond[0]}': there are {len(base)} of them", "they are counted from 0"
            )

        return [
            merge(item, over.get(str(index), item), f"{prefix}{index}")
            for index, item in enumerate(base)
        ]

    return over
