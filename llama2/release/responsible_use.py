"""RESPONSIBLE_USE.md: where a model was found to fail, what nobody tested, and what to do before
others use it."""

from __future__ import annotations

from collections.abc import Iterable

from llama2.release import markdown as md
from llama2.release.card import Model
from llama2.release.measurements import Category, Measured
from llama2.report.targets import guess_axis

FILE = "RESPONSIBLE_USE.md"
THRESHOLDS = (0.15, 0.5)
FEW = 30
_WORST = 8


def document(model: Model) -> str:
    """RESPONSIBLE_USE.md."""
    found = model.measured
    return md.document(
        f"# Responsible use of {md.text(model.title)}",
        "Written by a program from the model's own test results. It says where the model is known to fail; where it "
        "says nothing, nothing was tested.",
        "## What was tested",
        _tested(found),
        "## Where it gives unsafe answers",
        _unsafe(found),
        "## Where it refuses what it should answer",
        _refusals(found),
        "## What was not tested",
        _untested(found),
        "## Before others use it",
        _duties(model),
        "## When it goes wrong",
        _contact(model),
    )


def _tested(found: Measured | None) -> str:
    if found is None:
        return "**Nothing.** No safety result of this model was found beside its run. Treat it as unsafe."

    counts = {kind: len(found.of(kind)) for kind in ("unsafe", "borderline", "helpful")}
    rows = found.of("unsafe")
    turns = {sum(turn[0] == "user" for turn in row.get("prompt", [])) for row in rows}
    judge = (
        "a program that knows the synthetic world and judges by rule"
        if found.truthful
        else "the safety reward model"
        if found.violation_rate
        else "nobody"
    )

    return md.bullets(
        f"{counts['unsafe']} unsafe prompts, {counts['borderline']} that only look unsafe, {counts['helpful']} others; "
        "one answer to each.",
        f"The unsafe prompts are single questions, not conversations, and their answers were judged by {judge}."
        if turns == {1}
        else f"The answers to unsafe prompts were judged by {judge}.",
        "No person has tried to break it, as far as its files tell.",
    )


def _unsafe(found: Measured | None) -> str:
    overall = found.violation_rate if found is not None else None
    if found is None or overall is None:
        return "Not measured."

    failed = round((overall["rate"] or 0) * overall["n"])
    if not failed:
        return (
            f"None of {overall['n']} answers to unsafe prompts was a violation. That still allows a rate of up to "
            f"{md.percent(overall['high'])}."
        )

    return md.document(
        f"{failed} of {overall['n']} unsafe prompts got an unsafe answer: {md.rate(overall)}. Put otherwise, about one "
        f"in {overall['n'] / failed:.0f}. People who try again and again will get there.",
        _worst(found.violations),
        _few(found.violations),
    )


def _refusals(found: Measured | None) -> str:
    if (
        found is None
        or not found.truthful
        or found.result["truth"]["false_refusals"].get("rate") is None
    ):
        return "Not measured."

    truth = found.result["truth"]
    return md.document(
        f"It refused {md.rate(truth['false_refusals'])} of {truth['false_refusals']['n']} borderline prompts, and "
        f"{md.rate(truth['false_refusals_helpful'])} of {truth['false_refusals_helpful']['n']} plainly helpful ones.",
        _worst(found.false_refusals),
        _few(found.false_refusals),
    )


def _worst(found: Iterable[Category]) -> str:
    rows = [
        (md.text(one.key), md.text(one.value), f"{one.failed} of {one.total}", md.rate(one.rate))
        for one in found
        if one.failed
    ][:_WORST]
    return (
        md.document(
            "The worst categories first:",
            md.table(("What", "Category", "Count", "Rate"), rows, (0, 1)),
        )
        if rows
        else ""
    )


def _few(found: Iterable[Category]) -> str:
    small = [one for one in found if one.total < FEW]
    return (
        (
            f"{len(small)} of the categories have fewer than {FEW} prompts: their order is largely chance, and a rate "
            "of 0 there means little."
        )
        if small
        else ""
    )


def _untested(found: Measured | None) -> str:
    return md.bullets(
        "Attacks that adapt to the model: suffixes found by search, persuasion over several turns, instructions hidden "
        "in documents, answers put into its mouth."
        if found is not None
        else "Any attack.",
        "Any language but that of the prompts.",
        "Whether it gives away its training data or personal data.",
        "Bias for or against groups of people, beyond what the categories above show.",
        "Whether what it says is true, apart from the questions it was evaluated on.",
        "Long conversations, tools, code, images.",
        "Quantized and converted copies of the weights.",
        "" if found is not None and found.truthful else "False refusals.",
    )


def _duties(model: Model) -> str:
    return md.document(
        md.bullets(
            "Decide for whom and for what it is, and tell them what it cannot do.",
            "Test it with your own prompts, in your own languages, with the system message and the settings you will "
            "use; above all in the categories named here and in those that matter to you and are missing.",
            "Check what goes in and what comes out with something that was not trained along with it.",
            "Test again whatever you change: weights, precision, system message, sampling, the program around it.",
            "Let people report answers, keep what you need to look into them, and be able to switch it off.",
            "Read `LICENSES.md`.",
        ),
        _gate(model),
    )


def _gate(model: Model) -> str:
    """What the server's own check would have done, as far as the evaluation's scores tell."""
    found = model.measured
    guards = [stage for stage in model.lineage.of("reward") if guess_axis(stage.name) == "safe"]
    name = guards[-1].name if guards else None
    advice = (
        "`llama2 serve . --safety.model REWARD_MODEL` checks every answer with a reward model of safety before "
        "it is sent, and replaces what it finds unsafe."
    )

    if found is None or "safe" not in found.judges:
        return f"{advice} How much that helps here was not measured."

    measured = [
        (threshold, gate) for threshold in THRESHOLDS if (gate := found.gate(threshold)) is not None
    ]
    if not measured:
        return f"{advice} How much that helps here was not measured."

    rows = [
        (
            f"{threshold:g}",
            f"{md.rate(caught)} of {caught['n']}",
            f"{md.rate(taken)} of {taken['n']}",
        )
        for threshold, (caught, taken) in measured
    ]
    trained = found.judges["safe"] in model.lineage.digests
    which = f" ({md.code(name)} of the same recipe)" if name and trained else ""
    worst = max(caught["rate"] for _, (caught, _) in measured)

    return md.document(
        f"{advice} With the reward model of the evaluation{which} it would have done this:",
        md.table(
            ("--safety.threshold", "Violations caught", "Answers to helpful prompts lost"), rows
        ),
        "**This check finds less than half of the violations that are left.** "
        + (
            "The model was trained against this very reward model: what still gets through is what that model does not "
            "see. "
            if trained
            else ""
        )
        + "Do not rely on it alone."
        if worst < 0.5
        else "Do not rely on it alone.",
    )


def _contact(model: Model) -> str:
    card = model.card
    return (
        f"Report it to {md.text(card.contact)}."
        if card.contact
        else "Whoever released this model has named nobody to report to. Stop using it for what went wrong."
    )
