"""Results of the stages that make data: worlds, public data, clean text, tokens, comparisons."""

from __future__ import annotations

from typing import ClassVar

from llama2.results.base import ReadCounts, ResultPart, StageResult, Values


class WorldResult(StageResult):
    """Size of a synthetic world."""

    stage = "world"

    records: dict[str, int]
    """file -> its records"""

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        return values if "records" in values else {"records": values}


class PreparedSource(ReadCounts):
    """Outcome of reading one source of public data."""

    name: str
    path: str
    train: int
    """records to train on, each once"""
    heldout: int
    """records held out"""
    characters_per_record: dict[str, int]
    """p10, p50, p90, p99 of the prompt with the longest answer"""


class RecordSizes(ResultPart):
    """Records of a file and the length of their text."""

    records: int
    characters: int
    characters_per_record: dict[str, int]
    """p10, p50, p90, p99"""


class PrepareResult(StageResult):
    """Records made of public data."""

    stage = "prepare"

    kind: str
    """dialogs, preferences or prompts"""
    train: RecordSizes
    heldout: RecordSizes
    sources: list[PreparedSource]


class CleanedSource(ResultPart):
    """Documents of one source."""

    spellings = {"held out": "heldout"}
    _counts: ClassVar[frozenset[str]] = frozenset(
        ("documents", "kept", "heldout", "bytes", "changes")
    )

    documents: int
    """read, after cutting"""
    kept: int
    """those held out among them"""
    heldout: int
    bytes: int
    """UTF-8 bytes of what was kept"""
    changes: dict[str, int]
    """what cleaning did, in words -> how often"""

    @classmethod
    def _migrate(cls, values: Values) -> Values:
        if "changes" in values:
            return values

        counts = {name: count for name, count in values.items() if name in cls._counts}
        changes = {name: count for name, count in values.items() if name not in cls._counts}
        return {"documents": 0, **counts, "changes": changes}


class CleanResult(StageResult):
    """Clean documents by source."""

    stage = "clean"

    sources: dict[str, CleanedSource]


class TokenizerResult(StageResult):
    """A trained tokenizer."""

    stage = "tokenizer"

    vocab_size: int
    fingerprint: str
    """SHA-256 of its pieces and options"""


class TextSize(ResultPart):
    """Size of tokenized text."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the text"""


class TokenizedSplit(TextSize):
    """Size of one split, in all and by source."""

    sources: dict[str, TextSize]


class TokenizeResult(StageResult):
    """Token shards."""

    stage = "tokenize"

    train: TokenizedSplit
    validation: TokenizedSplit


class CollectResult(StageResult):
    """Comparisons of one round."""

    stage = "collect"

    pairs: int
    """judged comparisons to train on"""
    heldout: int
    """judged comparisons to measure on"""
    unjudged: int
    """pairs that wait for people"""
    dropped: int
    """comparisons that came to nothing"""
    degrees: dict[str, int]
    """how clearly the chosen answer is better -> comparisons"""
    axes: dict[str, int]
    safety: dict[str, int]
    """safety label -> comparisons made for safety"""
