"""Tasks of prompts: the turns, the key of their content, and the gold fields the rater needs.

A family is a kind of task: how to draw one from the world, and how three writers of different care
would answer it. `gold` is plain JSON and travels in `Prompt.metadata`, so a prompt read back from a
file can be answered and rated without the world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from llama2.microworld.world import World

Gold = dict[str, Any]
Writer = Callable[[Gold, Random], str]


@dataclass(frozen=True)
class Task:
    """`turns` alternate user and assistant and end with the user. `key` names the content, never
    the wording."""

    key: str
    turns: tuple[str, ...]
    gold: Gold
    requires: tuple[str, ...] = ()
    """Keys of contents shown on the way (an earlier turn); they must belong to the training
    split."""

    @property
    def family(self) -> str:
        """The kind of task."""
        return str(self.gold["family"])


@dataclass(frozen=True)
class TaskFamily:
    """One kind of task. `expert` is the ideal answer, `curt` the bare minimum, `sloppy` has one
    error."""

    draw: Callable[[World, Random], Task]
    expert: Writer
    curt: Writer
    sloppy: Writer


def fill(template: str) -> Writer:
    """Return a writer who fills a template with gold, its first letter a capital."""

    def write(gold: Gold, rng: Random) -> str:
        text = template.format_map(gold)
        return text[0].upper() + text[1:]

    return write


OPENERS = ("", "", "", "Hello. ", "Please help. ")
"""What may stand before a question; mostly nothing."""


def choose_other(value: str, pool: Sequence[str], rng: Random) -> str:
    """Draw another value of the pool."""
    return rng.choice([candidate for candidate in pool if candidate != value])


def enumerate_words(items: list[str]) -> str:
    """Return `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
