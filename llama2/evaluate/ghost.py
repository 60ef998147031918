"""How long an instruction of the first turn is obeyed (§3.3, table 30).

Each dialog gives its instruction once, in the first user turn or as the system message, and then asks its questions
one by one; the model's own answers stay in the dialog. All dialogs go through a turn together, as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
    """A conversation under a lasting instruction; an answer obeys if it starts with all `markers`."""

    instruction: str
    markers: tuple[str, ...]
    questions: tuple[str, ...]


def read(path: Path, limit: int | None = None) -> list[Dialog]:
    """Dialogs from prompts whose metadata holds `instruction` {text, markers} and `questions`."""
    dialogs = []
    for prompt in records.read(Prompt, path):
        try:
            instruction = prompt.metadata["instruction"]
            dialogs.append(Dialog(instruction["text"], tuple(instruction["markers"]),
                                  tuple(prompt.metadata["questions"])))
        except (KeyError, TypeError):
            raise UserError(f"{path}: prompt '{prompt.id}' has no metadata.instruction.text, .markers or "
                            "metadata.questions", "Ghost Attention is measured on such prompts only") from None
        if len(dialogs) == limit:
            break
    return dialogs


def opening(dialog: Dialog, place: Place) -> Messages:
    """The messages up to the first question."""
    if place == "system":
        return (Message("system", dialog.instruction), Message("user", dialog.questions[0]))
    return (Message("user", f"{dialog.instruction} {dialog.questions[0]}"),)


def converse(chat: Chat, dialogs: Sequence[Dialog], sampling: Sampling, place: Place = "user") -> list[Messages]:
    """Hold all dialogs to their last question; each ends with the model's last answer."""
    talks = [opening(dialog, place) for dialog in dialogs]
    for turn in range(max((len(dialog.questions) for dialog in dialogs), default=0)):
        live = [i for i, dialog in enumerate(dialogs) if turn < len(dialog.questions)]
        if turn:
            for i in live:
                talks[i] = (*talks[i], Message("user", dialogs[i].questions[turn]))
        answers = chat.answers([talks[i] for i in live], replace(sampling, n=1, seed=sampling.seed + turn))
        for i, row in zip(live, answers, strict=True):
            talks[i] = (*talks[i], Message("assistant", row[0].text))
    return talks


def by_turn(dialogs: Sequence[Dialog], talks: Sequence[Messages]) -> list[dict[str, float]]:
    """The share of answers that obey at turn 1, 2, ...: {"rate", "n", "low", "high"} each."""
    obeyed: dict[int, list[bool]] = {}
    for dialog, talk in zip(dialogs, talks, strict=True):
        answers = [message.content for message in talk if message.role == "assistant"]
        for turn, answer in enumerate(answers):
            obeyed.setdefault(turn, []).append(adherence(dialog.markers, answer))
    return [proportion(sum(obeyed[turn]), len(obeyed[turn])) for turn in sorted(obeyed)]
