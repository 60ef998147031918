"""The gate on answers: a reward model of safety reads each finished answer, and a refusal replaces
unsafe ones.

The threshold is the paper's, below which safety decides (§3.2.3). A gated server sends nothing
before the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama2.generate.rewards import to_probability
from llama2.records import Message, Messages
from llama2.serve.models import RewardModel


@dataclass(frozen=True)
class SafetyVerdict:
    """The probability that an answer is safe, and whether a refusal replaced it."""

    probability: float
    replaced: bool


@dataclass(frozen=True)
class SafetyGate:
    """Judges answers. `model` scores whole conversations."""

    model: RewardModel
    threshold: float
    refusal: str

    async def judge(self, prompt: Messages, answer: str) -> SafetyVerdict:
        """Judge an answer. Of a conversation that is longer than the model's context the last
        tokens are read."""
        ids = self.model.encode((*prompt, Message("assistant", answer)))
        safe = to_probability(await self.model.score(ids[-self.model.context :]))
        return SafetyVerdict(safe, safe < self.threshold)
