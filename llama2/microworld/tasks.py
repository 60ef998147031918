"""What a prompt asks for: the turns, the key of its content, and the gold fields the rater needs.

A family is a kind of task: how to draw one from the world, and how three writers of different care
would answer it. `gold` is plain JSON and travels in `Prompt.metadata`, so a prompt read back from a
file can be answered and rated without the world.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama2.microworld.world import Random, World

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
        return str(self.gold["family"])


@dataclass(frozen=True)
class Family:
    """One kind of task. `expert` is the ideal answer, `curt` the bare minimum, `sloppy` has one
    error."""

    draw: Callable[[World, Random], Task]
    expert: Writer
    curt: Writer
    sloppy: Writer


OPENERS = ("", "", "", "Hello. ", "Please help. ")
"""What may stand before a question; mostly nothing."""


def enumerate_words(items: list[str], last: str = " and ") -> str:
    """`a, b and c`."""
    return last.join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]
