"""Text of others in a form that is fit for a terminal.

Names of tensors and files, values of configurations and answers of models may hold any character.
An escape sequence would command the terminal, and a mark of direction would show a text in another
order than it has. Messages show such characters by their number, are one line each, and have an
end.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

LONGEST = 2000
"""characters of a message"""
_SHOWN = 100
_GAP = " ... "
_JOINERS = "\u200c\u200d"  # without which Persian words and emoji fall apart


def is_safe(letter: str) -> bool:
    """Return whether a character is only drawn: it neither commands a terminal nor moves what
    stands around it."""
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"


def make_printable(text: str) -> str:
    """Return a text with its lines and tabs, in which each character that is more than drawn is
    U+FFFD."""
    return "".join(letter if is_safe(letter) or letter in "\n\t" else "\ufffd" for letter in text)


def fit_line(text: str, most: int = LONGEST) -> str:
    """Return a text as one line of at most `most` characters, without its middle where it is
    longer.

    Line ends and tabs become spaces; what is more than drawn is spelt by its number, as `\\x1b`.
    """
    letters = re.sub(r"[\n\r\t]", " ", _cut_middle(text, most))
    spelt = "".join(letter if is_safe(letter) else ascii(letter)[1:-1] for letter in letters)
    return _cut_middle(spelt, most)  # numbers are longer than what they spell


def _cut_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text

    end = most // 4
    return f"{text[: most - end - len(_GAP)]}{_GAP}{text[-end:]}"


def show_value(value: Any) -> str:
    """Return a value of a file as Python writes it, the beginning of a long one."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        text = f"a {type(value).__name__} too large to show"

    return fit_line(shorten(text))


def shorten(text: str) -> str:
    """Return a text, the beginning of a long one."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def say(text: str) -> None:
    """Print one line on standard error."""
    print(fit_line(text), file=sys.stderr, flush=True)


def format_clock(seconds: float) -> str:
    """Write whole seconds as a clock does: 3:20, or 1:03:20."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@functools.cache
def say_once(text: str) -> None:
    """Print a line on standard error once in a process; of several ranks the first prints it."""
    if os.environ.get("RANK", "0") == "0":
        say(f"llama2: {text}")


def list_some(names: Sequence[str], most: int = 4) -> str:
    """Join the first `most` names; dots stand for the others."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
