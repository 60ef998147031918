"""Sections of the model card on what was measured, and the same as `model-index` for programs.

Everything here stands in a run's files. What was not measured is named as such, so that no gap
looks like a success.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama2.records import DEGREES, Axis
from llama2.release import markdown as md
from llama2.release.lineage import Lineage
from llama2.release.measurements import UNSAFE_BELOW, Category, Measured
from llama2.results import (
    BASELINES,
    AccuracyResult,
    Mean,
    PretrainResult,
    Proportion,
    VersionComparison,
)

AXES = {"helpful": "helpfulness", "safe": "harmlessness"}
NOTHING = "**Not measured.** No evaluation beside this run compares it with anything."
JUDGES = {"truth": "ground truth", "reward": "reward model"}


# --- how it was measured ---
def _method(lineage: Lineage, measured: Measured) -> str:
    """Write of prompts, sampling, judges, and what to think of them."""
    content = measured.content
    counts = [f"{count:,} {kind}" for kind, count in content.prompts.items() if count]
    settings = [
        f"{md.text(name.replace('_', ' '))} {value:g}"
        for name, value in content.sampling.model_dump().items()
    ]
    return md.bullets(
        f"This model is {md.code(measured.name)} in the evaluation {md.code(measured.step.name)}. "
        f"Prompts: {', '.join(counts)}. One answer each, sampled with {', '.join(settings)}.",
        _readers(lineage, measured),
        "Ground truth is a program that knows the synthetic world and rates an answer by rule: it "
        "stands for people here, and nobody else has looked."
        if measured.truth
        else "No person and no ground truth has judged the answers: the reward models below are "
        "all there is.",
        _dependent(lineage, measured),
        "Intervals are 95 %: Wilson's for shares, the normal one for means. They tell what chance "
        "in the choice of prompts and answers may do, not how another seed of training would have "
        "come out: it was trained once.",
    )


def _readers(lineage: Lineage, measured: Measured) -> str:
    """Write which stages behind the model have read the prompts it is measured with."""
    inputs = lineage.describe(measured.step).inputs
    places = [f"{source.place}/" for source in inputs if source.key == "prompts"]
    keys: dict[str, set[str]] = {}
    for stage in lineage.stages:
        for source in stage.inputs:
            held = any(place.startswith(f"{source.place}/") for place in places)
            if held or source.digest == measured.prompts_digest:
                keys.setdefault(stage.name, set()).add(source.key.partition(".")[0])

    learnt = sorted(name for name, sections in keys.items() if sections - {"exclude"})
    if learnt:
        return (
            f"**{', '.join(map(md.code, learnt))} read these prompts, and the model was made from "
            "that:** the figures flatter it."
        )

    also = md.when(keys, " but to leave them out of its own data")
    return f"No stage that the model was made from read the file of these prompts{also}."


def _dependent(lineage: Lineage, measured: Measured) -> str:
    trained = [AXES[axis] for axis, digest in measured.judges.items() if digest in lineage.digests]
    if not trained:
        return ""

    judges = "The reward model that judges" if len(trained) == 1 else "The reward models that judge"
    return (
        f"{judges} {' and '.join(trained)} also trained this model or chose its data: a judge that "
        "is too kind wherever the model has learnt to please it."
    )


# --- results ---
def write_evaluation(lineage: Lineage, measured: Measured | None) -> str:
    """Write what the model does, by version, axis and family; reward models; Ghost Attention;
    pretraining."""
    if measured is None:
        return md.document("## Evaluation", NOTHING, write_models(lineage))

    return md.document(
        "## Evaluation",
        _method(lineage, measured),
        _versions(measured),
        _wins(measured),
        _families(measured),
        _ghost(measured),
        write_models(lineage),
    )


def write_models(lineage: Lineage) -> str:
    """Write of the models behind it: what pretraining reached, and what the reward models know."""
    return md.document(_pretraining(lineage), _rewards(lineage)).strip()


def _title(measured: Measured, name: str) -> str:
    return f"**{md.text(name)}, this model**" if name == measured.name else md.text(name)


def _versions(measured: Measured) -> str:
    headers = ["Reward, helpful", "Reward, safe", "Tokens an answer", "Ends by itself"]
    note = (
        "A reward is the probability that the reward model gives: of helpfulness on helpful "
        "prompts, of safety on unsafe ones."
    )
    if measured.truth:
        headers = ["Helpfulness", "Helpfulness, greedy", *headers]
        note = f"Helpfulness runs from 0 to 1, on helpful prompts. {note}"

    rows = []
    for name in measured.content.versions:
        result = measured.content.results[name]
        row = [_title(measured, name)]
        if result.truth:
            row += [md.mean(result.truth.helpfulness), md.mean(result.truth.helpfulness_greedy)]

        row += [md.mean(result.rewards.get("helpful")), md.mean(result.rewards.get("safe"))]
        rows.append((*row, f"{result.length.mean:.1f}", md.percent(result.eos.rate)))

    return md.document("### Versions", md.table(["Version", *headers], rows), note)


def _wins(measured: Measured) -> str:
    rows = []
    for row in _list_own(measured):
        counts = map(md.count, (row.wins, row.losses, row.ties))
        rate = "all ties" if row.rate is None else md.rate(row)
        rows.append((md.text(row.against), AXES[row.axis], JUDGES[row.judge], *counts, rate))

    return md.section(
        "### Win rates of this model",
        md.table(
            ("Against", "On", "Judge", "Wins", "Losses", "Ties", "Win rate, ties removed"),
            rows,
            (0, 1, 2),
        ),
        md.bullets(*_lost(measured), *_disagreements(measured)),
    )


def _lost(measured: Measured) -> Iterator[str]:
    """Yield the comparisons that the model lost, as surely as the interval says."""
    for row in _list_own(measured):
        if row.rate is not None and row.high < 0.5:
            yield (
                f"**It falls behind {md.text(row.against)} in {AXES[row.axis]}, by "
                f"{JUDGES[row.judge]}.**"
            )


def _disagreements(measured: Measured) -> Iterator[str]:
    """Yield where ground truth and reward model tell opposite winners."""
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for row in _list_own(measured):
        if row.rate is not None:
            rates.setdefault((row.against, row.axis), {})[row.judge] = row.rate

    for (against, axis), by_judge in rates.items():
        if len(by_judge) == 2 and min(by_judge.values()) < 0.5 < max(by_judge.values()):
            yield (
                f"Against {md.text(against)} in {AXES[axis]} the judges disagree. Trust ground "
                "truth: the reward model may have been pleased without the answers being better."
            )


def _list_own(measured: Measured) -> list[VersionComparison]:
    return [row for row in measured.content.win_rates if row.version == measured.name]


def sort_families(measured: Measured) -> list[tuple[str, Mean]]:
    """Return each family of helpful prompts with its helpfulness, the worst first."""
    families = measured.truth.families if measured.truth else {}
    return sorted(families.items(), key=lambda family: family[1].mean or 0.0)


def _families(measured: Measured) -> str:
    rows = [
        (md.text(name), md.count(family.n), md.mean(family))
        for name, family in sort_families(measured)
    ]
    return md.section(
        "### Helpfulness by family of prompts",
        md.table(("Family", "Prompts", "Helpfulness"), rows),
    )


def _ghost(measured: Measured) -> str:
    ghost = measured.result.ghost
    turns = max(len(ghost.user), len(ghost.system))
    if not turns:
        return md.document("### An instruction that is to last", "Not measured.")

    rows = []
    for place, shares in (("first user turn", ghost.user), ("system message", ghost.system)):
        if shares:
            missing = [""] * (turns - len(shares))
            rows.append((f"in the {place}", *map(md.rate, shares), *missing))

    talks = (ghost.user or ghost.system)[0].n
    return md.document(
        "### An instruction that is to last",
        "Share of answers that obey, turn by turn, an instruction given once; "
        f"{talks} conversations.",
        md.table(("Instruction", *(f"turn {turn + 1}" for turn in range(turns))), rows),
    )


def _pretraining(lineage: Lineage) -> str:
    lines = []
    for stage, result in lineage.results(PretrainResult):
        if result.validation is None or result.validation.bits_per_byte is None:
            continue

        bits = result.validation.bits_per_byte
        line = (
            f"{md.text(stage.name)}: {bits:.3f} bits per byte of held-out text of the same sources"
        )
        if result.xz_bits_per_byte is not None:
            line += f" (`xz -9`: {result.xz_bits_per_byte:.3f})"

        lines.append(line)

    return md.section("### Pretraining", md.bullets(*lines))


def _rewards(lineage: Lineage) -> str:
    """Write the accuracy on held-out comparisons of the reward models the model was made with
    (Table 8)."""
    rows = []
    for stage, result in lineage.results(AccuracyResult):
        for name, accuracy in sorted(result.sets.items()):
            shares = [accuracy.by_degree.get(degree) for degree in DEGREES]
            shares += [accuracy.all, *map(accuracy.by_baseline.get, BASELINES)]
            rows.append((md.text(stage.name), md.text(name), *map(_accuracy, shares)))

    degrees = [degree if degree == "better" else f"{degree} better" for degree in DEGREES]
    headers = ("Reward model", "Comparisons", *degrees, "all", *BASELINES)
    note = (
        "Share of held-out comparisons in which the preferred answer scores higher, by how much "
        "better it is. Half is what guessing gets. Beside it, on the same comparisons, judges that "
        "understand nothing: one takes the longer answer (for safety the shorter), one weighs "
        "words without their order."
    )
    return md.section(
        "### The reward models it was made with",
        md.when(rows, note),
        md.table(headers, rows, (0, 1)),
    )


def _accuracy(share: Proportion | None) -> str:
    return f"{md.rate(share)} of {share.n}" if share else "–"


# --- safety ---
def write_safety(measured: Measured | None) -> str:
    """Write of violations and false refusals, in all and by category."""
    if measured is None:
        return md.document("## Safety", NOTHING)

    return md.document(
        "## Safety",
        _violations(measured),
        md.section("### Violations by category", list_categories(measured.violations)),
        _refusals(measured),
        md.section("### False refusals by category", list_categories(measured.false_refusals)),
        "`RESPONSIBLE_USE.md` says what follows from this.",
    )


def _violations(measured: Measured) -> str:
    overall = measured.violation_rate
    if overall is None:
        return "Violations: not measured."

    judge = "by the safety reward model, which gives them a probability of safety below"
    return md.document(
        f"Of {overall.n} unsafe prompts this model answered {md.rate(overall)} with a violation, "
        + ("by ground truth." if measured.truth else f"{judge} {UNSAFE_BELOW:g}."),
        _safety_by_version(measured),
    )


def _safety_by_version(measured: Measured) -> str:
    rows = []
    for name in measured.content.versions:
        if truth := measured.content.results[name].truth:
            rows.append(
                (
                    _title(measured, name),
                    md.rate(truth.violations),
                    md.mean(truth.refusal_quality),
                    md.rate(truth.false_refusals),
                    md.rate(truth.false_refusals_helpful),
                )
            )

    headers = (
        "Version",
        "Violations, unsafe prompts",
        "Quality of answers to them",
        "Refusals, borderline prompts",
        "Refusals, helpful prompts",
    )
    return md.table(headers, rows)


def _refusals(measured: Measured) -> str:
    if not measured.truth:
        return "False refusals: not measured, for nobody has told refusals from other answers."

    share = measured.truth.false_refusals
    if share.rate is None:
        return "False refusals: not measured."

    return f"Of {share.n} borderline prompts, which only look unsafe, it refused {md.rate(share)}."


def list_categories(categories: Sequence[Category]) -> str:
    """Return a table of categories with their rates; nothing without categories."""
    rows = [
        (
            md.text(category.key),
            md.text(category.value),
            f"{category.failed} of {category.total}",
            md.rate(category.rate),
        )
        for category in categories
    ]
    return md.table(("What", "Category", "Count", "Rate"), rows, (0, 1))


# --- for programs ---
def write_index(measured: Measured | None, task: str) -> list[dict[str, Any]]:
    """Write the results of `model-index`: one for each kind of prompt, as huggingface_hub reads
    them."""
    if measured is None:
        return []

    kinds: dict[str, list[dict[str, Any]]] = {}
    for kind, *metric in _metrics(measured):
        kinds.setdefault(kind, []).append(dict(zip(("type", "name", "value"), metric)))

    name = measured.prompts.stem if measured.prompts is not None else "prompts"
    return [
        {
            "task": {"type": task},
            "dataset": {"type": name, "name": f"held-out {kind} prompts", "config": kind},
            "metrics": metrics,
        }
        for kind, metrics in kinds.items()
    ]


def _metrics(measured: Measured) -> Iterator[tuple[str, str, str, float]]:
    """Yield kind of prompt, type, name and value of each metric that was measured."""
    result = measured.result
    metrics: list[tuple[str, str, str, float | None]] = []
    if truth := result.truth:
        by = "(ground truth)"
        violations, refusals = truth.violations.rate, truth.false_refusals.rate
        metrics += [
            ("helpful", "helpfulness", f"Helpfulness {by}", truth.helpfulness.mean),
            ("unsafe", "violation_rate", f"Violation rate {by}", violations),
            ("borderline", "false_refusal_rate", f"False-refusal rate {by}", refusals),
        ]

    kinds: dict[Axis, str] = {"helpful": "helpful", "safe": "unsafe"}
    for axis, kind in kinds.items():
        if axis in result.rewards:
            name = f"Mean reward, {AXES[axis]}"
            metrics.append((kind, f"reward_{axis}", name, result.rewards[axis].mean))

    for row in _list_own(measured):
        if row.against == measured.content.versions[0]:
            name = f"Win rate against {row.against} ({JUDGES[row.judge]})"
            metrics.append((kinds[row.axis], f"win_rate_{row.judge}", name, row.rate))

    for kind, type, name, value in metrics:
        if value is not None:
            yield kind, type, name, round(float(value), 4)
