"""Lasting instructions and the question lists they should outlive (Ghost Attention, §3.3).

An instruction (a hobby, a language, a public figure, or two of them) asks for a marker at the
*start* of every answer: a small model copies a start far more reliably than an ending. Questions
are short and brief, so that a dialog of six turns fits into 256 tokens.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from llama2.microworld import vocabulary as words
from llama2.microworld.world import World

PREPROMPTS = ("You are a {a} and {b} assistant.", "Be a {a} and {b} assistant.")


@dataclass(frozen=True)
class Instruction:
    """`text` is the whole sentence, `short` its short form; an answer obeys if it starts with all
    `markers`."""

    kind: str
    text: str
    short: str
    markers: tuple[str, ...]

    def __add__(self, other: Instruction) -> Instruction:
        """Return both instructions as one."""
        return Instruction(
            f"{self.kind}+{other.kind}",
            f"{self.text} {other.text}",
            f"{self.short} {other.short}",
            self.markers + other.markers,
        )


def list_single(world: World) -> list[list[Instruction]]:
    """List the instructions of each of the three kinds."""
    languages = [
        Instruction(
            "language",
            f"Always speak {language.name}.",
            f"Language: {language.name}.",
            (f"{language.hello}!",),
        )
        for language in world.languages
    ]
    figures = [
        Instruction("figure", f"Act as {name}.", f"Figure: {name}.", (f"{name} here.",))
        for name in world.figures
    ]
    hobbies = [
        Instruction("hobby", f"Always love {hobby}.", f"Hobby: {hobby}.", (f"I love {hobby}.",))
        for hobby in world.hobbies
    ]

    return [languages, figures, hobbies]


def list_combined(world: World) -> list[Instruction]:
    """List the instructions made of two of different kinds."""
    combined: list[Instruction] = []
    for first, second in itertools.combinations(list_single(world), 2):
        combined += itertools.starmap(operator.add, itertools.product(first, second))

    return combined


def choose(world: World, rng: Random) -> Instruction:
    """Draw an instruction; two in three are single."""
    single = rng.choice(list_single(world))
    if rng.random() < 2 / 3:
        return rng.choice(single)

    return rng.choice(list_combined(world))


def add_markers(markers: Sequence[str], answer: str) -> str:
    """Return the answer with the markers that it should start with."""
    return " ".join([*markers, answer])


def write_preprompt(rng: Random) -> str:
    """Write a safety preprompt of the kind that §4.2.4 builds from adjectives."""
    a, b = rng.sample(words.ADJECTIVES, 2)
    return rng.choice(PREPROMPTS).format(a=a, b=b)
