"""Results of the stages that train: pretraining, fine-tuning, reward models, PPO."""

from __future__ import annotations

from pydantic import model_validator

from llama2.records import DEGREES
from llama2.results.base import (
    HeldoutLoss,
    PairedDifference,
    Proportion,
    ReadCounts,
    ResultPart,
    StageResult,
    TrainingResult,
    Values,
)

BASELINES = ("length", "bag of words")
"""what the judges of `Baselines` look at"""


class PretrainResult(TrainingResult):
    """A pretrained model."""

    stage = "pretrain"

    validation: HeldoutLoss | None = None
    validation_bytes: int | None = None
    """UTF-8 bytes of the text validated on"""
    xz_bits_per_byte: float | None = None
    """of the same text, by `xz -9`"""
    bzip2_bits_per_byte: float | None = None
    """of the same text, by `bzip2 -9`"""
    passes: dict[str, float] = {}
    """source -> how often it was read"""


class SftResult(TrainingResult):
    """A model fine-tuned on dialogs."""

    stage = "sft"

    dialogs: int
    """dialogs in the rows of one epoch"""
    heldout: int
    """dialogs validated on"""
    cut: int
    """dialogs that were shortened to fit a row"""
    dropped: int
    """dialogs without an answer in what fits into a row"""
    fill: float
    """share of the places in a row that hold a token"""
    validation: HeldoutLoss | None = None
    sources: dict[str, ReadCounts]


class SetShare(ResultPart):
    """One set of comparisons in a data mix."""

    pairs: int
    share: float
    """of all pairs"""


class RewardResult(TrainingResult):
    """A trained reward model."""

    stage = "reward"

    pairs: int
    sets: dict[str, SetShare]
    read: dict[str, ReadCounts]


class Baselines(ResultPart):
    """Accuracy of judges that understand nothing, on the same pairs."""

    longer: Proportion
    """prefers the longer answer, for safety the shorter"""
    bag_of_words: Proportion | None = None
    """weighs words without their order; None where it had no pairs to learn from"""
    over_longer: PairedDifference | None = None
    """accuracy of the reward model less that of `longer`; None in files of earlier versions"""
    over_bag_of_words: PairedDifference | None = None

    @property
    def by_name(self) -> dict[str, Proportion]:
        """Accuracy by what a judge looks at."""
        judges = zip(BASELINES, (self.longer, self.bag_of_words))
        return {name: accuracy for name, accuracy in judges if accuracy is not None}

    @property
    def leads(self) -> dict[str, PairedDifference]:
        """Lead of the reward model on the same pairs, by what a judge looks at."""
        judges = zip(BASELINES, (self.over_longer, self.over_bag_of_words))
        return {name: difference for name, difference in judges if difference is not None}


class SetAccuracy(ResultPart):
    """Accuracy of a reward model on one held-out set, in all and by degree (Table 8): the share of
    pairs whose preferred answer scores higher, a tie for a half."""

    all: Proportion
    significantly: Proportion | None = None
    better: Proportion | None = None
    slightly: Proportion | None = None
    negligibly: Proportion | None = None
    baselines: Baselines | None = None
    baselines_by_degree: dict[str, Baselines] = {}

    @property
    def by_degree(self) -> dict[str, Proportion]:
        """Accuracy by degree, the clearest first; degrees without pairs are left out."""
        accuracies = {name: getattr(self, name) for name in DEGREES}
        return {name: accuracy for name, accuracy in accuracies.items() if accuracy is not None}

    @property
    def by_baseline(self) -> dict[str, Proportion]:
        """Accuracy of the baselines by name; empty where they were not measured."""
        return self.baselines.by_name if self.baselines else {}

    @property
    def leads(self) -> dict[str, PairedDifference]:
        """Lead of the model over each baseline; empty where it was not measured."""
        return self.baselines.leads if self.baselines else {}


class WordWeights(StageResult):
    """The bag of words fitted to a reward model's training pairs: with it the model can be judged
    on other pairs later."""

    stage = "reward"
    file = "bag_of_words.json"

    fitted_to: int
    """pairs"""
    words: list[str]
    word_weights: list[float]
    """one a word, then that of the logarithm of the length"""

    @model_validator(mode="after")
    def _check(self) -> WordWeights:
        if len(self.words) + 1 != len(self.word_weights):
            raise ValueError("not every word has a weight")

        return self


class AccuracyResult(StageResult):
    """Accuracy of a reward model by held-out set."""

    stage = "reward"
    file = "accuracy.json"

    sets: dict[str, SetAccuracy]

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        return values if "sets" in values else {"sets": values}


class JudgedPairsResult(StageResult):
    """Accuracy of a finished reward model on pairs by set."""

    stage = "accuracy"
    file = "accuracy.json"

    reward_model: str
    """name of its run directory"""
    sets: dict[str, SetAccuracy]
    read: dict[str, ReadCounts]


class PpoResult(TrainingResult):
    """A policy optimised with PPO."""

    stage = "ppo"


class Alarm(ResultPart):
    """A rule of `ppo_health` that was broken."""

    name: str
    """the metric"""
    step: int
    """where it first went wrong"""
    value: float
    """of the metric, there"""
    cause: str
    remedy: str


class Rollout(ResultPart):
    """A sampled answer and its reward."""

    prompt: str
    """its last turn"""
    answer: str
    reward: float


class HealthResult(StageResult):
    """Health of a PPO run."""

    stage = "ppo"
    file = "health.json"

    alarms: list[Alarm]
    samples: list[Rollout]
