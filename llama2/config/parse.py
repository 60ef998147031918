"""A command line as a configuration: recipes laid upon one another, flags upon them, and help."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro
from pydantic import BaseModel

from llama2.config import schema
from llama2.config.flags import read_flags
from llama2.config.layers import merge, read_layers
from llama2.config.models import C, build
from llama2.errors import UserError

_NARROWEST = 40
"""columns of a terminal in which help can be read"""


def parse(kind: type[C], arguments: Sequence[str], prog: str) -> C:
    """Read `[recipe.yaml ...] --section.key value ...` as a checked configuration, each recipe laid
    upon those before it.

    `--help` prints every key and its default.
    """
    flags, where = list(arguments), ""
    layers: list[Mapping[str, Any]] = []
    values: dict[str, Any] = {}
    if {"-h", "--help"} & set(flags):
        _print_help(kind, prog)

    while flags and not flags[0].startswith("-"):
        if where and not flags[0].endswith((".yaml", ".yml")):
            break

        where = flags.pop(0)
        for layer in _read_recipe(kind, where):
            layers.append(layer)
            values = merge(values, layer)

    if "steps" in values and "steps" not in kind.model_fields:
        raise UserError(
            f"{where}: this recipe has steps, each with a verb of its own",
            f"write llama2 run {where}, or with --step NAME for one of them",
        )

    *layers, _ = kind.arrange_layers([*layers, read_flags(kind, flags, values)])
    values = dict(reduce(merge, layers, {}))
    layers.append(read_flags(kind, flags, values))
    kind.check_layers(layers)
    return build(kind, merge(values, layers[-1]), where)


def _read_recipe(kind: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """Return the recipe `name` and those below it; where that is data or a model, UserError with
    the flag it goes behind."""
    path = Path(name)
    is_recipe = path.suffix in ("", ".yaml", ".yml", ".json") and not path.is_dir()
    if is_recipe or not path.exists():
        return read_layers(path)

    cure = "name one"
    for names, inner in schema.list_leaves(kind):
        if Path in schema.list_types(inner) and names != ("out",):
            flag = f"--{schema.spell_flag(*names)} {name}"
            cure = f"give data and models behind a flag, such as {flag}"
            break

    if (path / "recipe.yaml").is_file():
        cure = f"did you mean {path / 'recipe.yaml'}?"

    raise UserError(
        f"{name}: what stands before all flags is a recipe, a file that ends in .yaml", cure
    )


# --- help ---


def _print_help(kind: type[BaseModel], prog: str) -> None:
    """Print every key with its default, and leave."""
    # where no word fits, its lines are broken without end
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)

    tyro.cli(
        kind,
        prog=f"{prog} [recipe.yaml]",
        default=_make_example(kind),
        args=["--help"],
        config=(tyro.conf.AvoidSubcommands,),
    )


def _make_example(annotation: Any, default: Any = tyro.MISSING) -> Any:
    """Return a value of every default, with `NAME` for the names a user gives."""
    for kind in schema.list_types(annotation):
        if get_origin(kind) is dict and default in ({}, tyro.MISSING):
            below = get_args(kind)[1]
            return {schema.NAME: _make_example(below)} if schema.is_model(below) else {}

        if schema.is_model(kind) and default in (None, tyro.MISSING):
            examples = {}
            for name, field in kind.model_fields.items():
                value = field.get_default(call_default_factory=True)
                given = tyro.MISSING if field.is_required() else value
                examples[name] = _make_example(field.annotation, given)

            return kind.model_construct(**examples)

    return default
