"""Answers as they appear: at a terminal as Markdown, anywhere else as the plain text they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from llama2.terminal_text import make_printable

REFRESH = 0.08
"""seconds between two drawings of a growing answer: often enough to read along, and cheap beside a
token"""


class Display(Protocol):
    """Shows one answer."""

    def add(self, part: str) -> None:
        """Show a further part."""

    def end(self) -> None:
        """End the answer, which is finished or was interrupted."""


def make_display(sink: TextIO, plain: bool = False) -> Callable[[], Display]:
    """Return what makes a display for each answer that goes to `sink`; `plain` asks for the text as
    it is at a terminal too."""
    console = Console(file=sink, highlight=False)
    if plain or not sink.isatty() or console.is_dumb_terminal:
        return lambda: PlainDisplay(sink)

    return lambda: MarkdownDisplay(console)


class PlainDisplay:
    """The text as it is, each part as soon as it comes."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink

    def add(self, part: str) -> None:
        """Show a further part."""
        print(make_printable(part), end="", file=self._sink, flush=True)

    def end(self) -> None:
        """End the line."""
        print(file=self._sink, flush=True)


class MarkdownDisplay:
    """Markdown. A block that is finished is printed for good; the growing one is drawn again and
    again below it."""

    def __init__(self, console: Console) -> None:
        self._console, self._growing, self._drawn, self._printed = console, "", 0.0, False
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def add(self, part: str) -> None:
        """Show a further part, if the last drawing is old enough."""
        self._growing += make_printable(part)
        now = time.monotonic()
        if now - self._drawn < REFRESH:
            return

        self._live.start()
        *finished, self._growing = split_blocks(self._growing)
        for block in finished:
            self._print(block)

        # what has left the terminal could not be drawn again
        height = max(self._console.height - 2, 1)
        self._live.update(_Block(_markdown(self._growing), self._printed, height), refresh=True)
        self._drawn = time.monotonic()

    def end(self) -> None:
        """Print the rest for good."""
        self._live.stop()
        for block in split_blocks(self._growing):
            self._print(block)

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_Block(_markdown(text), self._printed), end="")
            self._printed = True


class _Block:
    """Markdown without the empty lines around it, perhaps set `apart` from the text above; at most
    its last `height` lines."""

    def __init__(self, content: Markdown, apart: bool, height: int | None = None) -> None:
        self._content, self._apart, self._height = content, apart, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        while lines and not _has_text(lines[0]):
            lines.pop(0)

        while lines and not _has_text(lines[-1]):
            lines.pop()

        if self._apart:
            yield Segment.line()

        if self._height:
            lines = lines[-self._height :]

        for line in lines:
            yield from line
            yield Segment.line()


def _has_text(line: list[Segment]) -> bool:
    return any(segment.text.strip() for segment in line)


def split_blocks(text: str) -> list[str]:
    """Return the blocks of a Markdown text: paragraphs, lists, tables, ... All but the last are
    finished: nothing more can come to them."""
    lines = text.split("\n")
    starts = [
        token.map[0]
        for token in _markdown(text).parsed
        if token.level == 0 and token.nesting >= 0 and token.map
    ]
    edges = [0, *starts[1:], len(lines)]
    return ["\n".join(lines[start:end]) for start, end in pairwise(edges)]


def _markdown(text: str) -> Markdown:
    # Addresses are written out: a link whose text names another address than it leads to deceives.
    return Markdown(text, code_theme="ansi_dark", hyperlinks=False)
