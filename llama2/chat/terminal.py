"""`llama2 chat CHECKPOINT`: talk to a model in the terminal; on a pipe, one answer for each line
that comes in (A.7).

Answers go to stdout, everything else to stderr: at a terminal as Markdown, on a pipe as the text
they are. No system prompt is set unless the user sets one. On a pipe every line is something to
answer, also one that begins with a slash: it comes from data that nobody has read.
"""

from __future__ import annotations

import codecs
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TextIO

from pydantic import Field

from llama2 import records
from llama2.chat import keyboard
from llama2.chat.keyboard import History
from llama2.chat.screen import Display, display
from llama2.config import Config as BaseConfig
from llama2.errors import UserError, did_you_mean
from llama2.formats import checkpoint
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model import quantize
from llama2.ranks import join
from llama2.reading import files
from llama2.reading.rows import detect_encoding
from llama2.records import Dialog, Message, Messages
from llama2.terminal_text import printable
from llama2.tokenizer.template import check_template

POSITIONAL = "checkpoint"
COMMANDS = {
    "/system": "/system TEXT   set the system prompt, from the next answer on; without TEXT remove it",
    "/retry": "/retry         answer the last message again",
    "/edit": "/edit TEXT     say TEXT instead of the last message; without TEXT, edit it",
    "/reset": "/reset         forget the conversation, keep the system prompt",
    "/save": "/save FILE     add the conversation to FILE (JSON Lines, as training data are)",
    "/load": "/load FILE     go on with the last conversation of FILE",
    "/help": "/help          show this",
    "/quit": "/quit          leave; so does Ctrl-D. Ctrl-C interrupts an answer",
}
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?$", re.DOTALL)


class Config(BaseConfig):
    """Talk to a checkpoint. The defaults of sampling are those of Meta's chat example."""

    checkpoint: Path
    """directory of the model"""
    system: str = ""
    """system prompt"""
    temperature: float = Field(0.6, ge=0)
    """0 always takes the likeliest token"""
    top_p: float = Field(0.9, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)
    """the longest answer"""
    seed: int = 0
    precision: quantize.WeightPrecision = "bf16"
    """of weights; int8 and int4 (needs torchao) let decoding read less, and `llama2 quantize` says
    what they cost"""
    plain: bool = False
    """show answers as the text they are, not as Markdown"""
    each_line: bool = False
    """on a pipe, answer each line as a conversation of its own; else they are turns of one"""
    commands: bool = False
    """on a pipe, obey lines such as /system TEXT and /reset too; anything in the input may then
    write files"""
    history: bool = True
    """offer messages of earlier runs again; they are kept in $XDG_STATE_HOME/llama2/history, for
    you alone to read"""


def run(config: Config) -> None:
    """Load the checkpoint and talk until the user leaves."""
    ranks = join()
    tokenizer = checkpoint.load_tokenizer(config.checkpoint)

    if not checkpoint.is_scorer(config.checkpoint):  # which is refused as what it is
        check_template(config.checkpoint, tokenizer.template)

    quantize.check(config.precision)
    model = checkpoint.load(
        config.checkpoint, dtype=quantize.load_dtype(config.precision), device=ranks.device
    )
    inner = Engine(model.eval().requires_grad_(False), slots=1, precision=config.precision)
    inner.test(config.checkpoint)
    engine = Meter(inner)
    sampling = Sampling(
        config.temperature, config.top_p, max_tokens=config.max_tokens, seed=config.seed
    )

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte must not end the session

    if isinstance(sys.stdin, TextIOWrapper):
        _decode(sys.stdin)

    history = _history() if config.history and sys.stdin.isatty() else None
    if not chat(
        Chat(engine, tokenizer),
        sampling,
        config.system,
        meter=engine,
        history=history,
        plain=config.plain,
        each_line=config.each_line,
        commands=config.commands,
    ):
        sys.exit(UserError.exit_code)


def _decode(source: TextIOWrapper) -> None:
    """Read a source in the encoding that it names, as files of Windows do."""
    if codecs.lookup(source.encoding).name == "ascii":
        source.reconfigure(encoding="utf-8")  # of which ASCII is a part

    if source.isatty() or not isinstance(source.buffer, BufferedReader):
        return

    head = source.buffer.peek(4)[:4]
    if encoding := "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else detect_encoding(head):
        source.reconfigure(encoding=encoding)


def _history() -> History | None:
    try:
        return History(History.default())
    except UserError as error:
        _note(f"what you write is not remembered: {error}")
        return None


def chat(
    model: Chat,
    sampling: Sampling,
    system: str = "",
    *,
    source: TextIO | None = None,
    sink: TextIO | None = None,
    meter: Meter | None = None,
    history: History | None = None,
    plain: bool = False,
    each_line: bool = False,
    commands: bool = False,
) -> bool:
    """Converse until `source` (default stdin) ends or the user leaves; answers go to `sink`
    (default stdout).

    At a terminal `meter` tells how fast answers were, and what is written goes into `history`. On a
    pipe lines are text unless `commands` are to be obeyed, and turns of one conversation unless
    `each_line` begins one. That conversation may outgrow the context: it ends there. False if a
    line of a pipe could not be answered or obeyed.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    session = Session(model, sampling, system, display(sink, plain))
    if source.isatty():
        session.meter = meter
        _converse(session, history)
        return True

    session.complaint, session.commands, session.alone = "llama2: error: ", commands, each_line
    for line in source:
        session.turn(line)
        if not session.open or session.outgrown:
            break

    return not session.failed


def _converse(session: Session, history: History | None) -> None:
    try:
        earlier = history.read() if history else []
    except UserError as error:
        earlier, history = [], None
        _note(f"what you write is not remembered: {error}")

    ask = keyboard.recorded(history, keyboard.reader(earlier))
    session.editable = True
    _note("Type a message, or /help.")

    while session.open:
        try:
            session.turn(ask(session.draft))
        except EOFError:
            break
        except KeyboardInterrupt:
            session.draft = ""
            _note("\nCtrl-D or /quit leaves")


class Meter:
    """An engine that tells how fast it was."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.tokens, self._begun, self._ended = engine, 0, 0.0, 0.0
        self.context, self.check, self.generate = engine.context, engine.check, engine.generate

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """As the engine's, counted."""
        self.tokens = 0
        for token in self._engine.stream(prompt, sampling):
            self._ended = time.perf_counter()
            self._begun = self._begun if self.tokens else self._ended
            self.tokens += 1
            yield token

    def __str__(self) -> str:
        # from the first token on: reading the prompt is another speed
        seconds = self._ended - self._begun
        speed = (
            f", {(self.tokens - 1) / seconds:.1f} tokens/s"
            if self.tokens > 1 and seconds > 0
            else ""
        )
        return f"{self.tokens} token{'s' if self.tokens != 1 else ''}{speed}"


class Session:
    """One conversation and the commands that act on it. `open` turns False when the user asks to
    leave.

    `failed` tells whether a line could not be answered or obeyed; `complaint` stands before the
    note that says why. `draft` is what the user's next message should begin with: the message that
    is being edited, where the source is `editable`. `commands` tells whether lines may be commands,
    `alone` whether each message begins a conversation. `outgrown` turns True when a message would
    have fitted into the context but for what had been said before.
    """

    def __init__(
        self, model: Chat, sampling: Sampling, system: str, show: Callable[[], Display]
    ) -> None:
        self.open, self.failed, self.complaint, self.draft, self.editable = (
            True,
            False,
            "",
            "",
            False,
        )
        self.commands, self.alone, self.outgrown = True, False, False
        self.turns: list[Message] = []
        self.meter: Meter | None = None
        self._model, self._sampling, self._system = model, sampling, system
        self._show = show
        self._asked = 0
        # the last message and what had been said before it
        self._last: tuple[str, list[Message]] | None = None

    def turn(self, line: str) -> None:
        """Obey a command or answer a message; whatever the user can cause becomes a note, and the
        session goes on."""
        line = line.strip()
        editing, self.draft = bool(self.draft), ""
        if not line or not self.open:
            return

        command = _COMMAND.match(line) if self.commands else None
        try:
            if command:
                self._obey(command[1], (command[2] or "").strip())
            else:
                if self.alone:
                    self._begin()

                self._answer(line, self._earlier()[1] if editing else self.turns)
        except UserError as error:
            self.failed = True
            _note(f"{self.complaint}{error}")

    def _begin(self) -> None:
        """A conversation as if there had been none before."""
        self.turns, self._last, self._asked = [], None, 0

    def _obey(self, command: str, argument: str) -> None:
        if command == "/system":
            self._system = argument
            _note("system prompt set" if argument else "no system prompt")
        elif command == "/retry":
            self._answer(*self._earlier())
        elif command == "/edit":
            self._edit(argument)
        elif command == "/load":
            self._load(argument)
        elif command == "/reset":
            self.turns, self._last = [], None
            _note("the conversation is forgotten")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            _note("\n".join(COMMANDS.values()))
        elif command == "/quit":
            self.open = False
        else:
            raise UserError(f"unknown command {command}", did_you_mean(command, COMMANDS))

    def _earlier(self) -> tuple[str, list[Message]]:
        if not self._last:
            raise UserError("nothing has been said yet", "say something first")

        return self._last

    def _edit(self, text: str) -> None:
        last, before = self._earlier()
        if text:
            self._answer(text, before)
        elif self.editable:
            self.draft = last
        else:
            raise UserError("/edit needs the new text", "for example /edit Say it in one sentence")

    def _answer(self, text: str, before: list[Message]) -> None:
        """Answer `text` said after `before`; if there is an answer, that becomes the
        conversation."""
        question = Message("user", text)
        self._last = text, list(before)
        self._asked += 1  # the same question asked again gets another answer
        sampling = replace(self._sampling, seed=self._sampling.seed + self._asked - 1)

        try:
            said = self._draw((*self._head(), *before, question), sampling)
        except UserError as error:
            if not before:
                raise

            self.outgrown = self._model.fits((*self._head(), question))
            raise UserError(error.cause, self._room(error.cure)) from None

        if said is not None:
            self.turns = [*before, question, Message("assistant", said)]

    def _room(self, cure: str) -> str:
        """What to do about a conversation that has grown too long."""
        if self.commands:
            return f"{cure}, or /reset to forget the conversation"

        return (
            "the conversation ends here: --each-line answers every line alone"
            if self.outgrown
            else cure
        )

    def _draw(self, messages: Messages, sampling: Sampling) -> str | None:
        """Show an answer while it is drawn. At a terminal it may be interrupted: what there is then
        is kept, None if nothing. On a pipe an interruption ends the command."""
        said: list[str] = []
        screen = self._show()
        try:
            for part in self._model.reply_stream(messages, sampling):
                said.append(part)
                screen.add(part)

            screen.end()
        except KeyboardInterrupt:
            if said:
                screen.end()

            if not self.editable:
                raise

            _note("interrupted")
            if not said:
                return None
        except BaseException:
            if said:
                screen.end()  # leaves the terminal as it was

            raise

        if self.meter:
            _note(str(self.meter))

        return "".join(said)

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs the name of a file", "for example /load talk.jsonl")

        path = files.expand_home(Path(name))
        *_, dialog = records.read(Dialog, path)
        system = dialog.messages[0].role == "system"
        self._system = dialog.messages[0].content if system else ""
        self.turns = list(dialog.messages[1 if system else 0 :])
        self._last = self.turns[-2].content, self.turns[:-2]
        _note(f"{path}: {len(self.turns)} messages, the last to you; /retry answers again")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file", "for example /save talk.jsonl")
        if not self.turns:
            raise UserError("there is no conversation to save", "say something first")

        path = files.expand_home(Path(name))
        earlier = list(records.read(Dialog, path)) if path.exists() and path.stat().st_size else []
        count = records.write(path, [*earlier, Dialog((*self._head(), *self.turns))])
        _note(f"{path}: {count} conversation{'s' if count > 1 else ''}")

    def _head(self) -> Iterator[Message]:
        if self._system:
            yield Message("system", self._system)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
