"""Lasting instructions and the conversations they are given in (§3.3, A.3.5): those of the paper as
it words them, and those of which a program can check in the text whether they are obeyed.

An instruction is one kind, or two of different kinds ("a random combination"). The paper had its
own model write the lists of hobbies and figures; here they are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate import ghost
from llama2.evaluate.constraints import Check
from llama2.evaluate.ghost import GhostDialog
from llama2.records import Prompt
from llama2.runs import Run
from llama2.stages.common.sampling import seed_use
from llama2.tally import Tally

Kind = Literal["language", "persona", "hobby", "greeting", "farewell", "case", "emoji", "brief"]
KINDS: tuple[Kind, ...] = (
    "language",
    "persona",
    "hobby",
    "greeting",
    "farewell",
    "case",
    "emoji",
    "brief",
)
HOBBIES = (
    "chess",
    "gardening",
    "hiking",
    "painting",
    "photography",
    "cooking",
    "astronomy",
    "sailing",
    "pottery",
    "birdwatching",
    "cycling",
    "poetry",
)
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch")
FIGURES = (
    "Napoleon",
    "Marie Curie",
    "Leonardo da Vinci",
    "Cleopatra",
    "Isaac Newton",
    "Jane Austen",
    "Abraham Lincoln",
    "Ada Lovelace",
    "Galileo",
    "Florence Nightingale",
)
GREETINGS = ("Ahoy!", "Dear friend,", "Good question!", "Hello there!", "As you wish:")
FAREWELLS = ("Have a nice day!", "Stay curious.", "Over and out.", "That is all.")


@dataclass(frozen=True)
class LastingInstruction:
    """A lasting instruction, whole and shortened, and what can be checked of it."""

    kind: str
    text: str
    short: str
    checks: tuple[Check, ...] = ()

    def __add__(self, other: LastingInstruction) -> LastingInstruction:
        """Return both instructions as one."""
        return LastingInstruction(
            f"{self.kind}+{other.kind}",
            f"{self.text} {other.text}",
            f"{self.short} {other.short}",
            self.checks + other.checks,
        )


@dataclass(frozen=True)
class Conversation:
    """User turns and the instruction that should outlive them."""

    questions: tuple[str, ...]
    text: str
    short: str
    checks: tuple[Check, ...] = ()
    kind: str = ""


def compose(
    path: Path, turns: int, kinds: Sequence[Kind] | None, seed: int, tally: Tally
) -> list[Conversation]:
    """Compose conversations of `turns` questions that have nothing to do with one another, under a
    random instruction: of these kinds, or in the paper's words, which nobody can check.

    UserError where there are too few questions for one.
    """
    generator = np.random.default_rng(seed_use(seed, "compose"))
    questions = list(_read_questions(path, tally))
    if len(questions) < turns:
        raise UserError(
            f"{path}: {len(questions)} questions for conversations of {turns} "
            f"turns ({tally.line()})",
            "give more questions, or fewer turns",
        )

    order = [questions[index] for index in generator.permutation(len(questions))]
    conversations = []
    for start in range(0, len(order) - turns + 1, turns):
        drawn = _draw_checked(generator, kinds) if kinds else _draw_paper(generator)
        conversations.append(
            Conversation(
                tuple(order[start : start + turns]),
                drawn.text,
                drawn.short,
                drawn.checks,
                drawn.kind,
            )
        )

    return conversations


def compose_dialogs(
    path: Path, turns: int, kinds: Sequence[Kind], seed: int, limit: int | None, tally: Tally
) -> list[GhostDialog]:
    """Compose dialogs to be held, as `compose` does."""
    dialogs = []
    for each in compose(path, turns, kinds, seed, tally)[:limit]:
        dialogs.append(GhostDialog(each.text, (), each.questions, each.checks, each.kind))

    return dialogs


class HoldsDialogs(Protocol):
    """A stage's settings of dialogs under a lasting instruction."""

    @property
    def seed(self) -> int:
        """The source of randomness."""
        ...

    @property
    def ghost(self) -> Path | None:
        """The file of dialogs, or of prompts."""
        ...

    @property
    def ghost_turns(self) -> int | None:
        """Questions of a dialog that is made."""
        ...

    @property
    def ghost_instructions(self) -> tuple[Kind, ...] | None:
        """Kinds to draw; None: all."""
        ...

    @property
    def ghost_limit(self) -> int | None:
        """The most dialogs."""
        ...


def read_dialogs(config: HoldsDialogs, run: Run) -> list[GhostDialog]:
    """Return the dialogs of a file, or, with `ghost_turns`, those made of the questions in it.

    UserError for kinds of instructions without `ghost_turns`.
    """
    path, turns, kinds = config.ghost, config.ghost_turns, config.ghost_instructions
    if kinds and turns is None:
        raise UserError(
            "ghost_instructions needs `ghost_turns`",
            "say of how many questions a dialog is made, or leave it out",
        )
    if path is None:
        return []
    if turns is None:
        return ghost.read(path, config.ghost_limit)

    tally = run.tally("ghost")
    return compose_dialogs(path, turns, kinds or KINDS, config.seed, config.ghost_limit, tally)


def _read_questions(path: Path, tally: Tally) -> Iterator[str]:
    """Yield what prompts of one turn ask that are not tagged for safety; the others are counted as
    left out."""
    for prompt in records.read(Prompt, path):
        tally.read += 1
        if prompt.safety:
            tally.skip("tagged for safety")
        elif len(prompt.messages) > 1:
            tally.skip("of several turns, or with a system turn")
        elif not prompt.messages[-1].content.strip():
            tally.skip("empty")
        else:
            tally.kept += 1
            yield prompt.messages[-1].content


def _draw_paper(generator: np.random.Generator) -> LastingInstruction:
    """Draw one or two of a hobby, a language and a public figure."""
    hobby = generator.choice(HOBBIES)
    language = generator.choice(LANGUAGES)
    figure = generator.choice(FIGURES)
    drawn = (
        LastingInstruction("hobby", f"Your hobby is {hobby}.", f"Hobby: {hobby}."),
        LastingInstruction("language", f"Always answer in {language}.", f"Language: {language}."),
        LastingInstruction("figure", f"Act as {figure}.", f"Figure: {figure}."),
    )
    order = generator.permutation(3)
    first, *others = [drawn[index] for index in order[: generator.integers(1, 3)]]
    return first + others[0] if others else first


def _draw_checked(generator: np.random.Generator, kinds: Sequence[Kind]) -> LastingInstruction:
    """Draw an instruction of one kind, or, one time in three where there are several kinds, of two
    that do not contradict one another."""
    first, *others = generator.permutation(len(kinds))
    instruction = _make(kinds[first], generator)
    if others and generator.random() < 1 / 3:
        second = kinds[others[0]]
        if {kinds[first], second} not in _CONTRARY:
            return instruction + _make(second, generator)

    return instruction


_CONTRARY: tuple[set[str], ...] = (
    {"language", "greeting"},
    {"language", "farewell"},
    {"language", "persona"},
    {"language", "hobby"},
    {"brief", "hobby"},
    {"brief", "persona"},
)
"""kinds of which a small model, or a check of words, cannot obey both"""


def _make(kind: Kind, generator: np.random.Generator) -> LastingInstruction:
    """Make an instruction of one kind, by chance."""

    def choose(values: Sequence[str]) -> str:
        return values[int(generator.integers(len(values)))]

    match kind:
        case "language":
            name = choose(LANGUAGES)
            full, short = f"Always answer in {name}.", f"Language: {name}."
            check = Check(kind, name)
        case "persona":
            return _make_persona(choose(("a pirate", *FIGURES)))
        case "hobby":
            name = choose(HOBBIES)
            full, short = f"You love {name}: mention {name} in every answer.", f"Hobby: {name}."
            check = Check("mentions", name)
        case "greeting":
            words = choose(GREETINGS)
            full, short = f'Begin every answer with "{words}"', f'Begin with "{words}"'
            check = Check("starts", words)
        case "farewell":
            words = choose(FAREWELLS)
            full, short = f'End every answer with "{words}"', f'End with "{words}"'
            check = Check("ends", words)
        case "case":
            name = choose(("upper case", "lower case"))
            full, short = f"Write every answer in {name} letters only.", f"Letters: {name}."
            check = Check(name)
        case "emoji":
            full, short = "Use an emoji in every answer.", "Style: emoji."
            check = Check("emoji")
        case "brief":
            full, short = "Answer every question in at most ten words.", "Length: ten words."
            check = Check("at most", "10")

    return LastingInstruction(kind, full, short, (check,))


def _make_persona(name: str) -> LastingInstruction:
    """Make an instruction to act as someone: of a figure a check sees the name alone, so the
    instruction asks for it."""
    if name == "a pirate":
        return LastingInstruction(
            "persona", "Always talk like a pirate.", "Figure: a pirate.", (Check("pirate"),)
        )

    return LastingInstruction(
        "persona",
        f'Act as {name}: begin every answer with "{name} here."',
        f"Figure: {name}.",
        (Check("starts", f"{name} here."),),
    )
