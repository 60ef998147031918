"""Protocols of judging: annotators compare two answers (§3.2.1), a judge rates each (§3.4).

Stages and evaluation know these protocols alone. The microworld implements both with the truth that
its prompts carry; people behind an annotation page would be other annotators, and a model that
rates answers another judge. `stages/common/judges.py` chooses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llama2.hashing import hash_fraction
from llama2.records import Axis, Preference, Prompt, Response


@dataclass(frozen=True)
class ComparisonRequest:
    """Two answers to a prompt, to be compared on one axis. Annotators choose the order shown."""

    prompt: Prompt
    answers: tuple[Response, Response]
    axis: Axis
    round: int = 0

    @property
    def id(self) -> str:
        """The same for the same prompt, answers (in either order) and axis."""
        turns = [message.content for message in self.prompt.messages]
        texts = sorted(answer.text for answer in self.answers)
        number = int(hash_fraction(repr((self.axis, turns, *texts))) * 16**12)
        return f"{self.axis}-{number:012x}"


Outcome = Preference | Literal["pending", "excluded"]
"""A preference; "pending" where nobody has compared the answers yet; "excluded" where the preferred
answer alone is unsafe, which the paper does not learn from (§3.2.1)."""


class Annotators(Protocol):
    """People, or what stands for them, who compare answers."""

    def accepts(self, prompt: Prompt) -> bool:
        """Return whether they can compare answers to a prompt."""
        ...

    def compare(
        self, comparisons: Iterable[ComparisonRequest]
    ) -> Iterator[tuple[ComparisonRequest, Outcome]]:
        """Ask for every comparison, and yield each in turn with its outcome so far.

        People may answer hours later: what is new to them is enqueued and "pending". The same
        comparison may be given again at any time; it is not enqueued twice, and its outcome is the
        preference once there is one.
        """
        ...


@dataclass(frozen=True)
class Rating:
    """Judgement of one answer on both axes."""

    helpfulness: float
    """in [0, 1]; on unsafe prompts the quality of the refusal"""
    safe: bool
    refusal: bool

    def score(self, axis: Axis) -> float:
        """Return one number to compare answers by; a violation loses to every safe answer."""
        if axis == "safe" and not self.safe:
            return -1.0

        return self.helpfulness


class Judge(Protocol):
    """Ground truth, or what stands for it, that rates answers on both axes."""

    def accepts(self, prompt: Prompt) -> bool:
        """Return whether it can rate answers to a prompt."""
        ...

    def rate(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Rating]:
        """Rate the answer to each prompt; it accepts them all."""
        ...


def strip_markers(markers: Sequence[str], answer: str) -> tuple[int, str]:
    """Return how many of the markers an answer starts with, in any order, and what follows them."""
    rest = answer.strip()
    missing = list(markers)
    while True:
        for marker in missing:
            start = marker.rstrip(".!")
            if re.match(re.escape(start) + r"(?!\w)", rest, re.IGNORECASE):
                break
        else:
            return len(markers) - len(missing), rest

        missing.remove(marker)
        rest = rest[len(start) :].lstrip(" .!,:")


def obeys(markers: Sequence[str], answer: str) -> bool:
    """Return whether an answer starts with all the markers that an instruction asks for (§3.3)."""
    return strip_markers(markers, answer)[0] == len(markers)
