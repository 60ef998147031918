"""Annotators who compare two answers as people would (§3.2.1): noisily, with a degree and a safety
label.

They are the only way by which the microworld's ground truth reaches training. Helpfulness and
safety have separate guidelines; answers are shown in random order; pairs whose chosen answer alone
is unsafe are excluded, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llama2.judging import Annotators, ComparisonRequest, Outcome, Rating
from llama2.microworld.rater import GroundTruth
from llama2.microworld.world import hash_to_fraction, seed_stream
from llama2.records import DEGREES, Axis, Degree, Preference, Prompt, SafetyLabel

THRESHOLDS = (0.45, 0.25, 0.1)
"""Perceived differences from which a choice is significantly better, better, slightly better;
below: negligibly."""
NOISE = 0.11
FLIPPED_SAFETY = 0.02
_TAGS = ("family", "split", "risk")  # metadata of a prompt that its comparisons keep


class SimulatedAnnotators(Annotators):
    """People who see the ground truth through noise, and answer at once.

    Every outcome is a pure function of seed, prompt, the two answers in either order, and axis.
    """

    def __init__(
        self, seed: int = 0, noise: float = NOISE, flipped_safety: float = FLIPPED_SAFETY
    ) -> None:
        """`noise` is the standard deviation of the perceived difference; `flipped_safety` the rate
        of wrong labels."""
        self.seed = seed
        self.noise = noise
        self.flipped_safety = flipped_safety
        self._truth = GroundTruth()

    def accepts(self, prompt: Prompt) -> bool:
        """Return whether a prompt carries its truth."""
        return self._truth.accepts(prompt)

    def compare(
        self, comparisons: Iterable[ComparisonRequest]
    ) -> Iterator[tuple[ComparisonRequest, Outcome]]:
        """Yield each comparison with its outcome; prompts without truth stay "pending"."""
        for comparison in comparisons:
            accepted = self.accepts(comparison.prompt)
            yield comparison, self.judge(comparison) if accepted else "pending"

    def judge(self, comparison: ComparisonRequest) -> Outcome:
        """Return the outcome of one comparison, on a prompt that carries its truth.

        The preference keeps the answers in the order displayed. Safety comparisons also carry the
        safety label.
        """
        prompt, axis = comparison.prompt, comparison.axis
        first, second = sorted(comparison.answers, key=lambda answer: answer.text)
        texts = (*(message.content for message in prompt.messages), first.text, second.text)
        rng = seed_stream(self.seed, "annotator", axis, *texts)
        shown = (first, second) if rng.random() < 0.5 else (second, first)

        ratings = self._truth.rate((prompt, prompt), [answer.text for answer in shown])
        difference = _value(ratings[0], axis) - _value(ratings[1], axis)
        difference += rng.gauss(0.0, self.noise)
        safe = [rating.safe != (rng.random() < self.flipped_safety) for rating in ratings]

        label: SafetyLabel | None = None
        if axis == "safe":
            chosen_safe, other_safe = safe if difference >= 0 else reversed(safe)
            if other_safe and not chosen_safe:
                return "excluded"

            label = label_safety(chosen_safe, other_safe)

        identity = int(hash_to_fraction(self.seed, axis, *texts) * 16**12)
        return Preference(
            f"{axis}-{identity:012x}",
            prompt.messages,
            shown,
            0 if difference >= 0 else 1,
            grade(difference),
            label,
            axis,
            f"simulated-{self.seed}",
            comparison.round,
            {tag: prompt.metadata[tag] for tag in _TAGS if tag in prompt.metadata},
        )


def grade(difference: float) -> Degree:
    """Return the degree of an absolute perceived difference."""
    return DEGREES[sum(abs(difference) < threshold for threshold in THRESHOLDS)]


def label_safety(chosen_safe: bool, other_safe: bool) -> SafetyLabel:
    """Return the label of two answers of which not the other alone is safe."""
    if not chosen_safe:
        return "neither"

    return "both" if other_safe else "preferred_only"


def _value(rating: Rating, axis: Axis) -> float:
    """Return what the guideline of an axis values: help; or safety first, and then help."""
    if axis == "helpful":
        return rating.helpfulness

    return 0.3 + 0.7 * rating.helpfulness if rating.safe else -0.3
