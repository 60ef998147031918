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
class Verdict:
    """What the safety model thought of an answer, and whether it was replaced."""

    probability: float
    replaced: bool

    def report(self) -> dict[str, object]:
        return {"safety": {"probability": self.probability, "replaced": self.replaced}}


@dataclass(frozen=True)
class Gate:
    """Judges answers. `model` scores whole conversations."""

    model: RewardModel
    threshold: float
    refusal: str

    async def judge(self, prompt: Messages, answer: str) -> Verdict:
        """The last tokens decide where a conversation is longer than the safety model's context by
        a few."""
        ids = self.model.encode((*prompt, Message("assistant", answer)))[-self.model.context :]
        found = to_probability(await self.model.score(ids))
        return Verdict(found, found < self.threshold)
