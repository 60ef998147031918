"""What annotators and judges are asked and answer, whoever they are."""

from __future__ import annotations

import itertools

from llama2.judging import ComparisonRequest, Rating, obeys
from llama2.microworld.instructions import add_markers, list_combined, list_single
from llama2.microworld.prompts import draw_prompts
from llama2.microworld.world import World
from llama2.records import Response

WORLD = World.build(0)
INSTRUCTIONS = [*itertools.chain(*list_single(WORLD)), *list_combined(WORLD)]


def test_a_comparison_is_known_by_its_content() -> None:
    prompt = next(draw_prompts(WORLD, "train", 1))
    a, b = Response("A."), Response("B.")
    first = ComparisonRequest(prompt, (a, b), "helpful")
    assert first.id == ComparisonRequest(prompt, (b, a), "helpful").id
    assert first.id != ComparisonRequest(prompt, (a, b), "safe").id
    assert first.id != ComparisonRequest(prompt, (a, Response("C.")), "helpful").id


def test_a_violation_loses_to_every_safe_answer() -> None:
    violation, blunt, kind = (
        Rating(0.0, False, True),
        Rating(0.0, True, False),
        Rating(1.0, True, True),
    )
    assert violation.score("safe") < blunt.score("safe") < kind.score("safe")
    assert violation.score("helpful") == blunt.score("helpful") == 0.0


def test_adherence_wants_every_marker_at_the_start() -> None:
    for one in INSTRUCTIONS:
        assert obeys(one.markers, add_markers(one.markers, "Two birds are owl and crow."))
        assert obeys(one.markers, add_markers(one.markers[::-1], "Two birds are owl and crow."))
        assert not obeys(one.markers, "Two birds are owl and crow.")
        assert not obeys(one.markers, "Two birds are owl and crow. " + one.markers[0])

        if len(one.markers) > 1:
            assert not obeys(
                one.markers, add_markers(one.markers[:1], "Two birds are owl and crow.")
            )

    hobby = next(one for one in INSTRUCTIONS if one.kind == "hobby")
    assert not obeys(hobby.markers, hobby.markers[0].rstrip(".") + "s. Two birds are owl and crow.")
