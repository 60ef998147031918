"""Section of the report on reward models (§3.2.2): accuracy by set and degree beside the paper's
(Tables 7 and 8), and what lies between it and the baselines on the same pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama2.records import DEGREES
from llama2.report import paper_values
from llama2.report.charts import Series, bars
from llama2.report.html import (
    Html,
    figure,
    figures,
    join,
    number,
    percent,
    section,
    subtitle,
    table,
)
from llama2.report.reward_targets import find_own_set, guess_axis
from llama2.report.training_sections import render_curve
from llama2.results import (
    BASELINES,
    AccuracyResult,
    JudgedPairsResult,
    PairedDifference,
    Proportion,
    SetAccuracy,
)
from llama2.runs.recipe_runs import Recipe

ACCURACY_NOTE = (
    "Accuracy: the preferred answer scores higher. Small figures: number of pairs; whiskers: 95 % "
    "(Wilson)."
)
BASELINE_NOTE = (
    " Beside it, on all pairs of the set, judges that understand nothing: one takes the longer "
    "answer (for safety the shorter), one weighs words without their order, learnt from the same "
    "pairs."
)


def render_reward_models(recipe: Recipe) -> Html:
    """Render accuracy on held-out pairs by degree, beside the paper's."""
    measured = dict(_list_measured(recipe))
    charts: list[Html] = []
    for step in recipe.of("reward"):
        accuracy = step.result(AccuracyResult) or AccuracyResult(sets={})
        charted = find_own_set(step.name, accuracy)
        if charted is not None:
            title = f"{step.name}: accuracy on {charted} by degree"
            paper = _find_degrees(step.name, charted)
            charts.append(_render_degrees(title, accuracy.sets[charted], paper))

        title = f"{step.name}: accuracy on training pairs"
        charts.append(render_curve(step, "reward/accuracy", title))

    if not measured and not any(charts):
        return Html("")

    return section(
        "reward",
        "§3.2.2",
        "Reward models",
        _render_accuracies(measured),
        _render_leads(measured),
        figures(*charts),
    )


Measured = Mapping[tuple[str, str], SetAccuracy]
"""(reward model, set of pairs) -> accuracy"""


def _list_measured(recipe: Recipe) -> Iterator[tuple[tuple[str, str], SetAccuracy]]:
    """List what was measured when a model was trained, and later on pairs kept apart."""
    for step, trained in recipe.results(AccuracyResult):
        for name, accuracy in trained.sets.items():
            yield (step.name, name), accuracy

    for _, judged in recipe.results(JudgedPairsResult):
        for name, accuracy in judged.sets.items():
            yield (judged.reward_model, name), accuracy


def _render_accuracies(measured: Measured) -> Html:
    """Render a row for every set, and the paper's below it where it has one."""
    rows: list[list[Any]] = []
    for (model, name), accuracy in measured.items():
        rows.append(_describe_accuracy(f"{model} on {name}", accuracy))
        for label, shares in _list_paper_values(model, name):
            rows.append([Html(f"<i>{label}</i>"), *map(percent, shares), "", ""])

    headers = ["Reward model on held-out set", *DEGREES, "all", "by length", "bag of words"]
    note = ACCURACY_NOTE + BASELINE_NOTE
    if not any(accuracy.baselines for accuracy in measured.values()):
        # runs of an earlier version measured no baselines
        headers, rows, note = headers[:-2], [row[:-2] for row in rows], ACCURACY_NOTE

    return table(headers, rows, note=note) if rows else Html("")


def _describe_accuracy(label: str, accuracy: SetAccuracy) -> list[Any]:
    by_degree, by_baseline = accuracy.by_degree, accuracy.by_baseline
    shares = [by_degree.get(degree) for degree in DEGREES]
    shares.append(accuracy.all)
    shares += [by_baseline.get(name) for name in BASELINES]
    return [label, *map(_mark, shares)]


def _mark(share: Proportion | None) -> Html | str:
    """Format a share with the number of pairs it stands on."""
    if share is None:
        return ""

    return Html(f'{percent(share.rate)} <span class="marks">{number(share.n)}</span>')


def _render_leads(measured: Measured) -> Html:
    """Render how many points each model is ahead of each baseline on the same pairs."""
    rows: list[list[Any]] = []
    for (model, name), accuracy in measured.items():
        for baseline, lead in accuracy.leads.items():
            by_degree = accuracy.baselines_by_degree
            leads = [
                by_degree[degree].leads.get(baseline) if degree in by_degree else None
                for degree in DEGREES
            ]
            label = f"{model} on {name}, beyond {baseline}"
            rows.append([label, *map(_format_lead, [*leads, lead])])

    if not rows:
        return Html("")

    note = (
        "Points by which the reward model is right more often than the baseline on the same pairs, "
        "with the paired 95 % interval (Agresti and Min; pairs that open alike count together). An "
        "interval that holds 0 leaves open which is the better judge."
    )
    headers = ["Points ahead of a baseline", *DEGREES, "all"]
    return join([subtitle("Beyond the baselines"), table(headers, rows, note=note)])


def _format_lead(lead: PairedDifference | None) -> Html | str:
    if lead is None:
        return ""

    interval = f"{100 * lead.low:+.1f} to {100 * lead.high:+.1f}"
    return Html(f'{100 * lead.difference:+.1f} <span class="marks">{interval}</span>')


# --- the paper's ---
def _list_paper_values(model: str, name: str) -> Iterator[tuple[str, Sequence[float | None]]]:
    """List the rows of the paper that belong below ours: of Table 8 by degree, of Table 7 by public
    set."""
    public = _find_public(name)
    axis = guess_axis(model)
    if public is not None and axis is not None:
        share = paper_values.REWARD_ACCURACY_PUBLIC[public][axis]
        yield f"paper, 70B, Table 7, {public}", [None] * len(DEGREES) + [share]
    elif degrees := _find_degrees(model, name):
        yield "paper, 70B, Table 8", degrees


def _find_public(name: str) -> str | None:
    """Find the public set of Table 7 that a set is named after."""
    for public, pattern in paper_values.PUBLIC_SETS.items():
        if pattern.search(name.replace("_", " ")):
            return public

    return None


def _find_degrees(model: str, name: str) -> Sequence[float]:
    """Find the row of Table 8 for a reward model and a set of pairs; empty where neither name tells
    the axis."""
    row = paper_values.REWARD_ACCURACY.get(guess_axis(model) or "", {})
    return row.get(guess_axis(name) or "", ())


def _render_degrees(title: str, accuracy: SetAccuracy, paper: Sequence[float]) -> Html:
    degrees = accuracy.by_degree
    if not degrees:
        return Html("")

    names = list(degrees)
    series = [Series.of_shares("ours", names, list(degrees.values()))]
    if paper:
        shares = [share for name, share in zip(DEGREES, paper) if name in degrees]
        series.append(Series("paper (Table 8)", names, shares, paper=True))

    return figure(bars(series, "accuracy", bounds=(0.3, 1.0), level=0.5), title)
