"""Configuration: frozen pydantic models, checked once, before any work.

A recipe and the flags behind it are merged first and checked once, so `learning_rat: 1e-4` in a
file and `--optimizer.learning-rat 1e-4` on the command line fail alike: one line, before any work.
Whatever is not said stays at the default, at every depth: `training: {optimizer: {eps: 1e-8}}`
leaves the rest of a stage's training as it is.

A value is what it says: true is no number, a number no text, and numbers are finite. A number in
quotes is read as that number where only a number can be meant, and 2.0 is a whole number.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from llama2.config import mistakes, schema
from llama2.config.exact import exact
from llama2.config.flags import overrides
from llama2.config.layers import layers, merge
from llama2.config.schema import Flag
from llama2.errors import UserError
from llama2.hashing import hash_number
from llama2.terminal_text import is_safe

__all__ = ["Config", "StageConfig", "build", "derive", "incidentals", "parse", "paths"]

LARGEST_SEED = 2**32 - 1
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)
_LONGEST_NAME = 200  # a file may have 255, and names get endings
NARROWEST = 40  # columns of a terminal in which help can be read


class Config(BaseModel):
    """Base of every configuration: frozen, and a key nobody declared is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    incidental: ClassVar[frozenset[str]] = frozenset()
    """keys that say how the work is done and change nothing of the result: a run may be resumed
    with others"""

    @classmethod
    def kind_at(cls, names: tuple[str, ...], values: Mapping[str, Any]) -> Any:
        """The type of what stands at a place whose own annotation leaves it open, None for any
        other place."""
        return None

    @classmethod
    def heed(cls, given: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what shows only before recipes and flags are merged: `given` are these, the lowest
        first."""

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """A section that is given in part differs from this class's default for it, not from that
        section's own."""
        if not isinstance(values, Mapping):
            return values

        sections = {
            name: field.default
            for name, field in cls.model_fields.items()
            if isinstance(field.default, BaseModel) and isinstance(values.get(name), Mapping)
        }
        return {
            **values,
            **{
                name: merge(default.model_dump(), values[name])
                for name, default in sections.items()
            },
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        made: CoreSchema = exact(handler(source))
        return made


class StageConfig(Config):
    """What every stage knows: where to write, and its seed."""

    out: Path
    """run directory; a finished run there is not repeated, an unfinished one is resumed"""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    """source of all randomness"""

    around: ClassVar[frozenset[str]] = frozenset()
    """keys of texts that name a directory in which the run may lie, and with which it may be
    moved"""


C = TypeVar("C", bound=Config)


def derive(seed: int, *names: str | int) -> int:
    """The seed of one of the things that `seed` decides: another for every list of names, 0 to 2^32
    - 1."""
    return hash_number(repr((seed, *names)), 4, "big")


# --- checked and settled
# ---------------------------------------------------------------------------------------------


def build(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """The checked configuration, or a `UserError` that names the first bad key. `where`: the file
    or step it is in."""
    try:
        found = kind.model_validate(_plain(values))
    except ValidationError as error:
        # a misspelt key leaves its right spelling missing as well: the misspelling is the one to
        # name
        order = ["extra_forbidden", "", "missing"]
        first = min(
            error.errors(),
            key=lambda detail: order.index(detail["type"]) if detail["type"] in order else 1,
        )
        raise mistakes.explained(kind, first, where, values) from None

    settled: C = _settled(found, "", f"{where}: " if where else "")
    return settled


def _plain(value: Any) -> Any:
    """`value` with each `Flag` replaced by its value."""
    if isinstance(value, Flag):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}

    return [_plain(item) for item in value] if isinstance(value, list) else value


def _settled(value: Any, place: str, prefix: str) -> Any:
    """`value` with `~` written out in its paths; UserError for a name or a path that cannot be
    meant."""
    if isinstance(value, Path):
        return _path(value, place, prefix)

    if isinstance(value, BaseModel):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
        settled = {
            name: _settled(part, f"{place}.{name}" if place else name, prefix)
            for name, part in parts.items()
        }
        changed = {name: part for name, part in settled.items() if part is not parts[name]}

        return value.model_copy(update=changed) if changed else value

    if isinstance(value, Mapping) and any(
        isinstance(item, (BaseModel, Path)) for item in value.values()
    ):
        check_names(value, f"{prefix}{place}")
        items: Any = {
            name: _settled(item, f"{place}.{name}", prefix) for name, item in value.items()
        }
        return items if any(items[name] is not value[name] for name in value) else value

    if isinstance(value, tuple):
        items = tuple(
            _settled(item, f"{place}.{index}", prefix) for index, item in enumerate(value)
        )
        return items if any(new is not old for new, old in zip(items, value)) else value

    return value


def _path(path: Path, place: str, prefix: str) -> Path:
    """A path with its home directory written out; UserError where a variable of the shell was
    meant."""
    if "\0" in str(path):
        raise UserError(f"{prefix}'{place}': {path}: no path has a NUL in it", "take it out")

    if path.parts[:1] == ("~",) or (str(path).startswith("~") and not path.exists()):
        try:
            return path.expanduser()
        except RuntimeError:
            raise UserError(
                f"{prefix}'{place}': {path}: there is no such home directory", "write it out"
            ) from None

    if re.search(r"\$(\{|[A-Za-z_])", str(path)) and not path.exists():
        raise UserError(
            f"{prefix}'{place}': {path}: variables of the shell are not known here",
            "write the path out, or give it as a flag, where the shell fills it in",
        )

    return path


def check_names(names: Iterable[str], place: str) -> None:
    """Refuse names that cannot be those of files side by side, on any system: names of sets and
    steps become such."""
    known: dict[str, str] = {}
    for name in names:
        bare = name.split(".")[0].strip()
        if (
            not name
            or name[0] in ". "
            or name[-1] in ". "
            or re.search(r"[/\\]", name)
            or not all(map(is_safe, name))
        ):
            raise UserError(
                f"{place}: {name!r} is no name",
                "choose one without '/' that neither begins nor ends with a dot or a space",
            )
        if _DEVICES.fullmatch(bare):
            raise UserError(
                f"{place}: {name!r} names a device on some systems", "choose another name"
            )
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            raise UserError(
                f"{place}: the name that begins with {name[:20]!r} is too long for a file",
                f"choose one of at most {_LONGEST_NAME} bytes",
            )

        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"{place}: the names {other!r} and {name!r} are one file on some systems",
                "choose names that differ in more than the case of letters",
            )


def parse(kind: type[C], arguments: Sequence[str], prog: str) -> C:
    """`[recipe.yaml ...] --section.key value ...` as a checked configuration, each recipe laid upon
    those before it.

    `--help` prints every key and its default.
    """
    flags, where = list(arguments), ""
    given: list[Mapping[str, Any]] = []
    values: dict[str, Any] = {}

    if "-h" in flags or "--help" in flags:
        # where no word fits, its lines are broken without end
        if shutil.get_terminal_size().columns < NARROWEST:
            os.environ["COLUMNS"] = str(NARROWEST)

        tyro.cli(
            kind,
            prog=f"{prog} [recipe.yaml]",
            default=_example(kind),
            args=["--help"],
            config=(tyro.conf.AvoidSubcommands,),
        )

    while (
        flags
        and not flags[0].startswith("-")
        and (not where or flags[0].endswith((".yaml", ".yml")))
    ):
        where = flags.pop(0)
        for layer in _layers(kind, where):
            given.append(layer)
            values = merge(values, layer)

    if "steps" in values and "steps" not in kind.model_fields:
        raise UserError(
            f"{where}: this recipe has steps, each with a verb of its own",
            f"write llama2 run {where}, or with --step NAME for one of them",
        )

    given.append(overrides(kind, flags, values))
    kind.heed(given)
    return build(kind, merge(values, given[-1]), where)


def _layers(kind: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """The recipe `name` and those below it; where that is data or a model, UserError with the flag
    it goes behind."""
    path = Path(name)
    if not path.exists() or (path.suffix in ("", ".yaml", ".yml", ".json") and not path.is_dir()):
        return layers(path)

    keys = [
        names
        for names, inner in schema.leaves(kind)
        if Path in schema.kinds(inner) and names != ("out",)
    ]
    cure = (
        f"give data and models behind a flag, such as --{schema.dashed(*keys[0])} {name}"
        if keys
        else "name one"
    )
    if (path / "recipe.yaml").is_file():
        cure = f"did you mean {path / 'recipe.yaml'}?"

    raise UserError(
        f"{name}: what stands before all flags is a recipe, a file that ends in .yaml", cure
    )


def _example(kind: type[BaseModel]) -> Any:
    """Every default, with `NAME` for the names a user gives: what the help shows."""
    return kind.model_construct(
        **{name: _shown(field) for name, field in kind.model_fields.items()}
    )


def _shown(field: FieldInfo) -> Any:
    origin, arguments = get_origin(field.annotation), get_args(field.annotation)
    if origin is dict and isinstance(arguments[1], type) and issubclass(arguments[1], BaseModel):
        return {"NAME": _example(arguments[1])}
    if origin is dict and field.is_required():
        return {}

    default = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
    if default is tyro.MISSING or default is None:
        for inner in _types(field.annotation):
            if issubclass(inner, BaseModel):
                return _example(inner)

    return default


def _types(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation

    for argument in get_args(annotation):
        yield from _types(argument)


def incidentals(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted key of everything in a configuration that is incidental (see `Config`)."""
    if isinstance(config, Config):
        yield from (f"{prefix}{name}" for name in config.incidental)

    for name in type(config).model_fields:
        value = getattr(config, name)
        for key, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(item, BaseModel):
                yield from incidentals(
                    item, ".".join(filter(None, (f"{prefix}{name}", str(key)))) + "."
                )


def paths(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every path inside a configuration except `out`, with its dotted key: the inputs of a run."""
    for name in type(config).model_fields:
        yield from _paths(getattr(config, name), f"{prefix}{name}") if name != "out" else ()


def _paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel):
        yield from paths(value, f"{key}.")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _paths(item, f"{key}.{index}")
