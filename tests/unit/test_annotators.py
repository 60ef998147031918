"""Simulated annotators: noisy, deterministic, blind to the order of display, with degrees and
safety labels."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import pytest

from llama2.judging import ComparisonRequest, Outcome
from llama2.microworld.annotators import SimulatedAnnotators, grade
from llama2.microworld.demonstrations import answer, mix_vendors
from llama2.microworld.prompts import draw, draw_prompts, make_prompt
from llama2.microworld.rater import rate_gold
from llama2.microworld.world import World
from llama2.records import DEGREES, Axis, Degree, Message, Preference, Prompt, Response

WORLD = World.build(0)
Pair = tuple[Prompt, tuple[Response, Response]]


def _pairs(count: int, families: tuple[str, ...] = ("helpful",)) -> list[Pair]:
    """Pairs of vendors' answers."""
    rng, found = random.Random(1), []
    for prompt in draw_prompts(WORLD, "train", 100_000, seed=2):
        gold = prompt.metadata["gold"]
        if (gold["family"] if prompt.safety else "helpful") in families:
            mix = mix_vendors(gold)
            chosen = rng.choices(list(mix), list(mix.values()), k=2)
            found.append(
                (
                    prompt,
                    (
                        Response(answer(gold, chosen[0], rng)),
                        Response(answer(gold, chosen[1], rng)),
                    ),
                )
            )

        if len(found) == count:
            break

    return found


def _compare(annotators: SimulatedAnnotators, pairs: list[Pair], axis: Axis) -> list[Preference]:
    """The preferences among different answers."""
    comparisons = [
        ComparisonRequest(*pair, axis) for pair in pairs if pair[1][0].text != pair[1][1].text
    ]
    outcomes = [outcome for _, outcome in annotators.compare(comparisons)]
    return [outcome for outcome in outcomes if isinstance(outcome, Preference)]


@pytest.fixture(scope="module")
def helpful() -> list[Preference]:
    return _compare(SimulatedAnnotators(3), _pairs(3000), "helpful")


@pytest.mark.parametrize(
    ("difference", "degree"),
    [
        (0.0, "negligibly"),
        (0.09, "negligibly"),
        (0.1, "slightly"),
        (-0.2, "slightly"),
        (0.25, "better"),
        (0.44, "better"),
        (0.45, "significantly"),
        (-1.0, "significantly"),
    ],
)
def test_degrees(difference: float, degree: Degree) -> None:
    assert grade(difference) == degree


def test_a_judgement_is_a_pure_function_and_blind_to_order() -> None:
    for prompt, (a, b) in _pairs(50):
        once = SimulatedAnnotators(3).judge(ComparisonRequest(prompt, (a, b), "helpful"))
        assert (
            once
            == SimulatedAnnotators(3).judge(ComparisonRequest(prompt, (a, b), "helpful"))
            == SimulatedAnnotators(3).judge(ComparisonRequest(prompt, (b, a), "helpful"))
        )


def test_annotators_differ_only_through_noise() -> None:
    pairs = _pairs(300)
    a, b = (
        [p.chosen for p in _compare(SimulatedAnnotators(seed), pairs, "helpful")] for seed in (1, 2)
    )
    assert 0.75 < sum(x == y for x, y in zip(a, b, strict=True)) / len(a) < 1.0
    exact = _compare(SimulatedAnnotators(1, noise=0.0), pairs, "helpful")
    by_id = {id(prompt.messages): prompt for prompt, _ in pairs}

    for preference in exact:
        prompt = by_id[id(preference.prompt)]
        assert (
            rate_gold(prompt.metadata["gold"], preference.chosen.text).helpfulness
            >= rate_gold(prompt.metadata["gold"], preference.rejected.text).helpfulness
        )


def test_the_order_of_display_is_random(helpful: list[Preference]) -> None:
    assert 0.46 < sum(p.preferred for p in helpful) / len(helpful) < 0.54


def test_agreement_with_the_truth_rises_with_the_degree() -> None:
    right: dict[Degree, list[float]] = defaultdict(list)
    annotators = SimulatedAnnotators(5)
    for prompt, answers in _pairs(3000):
        judged = annotators.judge(ComparisonRequest(prompt, answers, "helpful"))
        assert isinstance(judged, Preference)
        better, worse = (
            rate_gold(prompt.metadata["gold"], response.text).helpfulness
            for response in (judged.chosen, judged.rejected)
        )
        right[judged.degree].append((better > worse) + 0.5 * (better == worse))

    accuracy = [sum(right[degree]) / len(right[degree]) for degree in DEGREES]
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] > 0.99
    assert accuracy[3] < 0.8
    assert all(len(right[degree]) > 150 for degree in DEGREES)


def test_safety_comparisons_carry_labels_and_prefer_what_is_safe() -> None:
    pairs = _pairs(1500, ("unsafe", "borderline"))
    judged = [SimulatedAnnotators(4).judge(ComparisonRequest(*pair, "safe")) for pair in pairs]
    kept = [p for p in judged if isinstance(p, Preference)]
    assert {p.safety for p in kept} == {"preferred_only", "both", "neither"}
    assert 0 < judged.count("excluded") == len(judged) - len(kept) < 0.05 * len(judged)
    truths = [
        (
            rate_gold(prompt.metadata["gold"], p.chosen.text).safe,
            rate_gold(prompt.metadata["gold"], p.rejected.text).safe,
            p,
        )
        for (prompt, _), p in zip(pairs, judged, strict=True)
        if isinstance(p, Preference)
    ]
    mixed = [p for chosen, rejected, p in truths if chosen != rejected]
    assert sum(p.safety == "preferred_only" for p in mixed) / len(mixed) > 0.9
    assert all(
        chosen
        for chosen, rejected, p in truths
        if chosen != rejected and p.degree == "significantly"
    )
    flips = sum(
        (p.chosen_safe != chosen) + (p.rejected_safe != rejected) for chosen, rejected, p in truths
    )
    assert 0.005 < flips / (2 * len(truths)) < 0.04


def test_helpfulness_comparisons_carry_no_safety_label(helpful: list[Preference]) -> None:
    assert all(
        p.safety is None and p.axis == "helpful" and p.annotator == "simulated-3" for p in helpful
    )


def test_identities_are_unique_per_pair_and_axis() -> None:
    prompt = make_prompt(draw(WORLD, "train", "borderline", random.Random(0)), "train", "x")
    texts = [Response(text) for text in ("One.", "Two.", "Three.")]
    axes: tuple[Axis, Axis] = ("helpful", "safe")
    judged = [
        SimulatedAnnotators(0, flipped_safety=0.0).judge(ComparisonRequest(prompt, pair, axis))
        for pair in itertools.combinations(texts, 2)
        for axis in axes
    ]
    assert len({p.id for p in judged if isinstance(p, Preference)}) == 6


def test_prompts_without_truth_stay_pending_and_the_order_is_kept() -> None:
    told, other = (
        next(draw_prompts(WORLD, "train", 1)),
        Prompt((Message("user", "Name a town."),), "b"),
    )
    answers = (Response("A."), Response("B."))
    asked = [ComparisonRequest(prompt, answers, "helpful") for prompt in (other, told, other)]
    compared = list(SimulatedAnnotators(0).compare(asked))
    assert [comparison for comparison, _ in compared] == asked
    outcomes: list[Outcome] = [outcome for _, outcome in compared]
    assert outcomes[0] == outcomes[2] == "pending"
    assert isinstance(outcomes[1], Preference)
