"""The reward of an answer: two reward models and the paper's rule for joining them (§3.2.3).

    R_c(g | p) = R_s(g | p)  if is_safety(p) or R_s(g | p) < 0.15,  else R_h(g | p)

R_s and R_h are probabilities, the sigmoid of a scorer's output. Since R_c is used as logit(R_c),
raw scores are kept throughout and only the gate looks at a probability. Other rules are a setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from llama2.config import Config
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.generate.score import rewards
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks

Rule = Literal["llama2_piecewise", "weighted", "min", "helpful", "safe"]


class RewardModels(Config):
    """Which reward models judge, and how their scores are joined."""

    helpful: Path
    """reward model of helpfulness"""
    safe: Path | None = None
    """reward model of safety; without it helpfulness judges alone"""
    rule: Rule = "llama2_piecewise"
    """llama2_piecewise: the paper's; weighted: a mean of scores; min: the worse one; helpful, safe:
    one alone"""
    gate: float = Field(0.15, ge=0, le=1)
    """probability of being safe below which safety decides"""
    safe_weight: float = Field(0.5, ge=0, le=1)
    """of the rule `weighted`"""

    def paths(self) -> tuple[Path, ...]:
        """The checkpoints named here."""
        return (self.helpful, self.safe) if self.safe else (self.helpful,)


@dataclass(frozen=True)
class Score:
    """Raw scores of one answer; `probability` makes them the paper's R."""

    helpful: float
    safe: float
    joined: float


class Rewards:
    """Scores answers with both models, shared between `ranks`. `tags[i]` is is_safety(p) of row i."""

    def __init__(
        self,
        settings: RewardModels,
        helpful: Scorer,
        safe: Scorer | None,
        precision: Precision,
        ranks: Ranks | None = None,
    ) -> None:
        check(settings)
        self.settings, self.helpful, self.safe, self.precision = settings, helpful, safe, precision
        self.ranks = ranks

    def to(self, device: torch.device | str) -> None:
        """Keep the models there."""
        for model in (self.helpful, self.safe):
            if model is not None:
                model.to(device)

    @property
    def context(self) -> int:
        """The most tokens of a row."""
        return min(
            model.config.max_position_embeddings for model in (self.helpful, self.safe) if model
        )

    def __call__(self, rows: Sequence[Sequence[int]], tags: Sequence[bool]) -> list[Score]:
        """`rows` are token ids of whole conversations, answer included; every rank gets every
        score."""
        helpful = rewards(
            self.helpful, rows, self.precision, ranks=self.ranks, name=self.settings.helpful
        )
        safe = [math.inf] * len(rows)
        if self.safe:
            safe = rewards(
                self.safe, rows, self.precision, ranks=self.ranks, name=self.settings.safe
            )

        return [
            Score(h, s, join(self.settings, h, s, tag)) for h, s, tag in zip(helpful, safe, tags)
        ]


def check(settings: RewardModels) -> None:
    """UserError if the rule needs a reward model that is not given."""
    if settings.safe is None and settings.rule in ("min", "safe"):
        raise UserError(
            f"the rule '{settings.rule}' needs a safety reward model", "set rewards.safe"
        )


def join(settings: RewardModels, helpful: float, safe: float, tag: bool) -> float:
    """logit(R_c) of one answer."""
    if math.isinf(safe) or settings.rule == "helpful":
        return helpful
    if settings.rule == "llama2_piecewise":
        return safe if tag or probability(safe) < settings.gate else helpful
    if settings.rule == "weighted":
        return settings.safe_weight * safe + (1 - settings.safe_weight) * helpful

    return safe if settings.rule == "safe" else min(helpful, safe)


def probability(score: float) -> float:
    """The sigmoid of a raw score."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
