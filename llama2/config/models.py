"""Configuration: frozen pydantic models, checked once, before any work.

A recipe and the flags behind it are merged first and checked once, so `learning_rat: 1e-4` in a
file and `--optimizer.learning-rat 1e-4` on the command line fail alike: one line, before any work.
Whatever is not said stays at the default, at every depth: `training: {optimizer: {eps: 1e-8}}`
leaves the rest of a stage's training as it is.

A value is what it says: true is no number, a number no text, and numbers are finite. A number in
quotes is read as that number where only a number can be meant, and 2.0 is a whole number.

Flags are read by hand (`flags`): tyro and pydantic's settings know no keys that the user names
(`--dialogs.NAME.path`), no recipes under the flags, and name neither place nor cure of a mistake.
tyro prints the help.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from llama2.config import mistakes
from llama2.config.exact import make_exact
from llama2.config.layers import merge
from llama2.config.schema import Flag
from llama2.errors import UserError
from llama2.hashing import hash_number
from llama2.terminal_text import is_safe

_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])\s*(\..*)?", re.IGNORECASE)
_NO_NAME = re.compile(r"[. ].*|.*[. ]|.*[/\\].*|", re.DOTALL)
_LONGEST_NAME = 200
"""bytes; a file may have 255, and names get endings"""


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
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Leave it to the help where the lines of a field's description end."""
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())

    @classmethod
    def find_kind(cls, names: tuple[str, ...], values: Mapping[str, Any]) -> Any:
        """Return the type of what stands at a place whose own annotation leaves it open, None for
        any other place."""
        return None

    @classmethod
    def arrange_layers(cls, layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return recipes and flags, the lowest first, with the changes between them that the values
        of parameters choose."""
        return list(layers)

    @classmethod
    def check_layers(cls, layers: Sequence[Mapping[str, Any]]) -> None:
        """Refuse what shows only before recipes and flags, the lowest first, are merged."""

    @model_validator(mode="before")
    @classmethod
    def _merge_defaults(cls, values: Any) -> Any:
        """A section that is given in part differs from this class's default for it, not from that
        section's own."""
        if not isinstance(values, Mapping):
            return values

        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(field.default, BaseModel) and isinstance(values.get(name), Mapping):
                merged[name] = merge(field.default.model_dump(), values[name])

        return merged

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        made: CoreSchema = make_exact(handler(source))
        return made


class StageConfig(Config):
    """The keys of every stage: where to write, and its seed."""

    out: Path
    """run directory; a finished run there is not repeated, an unfinished one is resumed"""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """source of all randomness"""

    around: ClassVar[frozenset[str]] = frozenset()
    """keys of texts that name a directory in which the run may lie, and with which it may be
    moved"""


C = TypeVar("C", bound=Config)


def build(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Return the checked configuration; UserError that names the first bad key. `where`: the file
    or step it is in."""
    try:
        config = kind.model_validate(_strip_flags(values))
    except ValidationError as error:
        raise mistakes.explain(kind, error, where, values) from None

    prefix = f"{where}: " if where else ""
    for key, value in walk(config):
        if isinstance(value, Path):
            _check_path(value, f"{prefix}'{key}': {value}")
        elif _names_files(value):
            check_names(value, f"{prefix}{key}")

    return config


def _names_files(value: Any) -> bool:
    """Return whether the keys of a mapping become the names of files: those of sets and
    versions."""
    if not isinstance(value, Mapping):
        return False

    return any(isinstance(item, (BaseModel, Path)) for item in value.values())


def _strip_flags(value: Any) -> Any:
    """Replace each `Flag` in `value` by its value."""
    if isinstance(value, Flag):
        return value.value
    if isinstance(value, Mapping):
        return {key: _strip_flags(item) for key, item in value.items()}

    return [_strip_flags(item) for item in value] if isinstance(value, list) else value


def _check_path(path: Path, place: str) -> None:
    """Refuse a path that cannot be meant."""
    text = str(path)
    if "\0" in text:
        raise UserError(f"{place}: no path has a NUL in it", "take it out")
    if text.startswith("~") and not path.exists():
        raise UserError(f"{place}: there is no such home directory", "write it out")
    if re.search(r"\$(\{|[A-Za-z_])", text) and not path.exists():
        raise UserError(
            f"{place}: variables of the shell are not known here",
            "write the path out, or give it as a flag, where the shell fills it in",
        )


def check_names(names: Iterable[str], place: str) -> None:
    """Refuse names that cannot be those of files side by side, on any system: names of sets and
    steps become such."""
    known: dict[str, str] = {}
    for name in names:
        if _NO_NAME.fullmatch(name) or not all(map(is_safe, name)):
            raise UserError(
                f"{place}: {name!r} is no name",
                "choose one without '/' that neither begins nor ends with a dot or a space",
            )
        if _DEVICES.fullmatch(name):
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


def derive_seed(seed: int, *names: str | int) -> int:
    """Return the seed of one of the things that `seed` decides, in [0, 2^32): another for every
    list of names."""
    return hash_number(repr((seed, *names)), 4, "big")


# --- what is inside ---


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Everything inside a configuration with its dotted key, a section before what is in it."""
    yield key, value
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)

    for name, item in items:
        yield from walk(item, f"{key}.{name}" if key else str(name))


def list_paths(config: BaseModel) -> list[tuple[str, Path]]:
    """Every path inside a configuration except `out`, with its dotted key: the inputs of a run."""
    return [(key, value) for key, value in walk(config) if isinstance(value, Path) and key != "out"]


def list_incidentals(config: BaseModel) -> list[str]:
    """The dotted key of everything in a configuration that is incidental (see `Config`)."""
    keys: list[str] = []
    for key, value in walk(config):
        if isinstance(value, Config):
            keys += [f"{key}.{name}".lstrip(".") for name in value.incidental]

    return keys
