"""How long an instruction of the first turn is obeyed (§3.3, table 30).

Each dialog gives its instruction once, in the first user turn or as the system message, and then
asks its questions one by one; the model's own answers stay in the dialog. All dialogs go through a
turn together, as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate.winrate import proportion
from llama2.generate.dialogue import Chat
from llama2.generate.sampling import Sampling
from llama2.microworld.rater import adherence
from llama2.records import Message, Messages, Prompt

Place = Literal["user", "system"]


@dataclass(frozen=True)
class Dialog:
    """A conversation under a lasting instruction; an answer obeys if it starts with all
    `markers`."""

    instruction: str
    markers: tuple[str, ...]
    questions: tuple[str, ...]


def read(path: Path, limit: int | None = None) -> list[Dialog]:
    """Dialogs from prompts whose metadata holds `instruction` {text, markers} and `questions`."""
    dialogs = []
    for prompt in records.read(Prompt, path):
        try:
            instruction = prompt.metadata["instruction"]
            dialogs.append(
                Dialog(
                    instruction["text"],
                    tuple(instruction["markers"]),
                    tuple(prompt.metadata["questions"]),
                )
            )
        except (KeyError, TypeError):
            raise UserError(
                f"{path}: prompt '{prompt.id}' has no metadata.instruction.text, .markers or "
                "metadata.questions",
                "Ghost Attention is measured on such prompts only",
            ) from None

        if len(dialogs) == limit:
            break

    return dialogs


def opening(dialog: Dialog, place: Place) -> Messages:
    """The messages up to the first question."""
    if place == "system":
        return (Message("system", dialog.instruction), Message("user", dialog.questions[0]))

    return (Message("user", f"{dialog.instruction} {dialog.questions[0]}"),)


def converse(
    chat: Chat, dialogs: Sequence[Dialog], sampling: Sampling, place: Place = "user", first: int = 0
) -> list[Messages]:
    """Hold all dialogs to their last question; each ends with the model's last answer.

    A dialog that fills the context (a model that rambles) ends early. `first`: the place of the
    first dialog in the list of which these are a part; a dialog's random numbers depend on its own
    place alone.
    """
    talks: list[Messages] = [()] * len(dialogs)
    live = list(range(len(dialogs)))
    for turn in range(max((len(dialog.questions) for dialog in dialogs), default=0)):
        asked = {
            i: (*talks[i], Message("user", dialogs[i].questions[turn]))
            if turn
            else opening(dialogs[i], place)
            for i in live
            if turn < len(dialogs[i].questions)
        }
        live = [i for i, talk in asked.items() if chat.has_room(talk)]
        if not live:
            break

        talks = [asked[i] if i in live else talk for i, talk in enumerate(talks)]
        answers = chat.answer(
            [talks[i] for i in live],
            replace(sampling, n=1, seed=sampling.seed + turn),
            [first + i for i in live],
        )
        for i, row in zip(live, answers, strict=True):
            talks[i] = (*talks[i], Message("assistant", row[0].text))

    return talks


def obedience(dialog: Dialog, talk: Messages) -> list[bool]:
    """Whether each question was answered in obedience."""
    answers = [message.content for message in talk if message.role == "assistant"]
    return [
        turn < len(answers) and adherence(dialog.markers, answers[turn])
        for turn in range(len(dialog.questions))
    ]


def by_turn(dialogs: Sequence[Dialog], talks: Sequence[Messages]) -> list[dict[str, Any]]:
    """The share of questions answered in obedience at turn 1, 2, ...: {"rate", "n", "low", "high"}
    each.

    A question the dialog had no room for is not.
    """
    obeyed: dict[int, list[bool]] = {}
    for dialog, talk in zip(dialogs, talks, strict=True):
        for turn, obeys in enumerate(obedience(dialog, talk)):
            obeyed.setdefault(turn, []).append(obeys)

    return [proportion(sum(obeyed[turn]), len(obeyed[turn])) for turn in sorted(obeyed)]
