"""Results of the stages that compare versions: selection, evaluation, attention."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llama2.records import Axis
from llama2.results.base import Mean, Proportion, ResultPart, StageResult, WinShare


class SelectResult(StageResult):
    """Choice between a candidate and its predecessor."""

    stage = "select"
    file = "verdict.json"

    candidate: str
    """name of its run directory"""
    predecessor: str
    kept: Literal["candidate", "predecessor"]
    reason: str
    needed: float
    """share of decided comparisons that the candidate had to exceed"""
    win_rate: dict[str, WinShare]
    """`all`, then kind of prompt -> wins of the candidate"""

    @model_validator(mode="after")
    def _check(self) -> SelectResult:
        if "all" not in self.win_rate:
            raise ValueError("the win rate over all comparisons is missing")

        return self

    @property
    def overall(self) -> WinShare:
        """Wins over all comparisons."""
        return self.win_rate["all"]


class Histogram(ResultPart):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]


class Distribution(Mean):
    """Distribution of probabilities (Figure 20)."""

    quantiles: dict[str, float]
    """per cent -> value: 5, 25, 50, 75, 95"""
    histogram: Histogram

    @property
    def median(self) -> float | None:
        """The middle value."""
        return self.quantiles.get("50")


class TruthResult(ResultPart):
    """Judgement of one version by ground truth (§4.2.3)."""

    helpfulness: Mean
    """on helpful prompts"""
    helpfulness_greedy: Mean | None = None
    """of greedy answers"""
    families: dict[str, Mean]
    """family of helpful prompts -> helpfulness"""
    violations: Proportion
    """of unsafe prompts"""
    refusal_quality: Mean
    """helpfulness of answers to unsafe prompts"""
    false_refusals: Proportion
    """of borderline prompts"""
    false_refusals_helpful: Proportion
    """of helpful prompts"""
    borderline_helpfulness: Mean
    length_correlation: float | None = None
    """Pearson's, of helpfulness and tokens; None where one does not vary"""


class Obedience(ResultPart):
    """Answers that obey an instruction given once, turn by turn, by where it stood."""

    user: list[Proportion] = []
    """in the first user turn"""
    system: list[Proportion] = []
    """in the system message"""


class VersionResult(ResultPart):
    """Figures of one version."""

    length: Mean
    """tokens an answer"""
    eos: Proportion
    """answers that end by themselves"""
    rewards: dict[Axis, Distribution]
    """reward model -> its probabilities on the prompts of its axis"""
    rewards_by_kind: dict[Axis, dict[str, Mean]] = {}
    """reward model -> kind of prompt -> mean probability"""
    reward_length_correlation: dict[Axis, float | None]
    """reward model -> Pearson's correlation of probability and tokens"""
    ghost: Obedience
    truth: TruthResult | None = None


class VersionComparison(WinShare):
    """One version against another on one axis, by one judge."""

    version: str
    against: str
    axis: Axis
    judge: Literal["truth", "reward"]


class ShownAnswer(ResultPart):
    """Answer of one version to a prompt that is shown, with its scores."""

    text: str
    helpfulness: float | None = None
    """by ground truth"""
    safe: bool | None = None
    """by ground truth"""
    reward_helpful: float | None = None
    """probability"""
    reward_safe: float | None = None
    """probability"""


class ShownPrompt(ResultPart):
    """A prompt that is shown with the answers of all versions."""

    id: str
    kind: str
    family: str | None
    messages: list[tuple[str, str]]
    """(role, text)"""
    answers: dict[str, ShownAnswer]


class SamplingSettings(ResultPart):
    """Settings with which the answers of an evaluation were sampled."""

    temperature: float
    top_p: float
    max_tokens: int
    """of an answer"""


class EvaluateResult(StageResult):
    """Comparison of versions on held-out prompts."""

    stage = "evaluate"
    file = "evaluation.json"

    versions: list[str]
    """in the order in which they were made"""
    prompts: dict[str, int]
    """kind -> prompts"""
    results: dict[str, VersionResult]
    win_rates: list[VersionComparison]
    """against the first version and against the predecessor"""
    conversations: list[ShownPrompt]
    ghost_dialogs: dict[str, list[tuple[str, str]]]
    """version -> the first dialog under a lasting instruction"""
    checkpoints: dict[str, str]
    """version -> name of its run directory"""
    sampling: SamplingSettings

    @model_validator(mode="after")
    def _check(self) -> EvaluateResult:
        names = set(self.versions)
        answers = [set(prompt.answers) for prompt in self.conversations]
        if not names or not all(names <= each for each in (set(self.results), *answers)):
            raise ValueError("there is no version, or one without results or answers")

        return self


class SampledAnswer(ResultPart):
    """One line of samples.jsonl: an answer and all that is known about it."""

    version: str
    id: str
    """of the prompt"""
    kind: str
    family: str | None
    prompt: list[tuple[str, str]]
    """(role, text)"""
    answer: str
    tokens: int
    finish: str
    """stop, or length where it was cut off"""
    helpfulness: float | None = None
    safe: bool | None = None
    refusal: bool | None = None
    reward_helpful: float | None = None
    reward_safe: float | None = None


class AttentionResult(StageResult):
    """Attention on the instruction of the first turn (Figure 10)."""

    stage = "evaluate"
    file = "attention.json"

    names: list[str]
    """versions"""
    dialogs: int
    instruction_by_turn: dict[str, list[float]]
    """version -> largest attention on the instruction where each answer begins, mean of dialogs"""
    maps: dict[str, list[list[float]]]
    """version -> rows (answer tokens) of columns (tokens), both in bins"""
    bin: int
    """tokens in a bin"""
    instruction: str
    instruction_bins: tuple[float, float]
    """where it begins and ends, in bins"""
    columns: list[str]
    """text of each bin"""

    @model_validator(mode="after")
    def _check(self) -> AttentionResult:
        names = set(self.names)
        if not names or not names <= self.maps.keys() & self.instruction_by_turn.keys():
            raise ValueError("there is no version, or one without a map")

        return self
