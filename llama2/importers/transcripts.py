"""Conversations as other projects write them, turned into `records.Messages`.

Two spellings cover the public sets of §3.1 and §3.2.1: lists of turns (`role`/`content`, or
`from`/`value`) and one text with "\\n\\nHuman:" and "\\n\\nAssistant:" before each turn. All text
is tidy: stripped, its lines ended by "\\n".
"""

from __future__ import annotations

import re
from typing import Any

from llama2.importers.columns import is_filled
from llama2.importers.marks import LEARNT, NOT_LEARNT, turn_flag
from llama2.importers.tables import Skip
from llama2.reading.files import Row, tidy
from llama2.records import Message, Messages, Role

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
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_OPENING = re.compile(r"\A\s*Human:")
_ALPACA = re.compile(
    r"### Instruction:\n(?P<instruction>.*?)(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*\Z",
    re.DOTALL,
)


def messages(row: Row, turns: Any, system: str = "") -> Messages:
    """A list of turns; `system` is put first where the list does not begin with a system turn."""
    return conversation(row, turns, system)[0]


def conversation(row: Row, turns: Any, system: str = "") -> tuple[Messages, tuple[bool, ...]]:
    """A list of turns, and for each of its assistant turns whether it carries loss."""
    if not isinstance(turns, list):
        raise row.error(f"a list of turns was expected, found {type(turns).__name__}")

    both = [_turn(row, item, number) for number, item in enumerate(turns, 1)]
    read = tuple(message for message, _ in both)
    flags = tuple(flag for message, flag in both if message.role == "assistant")

    if read and read[0].role == "system" and not read[0].content:
        read = read[1:]

    if not system or (read and read[0] == Message("system", system)):
        return read, flags
    if read and read[0].role == "system":
        raise row.error("the column 'system' and the system turn differ", "keep one of them")

    return (Message("system", system), *read), flags


def turn(row: Row, item: Any, number: int = 1) -> Message:
    """One turn, `{"role", "content"}` or `{"from", "value"}`."""
    return _turn(row, item, number)[0]


def _turn(row: Row, item: Any, number: int) -> tuple[Message, bool]:
    if not isinstance(item, dict):
        raise row.error(
            f"turn {number} must be a mapping of role and content, it is {type(item).__name__}"
        )

    part = row.part(item)
    named = [value for key in ("role", "from", "speaker") if (value := part.get(key)) is not None]
    word = named[0].strip().lower() if named and isinstance(named[0], str) else ""
    calls = [part.get(key) for key in ("tool_calls", "function_call", "tool_call")]

    if word in TOOLS or any(map(is_filled, calls)):
        raise Skip("tools", "a Llama 2 dialogue has no place for their calls")

    if word not in ROLES:
        said = repr(named[0]) if named else "None"
        raise row.error(f"turn {number} has the role {said}", f"known roles: {', '.join(ROLES)}")

    flag = turn_flag(part, number) if ROLES[word] == "assistant" else True
    if ROLES[word] != "assistant":
        part.asked.update((*LEARNT, *NOT_LEARNT))  # no other turn ever carries loss

    return Message(ROLES[word], _content(row, part, number)), flag


def _content(row: Row, part: Row, number: int) -> str:
    """The text of a turn; null is "", which is counted as an empty turn."""
    found = [value for key in ("content", "value", "text") if (value := part.get(key)) is not None]
    content = found[0] if found else ""
    if isinstance(content, list) and all(isinstance(item, dict) for item in content):
        if any(item.get("type") not in _TEXT_PARTS for item in content):
            raise Skip("a turn is not text")

        texts = [item.get("text") for item in content]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise row.error(f"turn {number} has a part without text")

        content = "".join(text or "" for text in texts)

    if not isinstance(content, str) or not (
        found or any(key in part.value for key in ("content", "value", "text"))
    ):
        raise row.error(f"turn {number} has no text")

    return tidy(content)


def is_transcript(text: Any) -> bool:
    """Whether a value is a text in the Human/Assistant spelling. It begins with what the human
    says."""
    return isinstance(text, str) and _OPENING.match(text) is not None


def transcript(text: str) -> Messages:
    """The turns of a text in the Human/Assistant spelling; empty turns are kept."""
    parts = _SPEAKER.split(tidy(text))
    return tuple(
        Message("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2])
    )


def prompt(text: str) -> Messages:
    """A prompt given as one text: a transcript, an Alpaca prompt with its wrapping, or what the
    user says."""
    text = tidy(text)
    if is_transcript(text):
        turns = transcript(text)
        return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns

    return (Message("user", unwrapped(text)),)


def unwrapped(text: str) -> str:
    """A prompt without the wrapping of Alpaca."""
    wrapped = _ALPACA.search(text)
    return join(wrapped["instruction"], wrapped["input"]) if wrapped else text


def join(*parts: str | None) -> str:
    """The parts that say something, a blank line between them."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())
