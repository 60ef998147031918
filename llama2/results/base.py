"""Base of all results, and the parts that several of them have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from llama2.tally import Tally

Values = dict[str, Any]


class ResultPart(BaseModel):
    """Base of results and of what they are made of: frozen, each field described by what stands
    below it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    spellings: ClassVar[Mapping[str, str]] = {}
    """spelling of a key in files of earlier versions -> its name"""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        """Give every key its present name."""
        if not isinstance(values, Mapping):
            return values

        renamed = {cls.spellings.get(key, key): value for key, value in values.items()}
        return cls._migrate(renamed)

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        """Return the content of a file of an earlier version as this version writes it."""
        return values


class StageResult(ResultPart):
    """Base of the results: one JSON file that one stage writes."""

    stage: ClassVar[str]
    """the verb that writes it"""
    file: ClassVar[str] = "summary.json"
    """its name in the run directory"""

    def dump(self) -> Values:
        """Return the content of the file as plain JSON."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Proportion(ResultPart):
    """A share of cases with its Wilson interval."""

    spellings = {"accuracy": "rate"}

    rate: float | None
    """None without cases"""
    n: int
    """cases"""
    low: float
    high: float


class PairedDifference(ResultPart):
    """A share of cases less another share of the very same cases, with its paired interval."""

    difference: float
    n: int
    """cases"""
    low: float
    high: float


class Mean(ResultPart):
    """A mean with its normal interval; all None without values."""

    mean: float | None
    n: int
    """values"""
    low: float | None
    high: float | None


class WinShare(ResultPart):
    """Outcome of one version against another on the same prompts."""

    wins: int
    losses: int
    ties: int
    rate: float | None
    """wins / (wins + losses); None if every comparison was a tie"""
    low: float
    high: float


class ReadCounts(ResultPart):
    """Outcome of reading one set of records."""

    spellings = {"files left out": "files_left_out"}

    read: int
    kept: int
    cut: int = 0
    """records that were kept in part"""
    skipped: dict[str, int]
    """reason -> records left out"""
    format: dict[str, int] = {}
    """format -> rows, or files, that are in it"""
    columns_not_read: dict[str, int] = {}
    """column -> rows that have it"""
    splits_read_alike: dict[str, int] = {}
    """split of a dataset -> files"""
    axis: dict[str, int] = {}
    """axis -> comparisons made on it"""
    family: dict[str, int] = {}
    """family of prompts -> prompts"""
    files_left_out: dict[str, int] = {}
    """reason -> files of a folder, a glob or an archive"""

    @classmethod
    def of(cls, tally: Tally) -> ReadCounts:
        """Return what a tally has counted."""
        return ReadCounts.model_validate(tally.summary())


class HeldoutLoss(ResultPart):
    """Outcome of the last validation."""

    spellings = {"validation/loss": "loss", "validation/bits_per_byte": "bits_per_byte"}

    loss: float
    bits_per_byte: float | None = None
    """of held-out text, by pretraining alone"""


class DialogTurn(ResultPart):
    """One turn of a dialog that is shown."""

    role: str
    content: str


class TrainingResult(StageResult):
    """Base of the results of stages that train."""

    parameters: int
    steps: int
    """optimizer steps"""
    tokens: int
    """tokens read, without padding"""
    trained: int
    """tokens (pretrain, sft, ppo) or answers (reward) under the loss"""

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        """Leave out the empty validation of a run without one."""
        return {key: value for key, value in values.items() if (key, value) != ("validation", {})}
