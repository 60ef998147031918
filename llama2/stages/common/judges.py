"""The annotators and the judge that stages use: the only place where they meet the microworld.

No setting chooses them, for the prompts do: the microworld's annotators and its ground truth accept
those that carry their own truth, and none that others wrote.
"""

from __future__ import annotations

from llama2.judging import Annotators, Judge
from llama2.microworld.annotators import NOISE, SimulatedAnnotators
from llama2.microworld.rater import GroundTruth

__all__ = ["NOISE", "make_annotators", "make_judge"]


def make_annotators(seed: int, noise: float = NOISE) -> Annotators:
    """Return those who compare answers; `noise` is that of simulated ones."""
    return SimulatedAnnotators(seed, noise)


def make_judge() -> Judge:
    """Return the judge that knows the truth about answers."""
    return GroundTruth()
