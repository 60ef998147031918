"""Conversations as other projects write them, turned into `records.Messages`.

Two spellings cover the public sets of §3.1 and §3.2.1: lists of turns (`role`/`content`, or `from`/`value`) and one
text with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn. All text is stripped.
"""

from __future__ import annotations

import re
from typing import Any

from llama2.files import Row
from llama2.records import Message, Messages, Role
from llama2.tables import Skip

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_ALPACA = re.compile(r"### Instruction:\n(?P<instruction>.*?)(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*\Z",
                     re.DOTALL)


def messages(row: Row, turns: Any, system: str = "") -> Messages:
    """A list of turns; `system` is put first where the list does not begin with a system turn."""
    if not isinstance(turns, list):
        raise row.error(f"a list of turns was expected, found {type(turns).__name__}")
    read = tuple(turn(row, item, number) for number, item in enumerate(turns, 1))
    if read and read[0].role == "system" and not read[0].content:
        read = read[1:]
    elif system and (not read or read[0].role != "system"):
        read = (Message("system", system), *read)
    return read


def turn(row: Row, item: Any, number: int = 1) -> Message:
    """One turn, `{"role", "content"}` or `{"from", "value"}`."""
    if not isinstance(item, dict):
        raise row.error(f"turn {number} must be a mapping of role and content, it is {type(item).__name__}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value", item.get("text")))
    if role not in ROLES:
        raise row.error(f"turn {number} has the role {role!r}", f"known roles: {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type") != "text" for part in content):
            raise Skip("a turn is not text")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise row.error(f"turn {number} has no text")
    return Message(ROLES[role], content.strip())


def is_transcript(text: Any) -> bool:
    """Whether a value is a text in the Human/Assistant spelling."""
    return isinstance(text, str) and _SPEAKER.match(text) is not None


def transcript(text: str) -> Messages:
    """The turns of a text in the Human/Assistant spelling; empty turns are kept."""
    parts = _SPEAKER.split(text)
    return tuple(Message("user" if speaker == "Human" else "assistant", content.strip())
                 for speaker, content in zip(parts[1::2], parts[2::2]))


def prompt(text: str) -> Messages:
    """A prompt given as one text: a transcript, an Alpaca prompt with its wrapping, or what the user says."""
    if is_transcript(text):
        turns = transcript(text)
        return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns
    wrapped = _ALPACA.search(text)
    if wrapped:
        return (Message("user", join(wrapped["instruction"], wrapped["input"])),)
    return (Message("user", text.strip()),)


def join(*parts: str | None) -> str:
    """The parts that say something, a blank line between them."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())
