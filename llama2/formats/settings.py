"""Turn the settings in a file into the configuration of a model, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llama2.errors import UserError, did_you_mean
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling
from llama2.terminal_text import show_value

Built = TypeVar("Built", LlamaConfig, RopeScaling)


def _make_model(kind: type) -> type[BaseModel]:
    """Return what checks the types of the fields of a dataclass."""
    kinds, listed = get_type_hints(kind), fields(kind)
    declared: dict[str, Any] = {
        field.name: (kinds[field.name], ... if field.default is MISSING else field.default)
        for field in listed
    }
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return create_model(kind.__name__, __config__=strict, **declared)


_MODELS = {kind: _make_model(kind) for kind in (LlamaConfig, RopeScaling)}
_EXPECTED = {
    "int_type": "a whole number was expected",
    "float_type": "a number was expected",
    "finite_number": "a finite number was expected",
    "bool_type": "true or false was expected",
}


def build_config(
    place: object,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    known: Mapping[str, Any] | None = None,
) -> LlamaConfig:
    """Return the configuration with these values of its fields; None is a missing value.

    `place` names the file in errors, `names` are its own names of fields, `known` all its settings.
    UserError for a missing value, one of another type, and a model that cannot exist.
    """
    return _build(LlamaConfig, place, values, names or {}, known or {})


def build_scaling(
    place: object, values: Mapping[str, Any], names: Mapping[str, str]
) -> RopeScaling:
    """Return the scaling of positions with these values of its fields; else as `build_config`."""
    return _build(RopeScaling, place, values, names, {})


def _build(
    kind: type[Built],
    place: object,
    values: Mapping[str, Any],
    names: Mapping[str, str],
    known: Mapping[str, Any],
) -> Built:
    try:
        checked = _MODELS[kind].model_validate(values)
        return kind(**{field.name: getattr(checked, field.name) for field in fields(kind)})
    except UserError as error:
        raise UserError(f"{place}: {error.cause}", error.cure) from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]

    field = str(fault["loc"][0])
    name = names.get(field, field)
    if fault["type"] == "missing" or fault["input"] is None:
        given = [key for key, value in known.items() if value is not None]
        cure = did_you_mean(name, given) if given else "a model of this kind needs it"
        raise UserError(f"{place}: the key '{name}' is missing", cure)

    expected = _EXPECTED.get(fault["type"], fault["msg"])
    raise UserError(f"{place}: {name} is {show_value(fault['input'])}", expected)


def changes_nothing(value: Any, neutrals: Iterable[Any]) -> bool:
    """Return whether a setting has one of the values at which a model computes as Llama 2."""
    return any(_equal(value, neutral) for neutral in neutrals)


def _equal(value: Any, neutral: Any) -> bool:
    """Compare two settings: true is no number, and numbers may be rounded to six digits."""
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    if isinstance(value, float) and isinstance(neutral, int | float):
        return abs(value - neutral) <= 1e-6 * abs(neutral)

    return bool(value == neutral)


def covers_context(window: Any, config: LlamaConfig) -> bool:
    """Return whether a window of attention is as long as the context, and so limits nothing."""
    return type(window) is int and window >= config.max_position_embeddings
