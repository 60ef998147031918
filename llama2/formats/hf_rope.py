"""Rotary positions in config.json: their base, and how they are scaled.

transformers 4 writes the base at the top and the rest under `rope_scaling`, transformers 5 all of
it under `rope_parameters`. Both places are read, and must not contradict each other; both are
written. A kind of scaling that is not known is refused by name, and so is a setting that the kind
does not read and that is not at its neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.formats.settings import build_scaling, changes_nothing
from llama2.model.config import LlamaConfig
from llama2.model.rope import ROPE_TYPES, RopeScaling, default_attention_factor
from llama2.terminal_text import show_value
from llama2.tokenizer.chat_settings import read_section

SECTIONS = ("rope_parameters", "rope_scaling")
UNFIT = "this model cannot be loaded"
_ORIGINAL = "original_max_position_embeddings"
_DEFAULT = "default"
# what transformers reads of each kind, beside its name and the base
_YARN = {"beta_fast", "beta_slow", "truncate"}
_READ: Mapping[str, set[str]] = {
    _DEFAULT: set(),
    "linear": {"factor"},
    "dynamic": {"factor", _ORIGINAL},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", _ORIGINAL, "attention_factor", "mscale", "mscale_all_dim", *_YARN},
}
# read by some kind, and without effect on the others
_WITHOUT_EFFECT = {
    "rope_type",
    "type",
    "rope_theta",
    "finetuned",
    _ORIGINAL,
    "low_freq_factor",
    "high_freq_factor",
    *_YARN,
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "factor": (1,),
    "partial_rotary_factor": (1,),
    "attention_factor": (1,),
}


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a config.json.

    `base` is the key that holds `theta`; `scaled` are those of `scaling`, by their names there.
    """

    base: str
    theta: Any
    scaling: RopeScaling | None


# --- reading ---
def read_rope(path: Path, values: Mapping[str, Any]) -> Rope:
    """Return the base and the scaling.

    UserError for two settings that contradict each other, for a kind that is not known, and for
    numbers that are missing or have no sense.
    """
    sections = {name: read_section(path, values, name) for name in SECTIONS}
    bases = {"rope_theta": values.get("rope_theta")} | _gather(sections, "rope_theta")
    base, theta = _require_one(path, bases) or ("rope_theta", LlamaConfig.rope_theta)

    kinds = _gather(sections, "rope_type", "type")
    key, kind = _require_one(path, kinds) or (f"{SECTIONS[1]}.rope_type", _DEFAULT)
    known = _READ.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise UserError(
            f"{path}: {key} is {show_value(kind)}, which is not known",
            f"{UNFIT}; known are {_DEFAULT}, {', '.join(ROPE_TYPES)}",
        )

    _refuse_others(path, kind, known, sections)
    if kind == _DEFAULT:
        return Rope(base, theta, None)

    section = key.partition(".")[0]
    settings, names = _read_settings(path, kind, known, sections, values, section)
    scaling = build_scaling(path, settings | {"rope_type": kind}, names)
    return Rope(base, theta, None if _is_identity(scaling) else scaling)


def _gather(sections: Mapping[str, Mapping[str, Any]], *keys: str) -> dict[str, Any]:
    """Return the values of some keys in both sections, by their full names."""
    return {f"{name}.{key}": section.get(key) for name, section in sections.items() for key in keys}


def _refuse_others(
    path: Path, kind: str, known: set[str], sections: Mapping[str, Mapping[str, Any]]
) -> None:
    """UserError for a setting that this kind does not read, unless it has no effect."""
    for name, section in sections.items():
        for key, value in section.items():
            if value is None or key in known or key in _WITHOUT_EFFECT:
                continue
            if not changes_nothing(value, _NEUTRAL.get(key, ())):
                raise UserError(
                    f"{path}: {name}.{key} is {show_value(value)}, which the rope type '{kind}' "
                    "does not have",
                    UNFIT,
                )


def _read_settings(
    path: Path,
    kind: str,
    known: set[str],
    sections: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    section: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a scaling, and the names by which the file calls them: of those that it
    does not have, in the section that names the kind."""
    settings: dict[str, Any] = {}
    names = {key: f"{section}.{key}" for key in known}
    for key in sorted(known):
        places = _gather(sections, key)
        if key == _ORIGINAL:
            places[key] = values.get(key)
        if pair := _require_one(path, places):
            names[key], settings[key] = pair

    context = values.get("max_position_embeddings", 2048)
    if kind == "dynamic":  # transformers takes the context of the file, whatever else it says
        contexts = {names[_ORIGINAL]: settings.get(_ORIGINAL), "max_position_embeddings": context}
        _require_one(path, contexts)
    if _ORIGINAL in known:
        settings.setdefault(_ORIGINAL, context)

    if kind == "yarn":
        _complete_yarn(path, settings, names, context)

    return settings, names


def _complete_yarn(
    path: Path, settings: dict[str, Any], names: Mapping[str, str], context: Any
) -> None:
    """Replace what stands for other numbers, as transformers does.

    A missing factor is that of the contexts, a beta of 0 is the default, and two scales of
    attention make its factor.
    """
    original = settings[_ORIGINAL]
    if "factor" not in settings and type(context) is int and type(original) is int and original:
        settings["factor"] = context / original

    for name in ("beta_fast", "beta_slow"):
        if changes_nothing(settings.get(name), (0,)):
            del settings[name]

    scales = []
    for name in ("mscale", "mscale_all_dim"):
        scale = settings.pop(name, None) or 0
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise UserError(f"{path}: {names[name]} is {show_value(scale)}", "a number is expected")

        scales.append(scale)

    factor = settings.get("factor")
    if "attention_factor" not in settings and all(scales) and isinstance(factor, int | float):
        above, below = (default_attention_factor(factor, scale) for scale in scales)
        settings["attention_factor"] = above / below if below else above


def _is_identity(scaling: RopeScaling) -> bool:
    """Tell whether a scaling changes no position."""
    return scaling.factor == 1 and scaling.amplitude == 1


def _require_one(path: Path, settings: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the first of several settings that mean the same; UserError if two differ."""
    given = [(name, value) for name, value in settings.items() if value is not None]
    for name, value in given:
        first, expected = given[0]
        if value != expected:
            raise UserError(
                f"{path}: {first} is {show_value(expected)} and {name} is {show_value(value)}",
                "keep the one with which the model was trained",
            )

    return given[0] if given else None


# --- writing ---
def make_rope_json(config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of config.json that say it, for transformers 4 and 5."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": _DEFAULT, "rope_theta": config.rope_theta}
        return {"rope_scaling": None, "rope_parameters": parameters}

    settings: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type in ("llama3", "yarn"):
        settings[_ORIGINAL] = scaling.original
    if scaling.rope_type == "llama3":
        settings["low_freq_factor"] = scaling.low_freq_factor
        settings["high_freq_factor"] = scaling.high_freq_factor
    if scaling.rope_type == "yarn":
        settings |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling != replace(scaling, attention_factor=None):
            settings["attention_factor"] = scaling.attention_factor
        if not scaling.truncate:
            settings["truncate"] = False

    return {
        "rope_scaling": settings,
        "rope_parameters": settings | {"rope_theta": config.rope_theta},
    }
