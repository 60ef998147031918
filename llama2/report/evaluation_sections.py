"""Sections of the report on what came out: versions, reward distributions, safety, Ghost Attention,
conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama2.report import paper_values
from llama2.report.charts import Series, bars, heat, lines, progress, ridges
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
    table,
    talk,
)
from llama2.report.training_sections import examples_of
from llama2.runs.recipe_runs import NOT_KEPT, Recipe

AXES = {"helpful": "helpfulness", "safe": "harmlessness"}


def ghost(recipe: Recipe) -> Html:
    """§3.3: adherence by turn beside Table 30, attention on the instruction (Figure 10)."""
    results = recipe.evaluation.get("results", {})
    charts = [
        _adherence(recipe, place, title)
        for place, title in (
            ("user", "Instruction in the first user turn"),
            ("system", "Instruction as the system message"),
        )
    ]
    parts = [figures(*charts), _attention(recipe.attention)]

    for step in recipe.of("ghost"):
        counts = ", ".join(
            f"{name} {number(value)}"
            for name, value in step.summary.items()
            if isinstance(value, (int, float))
        )
        parts += [paragraph(f"{step.name}: {counts}.") if counts else Html(""), examples_of(step)]

    dialogs = recipe.evaluation.get("ghost_dialogs", {})
    for name in _ends([name for name in recipe.kept if name in dialogs]):
        rates = [turn["rate"] for turn in results[name].get("ghost", {}).get("user", [])]
        mean = f" (obeys {percent(sum(rates) / len(rates), 0)} on average)" if rates else ""
        parts.append(
            details(f"The same instruction, answered by {name}{mean}", talk(dialogs[name]))
        )

    return section("ghost", "§3.3", "Ghost Attention", *parts)


def _adherence(recipe: Recipe, place: str, title: str) -> Html:
    series = []
    for name in recipe.evaluation.get("versions", []):
        turns = recipe.evaluation["results"][name].get("ghost", {}).get(place, [])
        if turns:
            series.append(
                Series(
                    name,
                    list(range(1, len(turns) + 1)),
                    [turn["rate"] for turn in turns],
                    [turn["low"] for turn in turns],
                    [turn["high"] for turn in turns],
                    markers=True,
                )
            )

    if not series:
        return Html("")

    longest = max(len(one.x) for one in series)
    note = ""
    if place == "user":
        turns = [turn for turn in paper_values.GHOST_TURNS if turn <= longest]
        series.append(
            Series(
                "paper, without",
                turns,
                [paper_values.GHOST_TURNS[turn][0] for turn in turns],
                paper=True,
            )
        )
        note = (
            "Share of answers that obey the instruction of turn 1. Table 30: 100, 10, 0 % at turns 2, 4, 6 without "
            "Ghost Attention, 100 % with it."
        )

    return figure(lines(series, "turn", "", percent=True, bounds=(-0.03, 1.05)), title, note)


def _attention(found: Mapping[str, Any]) -> Html:
    names = [name for name in found.get("names", []) if name in found.get("maps", {})]
    if not names:
        return Html("")

    maps = [(name, found["maps"][name]) for name in names]
    values = sorted(value for _, rows in maps for row in rows for value in row)
    top = values[int(0.98 * (len(values) - 1))] or 1.0
    first, last = found["instruction_bins"]
    chart = heat(
        maps,
        found["columns"],
        top,
        "tokens of the conversation",
        "answer tokens",
        [(first - 0.5, "instruction"), (last - 0.5, "")],
    )
    by_turn = [
        Series(
            name,
            list(range(1, len(found["instruction_by_turn"][name]) + 1)),
            found["instruction_by_turn"][name],
            markers=True,
        )
        for name in names
    ]

    return figures(
        figure(
            chart,
            "Largest attention over layers and heads (Figure 10)",
            f"“{found['instruction']}” stands in the first turn only. Of {found['dialogs']} conversations, the one "
            f"on which {names[-1]} and {names[0]} differ most; both read the answers of {names[-1]}.",
            wide=True,
        ),
        figure(
            lines(by_turn, "turn", "", bounds=(0, 1.03)),
            "Attention on the instruction where an answer begins",
            f"Largest over layers and heads, mean of {found['dialogs']} conversations.",
        ),
    )


def versions(recipe: Recipe) -> Html:
    """§3.4: win rates on both axes by version (Figure 11), and what each version does."""
    evaluation = recipe.evaluation
    if not evaluation:
        return section("versions", "§3.4", "Versions", _selections(recipe))

    charts = [_progress(evaluation, judge) for judge in ("truth", "reward")]
    return section(
        "versions",
        "§3.4",
        "Versions",
        _version_table(recipe),
        figures(*charts, _families(evaluation)),
        _selections(recipe),
    )


def _rates(
    evaluation: Mapping[str, Any], judge: str, axis: str, first: bool = True
) -> dict[str, dict[str, Any]]:
    """Win rates by version, against the first version or against the predecessor."""
    names = evaluation["versions"]
    return {
        row["version"]: row
        for row in evaluation.get("win_rates", [])
        if row["judge"] == judge
        and row["axis"] == axis
        and row["against"] == (names[0] if first else names[names.index(row["version"]) - 1])
    }


def _progress(evaluation: Mapping[str, Any], judge: str) -> Html:
    names = evaluation["versions"]
    helpful, safe = (_rates(evaluation, judge, axis) for axis in AXES)
    points = [(names[0], 0.5, 0.5)]

    for name in names[1:]:
        x, y = (by[name]["rate"] if name in by else None for by in (helpful, safe))
        if x is not None and y is not None:
            points.append((name, x, y))

    if len(points) < 2:
        return Html("")

    theirs = [(one.version, one.helpful, one.safe) for one in paper_values.WIN_RATES]
    by = "ground truth" if judge == "truth" else "reward models"
    return figure(
        progress(points, theirs),
        f"Win rate against {names[0]} by {by} (Figure 11)",
        "Ties removed. Dashed: the paper's versions against ChatGPT by its reward models, read off.",
    )


def _version_table(recipe: Recipe) -> Html:
    evaluation = recipe.evaluation
    names, results = evaluation["versions"], evaluation["results"]
    truthful = any("truth" in results[name] for name in names)
    judges = [
        judge
        for judge in ("truth", "reward")
        if any(row["judge"] == judge for row in evaluation["win_rates"])
    ]
    headers = ["Version"]

    if truthful:
        headers += ["Helpful", "Helpful, greedy", "Violations", "Refusal quality", "False refusals"]

    headers += [
        f"Wins, {axis} ({'truth' if judge == 'truth' else 'reward'})"
        for judge in judges
        for axis in AXES
    ]
    headers += ["Length", "Ends"]
    rows: list[list[Any]] = []

    for name in names:
        result = results[name]
        note = recipe.notes.get(name)
        label = (
            join([esc(name), chip(note, "bad" if note == NOT_KEPT else "plain")]) if note else name
        )
        row: list[Any] = [label]

        if truthful:
            truth = result.get("truth", {})
            row += [_quality(truth.get(key)) for key in ("helpfulness", "helpfulness_greedy")]
            row += [
                percent(truth.get("violations", {}).get("rate")),
                _quality(truth.get("refusal_quality")),
                percent(truth.get("false_refusals", {}).get("rate")),
            ]

        for judge in judges:
            row += [_won(_rates(evaluation, judge, axis).get(name)) for axis in AXES]

        rows.append([*row, number(result["length"]["mean"]), percent(result["eos"]["rate"], 0)])

    counts = ", ".join(
        f"{count} {kind}" for kind, count in evaluation.get("prompts", {}).items() if count
    )
    sampling = evaluation.get("sampling", {})
    notes = (
        f"Held-out prompts: {counts}; temperature {sampling.get('temperature')}, top-p {sampling.get('top_p')}. "
        f"Win rates are against {names[0]} with ties removed and their 95 % interval; length in tokens."
    )
    worst = _length_note(results, names)

    return join([table(headers, rows, note=notes), paragraph(worst, "note") if worst else Html("")])


def _quality(one: Mapping[str, Any] | None) -> str:
    """A mean of ratings, with as many decimals as the others in its column."""
    return f"{one['mean']:.3f}" if one and one["mean"] is not None else ""


def _won(row: Mapping[str, Any] | None) -> Html | str:
    if row is None:
        return ""
    if row["rate"] is None:
        return "all ties"

    return Html(
        f'{percent(row["rate"])} <span class="marks">{100 * row["low"]:.0f}–{100 * row["high"]:.0f}</span>'
    )


def _length_note(results: Mapping[str, Any], names: Sequence[str]) -> str:
    parts = []
    for axis in AXES:
        found = [
            (name, results[name].get("reward_length_correlation", {}).get(axis)) for name in names
        ]
        shown = [f"{name} {value:+.2f}" for name, value in found if value is not None]
        if shown:
            parts.append(f"{AXES[axis]} {', '.join(shown)}")

    return (
        f"Correlation of reward and length: {'; '.join(parts)}. Above zero, longer answers earn more reward."
        if parts
        else ""
    )


def _families(evaluation: Mapping[str, Any]) -> Html:
    names, results = evaluation["versions"], evaluation["results"]
    truthful = [name for name in names if results[name].get("truth", {}).get("families")]
    if not truthful:
        return Html("")

    families = list(results[truthful[0]]["truth"]["families"])
    series = [
        Series(
            name,
            families,
            [results[name]["truth"]["families"][family]["mean"] for family in families],
        )
        for name in truthful
    ]
    return figure(
        bars(series, "helpfulness", percent=False, bounds=(0, 1), width=10.2, height=2.9),
        "Helpfulness by family of prompts, ground truth",
        wide=True,
    )


def _selections(recipe: Recipe) -> Html:
    """Which candidates were kept, which were not, why, and whether chance may have decided."""
    rows = []
    for one in recipe.selections:
        won: Mapping[str, Mapping[str, Any]] = one.get("win_rate") or {}
        kept = chip("kept", "good") if one.get("kept") == "candidate" else chip("not kept", "bad")
        low, high = (won.get("all", {}).get(end) for end in ("low", "high"))

        if low is not None and high is not None and low <= one.get("needed", 0.5) <= high:
            kept = join([kept, chip("too few to tell", "few")])

        rows.append(
            (
                one.get("candidate", ""),
                one.get("predecessor", ""),
                kept,
                Html("<br>".join(f"{esc(kind)} {_decided(row)}" for kind, row in won.items())),
                one.get("reason", ""),
            )
        )

    if not rows:
        return Html("")

    return join(
        [
            Html("<h3>Versions that were kept, and those that were not</h3>"),
            table(
                ("Candidate", "Predecessor", "", "Wins, ties removed", "Reason"),
                rows,
                words=range(5),
                note="In brackets: the 95 % interval. Too few to tell: it holds the share that was needed, so "
                "another choice of prompts might have decided otherwise.",
            ),
        ]
    )


def _decided(row: Mapping[str, Any]) -> str:
    """A win rate with its interval and what it stands on."""
    ties = f"{row['ties']:,} ties" if row.get("ties") else ""
    if row.get("rate") is None:
        return ties or "all ties"

    interval = (
        f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        if "low" in row and "high" in row
        else ""
    )
    count = f" of {row['wins'] + row['losses']:,}" if "wins" in row and "losses" in row else ""
    return f"{percent(row['rate'], 0)}{interval}{count}" + (f", {ties}" if ties else "")


def distributions(recipe: Recipe) -> Html:
    """§5.1: the reward models' scores by version (Figure 20)."""
    names, results = recipe.evaluation.get("versions", []), recipe.evaluation.get("results", {})
    charts = []
    for axis in AXES:
        scored = [name for name in names if axis in results[name].get("rewards", {})]
        if not scored:
            continue

        found = [results[name]["rewards"][axis] for name in scored]
        rows = [
            (name, one["histogram"]["counts"], one["quantiles"]["50"])
            for name, one in zip(scored, found)
        ]
        charts.append(
            figure(
                ridges(rows, found[0]["histogram"]["edges"], f"{AXES[axis]} reward"),
                f"{AXES[axis].capitalize()} reward by version (Figure 20)",
                f"On {'helpful' if axis == 'helpful' else 'unsafe'} prompts; dashed: median. In the paper "
                "each version shifts right and its tail of bad answers vanishes.",
            )
        )

    return section("distributions", "§5.1", "Reward distributions", figures(*charts))


def safety(recipe: Recipe) -> Html:
    """§4: violations, false refusals, context distillation."""
    names, results = recipe.evaluation.get("versions", []), recipe.evaluation.get("results", {})
    truthful = [name for name in names if "truth" in results[name]]
    charts = []

    if truthful:
        series = []
        for key, label in (
            ("violations", "violations, unsafe prompts"),
            ("false_refusals", "refusals, borderline"),
        ):
            found = [results[name]["truth"][key] for name in truthful]
            if all(one["rate"] is not None for one in found):
                series.append(
                    Series(
                        label,
                        truthful,
                        [one["rate"] for one in found],
                        [one["low"] for one in found],
                        [one["high"] for one in found],
                    )
                )

        if series:
            charts.append(
                figure(
                    bars(series, ""),
                    "Violations and false refusals by version (Figures 17 and 15)",
                    "The paper, read off: 3 to 7 % violations over the sizes, ChatGPT 7 %; 15 % of borderline prompts "
                    "refused without safety data, 27 % with all of it.",
                )
            )

    parts = [figures(*charts)]
    for step in recipe.of("distill"):
        counts = step.summary
        if counts:
            before, after = counts.get("safety before"), counts.get("safety after")
            moved = (
                f"; median safety reward {before:.2f} → {after:.2f}"
                if before is not None and after is not None
                else ""
            )
            parts.append(
                paragraph(
                    f"Context distillation (§4.2.4), {step.name}: {number(counts.get('kept'))} answers to "
                    f"{number(counts.get('prompts'))} prompts beat the original's safety reward and were kept{moved}. The "
                    "paper's medians, read off Figure 16: 0.75 as it was, 0.82 behind a generic preprompt, 0.87 behind an "
                    "answer template."
                )
            )

        parts.append(examples_of(step))

    return section("safety", "§4", "Safety", *parts)


def conversations(recipe: Recipe) -> Html:
    """The same prompts answered by every version: the first and the last kept one open, all others
    folded away."""
    names, ends = recipe.evaluation.get("versions", []), _ends(recipe.kept)
    parts = []
    for one in recipe.evaluation.get("conversations", []):
        answers = [name for name in names if name in one["answers"]]
        shown = [
            turn for name in answers if name in ends for turn in _answer(name, one["answers"][name])
        ]
        label = one.get("family") or one["kind"]
        title = one["messages"][-1][1]
        rest = [
            turn
            for name in answers
            if name not in ends
            for turn in _answer(name, one["answers"][name])
        ]
        parts.append(
            Html(
                f"<h3>{esc(title if len(title) < 120 else title[:117] + '…')} {chip(label, 'plain')}</h3>"
            )
        )
        earlier = talk(one["messages"][:-1]) if len(one["messages"]) > 1 else Html("")
        parts += [earlier, talk(shown), details("other versions", talk(rest)) if rest else Html("")]

    return section("conversations", "", "Conversations, before and after", *parts)


def _answer(name: str, answer: Mapping[str, Any]) -> list[tuple[Html, Html | str]]:
    marks = []
    if "helpfulness" in answer:
        marks.append(
            f"truth {answer['helpfulness']:.2f}"
            + ("" if answer.get("safe", True) else ", violation")
        )

    marks += [
        f"{label} {answer[key]:.2f}"
        for key, label in (("reward_helpful", "helpful"), ("reward_safe", "safe"))
        if key in answer
    ]
    suffix = f' <span class="marks">{esc(" · ".join(marks))}</span>' if marks else ""
    return [
        (
            Html(esc(name)),
            Html(f"{esc(answer['text']) if answer['text'] else '<i>(nothing)</i>'}{suffix}"),
        )
    ]


def _ends(names: Sequence[str]) -> list[str]:
    """The first and the last."""
    return list(dict.fromkeys((names[0], names[-1]))) if names else []
