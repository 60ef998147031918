"""Sections of the report on training: pretraining (§2.2), fine-tuning (§3.1)."""

from __future__ import annotations

from collections.abc import Mapping

from llama2.report import paper_values
from llama2.report.charts import Series, lines
from llama2.report.html import (
    Html,
    clock,
    figure,
    figures,
    number,
    paragraph,
    percent,
    section,
    short,
    table,
)
from llama2.results import PretrainResult, SftResult
from llama2.runs.recipe_runs import Recipe, StepRun


def render_curve(step: StepRun, key: str, title: str, small: bool = False) -> Html:
    """Render one metric over the steps; nothing where it was not logged twice."""
    x, y = step.series(key)
    if len(y) < 2:
        return Html("")

    width, height = (2.6, 1.8) if small else (5.0, 3.1)
    share = key.endswith(("accuracy", "rate", "fraction"))
    series = [Series(step.name, x, y)]
    chart = lines(series, "step", "", noisy=True, percent=share, width=width, height=height)
    return figure(chart, title)


def render_pretraining(recipe: Recipe) -> Html:
    """Render loss (Figure 5), bits per byte, and speed."""
    losses = " / ".join(f"{loss:.2f}" for loss in paper_values.PRETRAINING_LOSS.values())
    sizes = " / ".join(paper_values.PRETRAINING_LOSS)
    parts = []
    for step in recipe.of("pretrain"):
        result = step.result(PretrainResult)
        facts = [*_describe_model(result), *_describe_speed(step)]
        parts += [
            paragraph(f"{step.name}: {', '.join(facts)}."),
            figures(
                _render_loss(
                    {"training": step.series("train/loss")},
                    {"held out": step.series("validation/loss")},
                    "Loss, nats a token",
                    f"Figure 5 ends at {losses} after 2T tokens ({sizes}).",
                ),
                _render_bits(step, result),
                render_curve(step, "perf/tokens_per_second", "Tokens a second"),
                render_curve(step, "train/grad_norm", "Gradient norm, before clipping at 1.0"),
            ),
        ]

    return section("pretraining", "§2.2", "Pretraining", *parts)


def _describe_model(result: PretrainResult | None) -> list[str]:
    if result is None:
        return []

    facts = [f"{short(result.parameters)} parameters", f"{short(result.tokens)} tokens"]
    if result.validation and result.validation.bits_per_byte is not None:
        facts.append(f"{result.validation.bits_per_byte:.3f} bits per byte on held-out text")

    if result.xz_bits_per_byte is not None:
        facts.append(f"xz -9 of the same text: {result.xz_bits_per_byte:.3f}")

    return facts


def _describe_speed(step: StepRun) -> list[str]:
    facts = []
    if (speed := step.mean("perf/tokens_per_second")) is not None:
        facts.append(f"{short(speed)} tokens/s")

    if (mfu := step.mean("perf/mfu")) is not None:
        facts.append(f"MFU {percent(mfu, 0)}")

    return facts


Points = tuple[list[float], list[float]]
"""steps and values"""


def _render_loss(
    training: Mapping[str, Points], heldout: Mapping[str, Points], title: str, note: str = ""
) -> Html:
    """Render curves of training, and marked ones of validation."""
    series = [Series(name, x, y) for name, (x, y) in training.items() if y]
    series += [Series(name, x, y, markers=True) for name, (x, y) in heldout.items() if y]
    return figure(lines(series, "step", "", noisy=True), title, note) if series else Html("")


def _render_bits(step: StepRun, result: PretrainResult | None) -> Html:
    x, y = step.series("validation/bits_per_byte")
    if not y:
        return Html("")

    xz = result.xz_bits_per_byte if result else None
    level = None if xz is None else ("xz -9", xz)
    chart = lines([Series("held out", x, y, markers=True)], "step", "", level=level)
    return figure(chart, "Bits per byte of held-out text")


def render_fine_tuning(recipe: Recipe) -> Html:
    """Render all supervised runs, those on sampled answers included."""
    steps = recipe.of("sft")
    if not steps:
        return Html("")

    headers = ("Run", "Dialogs", "Tokens", "Training loss", "Held-out loss", "Time")
    if len(steps) > 1:
        training = {step.name: step.series("train/loss") for step in steps}
        heldout = {}
    else:
        training = {"training": steps[0].series("train/loss")}
        heldout = {"held out": steps[0].series("validation/loss")}

    return section(
        "sft",
        "§3.1",
        "Supervised fine-tuning",
        table(headers, [_describe_fine_tuning(step) for step in steps]),
        figures(_render_loss(training, heldout, "Training loss on answers, nats a token")),
        paragraph(
            f"The paper: {paper_values.ANNOTATIONS:,} annotations, 2 epochs, loss on answers only. "
            "Runs after the first learn from sampled answers (§3.2.3, §3.3, §4.2.4).",
            "note",
        ),
    )


def _describe_fine_tuning(step: StepRun) -> tuple[str, ...]:
    result = step.result(SftResult)
    validation = result.validation if result else None
    _, loss = step.series("train/loss")
    return (
        step.name,
        number(result.dialogs) if result else "",
        short(result.tokens) if result else "",
        f"{loss[0]:.3f} → {loss[-1]:.3f}" if loss else "",
        number(validation.loss, 4) if validation else "",
        clock(step.seconds),
    )
