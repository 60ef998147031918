"""`llama2 chat CHECKPOINT`: talk to a model in the terminal; on a pipe, one answer for each line
that comes in (A.7).

Answers go to stdout, everything else to stderr: at a terminal as Markdown, on a pipe as the text
they are. No system prompt is set unless the user sets one. On a pipe every line is something to
answer, also one that begins with a slash: it comes from data that nobody has read.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TextIO

from pydantic import Field

from llama2.chat.keyboard import History, open_reader, read_message, remember
from llama2.chat.screen import make_display
from llama2.chat.session import ChatSession, note
from llama2.config import Config as Section
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.dialogue import Chat
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.model import quantize
from llama2.ranks import join
from llama2.reading.rows import detect_encoding
from llama2.tokenizer.template import check_template, require_system

POSITIONAL = "checkpoint"


class Config(Section):
    """Talk to a checkpoint. The defaults of sampling are those of Meta's chat example.

    llama2 chat runs/demo/v3

    echo "Name a colour." | llama2 chat runs/demo/v3

    llama2 chat runs/demo/v3 --each-line < questions.txt > answers.txt

    At a terminal /help lists the commands, Ctrl-C interrupts an answer and Ctrl-D leaves.
    """

    checkpoint: Path
    """directory of the model, or a GGUF file; package:NAME is the one in an installed package"""
    system: str = ""
    """system prompt"""
    temperature: float = Field(0.6, ge=0)
    """0 always takes the likeliest token"""
    top_p: float = Field(0.9, gt=0, le=1)
    """the likeliest tokens up to this share of the probability"""
    max_tokens: int = Field(1024, ge=1)
    """most tokens of an answer"""
    seed: int = 0
    """the same seed and messages give the same answers"""
    precision: quantize.WeightPrecision = "bf16"
    """precision of the weights; int8 and int4 (needs torchao) make decoding read less, and
    `llama2 quantize` measures what they cost"""
    plain: bool = False
    """show answers as the text they are, not as Markdown"""
    each_line: bool = False
    """on a pipe, answer each line as a conversation of its own; else they are turns of one"""
    commands: bool = False
    """on a pipe, carry out lines such as /system TEXT and /reset too; anything in the input may
    then write files"""
    history: bool = True
    """offer messages of earlier runs again; they are kept in $XDG_STATE_HOME/llama2/history, which
    only you can read"""


def run(config: Config) -> None:
    """Load the checkpoint and talk until the user leaves."""
    ranks = join()
    tokenizer = checkpoint.load_tokenizer(config.checkpoint)

    if not checkpoint.is_scorer(config.checkpoint):  # which is refused as what it is
        check_template(config.checkpoint, tokenizer)
        if config.system:
            require_system(tokenizer)

    quantize.check(config.precision)
    model = checkpoint.load(
        config.checkpoint, dtype=quantize.load_dtype(config.precision), device=ranks.device
    )
    engine = Engine(model.eval().requires_grad_(False), slots=1, precision=config.precision)
    engine.test(config.checkpoint)
    meter = SpeedMeter(engine)
    _prepare_streams()

    answered = chat(
        Chat(meter, tokenizer),
        Sampling(config.temperature, config.top_p, max_tokens=config.max_tokens, seed=config.seed),
        config.system,
        meter=meter,
        history=_open_history() if config.history and sys.stdin.isatty() else None,
        plain=config.plain,
        each_line=config.each_line,
        commands=config.commands,
    )
    if not answered:
        sys.exit(UserError.exit_code)


def _prepare_streams() -> None:
    """Let no stray byte end the session, and read stdin in its own encoding, as files of Windows
    name it."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")

    source = sys.stdin
    if not isinstance(source, TextIOWrapper):
        return

    if codecs.lookup(source.encoding).name == "ascii":
        source.reconfigure(encoding="utf-8")  # of which ASCII is a part

    if not source.isatty() and isinstance(source.buffer, BufferedReader):
        head = source.buffer.peek(4)[:4]
        encoding = "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else detect_encoding(head)
        source.reconfigure(encoding=encoding or source.encoding)


def _open_history() -> History | None:
    try:
        return History(History.default())
    except UserError as error:
        note(f"what you write is not remembered: {error}")
        return None


def chat(
    model: Chat,
    sampling: Sampling,
    system: str = "",
    *,
    source: TextIO | None = None,
    sink: TextIO | None = None,
    meter: object = None,
    history: History | None = None,
    plain: bool = False,
    each_line: bool = False,
    commands: bool = False,
) -> bool:
    """Converse until `source` (default stdin) ends or the user leaves; answers go to `sink`
    (default stdout).

    At a terminal the text of `meter` is shown after each answer, and messages are added to
    `history`. On a pipe lines are text unless `commands` are to be carried out, and turns of one
    conversation unless `each_line` begins one. That conversation may outgrow the context: it ends
    there. Returns False if a line of a pipe could not be answered or carried out.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    session = ChatSession(model, sampling, system, make_display(sink, plain))
    if source.isatty():
        session.interactive, session.meter = True, meter
        _converse(session, history)
        return True

    session.commands, session.each_line = commands, each_line
    with suppress(EOFError):
        for line in source:
            session.take(line)
            if session.outgrown:
                break

    return not session.failed


def _converse(session: ChatSession, history: History | None) -> None:
    """Take what a person types until they leave."""
    earlier: list[str] = []
    try:
        earlier = history.read() if history else []
    except UserError as error:
        history = None
        note(f"what you write is not remembered: {error}")

    read = open_reader(earlier)
    note("Type a message, or /help.")

    while True:
        try:
            text = read_message(read, session.draft)
            history = remember(history, text)
            session.take(text)
        except EOFError:
            break
        except KeyboardInterrupt:
            session.draft = ""
            note("\nCtrl-D or /quit leaves")


class SpeedMeter:
    """An engine whose text is how fast it drew the last answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._times: list[float] = []  # of the tokens of the last answer
        self.context, self.check, self.generate = engine.context, engine.check, engine.generate
        self.update = engine.update

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield the engine's tokens."""
        self._times = []
        for token in self._engine.stream(prompt, sampling):
            self._times.append(time.perf_counter())
            yield token

    def __str__(self) -> str:
        count = len(self._times)
        tokens = f"{count} token{'s' if count != 1 else ''}"
        # from the first token on: reading the prompt is another speed
        seconds = self._times[-1] - self._times[0] if count else 0
        return f"{tokens}, {(count - 1) / seconds:.1f} tokens/s" if seconds else tokens
