"""Turn the settings in a file into the configuration of a model, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from llama2.errors import UserError, did_you_mean
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import show_value

_KINDS = get_type_hints(LlamaConfig)
_FIELDS: dict[str, Any] = {
    field.name: (_KINDS[field.name], ... if field.default is MISSING else field.default)
    for field in fields(LlamaConfig)
}
_Settings = create_model(
    "_Settings", __config__=ConfigDict(strict=True, allow_inf_nan=False), **_FIELDS
)
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
    try:
        return LlamaConfig(**_Settings.model_validate(values).model_dump())
    except UserError as error:
        raise UserError(f"{place}: {error.cause}", error.cure) from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]

    field = str(fault["loc"][0])
    name = (names or {}).get(field, field)
    if fault["input"] is None:
        given = [key for key, value in (known or {}).items() if value is not None]
        raise UserError(f"{place}: the key '{name}' is missing", did_you_mean(name, given))

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
