"""AdamW and the learning rate as the paper sets them (§2.2, Training Details).

Betas (0.9, 0.95), eps 1e-5, weight decay 0.1, warm-up, cosine decay to 10 % of the peak. The paper
does not say which tensors decay; here all matrices do, embeddings and output head included, and
vectors (norm gains, biases) do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from llama2 import devices
from llama2.config import Config

Schedule = Literal["cosine", "constant"]


class AdamW(Config):
    """Settings of the optimizer; the defaults are the paper's."""

    learning_rate: float = Field(3e-4, gt=0)
    """peak of the schedule"""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """on matrices; vectors do not decay"""


def group_parameters(
    model: nn.Module, settings: AdamW, rates: Mapping[str, float] | None = None
) -> list[dict[str, object]]:
    """Return parameter groups by peak learning rate and decay.

    `rates` gives the parameters whose name starts with a prefix a peak of their own (`{"critic.":
    3e-4}`); every prefix must match. Frozen parameters are left out. A tensor shared under two
    names counts once.
    """
    rates = rates or {}
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    matched = set()

    for name, parameter in model.named_parameters():
        prefix = _prefix(name, rates)
        matched.add(prefix)
        if parameter.requires_grad:
            peak = settings.learning_rate if prefix is None else rates[prefix]
            decay = settings.weight_decay if parameter.dim() >= 2 else 0.0
            members.setdefault((peak, decay), []).append(parameter)

    if missing := set(rates) - matched:
        raise ValueError(f"no parameter starts with {sorted(missing)}")

    return [
        {"params": parameters, "peak": peak, "lr": peak, "weight_decay": decay}
        for (peak, decay), parameters in members.items()
    ]


def split_parameters(model: nn.Module, prefixes: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that train, by the prefix their name starts with; those that match none
    are under "".

    Every prefix must match. A tensor shared under two names counts once.
    """
    members: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in prefixes}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault(_prefix(name, prefixes) or "", []).append(parameter)

    if missing := [prefix for prefix in prefixes if not members[prefix]]:
        raise ValueError(f"no parameter starts with {sorted(missing)}")

    return members


def _prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """Return the first of the prefixes that a parameter's name starts with."""
    return next((prefix for prefix in prefixes if name.startswith(prefix)), None)


def build_adamw(
    model: nn.Module, settings: AdamW, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """Return AdamW over `groups(...)`, fused into one kernel where PyTorch has one."""
    fused = all(p.device.type in devices.FUSED for p in model.parameters())
    return torch.optim.AdamW(
        group_parameters(model, settings, rates),
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=fused,
    )


def scale_rate(
    step: int, schedule: Schedule, warmup_steps: int, total_steps: int | None, min_ratio: float
) -> float:
    """Return the learning rate of update `step` (0-based) as a share of its peak.

    Linear warm-up reaches the peak at update `warmup_steps - 1` (without warm-up the first update
    has it); cosine decay reaches `min_ratio` exactly at the last update, `total_steps - 1`, and
    stays there. A single update has the peak.
    """
    warmup_steps = max(warmup_steps, 1)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if total_steps is None:
        raise ValueError("a cosine schedule needs the total number of steps")

    progress = min((step + 1 - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
