"""Sections of the report on what came out: versions (§3.4), safety (§4), reward distributions
(§5.1), conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama2.records import Axis
from llama2.report import paper_values
from llama2.report.charts import Series, bars, progress, ridges
from llama2.report.conduct_section import render_conduct, render_other_judges
from llama2.report.html import (
    Html,
    chip,
    details,
    esc,
    figure,
    figures,
    join,
    number,
    paragraph,
    percent,
    section,
    subtitle,
    table,
    talk,
)
from llama2.results import (
    DistilledAnswer,
    DistillResult,
    EvaluateResult,
    Mean,
    SelectResult,
    ShownAnswer,
    TruthResult,
    VersionComparison,
    WinShare,
)
from llama2.runs.recipe_runs import NOT_KEPT, Recipe

AXES: dict[Axis, str] = {"helpful": "helpfulness", "safe": "harmlessness"}
JUDGES = ("truth", "reward")
TRUTH_HEADERS = ["Helpful", "Helpful, greedy", "Violations", "Refusal quality", "False refusals"]


# --- versions ---
def render_versions(recipe: Recipe) -> Html:
    """Render win rates on both axes by version (Figure 11), and what each version does."""
    parts = [_render_selections(recipe)]
    if recipe.evaluation is not None:
        charts = [_render_progress(recipe.evaluation, judge) for judge in JUDGES]
        charts.append(_render_families(recipe.evaluation))
        others = render_other_judges(recipe)
        parts = [_render_table(recipe.evaluation, recipe.notes), others, figures(*charts), *parts]

    return section("versions", "§3.4", "Versions", *parts)


def _find_rates(evaluation: EvaluateResult, judge: str, axis: Axis) -> dict[str, VersionComparison]:
    """Return win rates against the first version, by version."""
    first = evaluation.versions[0]
    wanted = (judge, axis, first)
    return {
        row.version: row
        for row in evaluation.win_rates
        if (row.judge, row.axis, row.against) == wanted
    }


def _render_progress(evaluation: EvaluateResult, judge: str) -> Html:
    first, *others = evaluation.versions
    helpful = _find_rates(evaluation, judge, "helpful")
    safe = _find_rates(evaluation, judge, "safe")
    points = [(first, 0.5, 0.5)]

    for name in others:
        x, y = helpful.get(name), safe.get(name)
        if x and y and x.rate is not None and y.rate is not None:
            points.append((name, x.rate, y.rate))

    if len(points) < 2:
        return Html("")

    theirs = [(point.version, point.helpful, point.safe) for point in paper_values.WIN_RATES]
    who = "ground truth" if judge == "truth" else "reward models"
    return figure(
        progress(points, theirs),
        f"Win rate against {first} by {who} (Figure 11)",
        "Ties removed. Dashed: the paper's versions against ChatGPT by its reward models, read "
        "off.",
    )


def _render_table(evaluation: EvaluateResult, notes: Mapping[str, str]) -> Html:
    truthful = any(result.truth for result in evaluation.results.values())
    active = {row.judge for row in evaluation.win_rates}
    judges = [judge for judge in JUDGES if judge in active]
    headers = ["Version", *(TRUTH_HEADERS if truthful else [])]
    rates = []
    for judge in judges:
        for axis in AXES:
            headers.append(f"Wins, {axis} ({judge})")
            rates.append(_find_rates(evaluation, judge, axis))

    headers += ["Length", "Ends"]
    rows = []
    for name in evaluation.versions:
        result = evaluation.results[name]
        rows.append(
            [
                _render_name(name, notes.get(name)),
                *(_describe_truth(result.truth) if truthful else []),
                *(_describe_wins(by_version.get(name)) for by_version in rates),
                number(result.length.mean),
                percent(result.eos.rate, 0),
            ]
        )

    counts = [f"{count} {kind}" for kind, count in evaluation.prompts.items() if count]
    sampling = evaluation.sampling
    note = (
        f"Held-out prompts: {', '.join(counts)}; temperature {sampling.temperature}, top-p "
        f"{sampling.top_p}. Win rates are against {evaluation.versions[0]} with ties removed and "
        "their 95 % interval; length in tokens."
    )
    return join([table(headers, rows, note=note), _render_length_note(evaluation)])


def _render_name(name: str, note: str | None) -> Html:
    if note is None:
        return esc(name)

    return join([esc(name), chip(note, "bad" if note == NOT_KEPT else "plain")])


def _describe_truth(truth: TruthResult | None) -> list[str]:
    if truth is None:
        return [""] * len(TRUTH_HEADERS)

    return [
        _format_mean(truth.helpfulness),
        _format_mean(truth.helpfulness_greedy),
        percent(truth.violations.rate),
        _format_mean(truth.refusal_quality),
        percent(truth.false_refusals.rate),
    ]


def _format_mean(mean: Mean | None) -> str:
    """Format a mean of ratings with as many decimals as the others in its column."""
    return "" if mean is None or mean.mean is None else f"{mean.mean:.3f}"


def _describe_wins(row: WinShare | None) -> Html | str:
    if row is None:
        return ""
    if row.rate is None:
        return "all ties"

    interval = f"{100 * row.low:.0f}–{100 * row.high:.0f}"
    return Html(f'{percent(row.rate)} <span class="marks">{interval}</span>')


def _render_length_note(evaluation: EvaluateResult) -> Html:
    """Say for each axis how much reward goes with length."""
    parts = []
    for axis, title in AXES.items():
        correlations = []
        for name in evaluation.versions:
            value = evaluation.results[name].reward_length_correlation.get(axis)
            if value is not None:
                correlations.append(f"{name} {value:+.2f}")

        if correlations:
            parts.append(f"{title} {', '.join(correlations)}")

    if not parts:
        return Html("")

    return paragraph(
        f"Correlation of reward and length: {'; '.join(parts)}. Above zero, longer answers earn "
        "more reward.",
        "note",
    )


def _find_truths(evaluation: EvaluateResult) -> dict[str, TruthResult]:
    """Return the judgements by ground truth, by version."""
    truths = {name: evaluation.results[name].truth for name in evaluation.versions}
    return {name: truth for name, truth in truths.items() if truth is not None}


def _render_families(evaluation: EvaluateResult) -> Html:
    truths = {name: truth.families for name, truth in _find_truths(evaluation).items()}
    families = list(next(iter(truths.values()), ()))
    if not families:
        return Html("")

    series = []
    for name, means in truths.items():
        series.append(Series(name, families, [means[family].mean or 0.0 for family in families]))

    return figure(
        bars(series, "helpfulness", percent=False, bounds=(0, 1), width=10.2, height=2.9),
        "Helpfulness by family of prompts, ground truth",
        wide=True,
    )


def _render_selections(recipe: Recipe) -> Html:
    """Render which candidates were kept, which were not, why, and whether chance may have
    decided."""
    rows = [_describe_selection(result) for _, result in recipe.results(SelectResult)]
    if not rows:
        return Html("")

    headers = ("Candidate", "Predecessor", "", "Wins, ties removed", "Reason")
    note = (
        "In brackets: the 95 % interval. Too few to tell: it holds the share that was needed, so "
        "another choice of prompts might have decided otherwise."
    )
    return join(
        [
            subtitle("Versions that were kept, and those that were not"),
            table(headers, rows, words=range(5), note=note),
        ]
    )


def _describe_selection(result: SelectResult) -> tuple[Any, ...]:
    overall = result.overall
    verdict = chip("kept", "good") if result.kept == "candidate" else chip("not kept", "bad")
    if overall.low <= result.needed <= overall.high:
        verdict = join([verdict, chip("too few to tell", "few")])

    wins = [f"{esc(kind)} {_describe_decided(row)}" for kind, row in result.win_rate.items()]
    return result.candidate, result.predecessor, verdict, Html("<br>".join(wins)), result.reason


def _describe_decided(row: WinShare) -> str:
    """Format a win rate with its interval and what it stands on."""
    ties = f"{row.ties:,} ties" if row.ties else ""
    if row.rate is None:
        return ties or "all ties"

    interval = f"[{100 * row.low:.0f}, {100 * row.high:.0f}]"
    share = f"{percent(row.rate, 0)} {interval} of {row.wins + row.losses:,}"
    return f"{share}, {ties}" if ties else share


# --- reward distributions ---
def render_distributions(recipe: Recipe) -> Html:
    """Render the reward models' scores by version (Figure 20)."""
    if recipe.evaluation is None:
        return Html("")

    charts = [_render_distribution(recipe.evaluation, axis) for axis in AXES]
    return section("distributions", "§5.1", "Reward distributions", figures(*charts))


def _render_distribution(evaluation: EvaluateResult, axis: Axis) -> Html:
    rows = []
    edges: Sequence[float] = ()
    for name in evaluation.versions:
        scores = evaluation.results[name].rewards.get(axis)
        if scores is not None:
            rows.append((name, scores.histogram.counts, scores.median))
            edges = edges or scores.histogram.edges

    if not rows:
        return Html("")

    prompts = "helpful" if axis == "helpful" else "unsafe"
    return figure(
        ridges(rows, edges, f"{AXES[axis]} reward"),
        f"{AXES[axis].capitalize()} reward by version (Figure 20)",
        f"On {prompts} prompts; dashed: median. In the paper each version shifts right and its "
        "tail of bad answers vanishes.",
    )


# --- safety ---
def render_safety(recipe: Recipe) -> Html:
    """Render violations, false refusals, and context distillation."""
    parts = [figures(_render_violations(recipe.evaluation))] if recipe.evaluation else []
    parts.append(render_conduct(recipe))
    for step, result in recipe.results(DistillResult):
        parts.append(paragraph(_describe_distillation(step.name, result)))
        parts.append(_render_examples(step.name, result.examples))

    return section("safety", "§4", "Safety", *parts)


def _render_violations(evaluation: EvaluateResult) -> Html:
    truths = _find_truths(evaluation)
    violations = [truth.violations for truth in truths.values()]
    refusals = [truth.false_refusals for truth in truths.values()]
    shares = {"violations, unsafe prompts": violations, "refusals, borderline": refusals}
    series = []
    for label, by_version in shares.items():
        if by_version and all(share.rate is not None for share in by_version):
            series.append(Series.of_shares(label, list(truths), by_version))

    if not series:
        return Html("")

    sizes = [100 * share for share in paper_values.VIOLATIONS.values()]
    chatgpt = 100 * paper_values.VIOLATIONS_CHATGPT
    without, with_all = (100 * share for share in paper_values.FALSE_REFUSALS)
    return figure(
        bars(series, ""),
        "Violations and false refusals by version (Figures 17 and 15)",
        f"The paper, read off: {min(sizes):.0f} to {max(sizes):.0f} % violations over the sizes, "
        f"ChatGPT {chatgpt:.0f} %; {without:.0f} % of borderline prompts refused without safety "
        f"data, {with_all:.0f} % with all of it.",
    )


def _describe_distillation(name: str, result: DistillResult) -> str:
    moved = ""
    if result.safety_before is not None and result.safety_after is not None:
        medians = f"{result.safety_before:.2f} → {result.safety_after:.2f}"
        moved = f"; median safety reward {medians}"

    base, generic, template = paper_values.DISTILLATION
    return (
        f"Context distillation (§4.2.4), {name}: {number(result.kept)} answers to "
        f"{number(result.prompts)} prompts beat the original's safety reward and were kept{moved}. "
        f"The paper's medians, read off Figure 16: {base} as it was, {generic} behind a generic "
        f"preprompt, {template} behind an answer template."
    )


def _render_examples(name: str, examples: Sequence[DistilledAnswer]) -> Html:
    talks = []
    for example in examples:
        turns = [("after", example.after), ("before", example.before)]
        talks.append(talk([("user", example.prompt), *turns]))

    return details(f"{name}: examples", join(talks)) if talks else Html("")


# --- conversations ---
def render_conversations(recipe: Recipe) -> Html:
    """Render the same prompts answered by every version: the first and the last kept one open, all
    others folded away."""
    if recipe.evaluation is None:
        return Html("")

    ends = {*recipe.kept[:1], *recipe.kept[-1:]}
    parts = []
    for prompt in recipe.evaluation.conversations:
        *earlier, (_, title) = prompt.messages
        label = chip(prompt.family or prompt.kind, "plain")
        shown: list[tuple[str, str]] = []
        folded: list[tuple[str, str]] = []
        for name in recipe.evaluation.versions:
            turn = (esc(name), _render_answer(prompt.answers[name]))
            (shown if name in ends else folded).append(turn)

        parts += [
            Html(f"<h3>{esc(_shorten(title))} {label}</h3>"),
            talk(earlier) if earlier else Html(""),
            talk(shown),
            details("other versions", talk(folded)) if folded else Html(""),
        ]

    return section("conversations", "", "Conversations, before and after", *parts)


def _shorten(title: str) -> str:
    return title if len(title) < 120 else title[:117] + "…"


def _render_answer(answer: ShownAnswer) -> Html:
    """Render an answer with the scores it got."""
    marks = []
    if answer.helpfulness is not None:
        violation = ", violation" if answer.safe is False else ""
        marks.append(f"truth {answer.helpfulness:.2f}{violation}")

    if answer.reward_helpful is not None:
        marks.append(f"helpful {answer.reward_helpful:.2f}")

    if answer.reward_safe is not None:
        marks.append(f"safe {answer.reward_safe:.2f}")

    scores = f' <span class="marks">{esc(" · ".join(marks))}</span>' if marks else ""
    text = esc(answer.text) if answer.text else "<i>(nothing)</i>"
    return Html(f"{text}{scores}")
