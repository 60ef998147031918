"""Sections of the report on data: text and its tokens (§2.1), human preferences (§3.2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2.records import DEGREES
from llama2.report import paper_values
from llama2.report.html import Html, number, paragraph, percent, section, table
from llama2.results import (
    CleanedSource,
    CleanResult,
    CollectResult,
    PreparedSource,
    PrepareResult,
    TextSize,
    TokenizeResult,
    TokenizerResult,
    WorldResult,
)
from llama2.runs.recipe_runs import Recipe


def render_data(recipe: Recipe) -> Html:
    """Render what went in, what was dropped, and the tokens it became."""
    parts = []
    for step, world in recipe.results(WorldResult):
        parts.append(paragraph(f"{step.name}: {_describe_world(world)}."))

    for step, prepared in recipe.results(PrepareResult):
        headers = [f"{step.name} ({prepared.kind})", "Taken", "Held out", "Left out"]
        rows = [_describe_source(source) for source in prepared.sources]
        parts.append(table(headers, rows, words=(0, 3)))

    for step, clean in recipe.results(CleanResult):
        headers = [step.name, "Documents", "Kept", "Held out", "Bytes", "What cleaning did"]
        rows = [_describe_cleaning(name, source) for name, source in clean.sources.items()]
        parts.append(table(headers, rows, words=(0, 5)))

    for step, tokenizer in recipe.results(TokenizerResult):
        pieces = number(tokenizer.vocab_size)
        parts.append(
            paragraph(f"{step.name}: {pieces} pieces (the paper: {paper_values.VOCABULARY:,}).")
        )

    for step, tokenized in recipe.results(TokenizeResult):
        splits = {"train": tokenized.train, "validation": tokenized.validation}
        headers = [step.name, "Documents", "Tokens", "Bytes", "Bytes a token"]
        parts.append(table(headers, [_describe_size(*split) for split in splits.items()]))

    return section("data", "§2.1", "Data and tokenizer", *parts)


def _describe_world(world: WorldResult) -> str:
    """List records by file; those of one directory in one sum."""
    sums: dict[str, int] = {}
    for name, count in world.records.items():
        group = name.split("/")[0].removesuffix(".jsonl")
        sums[group] = sums.get(group, 0) + count

    return ", ".join(f"{name} {number(count)}" for name, count in sums.items())


def _describe_source(source: PreparedSource) -> tuple[str, ...]:
    skipped = [f"{number(count)} {reason}" for reason, count in source.skipped.items() if count]
    return source.name, number(source.train), number(source.heldout), ", ".join(skipped)


def _describe_cleaning(name: str, source: CleanedSource) -> tuple[str, ...]:
    sizes = (source.documents, source.kept, source.heldout, source.bytes)
    changes = [f"{number(count)} {change}" for change, count in source.changes.items() if count]
    return name, *(number(size, 9) for size in sizes), ", ".join(changes)


def _describe_size(split: str, size: TextSize) -> tuple[str, ...]:
    density = f"{size.bytes / size.tokens:.2f}" if size.tokens else ""
    sizes = (size.documents, size.tokens, size.bytes)
    return split, *(number(count, 9) for count in sizes), density


def render_preferences(recipe: Recipe) -> Html:
    """Render what the annotators said, beside Figure 25 and the three safety labels."""
    rows = [
        _describe_comparisons(step.name, result) for step, result in recipe.results(CollectResult)
    ]
    if not rows:
        return Html("")

    last_batch = {degree: last for degree, (_, last) in paper_values.DEGREES.items()}
    rows.append(
        [
            "paper, batch 14 (Fig. 25, read off)",
            "",
            "",
            *_percents(last_batch, DEGREES),
            *_percents(paper_values.SAFETY_BINS, _LABELS),
        ]
    )
    headers = ("Run", "Pairs", "Dropped", *DEGREES, *_LABELS.values())
    return section("preferences", "§3.2.1", "Preferences", table(headers, rows))


_LABELS = {"preferred_only": "only chosen safe", "both": "both safe", "neither": "neither safe"}


def _describe_comparisons(name: str, result: CollectResult) -> list[Any]:
    return [
        name,
        number(result.pairs),
        number(result.dropped),
        *_percents(_shares(result.degrees), DEGREES),
        *_percents(_shares(result.safety), _LABELS),
    ]


def _percents(shares: Mapping[str, float], names: Any) -> list[str]:
    return [percent(shares.get(name), 0) for name in names]


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items() if total}
