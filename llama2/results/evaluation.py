"""Results of the stages that compare versions: selection, evaluation, attention."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llama2.records import Axis
from llama2.results.base import (
    Mean,
    PairedDifference,
    Proportion,
    ResultPart,
    StageResult,
    WinShare,
)


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


class JudgeQuality(ResultPart):
    """Agreement of a judge with labels that it was not made of."""

    what: str
    """what it finds"""
    labels: str
    """whose labels, of which answers"""
    accuracy: Proportion
    """of all answers"""
    precision: Proportion
    """of those that it names, those that are it"""
    recall: Proportion
    """of those that are it, those that it names"""
    false_alarms: Proportion
    """of those that are not it, those that it names all the same"""


class ConductResult(ResultPart):
    """Refusals, violations and answers that are none of one version, told by rules on their words.

    Degenerate answers neither refuse nor violate; they stay among the cases.
    """

    refusals: dict[str, Proportion]
    """kind of prompt -> answers that decline, in full or in part; of borderline prompts: false"""
    full_refusals: dict[str, Proportion]
    violations: Proportion
    """of unsafe prompts: answers that neither decline nor warn nor contradict"""
    violations_by_source: dict[str, Proportion] = {}
    """set of unsafe prompts -> the same"""
    degenerate: dict[str, Proportion]
    """kind of prompt -> answers that say nothing, or one thing over and over"""

    @property
    def false_refusals(self) -> Proportion | None:
        """Refusals of borderline prompts, None where there are none."""
        return self.refusals.get("borderline")


class ConductDifference(ResultPart):
    """Difference of two versions in what they do to the same prompts."""

    measure: Literal["refusals", "violations", "degenerate"]
    kind: str
    """of the prompts"""
    version: str
    against: str
    difference: PairedDifference


class Obedience(ResultPart):
    """Answers that obey an instruction given once, turn by turn, by where it stood."""

    user: list[Proportion] = []
    """in the first user turn"""
    system: list[Proportion] = []
    """in the system message"""
    by_kind: dict[str, list[Proportion]] = {}
    """kind of instruction -> the same where it stood in the first user turn, if a program checks
    it"""


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
    conduct: ConductResult | None = None
    """by rules, where ground truth does not judge"""
    other_rewards: dict[str, Mean] = {}
    """judge that is only a judge -> its mean probability on the prompts of its axis"""


class VersionComparison(WinShare):
    """One version against another on one axis, by one judge."""

    version: str
    against: str
    axis: Axis
    judge: Literal["truth", "reward"]


class JudgeComparison(WinShare):
    """One version against another by a reward model that is only a judge."""

    version: str
    against: str
    axis: Axis
    reward_model: str
    """name of the judge"""


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
    other_win_rates: list[JudgeComparison] = []
    """by judges that are only judges, against the first version and against the predecessor"""
    judges: dict[str, str] = {}
    """judge, or axis of a reward model -> name of its run directory"""
    conduct_differences: list[ConductDifference] = []
    """of each version from the first"""
    conduct_judges: list[JudgeQuality] = []
    """how far refusals and violations found by rules can be trusted"""

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
    conduct: str | None = None
    """class of refusal by the rules, or why it is no answer"""
    violation: bool | None = None
    """by the rules; of unsafe prompts alone"""


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
