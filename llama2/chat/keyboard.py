"""How a person writes to the terminal chat: a message of one line or of many, with what was written
in earlier runs.

With prompt_toolkit (the extra `chat`) Alt+Enter begins a new line within a message. With or without
it a line that ends in a backslash goes on in the next one, and three quotation marks open a block
that three more close.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors

PROMPT, CONTINUED, BLOCK = "> ", ". ", '"""'
KEPT = 1000
"""messages of earlier runs that are offered again"""


class Reader(Protocol):
    """Reads what the user writes behind `prompt`, beginning with `draft`. EOFError and
    KeyboardInterrupt as `input`."""

    def __call__(self, prompt: str, draft: str = "") -> str: ...


def message(read: Reader, draft: str = "") -> str:
    """The user's next message, put together from as many lines as it has."""
    text = read(PROMPT, draft)
    if text.lstrip().startswith(BLOCK):
        while is_open(text):
            text += "\n" + read(CONTINUED)

        return text.lstrip().removeprefix(BLOCK).partition(BLOCK)[0].strip("\n")

    while text.endswith("\\"):
        text = text[:-1] + "\n" + read(CONTINUED)

    return text


def is_open(text: str) -> bool:
    """Whether a block of three quotation marks waits for its end."""
    return text.lstrip().startswith(BLOCK) and text.count(BLOCK) < 2


def reader(earlier: list[str]) -> Reader:
    """The best way to read from this terminal that is installed, with `earlier` messages a key
    away."""
    if sys.stdin.isatty() and sys.stdout.isatty() and importlib.util.find_spec("prompt_toolkit"):
        return _toolkit(earlier)

    return _readline(earlier)


class History:
    """Messages of earlier runs, one JSON string a line, in a file that only the user may read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def default() -> Path:
        """Where the state of programs belongs (XDG). UserError for a user without a home
        directory."""
        state = os.environ.get("XDG_STATE_HOME", "")
        try:
            return (
                (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state")
                / "llama2"
                / "history"
            )
        except RuntimeError:
            raise UserError("this user has no home directory", "set XDG_STATE_HOME") from None

    def read(self) -> list[str]:
        """The last messages, oldest first; what is no message is passed over."""
        with explain_os_errors(self.path):
            if not self.path.exists():
                return []

            lines = self.path.read_text("utf-8", "replace").splitlines()

        found = [text for line in lines if (text := _text(line))]
        if len(found) > 2 * KEPT:
            self._replace(found[-KEPT:])

        return found[-KEPT:]

    def add(self, text: str) -> None:
        """Remember a message. UserError if it cannot be written."""
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._private(self.path, os.O_APPEND) as file:
                file.write(json.dumps(text) + "\n")

    def _replace(self, texts: list[str]) -> None:
        with atomic.new_file(self.path) as work, self._private(work, os.O_TRUNC) as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)

    @staticmethod
    def _private(path: Path, mode: int) -> Any:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)
        os.chmod(path, 0o600)  # the file may be older than this care
        return os.fdopen(descriptor, "w", encoding="utf-8")


def recorded(history: History | None, read: Reader) -> Callable[[str], str]:
    """Messages that begin with a draft, kept in `history` until it cannot be written, which is said
    once."""
    keeping = history

    def remembering(draft: str) -> str:
        nonlocal keeping
        text = message(read, draft)
        if keeping and text.strip():
            try:
                keeping.add(text)
            except UserError as error:
                keeping = None
                print(f"what you write is not remembered: {error}", file=sys.stderr)

        return text

    return remembering


def _text(line: str) -> str:
    try:
        text = json_files.parsed(line)
    except ValueError:
        return ""

    return text if isinstance(text, str) else ""


def _readline(earlier: list[str]) -> Reader:
    readline: Any = None
    # gives input() editing and history; absent on some systems
    if importlib.util.find_spec("readline"):
        readline = importlib.import_module("readline")
        for text in earlier:
            readline.add_history(text.replace("\n", " "))

    def read(prompt: str, draft: str = "") -> str:
        if readline and draft:
            readline.set_startup_hook(lambda: readline.insert_text(draft.replace("\n", " ")))

        try:
            if sys.stdout.isatty():
                return input(prompt)

            print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers alone
            return input("")
        finally:
            if readline:
                readline.set_startup_hook()

    return read


def _toolkit(earlier: list[str]) -> Reader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(earlier),
        key_bindings=keys,
        multiline=True,
        prompt_continuation=CONTINUED,
    )

    def read(prompt: str, draft: str = "") -> str:
        return session.prompt(prompt, default=draft)

    return read
