"""Reading messages at a terminal: of one line or of many, with those of earlier runs a key away.

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
from pathlib import Path
from typing import Any, Protocol, TextIO

from llama2 import atomic, json_files
from llama2.errors import UserError, explain_os_errors

PROMPT, CONTINUED, BLOCK = "> ", ". ", '"""'
MOST_MESSAGES = 1000
"""of earlier runs that are offered again"""


class LineReader(Protocol):
    """Reads a line behind `prompt`, beginning with `draft`. EOFError and KeyboardInterrupt as
    `input`."""

    def __call__(self, prompt: str, draft: str = "") -> str: ...


def read_message(read: LineReader, draft: str = "") -> str:
    """Return the user's next message, put together from as many lines as it has."""
    text = read(PROMPT, draft)
    if text.lstrip().startswith(BLOCK):
        while is_open(text):
            text += "\n" + read(CONTINUED)

        return text.lstrip().removeprefix(BLOCK).partition(BLOCK)[0].strip("\n")

    while text.endswith("\\"):
        text = text[:-1] + "\n" + read(CONTINUED)

    return text


def is_open(text: str) -> bool:
    """Return whether a block of three quotation marks waits for its end."""
    return text.lstrip().startswith(BLOCK) and text.count(BLOCK) < 2


def open_reader(earlier: list[str]) -> LineReader:
    """Return the best way to read from this terminal that is installed, with `earlier` messages a
    key away."""
    if sys.stdin.isatty() and sys.stdout.isatty() and importlib.util.find_spec("prompt_toolkit"):
        return _open_prompt_toolkit(earlier)

    return _open_readline(earlier)


class History:
    """Messages of earlier runs, one JSON string a line, in a file that only the user may read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def default() -> Path:
        """Return the file in the user's directory for the state of programs (XDG). UserError for a
        user without a home directory."""
        state = os.environ.get("XDG_STATE_HOME", "")
        try:
            folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
        except RuntimeError:
            raise UserError("this user has no home directory", "set XDG_STATE_HOME") from None

        return folder / "llama2" / "history"

    def read(self) -> list[str]:
        """Return the last messages, oldest first; lines that are no message are skipped."""
        with explain_os_errors(self.path):
            if not self.path.exists():
                return []

            lines = self.path.read_text("utf-8", "replace").splitlines()

        messages = list(filter(None, map(_parse_message, lines)))
        if len(messages) > 2 * MOST_MESSAGES:
            self._replace(messages[-MOST_MESSAGES:])

        return messages[-MOST_MESSAGES:]

    def add(self, text: str) -> None:
        """Append a message. UserError if it cannot be written."""
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._open(self.path, os.O_APPEND) as file:
                file.write(json.dumps(text) + "\n")

    def _replace(self, texts: list[str]) -> None:
        with atomic.new_file(self.path) as work, self._open(work, os.O_TRUNC) as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)

    @staticmethod
    def _open(path: Path, mode: int) -> TextIO:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)
        os.chmod(path, 0o600)  # an older version may have made the file
        return os.fdopen(descriptor, "w", encoding="utf-8")


def remember(history: History | None, text: str) -> History | None:
    """Add a message to a history and return it. If it cannot be written, say so and return None."""
    if history and text.strip():
        try:
            history.add(text)
        except UserError as error:
            print(f"what you write is not remembered: {error}", file=sys.stderr)
            return None

    return history


def _parse_message(line: str) -> str:
    """Return the message of a line; "" if there is none."""
    try:
        text = json_files.parse(line)
    except ValueError:
        return ""

    return text if isinstance(text, str) else ""


def _open_readline(earlier: list[str]) -> LineReader:
    # gives input() editing and history; absent on some systems
    readline: Any = None
    if importlib.util.find_spec("readline"):
        readline = importlib.import_module("readline")
        for text in earlier:
            readline.add_history(text.replace("\n", " "))

    def read(prompt: str, draft: str = "") -> str:
        """Return a line of stdin."""
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


def _open_prompt_toolkit(earlier: list[str]) -> LineReader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        """Begin a new line within the message."""
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        """Send the message, unless it is to go on."""
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
    return lambda prompt, draft="": session.prompt(prompt, default=draft)
