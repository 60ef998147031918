"""Results of the stages that sample answers to learn from."""

from __future__ import annotations

from pydantic import model_validator

from llama2 import json_files
from llama2.results.base import DialogTurn, Proportion, ResultPart, StageResult, Values


class RankedAnswers(ResultPart):
    """A prompt with the worst and the best of its sampled answers."""

    prompt: str
    worst: str
    best: str
    worst_reward: float
    """probability of being good"""
    best_reward: float


class RejectionResult(StageResult):
    """Best answers of one round of rejection sampling."""

    stage = "rejection"

    prompts: int
    k: int
    """answers sampled a prompt"""
    kept: int
    """answers of this round that were kept"""
    earlier: int
    """answers of earlier rounds in the pool"""
    pool: dict[str, int]
    """round -> its answers in the pool"""
    temperature: float
    examples: list[RankedAnswers]


class CurvesResult(StageResult):
    """Reward by number of samples (Figure 7), and the search for a temperature (Figure 8)."""

    stage = "rejection"
    file = "curves.json"

    k: list[int]
    max: list[float]
    """mean over prompts of the best probability of the first k answers"""
    median: list[float]
    temperatures: dict[str, float]
    """temperature -> mean reward of the best answer; empty without a search"""
    temperature: float
    """of this round"""

    @model_validator(mode="after")
    def _check(self) -> CurvesResult:
        if not len(self.k) == len(self.max) == len(self.median):
            raise ValueError("the curves are not of one length")

        return self


class GhostExample(ResultPart):
    """A dialog to learn from: the instruction stands in its first turn."""

    messages: list[DialogTurn]


class GhostResult(StageResult):
    """Ghost Attention dialogs."""

    stage = "ghost"

    conversations: int
    dialogs: int
    turns: int
    """answers that dialogs were made of"""
    adherence: Proportion | None = None
    """of all sampled answers, those that obey; None where that cannot be checked"""
    examples: list[GhostExample]

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        """Open the examples that earlier versions wrote as text."""
        examples = values.get("examples")
        if not isinstance(examples, list):
            return values

        opened = [json_files.parse(text) if isinstance(text, str) else text for text in examples]
        return {**values, "examples": opened}


class DistilledAnswer(ResultPart):
    """A prompt with its answer without a preprompt, and the safer one under a preprompt."""

    prompt: str
    before: str
    after: str


class DistillResult(StageResult):
    """Answers of safety context distillation."""

    stage = "distill"
    spellings = {"safety before": "safety_before", "safety after": "safety_after"}

    prompts: int
    kept: int
    templated: int
    """prompts with an answer template for their risk"""
    safety_before: float | None
    """median probability of safety without a preprompt; None without prompts"""
    safety_after: float | None
    """the same of all answers under preprompts"""
    examples: list[DistilledAnswer]
