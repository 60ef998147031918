"""Rotary frequencies, and how they are scaled for a context longer than that of pretraining.

The paper's models have a context of 4,096 and scale nothing (§2.2, table 1). Their relatives do, in
one of four ways; the numbers are those of transformers' `ROPE_INIT_FUNCTIONS`:

- linear: every frequency is divided by the factor.
- dynamic: the base grows with the length of a sequence once that exceeds the original context. A
  position is rotated as the last one of the sequence that it ends, as transformers does token by
  token. So a row does not depend on what follows it, nor on its batch, and keys and values from a
  cache are those of a pass over the whole row. (Where transformers reads more than the original
  context in one pass, it rotates every position by the base of the longest row of the batch: the
  logits of a position then depend on what comes after it.)
- llama3: long wavelengths are divided by the factor, short ones stay, and between them a ramp over
  the wavelength leads from one to the other (Llama 3.1).
- yarn: the same with a ramp over the index of the dimension, and cosine and sine are multiplied by
  an attention factor.

Shapes: B rows, T positions, E head dimension, F = E / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llama2.errors import UserError

RopeType = Literal["linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES: tuple[str, ...] = get_args(RopeType)
_BOUNDS: dict[str, tuple[float, float]] = {
    "factor": (1.0, 1e6),
    "original_max_position_embeddings": (1, 1 << 26),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
}


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary frequencies; names are those of Hugging Face's config.json.

    UserError for a number that is out of its range, and for two that contradict each other.
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int | None = None
    """the context of pretraining; `linear` asks for none"""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """of `llama3`: wavelengths above the original context divided by the first are scaled, those
    below it divided by the second stay"""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """of `yarn`: what turns more often than the first within the original context stays, what turns
    less often than the second is scaled"""
    truncate: bool = True
    """of `yarn`: the ramp begins and ends at whole dimensions"""
    attention_factor: float | None = None
    """of `yarn`, a factor of cosine and sine: 0.1 · ln(factor) + 1 unless given"""

    def __post_init__(self) -> None:
        if self.rope_type == "yarn" and self.attention_factor is None:
            object.__setattr__(self, "attention_factor", default_attention_factor(self.factor))

        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(
                    f"{name} of the rope type '{self.rope_type}' is {value}",
                    f"it must be at least {least:g} and at most {most:.8g}",
                )

        if self.rope_type != "linear" and self.original_max_position_embeddings is None:
            raise UserError(
                f"the rope type '{self.rope_type}' has no original_max_position_embeddings",
                "name the context of pretraining",
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor {self.low_freq_factor:g} is not less than high_freq_factor "
                f"{self.high_freq_factor:g}",
                "Llama 3.1 has 1 and 4",
            )
        if self.rope_type == "yarn" and self.beta_slow > self.beta_fast:
            raise UserError(
                f"beta_slow {self.beta_slow:g} is more than beta_fast {self.beta_fast:g}",
                "the published values are 1 and 32",
            )

    @property
    def original(self) -> int:
        """The context of pretraining."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings

    @property
    def extended(self) -> int:
        """The context of pretraining times the factor, the most positions of `dynamic`."""
        return int(self.original * self.factor)

    @property
    def amplitude(self) -> float:
        """The factor of cosine and sine."""
        return self.attention_factor if self.attention_factor and self.rope_type == "yarn" else 1.0


def default_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Return yarn's factor of cosine and sine for a context `factor` times as long; transformers
    calls `scale` mscale."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_angles(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Return the angle of each position and frequency, [B, T, F] in fp32."""
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions_BT.device)
    if scaling is not None and scaling.rope_type == "dynamic":
        frequencies = _stretch(positions_BT, head_dim, theta, scaling, frequencies)

    return positions_BT.float()[..., None] * frequencies


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Return the angle by which each frequency turns from one position to the next, [F] in fp32:
    theta^(-2 i / head_dim), scaled. For `dynamic` those inside the original context."""
    powers_F = theta ** _exponents(head_dim, device)
    frequencies_F = 1.0 / powers_F
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies_F
    if scaling.rope_type == "linear":
        return frequencies_F / scaling.factor
    if scaling.rope_type == "llama3":
        return _scale_by_wavelength(frequencies_F, scaling)

    begin, end = _find_ramp(head_dim, theta, scaling)
    index_F = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    kept_F = 1 - ((index_F - begin) / (end - begin)).clamp(0, 1)
    scaled_F = 1.0 / (scaling.factor * powers_F)
    return scaled_F * (1 - kept_F) + frequencies_F * kept_F


def _exponents(head_dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


def _stretch(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling, inside_F: Tensor
) -> Tensor:
    """Return the frequencies of every position, [B, T, F], of a base that grows with it beyond the
    original context; `inside_F` are those within."""
    lengths_BT1 = (positions_BT + 1)[..., None]
    growth_BT1 = scaling.factor * lengths_BT1 / scaling.original - (scaling.factor - 1)
    # what lies inside is not used, and must be no power of a negative number
    growth_BT1 = growth_BT1.clamp(min=1.0)
    bases_BT1 = theta * growth_BT1 ** (head_dim / (head_dim - 2))
    beyond_BTF = 1.0 / bases_BT1 ** _exponents(head_dim, positions_BT.device)

    return torch.where(lengths_BT1 > scaling.original, beyond_BTF, inside_F)


def _scale_by_wavelength(frequencies_F: Tensor, scaling: RopeScaling) -> Tensor:
    low, high, factor = scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor
    wavelengths_F, original = 2 * math.pi / frequencies_F, scaling.original
    long_F, short_F = wavelengths_F > original / low, wavelengths_F < original / high
    kept_F = (original / wavelengths_F - low) / (high - low)
    between_F = (1 - kept_F) * frequencies_F / factor + kept_F * frequencies_F
    scaled_F = torch.where(long_F, frequencies_F / factor, frequencies_F)

    return torch.where(long_F | short_F, scaled_F, between_F)


def _find_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the dimensions between which yarn goes from frequencies that stay to scaled ones."""

    def find_dimension(turns: float) -> float:
        """The dimension that turns so often within the original context."""
        longest = scaling.original / (turns * 2 * math.pi)
        return head_dim * math.log(longest) / (2 * math.log(theta))

    begin, end = find_dimension(scaling.beta_fast), find_dimension(scaling.beta_slow)
    if scaling.truncate:
        begin, end = math.floor(begin), math.ceil(end)

    begin, end = max(begin, 0), min(end, head_dim - 1)
    return begin, end if end != begin else end + 0.001
