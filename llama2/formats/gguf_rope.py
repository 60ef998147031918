"""Scaled rotary positions in GGUF: metadata that llama.cpp reads, or factors of frequencies.

llama.cpp scales linearly and by yarn as the metadata say. Llama 3.1's way it knows as a tensor
alone, `rope_freqs.weight`, by whose numbers frequencies are divided: they are made of the scaling,
and the scaling is found again from them. It has no dynamic scaling, and the limits of yarn's ramp
it does not read of a file of this architecture.

Shapes: F frequencies of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama2 import devices
from llama2.errors import UserError
from llama2.formats.settings import build_scaling, changes_nothing
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling, default_attention_factor, rotary_frequencies
from llama2.terminal_text import show_value

FACTORS = "rope_freqs.weight"
UNREADABLE = "this model cannot be read"
_SCALING = "rope.scaling"
_TYPE, _FACTOR = f"{_SCALING}.type", f"{_SCALING}.factor"
ORIGINAL = f"{_SCALING}.original_context_length"
_ATTENTION = f"{_SCALING}.attn_factor"
_BETAS = {
    "beta_fast": f"{_SCALING}.yarn_beta_fast",
    "beta_slow": f"{_SCALING}.yarn_beta_slow",
}
# keys that are read here, without the architecture before them
KEYS = (_TYPE, _FACTOR, "rope.scale_linear", ORIGINAL, _ATTENTION, *_BETAS.values())
_OFF = (0, 1)
_LLAMA3 = RopeScaling("llama3", 8.0, 8192)
_AGREEMENT = 2e-6  # of factors that went through fp32


# --- writing ---
def require_holdable(place: object, config: LlamaConfig) -> None:
    """UserError for a scaling that llama.cpp does not have, or that it does not read of a file."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type in ("linear", "llama3"):
        return

    default = RopeScaling("yarn", scaling.factor, scaling.original)
    if replace(scaling, attention_factor=default.attention_factor) != default:
        betas = f"beta_fast {scaling.beta_fast:g}, beta_slow {scaling.beta_slow:g}"
        limits = f" with {betas}, truncate {scaling.truncate}".lower()
        raise UserError(
            f"{place}: rotary positions are scaled by '{scaling.rope_type}'"
            f"{limits if scaling.rope_type == 'yarn' else ''}, which llama.cpp does not read of a "
            "file",
            "export the model in Hugging Face's format",
        )


def describe_scaling(writer: Any, config: LlamaConfig, architecture: str) -> None:
    """Give a `GGUFWriter` the metadata of a model's scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return

    if scaling.original_max_position_embeddings is not None:
        writer.add_uint32(f"{architecture}.{ORIGINAL}", scaling.original)
    if scaling.rope_type == "llama3":
        return

    writer.add_string(f"{architecture}.{_TYPE}", scaling.rope_type)
    writer.add_float32(f"{architecture}.{_FACTOR}", scaling.factor)
    if scaling.rope_type == "yarn":
        # llama.cpp multiplies with the default by itself
        more = scaling.amplitude / default_attention_factor(scaling.factor)
        if more != 1:
            writer.add_float32(f"{architecture}.{_ATTENTION}", more)


def make_factors(config: LlamaConfig) -> Tensor | None:
    """Return what frequencies are divided by, [F] in fp32; None where the metadata say it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None

    return _divide_frequencies(config, scaling)


def _divide_frequencies(config: LlamaConfig, scaling: RopeScaling) -> Tensor:
    head, theta, device = config.head_dim, config.rope_theta, torch.device(devices.CPU)
    plain_F = rotary_frequencies(head, theta, None, device)
    return plain_F / rotary_frequencies(head, theta, scaling, device)


# --- reading ---
def read_scaling(
    place: object, metadata: Mapping[str, Any], architecture: str, context: Any
) -> RopeScaling | None:
    """Return the scaling that the metadata of a file name; UserError for one that is not known."""

    def read(key: str) -> Any:
        value = metadata.get(f"{architecture}.{key}")
        return None if changes_nothing(value, (0,)) else value

    # without a type llama.cpp takes linear
    kind = read(_TYPE) or "linear"
    factor, more = read(_FACTOR) or read("rope.scale_linear") or 1.0, read(_ATTENTION) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise UserError(
            f"{place}: {architecture}.{_TYPE} is {show_value(kind)}, which is not known", UNREADABLE
        )
    if kind != "yarn" and more != 1:
        raise UserError(
            f"{place}: {architecture}.{_ATTENTION} is {show_value(more)}, and positions are not "
            "scaled by yarn",
            UNREADABLE,
        )
    if kind == "none" or (factor == 1 and more == 1):
        return None

    settings: dict[str, Any] = {"rope_type": kind, "factor": factor}
    names = {"factor": f"{architecture}.{_FACTOR}"}
    if kind == "yarn":
        settings["original_max_position_embeddings"] = read(ORIGINAL) or context
        names |= {field: f"{architecture}.{key}" for field, key in _BETAS.items()}
        betas = {field: read(key) for field, key in _BETAS.items()}
        settings |= {field: value for field, value in betas.items() if value is not None}
        if more != 1 and isinstance(more, float) and isinstance(factor, float):
            settings["attention_factor"] = more * default_attention_factor(factor)

    return build_scaling(place, settings, names)


def recognise_factors(
    place: object, factors_F: Tensor, config: LlamaConfig, original: Any
) -> RopeScaling | None:
    """Return the scaling of Llama 3.1 that makes these factors; None if all of them are 1.

    `original` is the context of pretraining, where the file says it: the same factors are made
    for twice the context with twice the wavelengths. UserError for factors that no such scaling
    makes.
    """
    if bool((factors_F == 1).all()):
        return None
    if bool((factors_F == factors_F[0]).all()) and float(factors_F[0]) > 1:
        return RopeScaling("linear", float(factors_F[0]))

    if config.rope_scaling is None and bool((factors_F.isfinite() & (factors_F > 0)).all()):
        for scaling in _guess_scalings(factors_F, config, original):
            made_F = _divide_frequencies(config, scaling)
            if torch.allclose(made_F, factors_F, rtol=_AGREEMENT, atol=0):
                return scaling

    raise UserError(
        f"{place} scales rotary positions in a way that is not Llama 3.1's, and no other is known",
        UNREADABLE,
    )


def _guess_scalings(factors_F: Tensor, config: LlamaConfig, original: Any) -> Iterator[RopeScaling]:
    """Yield scalings that may have made some factors, those of published models first."""
    largest = float(factors_F.max())
    factor = (
        float(round(largest)) if math.isclose(largest, round(largest), rel_tol=1e-6) else largest
    )
    if not 1 < factor <= 1e6:
        return

    lengths = [original] if type(original) is int and original > 0 else []
    for length in (*lengths, _LLAMA3.original):
        yield RopeScaling("llama3", factor, length)

    for length in (*lengths, _LLAMA3.original):
        low, high = _find_limits(factors_F.double(), config, factor, length)
        if 0 < low < high:
            yield RopeScaling("llama3", factor, length, _tidy(low), _tidy(high))
            yield RopeScaling("llama3", factor, length, low, high)


def _find_limits(
    factors_F: Tensor, config: LlamaConfig, factor: float, original: int
) -> tuple[float, float]:
    """Return how often what is scaled, and what stays, turns within the original context at most
    and at least; zeros if factors do not lie on a ramp."""
    frequencies_F = rotary_frequencies(
        config.head_dim, config.rope_theta, None, torch.device(devices.CPU)
    )
    turns_F = frequencies_F.double() * original / (2 * math.pi)
    shares_F = (1 / factors_F - 1 / factor) / (1 - 1 / factor)
    between_F = (shares_F > 1e-5) & (shares_F < 1 - 1e-5)
    turns, shares = turns_F[between_F].tolist(), shares_F[between_F].tolist()
    if len(turns) > 1:
        width = (
            (turns[0] - turns[-1]) / (shares[0] - shares[-1]) if shares[0] != shares[-1] else 0.0
        )
        low = turns[0] - shares[0] * width
        return low, low + width

    # any two limits will do between which nothing else lies
    below = max(turns_F[shares_F <= 1e-5].tolist(), default=0.0)
    above = min(turns_F[shares_F >= 1 - 1e-5].tolist(), default=2 * float(turns_F.max()))
    if not turns:
        return below + (above - below) / 3, above - (above - below) / 3

    width = min((turns[0] - below) / shares[0], (above - turns[0]) / (1 - shares[0])) / 2
    low = turns[0] - shares[0] * width
    return low, low + width


def _tidy(value: float) -> float:
    """Return the short number that a value is, but for its rounding."""
    short = float(f"{value:.4g}")
    return short if math.isclose(short, value, rel_tol=1e-4) else value
