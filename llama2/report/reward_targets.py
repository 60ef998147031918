"""What the summary says of reward models, and which set of pairs is a model's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from llama2.evaluate.winrate import bound_difference
from llama2.records import Axis
from llama2.report.judgements import (
    Judgement,
    State,
    combine,
    format_points,
    format_share,
    judge_interval,
)
from llama2.results import AccuracyResult, JudgedPairsResult, Proportion, SetAccuracy
from llama2.runs.recipe_runs import Recipe, StepRun


def judge_reward_models(recipe: Recipe, least: float) -> Iterator[Judgement]:
    """Judge accuracy and what lies beyond the baselines; `least` is wanted of "significantly
    better" pairs in the microworld."""
    for step, accuracy in recipe.results(AccuracyResult):
        name = find_own_set(step.name, accuracy)
        if name is not None:
            yield from _judge_reward_model(step, accuracy.sets[name], least, recipe.simulated)
            yield from _judge_baselines(f"Reward model {step.name}", accuracy.sets[name])

    for _, judged in recipe.results(JudgedPairsResult):
        for name, of_set in judged.sets.items():
            axes = {guess_axis(judged.reward_model), guess_axis(name)} - {None}
            if "/" not in name and len(axes) < 2:
                yield from _judge_baselines(f"Reward model {judged.reward_model} on {name}", of_set)


def guess_axis(name: str) -> Axis | None:
    """Guess the axis a reward model or a set of pairs is about from its name."""
    lower = name.lower()
    if "saf" in lower or "harm" in lower:
        return "safe"

    return "helpful" if "help" in lower else None


def find_own_set(model: str, accuracy: AccuracyResult) -> str | None:
    """Return the held-out set a reward model is meant for: the one of its own axis, else its
    first."""
    axis = guess_axis(model)
    same_axis = [name for name in accuracy.sets if guess_axis(name) == axis]
    return next(iter([*same_axis, *accuracy.sets]), None)


def _judge_reward_model(
    step: StepRun, accuracy: SetAccuracy, least: float, simulated: bool
) -> Iterator[Judgement]:
    if not simulated:
        every = accuracy.all
        yield Judgement(
            f"Reward model {step.name} on held-out human pairs",
            "above 50 %",
            format_share(every),
            judge_interval((every.low, every.high), math.nextafter(0.5, 1)),
            f"{every.n:,} pairs",
        )
        return

    if accuracy.significantly is None:
        return

    degrees = list(accuracy.by_degree.values())
    first = degrees[0]
    later = "".join(f" / {100 * (degree.rate or 0):.1f}" for degree in degrees[1:])
    high_enough = judge_interval((first.low, first.high), least)
    yield Judgement(
        f"Reward model {step.name}, by degree of preference",
        f"falling, from at least {100 * least:g} %",
        f"{format_share(first)}{later}",
        combine([high_enough, _judge_fall(degrees)]),
        "/".join(f"{degree.n:,}" for degree in degrees) + " pairs",
    )


def _judge_fall(degrees: Sequence[Proportion]) -> State:
    """Judge whether accuracy falls from each degree to the next: no step may rise, and the last
    lies below the first."""
    if len(degrees) == 1:
        return "reached"

    for clearer, less_clear in pairwise(degrees):
        if judge_interval(bound_difference(less_clear, clearer), most=0.0) == "not reached":
            return "not reached"

    return judge_interval(bound_difference(degrees[-1], degrees[0]), most=0.0)


def _judge_baselines(model: str, accuracy: SetAccuracy) -> Iterator[Judgement]:
    """Judge whether a reward model knows more than judges that understand nothing, on the same
    pairs."""
    baselines, leads = accuracy.by_baseline, accuracy.leads
    if not baselines:
        return

    theirs, states = [], []
    for name, share in baselines.items():
        lead = leads.get(name)
        interval = (lead.low, lead.high) if lead else bound_difference(accuracy.all, share)
        beyond = f": {format_points(lead.difference, interval)}" if lead else ""
        theirs.append(f"{name} {format_share(share)}{beyond}")
        states.append(judge_interval(interval, math.nextafter(0.0, 1)))

    yield Judgement(
        f"{model} beside its baselines",
        f"above {' and '.join(baselines)}",
        f"{format_share(accuracy.all)}; {', '.join(theirs)}",
        combine(states),
        f"{accuracy.all.n:,} pairs",
    )
