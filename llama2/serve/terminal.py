"""`llama2 chat CHECKPOINT`: talk to a model in the terminal; on a pipe, one answer for each line that comes in (A.7).

Answers go to stdout, everything else to stderr. No system prompt is set unless the user sets one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import torch
from pydantic import Field

from llama2 import mesh, records
from llama2.config import Config as BaseConfig
from llama2.errors import UserError, did_you_mean
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.mesh import Precision
from llama2.model import checkpoint
from llama2.records import Dialog, Message
from llama2.tokenizer.tokenizer import Tokenizer

POSITIONAL = "checkpoint"
COMMANDS = {
    "/system": "/system TEXT   set the system prompt, from the next answer on; without TEXT remove it",
    "/reset": "/reset         forget the conversation, keep the system prompt",
    "/save": "/save FILE     add the conversation to FILE (JSON Lines, as training data are)",
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
    precision: Precision = "bf16"


def run(config: Config) -> None:
    """Load the checkpoint and talk until the user leaves."""
    mesh.init()
    tokenizer = Tokenizer.load(config.checkpoint)
    pieces = checkpoint.config_of(config.checkpoint).vocab_size
    if tokenizer.vocab_size != pieces:
        raise UserError(f"{config.checkpoint}: the tokenizer has {tokenizer.vocab_size} pieces, the model {pieces}",
                        "put the tokenizer there with which the model was trained")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = checkpoint.load(config.checkpoint, dtype=dtype, device=mesh.device())
    engine = Engine(model.eval(), slots=1, precision=config.precision)
    sampling = Sampling(config.temperature, config.top_p, max_tokens=config.max_tokens, seed=config.seed)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte must not end the session
    if not chat(Chat(engine, tokenizer), sampling, config.system):
        sys.exit(UserError.exit_code)


def chat(
    model: Chat, sampling: Sampling, system: str = "", *, source: TextIO | None = None, sink: TextIO | None = None
) -> bool:
    """Converse until `source` (default stdin) ends or the user leaves; answers go to `sink` (default stdout).

    False if `source` is a pipe and one of its lines could not be answered or obeyed.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    session = Session(model, sampling, system, sink)
    if not source.isatty():
        session.complaint = "llama2: error: "
        for line in source:
            session.turn(line)
            if not session.open:
                break
        return not session.failed
    if importlib.util.find_spec("readline"):  # gives input() editing and history; absent on some systems
        importlib.import_module("readline")
    _note("Type a message, or /help.")
    while session.open:
        try:
            session.turn(input("> "))
        except EOFError:
            break
        except KeyboardInterrupt:
            _note("\nCtrl-D or /quit leaves")
    return True


class Session:
    """One conversation and the commands that act on it. `open` turns False when the user asks to leave.

    `failed` tells whether a line could not be answered or obeyed; `complaint` stands before the note that says why.
    """

    def __init__(self, model: Chat, sampling: Sampling, system: str, sink: TextIO) -> None:
        self.open, self.failed, self.complaint = True, False, ""
        self.turns: list[Message] = []
        self._model, self._sampling, self._system, self._sink = model, sampling, system, sink
        self._asked = 0

    def turn(self, line: str) -> None:
        """Obey a command or answer a message; whatever the user can cause becomes a note, and the session goes on."""
        line = line.strip()
        if not line or not self.open:
            return
        command = _COMMAND.match(line)
        try:
            if command:
                self._obey(command[1], (command[2] or "").strip())
            else:
                self._answer(line)
        except UserError as error:
            self.failed = True
            _note(f"{self.complaint}{error}")

    def _obey(self, command: str, argument: str) -> None:
        if command == "/system":
            self._system = argument
            _note("system prompt set" if argument else "no system prompt")
        elif command == "/reset":
            self.turns = []
            _note("the conversation is forgotten")
        elif command == "/save":
            self._save(argument)
        elif command == "/help":
            _note("\n".join(COMMANDS.values()))
        elif command == "/quit":
            self.open = False
        else:
            raise UserError(f"unknown command {command}", did_you_mean(command, COMMANDS))

    def _answer(self, text: str) -> None:
        question = Message("user", text)
        self._asked += 1  # the same question asked again gets another answer
        sampling = replace(self._sampling, seed=self._sampling.seed + self._asked - 1)
        said: list[str] = []
        try:
            for part in self._model.reply_stream((*self._head(), *self.turns, question), sampling):
                said.append(part)
                print(_printable(part), end="", file=self._sink, flush=True)
        except KeyboardInterrupt:
            _note("\ninterrupted")
            if not said:
                return
        except UserError as error:
            cure = f"{error.cure}, or /reset to forget the conversation" if self.turns else error.cure
            raise UserError(error.cause, cure) from None
        print(file=self._sink, flush=True)
        self.turns += [question, Message("assistant", "".join(said))]

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file", "for example /save talk.jsonl")
        if not self.turns:
            raise UserError("there is no conversation to save", "say something first")
        path = Path(name).expanduser()
        earlier = list(records.read(Dialog, path)) if path.exists() and path.stat().st_size else []
        count = records.write(path, [*earlier, Dialog((*self._head(), *self.turns))])
        _note(f"{path}: {count} conversation{'s' if count > 1 else ''}")

    def _head(self) -> Iterator[Message]:
        if self._system:
            yield Message("system", self._system)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """A model may emit any byte; what would command the terminal is shown as U+FFFD."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
