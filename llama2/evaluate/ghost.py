"""Obedience to an instruction of the first turn, turn by turn (§3.3, table 30).

Each dialog gives its instruction once, in the first user turn or as the system message, and then
asks its questions one by one; the model's own answers stay in the dialog. All dialogs go through a
turn together, as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from llama2 import records
from llama2.errors import UserError
from llama2.evaluate.constraints import Check, obeys_all, read_checks
from llama2.evaluate.winrate import measure_share
from llama2.generate.dialogue import Chat
from llama2.generate.sampling import Sampling
from llama2.judging import obeys
from llama2.records import Message, Messages, Prompt
from llama2.results import Proportion

InstructionRole = Literal["user", "system"]
"""where the instruction stands: in the first user turn, or as the system message"""


@dataclass(frozen=True)
class GhostDialog:
    """Questions under a lasting instruction; an answer obeys if it starts with all `markers` and
    passes all `checks`."""

    instruction: str
    markers: tuple[str, ...]
    questions: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    kind: str = ""

    def is_obeyed_by(self, turn: int, answer: str) -> bool:
        """Return whether the answer to a question obeys."""
        if self.checks and not obeys_all(self.checks, self.questions[turn], answer):
            return False

        return obeys(self.markers, answer)


def read(path: Path, limit: int | None = None) -> list[GhostDialog]:
    """Read dialogs from prompts whose metadata holds `instruction` {text, and markers or checks}
    and `questions`.

    UserError for a prompt that lacks them.
    """
    return [_parse(path, prompt) for prompt in islice(records.read(Prompt, path), limit)]


def _parse(path: Path, prompt: Prompt) -> GhostDialog:
    try:
        instruction = prompt.metadata["instruction"]
        text, questions = instruction["text"], tuple(prompt.metadata["questions"])
        rows = instruction.get("checks")
        markers = tuple(instruction["markers"] if rows is None else instruction.get("markers", ()))
        kind = str(instruction.get("kind", ""))
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: prompt '{prompt.id}' has no metadata.instruction.text, .markers or .checks, "
            "or metadata.questions",
            "Ghost Attention is measured on such prompts only",
        ) from None

    checks = () if rows is None else read_checks(rows, f"{path}: prompt '{prompt.id}'")
    return GhostDialog(text, markers, questions, checks, kind)


def converse(
    chat: Chat,
    dialogs: Sequence[GhostDialog],
    sampling: Sampling,
    role: InstructionRole = "user",
    first: int = 0,
) -> list[Messages]:
    """Hold all dialogs to their last question; each ends with the model's last answer.

    A dialog that fills the context (a model that rambles) ends early. `first`: the place of the
    first dialog in the list of which these are a part; a dialog's random numbers depend on its own
    place alone.
    """
    talks: list[Messages] = [()] * len(dialogs)
    live = list(range(len(dialogs)))
    for turn in range(max((len(dialog.questions) for dialog in dialogs), default=0)):
        live = [i for i in live if turn < len(dialogs[i].questions)]
        prompts = {i: (*talks[i], *ask(dialogs[i], turn, role)) for i in live}
        prompts = {i: prompt for i, prompt in prompts.items() if chat.has_room(prompt)}
        if not prompts:
            break

        live = list(prompts)
        indices = [first + i for i in live]
        turn_sampling = replace(sampling, n=1, seed=sampling.seed + turn)
        answers = chat.answer(list(prompts.values()), turn_sampling, indices)
        for i, (answer, *_) in zip(live, answers, strict=True):
            talks[i] = (*prompts[i], Message("assistant", answer.text))

    return talks


def ask(dialog: GhostDialog, turn: int, role: InstructionRole) -> Messages:
    """Return the messages of a turn up to its question: in the first, the instruction too."""
    question = dialog.questions[turn]
    if turn > 0:
        return (Message("user", question),)
    if role == "system":
        return (Message("system", dialog.instruction), Message("user", question))

    return (Message("user", f"{dialog.instruction} {question}"),)


def check_turns(dialog: GhostDialog, talk: Messages) -> list[bool]:
    """Return for each question whether its answer obeys; one that was not asked does not."""
    answers = [message.content for message in talk if message.role == "assistant"]
    missing = len(dialog.questions) - len(answers)
    marks = [dialog.is_obeyed_by(turn, answer) for turn, answer in enumerate(answers)]
    return marks + [False] * missing


def count_by_turn(dialogs: Sequence[GhostDialog], talks: Sequence[Messages]) -> list[Proportion]:
    """Return the share of questions answered in obedience at turn 1, 2, ...

    A question the dialog had no room for is not obeyed.
    """
    turns: dict[int, list[bool]] = {}
    for dialog, talk in zip(dialogs, talks, strict=True):
        for turn, obeyed in enumerate(check_turns(dialog, talk)):
            turns.setdefault(turn, []).append(obeyed)

    return [measure_share(sum(turns[turn]), len(turns[turn])) for turn in sorted(turns)]


def count_by_kind(
    dialogs: Sequence[GhostDialog], talks: Sequence[Messages]
) -> dict[str, list[Proportion]]:
    """Return what `count_by_turn` does, by kind of instruction, of those that a program checks."""
    kinds: dict[str, list[int]] = {}
    for place, dialog in enumerate(dialogs):
        if dialog.checks:
            kinds.setdefault(dialog.kind or "other", []).append(place)

    counts = {}
    for kind in sorted(kinds):
        chosen = [dialogs[place] for place in kinds[kind]]
        counts[kind] = count_by_turn(chosen, [talks[place] for place in kinds[kind]])

    return counts
