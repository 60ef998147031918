"""Section of the report on Ghost Attention (§3.3)."""

from __future__ import annotations

from collections.abc import Mapping

from llama2.report import paper_values
from llama2.report.charts import Series, heat, lines
from llama2.report.html import (
    Html,
    details,
    figure,
    figures,
    join,
    number,
    paragraph,
    percent,
    section,
    table,
    talk,
)
from llama2.results import (
    AttentionResult,
    EvaluateResult,
    GhostExample,
    GhostResult,
    Proportion,
)
from llama2.runs.recipe_runs import Recipe


def render_ghost(recipe: Recipe) -> Html:
    """Render adherence by turn beside Table 30, and attention on the instruction (Figure 10)."""
    evaluation, parts = recipe.evaluation, []
    if evaluation is not None:
        user = {name: evaluation.results[name].ghost.user for name in evaluation.versions}
        system = {name: evaluation.results[name].ghost.system for name in evaluation.versions}
        parts.append(figures(_render_user(user), _render_system(system)))
        parts.append(_render_table(evaluation, recipe.kept))

    if recipe.attention is not None:
        parts.append(_render_attention(recipe.attention))

    for step, result in recipe.results(GhostResult):
        counts = (
            f"conversations {number(result.conversations)}, dialogs {number(result.dialogs)}, "
            f"turns {number(result.turns)}"
        )
        if result.adherence is not None:
            share = result.adherence
            counts += f"; of {number(share.n)} sampled answers {_format_share(share)} obey"

        parts += [
            paragraph(f"{step.name}: {counts}."),
            _render_examples(step.name, result.examples),
        ]

    if evaluation is not None:
        parts += _render_dialogs(evaluation, recipe.kept)

    return section("ghost", "§3.3", "Ghost Attention", *parts)


def _render_examples(name: str, examples: list[GhostExample]) -> Html:
    talks = []
    for example in examples:
        talks.append(talk([(turn.role, turn.content) for turn in example.messages]))

    return details(f"{name}: examples", join(talks)) if talks else Html("")


def _render_dialogs(evaluation: EvaluateResult, kept: list[str]) -> list[Html]:
    """Render the same instruction as the first and the last version answer it."""
    names = [name for name in kept if name in evaluation.ghost_dialogs]
    parts = []
    for name in dict.fromkeys([*names[:1], *names[-1:]]):
        turns = evaluation.results[name].ghost.user
        mean = sum(turn.rate or 0.0 for turn in turns) / max(len(turns), 1)
        obeys = f" (obeys {percent(mean, 0)} on average)" if turns else ""
        dialog = talk(evaluation.ghost_dialogs[name])
        parts.append(details(f"The same instruction, answered by {name}{obeys}", dialog))

    return parts


TABLE_TURNS = (1, 2, 4, 6, 8, 10, 15, 20)


def _render_table(evaluation: EvaluateResult, kept: list[str]) -> Html:
    """Render adherence to instructions that a program checks as Table 30 has it, without (the first
    version) and with Ghost Attention (the last), in all and by kind; nothing for others."""
    names = list(dict.fromkeys([*kept[:1], *kept[-1:]]))
    rows: list[tuple[str, list[Proportion]]] = []
    for name in names:
        obedience = evaluation.results[name].ghost
        if obedience.by_kind:
            rows.append((name, obedience.user))
            rows += [(f"{name}, {kind}", turns) for kind, turns in obedience.by_kind.items()]

    if not rows:
        return Html("")

    longest = max(len(turns) for _, turns in rows)
    shown = [turn for turn in TABLE_TURNS if turn <= longest]
    lines: list[list[str]] = []
    for label, turns in rows:
        shares = [turns[turn - 1] if turn <= len(turns) else None for turn in shown]
        lines.append([label, *map(_format_share, shares)])

    for place, label in enumerate(("paper, without (Table 30)", "paper, with")):
        shares_of_paper = [paper_values.GHOST_TURNS.get(turn) for turn in shown]
        lines.append(
            [label, *(percent(pair[place], 0) if pair else "" for pair in shares_of_paper)]
        )

    note = (
        "Share of answers that obey, told by a program in the text, with the 95 % interval; the "
        "paper's were judged by people. A dialog that ended early obeys no more, and neither does "
        "an answer that says one thing over and over."
    )
    headers = ["Instruction obeyed at turn", *map(str, shown)]
    return table(headers, lines, note=note)


def _format_share(share: Proportion | None) -> str:
    if share is None or share.rate is None:
        return ""

    return f"{percent(share.rate, 0)} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _render_user(by_version: Mapping[str, list[Proportion]]) -> Html:
    """Render adherence to an instruction in the first user turn, beside Table 30."""
    series = _adherence(by_version)
    if not series:
        return Html("")

    longest = max(len(line.x) for line in series)
    turns = [turn for turn in paper_values.GHOST_TURNS if turn <= longest]
    without = [paper_values.GHOST_TURNS[turn][0] for turn in turns]
    series.append(Series("paper, without", turns, without, paper=True))
    early = [paper_values.GHOST_TURNS[turn] for turn in (2, 4, 6)]
    rates = ", ".join(f"{100 * share:.0f}" for share, _ in early)
    return figure(
        _draw(series),
        "Instruction in the first user turn",
        f"Share of answers that obey the instruction of turn 1. Table 30: {rates} % at turns "
        f"2, 4, 6 without Ghost Attention, {100 * early[-1][1]:.0f} % with it.",
    )


def _render_system(by_version: Mapping[str, list[Proportion]]) -> Html:
    series = _adherence(by_version)
    return figure(_draw(series), "Instruction as the system message") if series else Html("")


def _adherence(by_version: Mapping[str, list[Proportion]]) -> list[Series]:
    series = []
    for name, turns in by_version.items():
        if turns:
            series.append(Series.of_shares(name, range(1, len(turns) + 1), turns, markers=True))

    return series


def _draw(series: list[Series]) -> str:
    return lines(series, "turn", "", percent=True, bounds=(-0.03, 1.05))


def _render_attention(attention: AttentionResult) -> Html:
    names = attention.names
    maps = [(name, attention.maps[name]) for name in names]
    values: list[float] = []
    for _, rows in maps:
        for row in rows:
            values += row

    values.sort()
    top = values[int(0.98 * (len(values) - 1))] or 1.0
    first, last = attention.instruction_bins
    chart = heat(
        maps,
        attention.columns,
        top,
        "tokens of the conversation",
        "answer tokens",
        [(first - 0.5, "instruction"), (last - 0.5, "")],
    )
    series = []
    for name in names:
        weights = attention.instruction_by_turn[name]
        series.append(Series(name, range(1, len(weights) + 1), weights, markers=True))

    return figures(
        figure(
            chart,
            "Largest attention over layers and heads (Figure 10)",
            f"“{attention.instruction}” stands in the first turn only. Of {attention.dialogs} "
            f"conversations, the one on which {names[-1]} and {names[0]} differ most; both read "
            f"the answers of {names[-1]}.",
            wide=True,
        ),
        figure(
            lines(series, "turn", "", bounds=(0, 1.03)),
            "Attention on the instruction where an answer begins",
            f"Largest over layers and heads, mean of {attention.dialogs} conversations.",
        ),
    )
