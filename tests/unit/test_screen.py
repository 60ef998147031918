"""Answers as they appear: text on a pipe, Markdown at a terminal."""

import io
import re

import pytest
from rich.console import Console

from llama2.chat import screen
from llama2.chat.screen import MarkdownDisplay, PlainDisplay, make_display, split_blocks

TEXT = "# Title\n\nA **bold** word.\n\n- one\n- two\n\n```python\nx = 1\n\ny = 2\n```\n\nEnd."


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(text: str, size: int, height: int = 50) -> str:
    """What is printed for good when `text` comes in parts of `size`: everything that no control
    code takes back."""
    sink = io.StringIO()
    console = Console(
        file=sink, force_terminal=True, width=60, height=height, color_system=None, _environ={}
    )
    answer = MarkdownDisplay(console)

    for at in range(0, len(text), size):
        answer.add(text[at : at + size])

    answer.end()
    lines: list[str] = [""]
    at = 0

    for code, plain in re.findall(r"(\x1b\[\??\d*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", sink.getvalue()):
        if code == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif code == "\x1b[1A":
            at -= 1
        elif code == "\x1b[2K":
            lines[at] = ""
        elif plain:
            lines[at] += plain

    return "\n".join(line.rstrip() for line in lines).rstrip()


def test_blocks_are_printed_when_the_next_one_begins() -> None:
    assert split_blocks("a\nb") == ["a\nb"]
    assert split_blocks("a\n\n- b\n\n  c\n- d") == ["a\n", "- b\n\n  c\n- d"]
    assert split_blocks("a\n\n```\nb\n\n# c\n") == ["a\n", "```\nb\n\n# c\n"]
    assert split_blocks("") == [""]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_parts_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "REFRESH", 0)
    seen = drawn(TEXT, size)
    assert seen == drawn(TEXT, len(TEXT) + 1)
    assert "A bold word." in seen
    assert [seen.count(word) for word in ("Title", "bold", "one", "y = 2", "End.")] == [
        1,
        1,
        1,
        1,
        1,
    ]
    assert "**" not in seen
    assert "```" not in seen


def test_a_block_higher_than_the_terminal_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "REFRESH", 0)
    text = "\n".join(f"- item {number}" for number in range(100, 140))
    seen = drawn(text, 5, height=8)
    assert [seen.count(f"item {number}") for number in (100, 120, 139)] == [1, 1, 1]


def test_no_part_of_an_answer_commands_the_terminal() -> None:
    seen = drawn("\x1b[2J\x1b]8;;https://e.org\x07 [text](https://e.org)", 3)
    assert "\ufffd[2J" in seen
    assert "text (https://e.org)" in seen


def test_only_a_terminal_gets_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_display(io.StringIO())(), PlainDisplay)
    assert isinstance(make_display(Terminal())(), MarkdownDisplay)
    assert isinstance(make_display(Terminal(), plain=True)(), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Terminal())(), PlainDisplay)
