"""A checkpoint's own chat template: Jinja, rendered as transformers does (`sandbox` bounds it).

Blocks lose the line end behind them and the spaces before them, loops have `break` and `continue`,
and a template may call `raise_exception` and `strftime_now`, write JSON by `tojson` and mark what
the model generates by `{% generation %}`. `SOURCE_DATE_EPOCH` sets the date that it sees, so that a
run of several days reads one prompt.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from llama2.records import Messages
from llama2.tokenizer.bounds import Overrun
from llama2.tokenizer.said import Said, Seal, make_markers
from llama2.tokenizer.sandbox import BoundedEnvironment, Budget, spend_from

_LONGEST = 1 << 16  # characters of a template
_SMALLEST, _TIMES = 1 << 20, 8  # bound of a result: at least, and for each character said
_DATE = re.compile(r"(?:[^%]|%[a-zA-Z%]|%-[a-zA-Z]){0,200}")
Span = tuple[int, int]


class TemplateFault(Exception):
    """A template that fails; says in a line why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template writes it.

    `text` is sealed: what `seal.markers` finds in it are the template's markers. `generated` are
    the places that the template marks as the model's.
    """

    text: str
    seal: Seal
    generated: tuple[Span, ...]

    def holds(self, text: str) -> bool:
        """Return whether something that was said stands in it."""
        return text in self.seal.remove(self.text)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call, which tells the place of its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_note", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _note(self, context: Any, caller: Callable[[], str]) -> str:
        text = caller()
        pieces, marks = context["__pieces"], context["__marks"]
        marks.append((sum(map(len, pieces)), text))
        return text


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if not _DATE.fullmatch(pattern):
        raise Overrun("its date has another form than Python's")

    return _now().strftime(pattern)


def _now() -> datetime:
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    if fixed.isascii() and fixed.isdigit():
        return datetime.fromtimestamp(int(fixed[:11]), UTC)

    return datetime.now()


@functools.lru_cache(maxsize=1)
def _make_environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _LONGEST:
        raise Overrun(f"it has {len(source):,} characters, more than {_LONGEST:,}")

    return _make_environment().from_string(source)


def render(
    source: str,
    messages: Messages,
    names: Mapping[str, str],
    seal: Seal,
    *,
    prompt: bool = False,
    begun: bool = False,
) -> Rendered:
    """Render a conversation.

    `names` are the texts of tokens that a template may write (`bos_token`, ...); with `prompt` the
    header of the next answer follows. `begun`: the last message is not finished, and `seal.end`
    stands at its end. TemplateFault, with the template's own message, where it fails.
    """
    contents = [message.content for message in messages]
    if begun:
        contents[-1] += seal.end

    rows: list[dict[str, str]] = []
    for message, content in zip(messages, contents, strict=True):
        rows.append({"role": message.role, "content": Said(content)})

    most = _SMALLEST + _TIMES * sum(map(len, contents))
    pieces: list[str] = []
    marks: list[tuple[int, str]] = []
    try:
        template = _compile(source)
        with spend_from(Budget(seal, most)) as budget:
            for piece in template.generate(
                messages=rows,
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                __pieces=pieces,
                __marks=marks,
                **names,
            ):
                pieces.append(piece)
                budget.write_out(len(piece))
    except Exception as error:  # whatever a program of somebody else's raises
        raise TemplateFault(_describe(error)) from None

    text = "".join(pieces)
    spans = [(begin, begin + len(part)) for begin, part in marks]
    if any(text[begin:end] != part for (begin, end), (_, part) in zip(spans, marks, strict=True)):
        raise TemplateFault("it marks what is generated inside a macro or a block, out of place")

    return Rendered(text, seal, tuple(spans))


def make_seal(
    source: str, messages: Messages, names: Mapping[str, str], texts: Sequence[str]
) -> Seal:
    """Return what keeps the contents of messages apart, of the spellings of all control items."""
    contents = [message.content for message in messages]
    return Seal(make_markers(tuple(texts)), [source, *contents, *names.values()])


def _describe(error: Exception) -> str:
    """Say in a line why a template failed."""
    message = " ".join(str(error).split())
    match error:
        case jinja2.TemplateSyntaxError():
            return f"line {error.lineno}: {message}"
        case Overrun() | jinja2.TemplateError():
            return message or type(error).__name__
        case RecursionError():
            return "it calls itself, or is nested, too deeply"
        case _:
            return f"{type(error).__name__}: {message}"


def has_generation(source: str) -> bool:
    """Return whether a template marks what the model says."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
