"""Conversations as other projects write them, turned into `records.Messages`.

Two spellings cover the public sets of §3.1 and §3.2.1: lists of turns (`role`/`content`, or
`from`/`value`) and one text with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn. All text
is tidy: stripped, its lines ended by "\\n".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llama2.importers.columns import is_filled
from llama2.importers.marks import LEARNT, NOT_LEARNT, read_turn_flag
from llama2.importers.tables import SkippedRow
from llama2.reading.files import Row, tidy
from llama2.records import Message, Messages, Record, Role, parse

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
}
TOOLS = frozenset(
    {
        "tool",
        "tools",
        "function",
        "observation",
        "function_call",
        "function-call",
        "tool_call",
        "ipython",
        "function_response",
        "function-response",
        "tool_response",
        "environment",
    }
)
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_CALL_KEYS = ("tool_calls", "function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_OPENING = re.compile(r"\A\s*Human:")
_ALPACA = re.compile(
    r"### Instruction:\n(?P<instruction>.*?)(?:\n\n### Input:\n(?P<input>.*?))?"
    r"\n\n### Response:\s*\Z",
    re.DOTALL,
)


def is_own(row: Row, fields: Mapping[str, Any]) -> bool:
    """Return whether a row is a record of ours: `messages`, and beside it `fields` alone, of which
    one at least has the type given for it."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not row.value.keys() <= {"messages", *fields}:
        return False
    if not any(isinstance(row.get(key), kind) for key, kind in fields.items()):
        return False

    return all(isinstance(turn, dict) and turn.keys() == {"role", "content"} for turn in turns)


def read_own(kind: type[Record]) -> Callable[[Row], list[Record]]:
    """Return a reader of rows that are records of ours."""
    return lambda row: [parse(kind, json.dumps(row.read_all()), row.where)]


def read_turns(row: Row, turns: Any, system: str = "") -> Messages:
    """Return a list of turns; `system` is put first where the list does not begin with a system
    turn."""
    return read_conversation(row, turns, system)[0]


def read_conversation(row: Row, turns: Any, system: str = "") -> tuple[Messages, tuple[bool, ...]]:
    """Return a list of turns, and for each of its assistant turns whether it carries loss."""
    if not isinstance(turns, list):
        raise row.error(f"a list of turns was expected, found {type(turns).__name__}")

    read = [_read_turn(row, item, number) for number, item in enumerate(turns, 1)]
    flags = tuple(flag for message, flag in read if message.role == "assistant")
    messages = tuple(message for message, _ in read)
    if messages and messages[0].role == "system" and not messages[0].content:
        messages = messages[1:]

    opening = Message("system", system)
    if not system or messages[:1] == (opening,):
        return messages, flags
    if messages and messages[0].role == "system":
        raise row.error("the column 'system' and the system turn differ", "keep one of them")

    return (opening, *messages), flags


def read_turn(row: Row, item: Any) -> Message:
    """Return one turn, `{"role", "content"}` or `{"from", "value"}`."""
    return _read_turn(row, item, 1)[0]


def _read_turn(row: Row, item: Any, number: int) -> tuple[Message, bool]:
    """Return a turn, and whether it carries loss where it is an answer."""
    if not isinstance(item, dict):
        raise row.error(
            f"turn {number} must be a mapping of role and content, it is {type(item).__name__}"
        )

    part = row.part(item)
    name = _first(part, _ROLE_KEYS)
    word = name.strip().lower() if isinstance(name, str) else ""
    calls = [part.get(key) for key in _CALL_KEYS]
    if word in TOOLS or any(map(is_filled, calls)):
        raise SkippedRow("tools", "a Llama 2 dialogue has no place for their calls")
    if word not in ROLES:
        known = f"known roles: {', '.join(ROLES)}"
        raise row.error(f"turn {number} has the role {name!r}", known)

    role = ROLES[word]
    if role == "assistant":
        flag = read_turn_flag(part, number)
        return Message(role, _read_content(row, part, number)), flag

    part.read.update((*LEARNT, *NOT_LEARNT))  # no other turn ever carries loss
    return Message(role, _read_content(row, part, number)), True


def _first(part: Row, keys: tuple[str, ...]) -> Any:
    """The value of the first key that has one; all of the keys are read."""
    values = [part.get(key) for key in keys]
    return next((value for value in values if value is not None), None)


def _read_content(row: Row, part: Row, number: int) -> str:
    """Return the text of a turn; null is "", which is counted as an empty turn."""
    content = _first(part, _CONTENT_KEYS)
    if content is None and not part.value.keys().isdisjoint(_CONTENT_KEYS):
        return ""

    if isinstance(content, list) and all(isinstance(item, dict) for item in content):
        if any(item.get("type") not in _TEXT_PARTS for item in content):
            raise SkippedRow("a turn is not text")

        texts = [item.get("text") for item in content]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise row.error(f"turn {number} has a part without text")

        content = "".join(text or "" for text in texts)

    if not isinstance(content, str):
        raise row.error(f"turn {number} has no text")

    return tidy(content)


def is_transcript(text: Any) -> bool:
    """Return whether a value is a text in the Human/Assistant spelling. It begins with what the
    human says."""
    return isinstance(text, str) and _OPENING.match(text) is not None


def split_transcript(text: str) -> Messages:
    """Return the turns of a text in the Human/Assistant spelling; empty turns are kept."""
    parts = _SPEAKER.split(tidy(text))
    return tuple(
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2])
    )


def read_prompt(text: str) -> Messages:
    """Return the turns of a prompt given as one text: a transcript, an Alpaca prompt with its
    wrapping, or what the user says."""
    text = tidy(text)
    if not is_transcript(text):
        return (Message("user", unwrap(text)),)

    turns = split_transcript(text)
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns


def unwrap(text: str) -> str:
    """Return a prompt without the wrapping of Alpaca."""
    wrapped = _ALPACA.search(text)
    return join(wrapped["instruction"], wrapped["input"]) if wrapped else text


def join(*parts: str | None) -> str:
    """Join the parts that say something, a blank line between them."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())
