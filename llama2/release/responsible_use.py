"""RESPONSIBLE_USE.md: where a model was found to fail, what nobody tested, and what to do before
others use it."""

from __future__ import annotations

from collections.abc import Sequence

from llama2.release import markdown as md
from llama2.release.card import ReleasedModel
from llama2.release.card_results import list_categories
from llama2.release.measurements import Category, Measured
from llama2.report.reward_targets import guess_axis

FILE = "RESPONSIBLE_USE.md"
THRESHOLDS = (0.15, 0.5)
FEW = 30
_WORST = 8


def document(model: ReleasedModel) -> str:
    """Write RESPONSIBLE_USE.md."""
    measured = model.measured
    return md.document(
        f"# Responsible use of {md.text(model.title)}",
        "Written by a program from the model's own test results. It says where the model is known "
        "to fail; where it says nothing, nothing was tested.",
        "## What was tested",
        _tested(measured),
        "## Where it gives unsafe answers",
        _violations(measured),
        "## Where it refuses what it should answer",
        _refusals(measured),
        "## What was not tested",
        _untested(measured),
        "## Before others use it",
        _duties(model),
        "## When it goes wrong",
        _contact(model),
    )


def _tested(measured: Measured | None) -> str:
    if measured is None:
        return (
            "**Nothing.** No safety result of this model was found beside its run. Treat it as "
            "unsafe."
        )

    unsafe, borderline, helpful = map(measured.of, ("unsafe", "borderline", "helpful"))
    turns = set()
    for answer in unsafe:
        turns.add(sum(role == "user" for role, _ in answer.prompt))

    judge = _name_judge(measured)
    return md.bullets(
        f"{len(unsafe)} unsafe prompts, {len(borderline)} that only look unsafe, {len(helpful)} "
        "others; one answer to each.",
        "The unsafe prompts are single questions, not conversations, and their answers were judged "
        f"by {judge}."
        if turns == {1}
        else f"The answers to unsafe prompts were judged by {judge}.",
        "No person has tried to break it, as far as its files tell.",
    )


def _name_judge(measured: Measured) -> str:
    if measured.truth:
        return "a program that knows the synthetic world and judges by rule"

    return "the safety reward model" if measured.violation_rate else "nobody"


def _violations(measured: Measured | None) -> str:
    overall = measured.violation_rate if measured is not None else None
    if measured is None or overall is None:
        return "Not measured."

    failed = round((overall.rate or 0) * overall.n)
    if not failed:
        return (
            f"None of {overall.n} answers to unsafe prompts was a violation. That still allows a "
            f"rate of up to {md.percent(overall.high)}."
        )

    return md.document(
        f"{failed} of {overall.n} unsafe prompts got an unsafe answer: {md.rate(overall)}. Put "
        f"otherwise, about one in {overall.n / failed:.0f}. People who try again and again will "
        "get there.",
        _worst(measured.violations),
    )


def _refusals(measured: Measured | None) -> str:
    truth = measured.truth if measured is not None else None
    if measured is None or truth is None or truth.false_refusals.rate is None:
        return "Not measured."

    borderline, helpful = truth.false_refusals, truth.false_refusals_helpful
    return md.document(
        f"It refused {md.rate(borderline)} of {borderline.n} borderline prompts, and "
        f"{md.rate(helpful)} of {helpful.n} plainly helpful ones.",
        _worst(measured.false_refusals),
    )


def _worst(categories: Sequence[Category]) -> str:
    failed = [category for category in categories if category.failed]
    small = sum(category.total < FEW for category in categories)
    return md.document(
        md.section("The worst categories first:", list_categories(failed[:_WORST])),
        md.when(
            small,
            f"{small} of the categories have fewer than {FEW} prompts: their order is largely "
            "chance, and a rate of 0 there means little.",
        ),
    )


def _untested(measured: Measured | None) -> str:
    return md.bullets(
        "Attacks that adapt to the model: suffixes found by search, persuasion over several turns, "
        "instructions hidden in documents, answers put into its mouth."
        if measured is not None
        else "Any attack.",
        "Any language but that of the prompts.",
        "Whether it gives away its training data or personal data.",
        "Bias for or against groups of people, beyond what the categories above show.",
        "Whether what it says is true, apart from the questions it was evaluated on.",
        "Long conversations, tools, code, images.",
        "Quantized and converted copies of the weights.",
        "" if measured is not None and measured.truth else "False refusals.",
    )


def _duties(model: ReleasedModel) -> str:
    return md.document(
        md.bullets(
            "Decide for whom and for what it is, and tell them what it cannot do.",
            "Test it with your own prompts, in your own languages, with the system message and the "
            "settings you will use; above all in the categories named here and in those that "
            "matter to you and are missing.",
            "Check what goes in and what comes out with something that was not trained along with "
            "it.",
            "Test again whatever you change: weights, precision, system message, sampling, the "
            "program around it.",
            "Let people report answers, keep what you need to look into them, and be able to "
            "switch it off.",
            "Read `LICENSES.md`.",
        ),
        _gate(model),
    )


def _gate(model: ReleasedModel) -> str:
    """Write what the server's own check would have done, as far as the evaluation's scores tell."""
    advice = (
        "`llama2 serve . --safety.model REWARD_MODEL` checks every answer with a reward model of "
        "safety before it is sent, and replaces what it finds unsafe."
    )
    measured = model.measured
    rows, rates = [], []
    for threshold in THRESHOLDS if measured is not None and "safe" in measured.judges else ():
        assert measured is not None
        if gate := measured.simulate_gate(threshold):
            shares = [f"{md.rate(share)} of {share.n}" for share in gate]
            rows.append((f"{threshold:g}", *shares))
            rates.append(gate[0].rate or 0.0)

    if not rows or measured is None:
        return f"{advice} How much that helps here was not measured."

    guards = [stage for stage in model.lineage.of("reward") if guess_axis(stage.name) == "safe"]
    trained = measured.judges["safe"] in model.lineage.digests
    judge = f" ({md.code(guards[-1].name)} of the same recipe)" if guards and trained else ""
    weak = max(rates) < 0.5
    warnings = (
        md.when(weak, "**This check finds less than half of the violations that are left.** "),
        md.when(
            weak and trained,
            "The model was trained against this very reward model: what still gets through is what "
            "that model does not see. ",
        ),
        "Do not rely on it alone.",
    )
    return md.document(
        f"{advice} With the reward model of the evaluation{judge} it would have done this:",
        md.table(
            ("--safety.threshold", "Violations caught", "Answers to helpful prompts lost"), rows
        ),
        "".join(warnings),
    )


def _contact(model: ReleasedModel) -> str:
    if model.card.contact:
        return f"Report it to {md.text(model.card.contact)}."

    return (
        "Whoever released this model has named nobody to report to. Stop using it for what went "
        "wrong."
    )
