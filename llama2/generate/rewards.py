"""The reward of an answer: two reward models and the paper's rule to combine them (§3.2.3).

    R_c(g | p) = R_s(g | p)  if is_safety(p) or R_s(g | p) < 0.15,  else R_h(g | p)

R_s and R_h are probabilities, the sigmoid of a scorer's output. Since R_c is used as logit(R_c),
all scores here are raw, and only the gate looks at a probability. Other rules are a setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from llama2.config import Config as Section
from llama2.devices import Precision
from llama2.errors import UserError
from llama2.generate.score import score_rows
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks

Rule = Literal["llama2_piecewise", "weighted", "min", "helpful", "safe"]


class RewardModels(Section):
    """The reward models that judge, and the rule that combines their scores."""

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
        """Return the checkpoints named here."""
        return (self.helpful, self.safe) if self.safe else (self.helpful,)


@dataclass(frozen=True)
class Score:
    """Raw scores of one answer, and their combination; `to_probability` gives the paper's R."""

    helpful: float
    safe: float
    reward: float


class Rewards:
    """Scores answers with both models, shared between `ranks` (this process alone unless given)."""

    def __init__(
        self,
        settings: RewardModels,
        helpful: Scorer,
        safe: Scorer | None,
        precision: Precision,
        ranks: Ranks | None = None,
    ) -> None:
        check_rule(settings)
        self.settings, self.helpful, self.safe = settings, helpful, safe
        self.precision, self.ranks = precision, ranks

    def to(self, device: torch.device | str) -> None:
        """Move the models to a device."""
        for model in (self.helpful, self.safe):
            if model is not None:
                model.to(device)

    @property
    def context(self) -> int:
        """The most tokens of a row."""
        models = [model for model in (self.helpful, self.safe) if model]
        return min(model.config.max_position_embeddings for model in models)

    def __call__(self, rows: Sequence[Sequence[int]], tags: Sequence[bool]) -> list[Score]:
        """Return the scores of `rows`, token ids of conversations with their answers; `tags[i]` is
        is_safety(p) of row i. Every rank gets every score."""
        score = partial(score_rows, rows=rows, precision=self.precision, ranks=self.ranks)
        helpful = score(self.helpful, name=self.settings.helpful)
        safe = [math.inf] * len(rows)
        if self.safe:
            safe = score(self.safe, name=self.settings.safe)

        return [
            Score(h, s, combine(self.settings, h, s, is_safety))
            for h, s, is_safety in zip(helpful, safe, tags)
        ]


def check_rule(settings: RewardModels) -> None:
    """UserError if the rule needs a reward model that is not given."""
    if settings.safe is None and settings.rule in ("min", "safe"):
        raise UserError(
            f"the rule '{settings.rule}' needs a safety reward model", "set rewards.safe"
        )


def combine(settings: RewardModels, helpful: float, safe: float, is_safety: bool) -> float:
    """Return logit(R_c) of one answer."""
    if math.isinf(safe) or settings.rule == "helpful":
        return helpful
    if settings.rule == "llama2_piecewise":
        return safe if is_safety or to_probability(safe) < settings.gate else helpful
    if settings.rule == "weighted":
        return settings.safe_weight * safe + (1 - settings.safe_weight) * helpful

    return safe if settings.rule == "safe" else min(helpful, safe)


def to_probability(score: float) -> float:
    """Return the sigmoid of a raw score, without overflow."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))

    return math.exp(score) / (1 + math.exp(score))
