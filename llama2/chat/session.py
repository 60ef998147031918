"""One conversation at a terminal or on a pipe, and the commands that act on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llama2 import records
from llama2.chat.screen import Display
from llama2.errors import UserError, did_you_mean
from llama2.generate.dialogue import Chat
from llama2.generate.sampling import Sampling
from llama2.reading import files
from llama2.records import Dialog, Message, Messages
from llama2.terminal_text import make_printable

COMMANDS = {
    "/system": "/system TEXT   set the system prompt for the next answers; without TEXT remove it",
    "/retry": "/retry         answer the last message again",
    "/edit": "/edit TEXT     say TEXT instead of the last message; without TEXT, edit it",
    "/reset": "/reset         forget the conversation, keep the system prompt",
    "/save": "/save FILE     add the conversation to FILE (JSON Lines, as training data are)",
    "/load": "/load FILE     go on with the last conversation of FILE",
    "/help": "/help          show this",
    "/quit": "/quit          leave; so does Ctrl-D. Ctrl-C interrupts an answer",
}
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?$", re.DOTALL)


@dataclass
class ChatSession:
    """Takes messages and shows answers. `system` is the system prompt, "" for none."""

    model: Chat
    sampling: Sampling
    system: str
    show: Callable[[], Display]
    interactive: bool = False
    """a person types: messages can be edited, answers interrupted"""
    commands: bool = True
    """lines may be commands"""
    each_line: bool = False
    """each message begins a conversation"""
    meter: object = None
    """its text, the speed of an answer, is shown below each"""

    turns: list[Message] = field(default_factory=list)
    draft: str = ""
    """beginning of the next message: the message that is being edited"""
    failed: bool = False
    """a line could not be answered, or a command not carried out"""
    outgrown: bool = False
    """a message would have fitted into the context but for the conversation before it"""
    _answers: int = 0
    _last: tuple[str, list[Message]] | None = None
    """the last message and the conversation before it"""

    def take(self, line: str) -> None:
        """Carry out a command or answer a message. An error that the user can cause becomes a note,
        and the conversation goes on. EOFError when the user asks to leave."""
        line = line.strip()
        editing, self.draft = bool(self.draft), ""
        if not line:
            return

        command = _COMMAND.match(line) if self.commands else None
        try:
            if command:
                self._carry_out(command[1], (command[2] or "").strip())
            elif self.each_line:
                self.turns, self._answers = [], 0
                self._answer(line, [])
            else:
                self._answer(line, self._last_message()[1] if editing else self.turns)
        except UserError as error:
            self.failed = True
            note(str(error) if self.interactive else f"llama2: error: {error}")

    # --- commands ----

    def _carry_out(self, command: str, argument: str) -> None:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command}", did_you_mean(command, COMMANDS))

        getattr(self, f"_{command[1:]}")(argument)

    def _system(self, text: str) -> None:
        self.system = text
        note("system prompt set" if text else "no system prompt")

    def _retry(self, _: str) -> None:
        self._answer(*self._last_message())

    def _edit(self, text: str) -> None:
        last, before = self._last_message()
        if text:
            self._answer(text, before)
        elif self.interactive:
            self.draft = last
        else:
            raise UserError("/edit needs the new text", "for example /edit Say it in one sentence")

    def _reset(self, _: str) -> None:
        self.turns, self._last = [], None
        note("the conversation is forgotten")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file", "for example /save talk.jsonl")
        if not self.turns:
            raise UserError("there is no conversation to save", "say something first")

        path = files.expand_home(Path(name))
        earlier = list(records.read(Dialog, path)) if path.exists() and path.stat().st_size else []
        count = records.write(path, [*earlier, Dialog(self._with_system(self.turns))])
        note(f"{path}: {count} conversation{'s' if count > 1 else ''}")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs the name of a file", "for example /load talk.jsonl")

        path = files.expand_home(Path(name))
        *_, dialog = records.read(Dialog, path)
        self.system, self.turns = "", list(dialog.messages)
        if self.turns[0].role == "system":
            self.system = self.turns.pop(0).content

        self._last = self.turns[-2].content, self.turns[:-2]
        note(f"{path}: {len(self.turns)} messages, the last to you; /retry answers again")

    def _help(self, _: str) -> None:
        note("\n".join(COMMANDS.values()))

    def _quit(self, _: str) -> None:
        raise EOFError

    # --- answers ----

    def _last_message(self) -> tuple[str, list[Message]]:
        if not self._last:
            raise UserError("nothing has been said yet", "say something first")

        return self._last

    def _with_system(self, messages: list[Message]) -> Messages:
        system = [Message("system", self.system)] if self.system else []
        return (*system, *messages)

    def _answer(self, text: str, before: list[Message]) -> None:
        """Answer `text` said after `before`; if there is an answer, that becomes the
        conversation."""
        question = Message("user", text)
        self._last = text, list(before)
        # the same question asked again gets another answer
        sampling = replace(self.sampling, seed=self.sampling.seed + self._answers)
        self._answers += 1

        try:
            answer = self._draw(self._with_system([*before, question]), sampling)
        except UserError as error:
            if not before:
                raise

            self.outgrown = self.model.has_room(self._with_system([question]), 1)
            raise UserError(error.cause, self._cure(error.cure)) from None

        if answer is not None:
            self.turns = [*before, question, Message("assistant", answer)]

    def _cure(self, cure: str) -> str:
        """Return what to do about a conversation that has grown too long."""
        if self.commands:
            return f"{cure}, or /reset to forget the conversation"
        if self.outgrown:
            return "the conversation ends here: --each-line answers every line alone"

        return cure

    def _draw(self, messages: Messages, sampling: Sampling) -> str | None:
        """Show an answer while it is drawn and return it. A person may interrupt it: what there is
        then is the answer, None if nothing. On a pipe an interruption ends the command."""
        parts: list[str] = []
        display = self.show()
        try:
            for part in self.model.stream(messages, sampling):
                parts.append(part)
                display.add(part)
        except BaseException as error:
            if parts:
                display.end()  # leaves the terminal as it was
            if not (self.interactive and isinstance(error, KeyboardInterrupt)):
                raise

            note("interrupted")
            if not parts:
                return None
        else:
            display.end()

        if self.meter:
            note(str(self.meter))

        return "".join(parts)


def note(text: str) -> None:
    """Tell the user something, on stderr: stdout is for answers alone."""
    print(make_printable(text), file=sys.stderr, flush=True)
