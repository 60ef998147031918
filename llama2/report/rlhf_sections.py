"""Sections of the report on how the policy was tuned with rewards: rejection sampling and PPO
(§3.2.3)."""

from __future__ import annotations

from collections.abc import Sequence

from llama2.report import paper_values
from llama2.report.charts import Series, lines
from llama2.report.html import (
    Html,
    details,
    figure,
    figures,
    join,
    number,
    paragraph,
    section,
    subtitle,
    table,
    talk,
)
from llama2.report.training_sections import render_curve
from llama2.results import Alarm, CurvesResult, HealthResult, RankedAnswers, RejectionResult
from llama2.runs.recipe_runs import Recipe, Step


def render_rejection(recipe: Recipe) -> Html:
    """Render the best and the median of k samples (Figure 7), and the temperature search
    (Figure 8)."""
    parts = []
    for step in recipe.of("rejection"):
        result, curves = step.result(RejectionResult), step.result(CurvesResult)
        if result is not None:
            parts.append(paragraph(f"{step.name}: {_describe_round(result)}."))

        if curves is not None:
            parts.append(
                figures(_render_curves(step.name, curves), _render_search(step.name, curves))
            )

        if result is not None and result.examples:
            talks = [_render_example(example) for example in result.examples]
            parts.append(details(f"{step.name}: best and worst samples", join(talks)))

    return section("rejection", "§3.2.3", "Rejection sampling", *parts)


def _describe_round(result: RejectionResult) -> str:
    facts = [
        f"{number(result.prompts)} prompts",
        f"K = {result.k}",
        f"{number(result.kept)} answers kept",
    ]
    if result.earlier:
        facts.append(f"{number(result.earlier)} from earlier rounds")

    return ", ".join([*facts, f"temperature {result.temperature:g}"])


def _render_curves(name: str, curves: CurvesResult) -> Html:
    if not curves.k:
        return Html("")

    series = [
        Series("best", curves.k, curves.max, markers=True),
        Series("median", curves.k, curves.median, markers=True),
    ]
    median, best = paper_values.BEST_OF_20
    return figure(
        lines(series, "samples k", "reward"),
        f"{name}: reward of k samples",
        f"Figure 7, read off: the median stays at {median}, the best of 20 reaches {best}.",
    )


def _render_search(name: str, curves: CurvesResult) -> Html:
    if len(curves.temperatures) < 2:
        return Html("")

    rewards = sorted((float(key), reward) for key, reward in curves.temperatures.items())
    temperatures, means = zip(*rewards)
    series = [Series("best", temperatures, means, markers=True)]
    low, high = paper_values.BEST_TEMPERATURE
    return figure(
        lines(series, "temperature", "mean score of the best"),
        f"{name}: temperature search",
        f"The paper's best temperature for an RLHF model is {low} to {high} (Figure 8).",
    )


def _render_example(example: RankedAnswers) -> Html:
    return talk(
        [
            ("user", example.prompt),
            (f"worst {example.worst_reward:.2f}", example.worst),
            (f"best {example.best_reward:.2f}", example.best),
        ]
    )


PPO_CHARTS = (
    ("KL to the initial policy, nats", "ppo/kl_reference"),
    ("Entropy, nats", "ppo/entropy"),
    ("Clip fraction", "ppo/clip_fraction"),
    ("Explained variance", "ppo/explained_variance"),
    ("Policy's gradient norm", "ppo/actor_grad_norm"),
    ("Critic's gradient norm", "ppo/critic_grad_norm"),
    ("Answer length, tokens", "ppo/length"),
    ("Answers that end", "ppo/eos_rate"),
    ("Reward, helpfulness", "reward/helpfulness"),
    ("Reward, safety", "reward/safety"),
    ("Reward, combined", "reward/mean"),
    ("Correlation of reward and length", "reward/length_correlation"),
)
HELDOUT = {
    "mean": "heldout/reward",
    "helpful": "heldout/helpful",
    "unsafe": "heldout/unsafe",
    "borderline": "heldout/borderline",
}
MOST_SAMPLES = 12


def render_ppo(recipe: Recipe) -> Html:
    """Render the health of the reinforcement-learning runs, with every alarm and its remedy."""
    parts = []
    for step in recipe.of("ppo"):
        charts = [render_curve(step, key, title, small=True) for title, key in PPO_CHARTS]
        health = step.result(HealthResult)
        if not any(charts) and health is None:
            continue

        parts.append(subtitle(step.name))
        if health is not None:
            parts.append(_render_alarms(health.alarms))

        parts += [figures(*charts, small=True), figures(_render_heldout(step))]
        if health is not None and health.samples:
            talks = [
                talk([("user", sample.prompt), (f"reward {number(sample.reward)}", sample.answer)])
                for sample in health.samples[:MOST_SAMPLES]
            ]
            parts.append(details(f"{step.name}: samples", join(talks)))

    return section("ppo", "§3.2.3", "PPO", *parts)


def _render_alarms(alarms: Sequence[Alarm]) -> Html:
    if not alarms:
        return paragraph(
            "No alarm: KL, entropy, clipping, value function, length and endings stayed healthy."
        )

    headers = ("Alarm", "Step", "Value", "Cause", "Remedy")
    rows = [
        (alarm.name, alarm.step, number(alarm.value), alarm.cause, alarm.remedy) for alarm in alarms
    ]
    return table(headers, rows, words=(0, 3, 4))


def _render_heldout(step: Step) -> Html:
    """Render the reward on held-out prompts, in all and by kind of prompt: what early stopping
    watches."""
    points = {name: step.series(key) for name, key in HELDOUT.items()}
    series = [Series(name, x, y) for name, (x, y) in points.items() if len(y) > 1]
    if not series:
        return Html("")

    return figure(lines(series, "step", ""), "Reward on held-out prompts, by kind")
