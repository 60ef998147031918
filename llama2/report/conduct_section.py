"""What rules on the words and judges that nothing was optimised against say of the versions (§3.4,
§4.2.3): tables for the sections on versions and on safety."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2.report.html import Html, join, paragraph, percent, subtitle, table
from llama2.report.judgements import format_points
from llama2.results import (
    ConductDifference,
    ConductResult,
    EvaluateResult,
    JudgeComparison,
    JudgeQuality,
    Proportion,
    WinShare,
)
from llama2.runs.recipe_runs import Recipe

OPTIMISERS = ("rejection", "ppo", "distill", "select")
"""stages that optimise against reward models, or choose by them"""
KIND_NAMES = {"borderline": "borderline", "helpful": "harmless", "unsafe": "unsafe"}
WORSE = {"refusals": "refuses", "violations": "violates on", "degenerate": "gives no answer to"}


# --- refusals, violations, degenerate answers ---
def render_conduct(recipe: Recipe) -> Html:
    """Render shares by rules with their intervals, what changed on the same prompts, and how far
    the rules can be trusted; nothing where ground truth judges."""
    evaluation = recipe.evaluation
    if evaluation is None or not evaluation.conduct_judges:
        return Html("")

    return join(
        [
            subtitle("Refusals, violations and answers that are none, by rules on the words"),
            _render_shares(evaluation),
            *map(paragraph, _describe_changes(evaluation, recipe.kept)),
            paragraph(_describe_judges(evaluation.conduct_judges), "note"),
        ]
    )


def _render_shares(evaluation: EvaluateResult) -> Html:
    conducts: dict[str, ConductResult] = {}
    for name in evaluation.versions:
        conduct = evaluation.results[name].conduct
        if conduct is not None:
            conducts[name] = conduct

    columns = list(_list_columns(next(iter(conducts.values()))))
    rows = []
    for name, conduct in conducts.items():
        shares = dict(_list_columns(conduct))
        rows.append([name, *(_format_share(shares.get(column)) for column, _ in columns)])

    note = (
        "Small figures: 95 % (Wilson) and the number of prompts. A refusal declines, in full or in "
        "part; a violation answers an unsafe prompt and does not decline, warn or contradict. An "
        "answer that is none is empty, has no words or says one thing over and over, and counts "
        "as neither."
    )
    return table(["Version", *(column for column, _ in columns)], rows, note=note)


def _list_columns(conduct: ConductResult) -> Iterator[tuple[str, Proportion]]:
    """List the shares of one version by the names of their columns."""
    for kind, share in conduct.refusals.items():
        yield f"refuses, {KIND_NAMES.get(kind, kind)}", share

    if conduct.violations.n:
        yield "violations, unsafe", conduct.violations

    for source, share in conduct.violations_by_source.items():
        yield f"violations, {source}", share

    for kind, share in conduct.degenerate.items():
        yield f"no answer, {KIND_NAMES.get(kind, kind)}", share


def _format_share(share: Proportion | None) -> Html | str:
    if share is None or share.rate is None:
        return ""

    interval = f"{100 * share.low:.0f}–{100 * share.high:.0f}, {share.n:,}"
    return Html(f'{percent(share.rate)} <span class="marks">{interval}</span>')


def find_changes(evaluation: EvaluateResult, kept: Sequence[str]) -> list[ConductDifference]:
    """Return what the last kept version does differently from the first."""
    if len(kept) < 2:
        return []

    ends = (kept[-1], kept[0])
    return [row for row in evaluation.conduct_differences if (row.version, row.against) == ends]


def _describe_changes(evaluation: EvaluateResult, kept: Sequence[str]) -> Iterator[str]:
    """Say which of the two versions is better, or that it cannot be told."""
    rows = find_changes(evaluation, kept)
    silent = {row.kind for row in rows if row.measure == "degenerate" and row.difference.low > 0}
    for row in rows:
        if (row.measure, row.kind) == ("refusals", "unsafe"):
            continue  # a refusal of these is no fault

        difference = row.difference
        points = format_points(difference.difference, (difference.low, difference.high))
        does = f"{WORSE[row.measure]} {KIND_NAMES.get(row.kind, row.kind)} prompts"
        if difference.high < 0 and row.kind in silent:
            verdict = "less often, but gives no answer more often: it is not shown to be better"
        elif difference.high < 0:
            verdict = f"less often: {row.version} is better"
        elif difference.low > 0:
            verdict = f"more often: {row.version} is worse"
        else:
            verdict = "as often as can be told: the interval holds 0"

        yield (
            f"{row.version} {does} {verdict} ({points} against {row.against}, "
            f"{difference.n:,} prompts)."
        )


def _describe_judges(judges: Sequence[JudgeQuality]) -> str:
    """Say how far the rules agree with labels on prompts they were not written on."""
    parts = []
    for judge in judges:
        parts.append(
            f"{judge.what}: they find {_format_exactly(judge.recall)} of those that are labelled "
            f"so, and name {_format_exactly(judge.false_alarms)} of the others by mistake (labels: "
            f"{judge.labels})"
        )

    return (
        f"How far the rules can be trusted, on prompts they were not written on: {'; '.join(parts)}"
        ". Both versions are judged by the same rules."
    )


def _format_exactly(share: Proportion) -> str:
    return f"{percent(share.rate)} [{100 * share.low:.0f}, {100 * share.high:.0f}] of {share.n:,}"


# --- judges that are only judges ---
def render_other_judges(recipe: Recipe) -> Html:
    """Render win rates by every reward model that is only a judge, and by which models the versions
    were optimised."""
    evaluation = recipe.evaluation
    if evaluation is None or not evaluation.other_win_rates:
        return Html("")

    first = evaluation.versions[0]
    judges = dict.fromkeys(row.reward_model for row in evaluation.other_win_rates)
    optimised = find_optimised(recipe)
    headers = ["Version"]
    for judge in judges:
        axis = next(row.axis for row in evaluation.other_win_rates if row.reward_model == judge)
        mark = ", optimised against" if evaluation.judges.get(judge) in optimised else ""
        headers.append(f"Wins, {axis} ({judge}{mark})")

    rows: list[list[Any]] = []
    for name in evaluation.versions[1:]:
        wins = _find_wins(evaluation.other_win_rates, name, first)
        rows.append([name, *(_format_wins(wins.get(judge)) for judge in judges)])

    note = (
        f"Win rates against {first}, ties removed, with their 95 % interval, by reward models made "
        "of other comparisons or with another seed. "
        f"{_describe_optimised(evaluation, optimised)}"
    )
    title = subtitle("Judges that nothing was optimised against")
    return join([title, table(headers, rows, note=note)])


def find_optimised(recipe: Recipe) -> set[str]:
    """Return the run directories of the reward models that stages of the recipe optimised against
    or chose by."""
    names: set[str] = set()
    for step in recipe.of(*OPTIMISERS):
        names.update(step.rewards)

    return names


def _describe_optimised(evaluation: EvaluateResult, optimised: set[str]) -> str:
    against = {name for name, run in evaluation.judges.items() if run in optimised}
    if not against:
        return ""

    names = ", ".join(sorted(evaluation.judges[name] for name in against))
    return f"The versions were optimised against: {names}; their win rates flatter."


def _find_wins(
    rows: Sequence[JudgeComparison], version: str, against: str
) -> Mapping[str, JudgeComparison]:
    direct = [row for row in rows if (row.version, row.against) == (version, against)]
    return {row.reward_model: row for row in direct}


def _format_wins(row: WinShare | None) -> Html | str:
    if row is None:
        return ""
    if row.rate is None:
        return "all ties"

    interval = f"{100 * row.low:.0f}–{100 * row.high:.0f}, {row.wins + row.losses:,}"
    return Html(f'{percent(row.rate)} <span class="marks">{interval}</span>')
