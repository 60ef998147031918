"""Lasting instructions and the question lists they should outlive (Ghost Attention, §3.3).

An instruction (a hobby, a language, a public figure, or two of them) asks for a marker at the
*start* of every answer: a small model copies a start far more reliably than an ending. Questions
are short and brief, so that a dialog of six turns fits into 256 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama2.microworld import vocabulary as words
from llama2.microworld.world import Random, World


@dataclass(frozen=True)
class Instruction:
    """`text` is the whole sentence, `short` its short form; an answer obeys if it starts with all
    `markers`."""

    kind: str
    text: str
    short: str
    markers: tuple[str, ...]


def instructions(world: World) -> list[Instruction]:
    """All instructions of a world: three kinds and their combinations."""
    languages = [
        Instruction(
            "language", f"Always speak {one.name}.", f"Language: {one.name}.", (f"{one.hello}!",)
        )
        for one in world.languages
    ]
    figures = [
        Instruction("figure", f"Act as {name}.", f"Figure: {name}.", (f"{name} here.",))
        for name in world.figures
    ]
    hobbies = [
        Instruction("hobby", f"Always love {hobby}.", f"Hobby: {hobby}.", (f"I love {hobby}.",))
        for hobby in world.hobbies
    ]
    pairs = [
        (a, b)
        for first, second in ((languages, figures), (languages, hobbies), (figures, hobbies))
        for a in first
        for b in second
    ]
    combined = [
        Instruction(
            f"{a.kind}+{b.kind}",
            f"{a.text} {b.text}",
            f"{a.short} {b.short}",
            a.markers + b.markers,
        )
        for a, b in pairs
    ]

    return languages + figures + hobbies + combined


def choose(world: World, rng: Random) -> Instruction:
    """An instruction; two in three are single."""
    options = instructions(world)
    single = [one for one in options if "+" not in one.kind]
    kind = rng.choice(("language", "figure", "hobby"))

    if rng.random() < 2 / 3:
        return rng.choice([one for one in single if one.kind == kind])

    return rng.choice(options[len(single) :])


def obey(markers: Sequence[str], answer: str) -> str:
    """The answer with the markers it should start with."""
    return " ".join([*markers, answer])


PREPROMPTS = ("You are a {a} and {b} assistant.", "Be a {a} and {b} assistant.")


def preprompt(rng: Random) -> str:
    """A safety preprompt of the kind §4.2.4 builds from adjectives."""
    a, b = rng.sample(words.ADJECTIVES, 2)
    return rng.choice(PREPROMPTS).format(a=a, b=b)
