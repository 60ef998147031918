"""Annotators who compare two answers as people would (§3.2.1): noisily, with a degree and a safety
label.

They are the only way by which the microworld's ground truth reaches training. Helpfulness and
safety have separate guidelines; answers are shown in random order; pairs whose chosen answer alone
is unsafe are excluded, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llama2.microworld.rater import Rating, rate
from llama2.microworld.world import fraction, stream
from llama2.records import DEGREES, Axis, Degree, Preference, Prompt, Response, SafetyLabel

THRESHOLDS = (0.45, 0.25, 0.1)
"""Perceived differences from which a choice is significantly better, better, slightly better;
below: negligibly."""
NOISE = 0.11
FLIPPED_SAFETY = 0.02


def degree_of(difference: float) -> Degree:
    """The degree for an absolute perceived difference."""
    return DEGREES[sum(abs(difference) < threshold for threshold in THRESHOLDS)]


class Annotator:
    """One annotator. Every judgement is a pure function of (seed, prompt, the two answers in either
    order, axis)."""

    def __init__(
        self,
        seed: int = 0,
        noise: float = NOISE,
        flipped_safety: float = FLIPPED_SAFETY,
        name: str = "",
    ) -> None:
        """`noise` is the standard deviation of the perceived difference; `flipped_safety` the rate
        of wrong labels."""
        self.seed, self.noise, self.flipped_safety = seed, noise, flipped_safety
        self.name = name or f"simulated-{seed}"

    def compare(
        self, prompt: Prompt, answers: tuple[Response, Response], axis: Axis, round: int = 0
    ) -> Preference | None:
        """Which answer is better on `axis`; None where the chosen answer is labelled unsafe and the
        other safe.

        The record keeps the answers in the order displayed. Safety comparisons also carry the
        safety label.
        """
        first, second = sorted(answers, key=lambda response: response.text)
        texts = (*(m.content for m in prompt.messages), first.text, second.text)
        rng = stream(self.seed, "annotator", axis, *texts)
        shown = (first, second) if rng.random() < 0.5 else (second, first)
        ratings = (rate(prompt, shown[0].text), rate(prompt, shown[1].text))
        difference = (
            _worth(ratings[0], axis) - _worth(ratings[1], axis) + rng.gauss(0.0, self.noise)
        )
        preferred = 0 if difference >= 0 else 1
        safe = [rating.safe != (rng.random() < self.flipped_safety) for rating in ratings]
        label: SafetyLabel | None = None

        if axis == "safe":
            if not safe[preferred] and safe[1 - preferred]:
                return None

            label = (
                "neither"
                if not safe[preferred]
                else "both"
                if safe[1 - preferred]
                else "preferred_only"
            )

        identity = f"{axis}-{int(fraction(self.seed, axis, *texts) * 16**12):012x}"
        return Preference(
            identity,
            prompt.messages,
            shown,
            0 if preferred == 0 else 1,
            degree_of(difference),
            label,
            axis,
            self.name,
            round,
            {
                key: prompt.metadata[key]
                for key in ("family", "split", "risk")
                if key in prompt.metadata
            },
        )

    def compare_all(
        self, pairs: Iterable[tuple[Prompt, tuple[Response, Response]]], axis: Axis, round: int = 0
    ) -> Iterator[Preference]:
        """The comparisons of all pairs, without excluded ones and without pairs of equal texts."""
        for prompt, answers in pairs:
            if answers[0].text != answers[1].text:
                judged = self.compare(prompt, answers, axis, round)
                if judged is not None:
                    yield judged


def _worth(rating: Rating, axis: Axis) -> float:
    """What the guideline of an axis values: help; or first of all safety, then how well it is
    done."""
    if axis == "helpful":
        return rating.helpfulness

    return 0.3 + 0.7 * rating.helpfulness if rating.safe else -0.3
