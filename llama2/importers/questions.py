"""A question with all that it is about: its context, its input, its options, the system turn.

What comes first is the custom of the sets: reading comprehension (SQuAD, BoolQ, RACE, SVAMP) puts
the passage before the question, instruction sets (Alpaca, Dolly) put the input after the
instruction, and options follow either.
"""

from __future__ import annotations

import re
from typing import Any

from llama2.importers.columns import is_filled
from llama2.importers.tables import Skip
from llama2.importers.transcripts import join, messages, prompt
from llama2.reading.files import Row, tidy
from llama2.records import Message, Messages

INSTRUCTIONS = ("instruction", "Instruction")
QUESTIONS = (
    "prompt",
    "question",
    "Question",
    "query",
    "problem",
    "goal",
    *INSTRUCTIONS,
    "text",
    "input",
)
CONTEXTS = (
    "context",
    "Context",
    "contexts",
    "passage",
    "Passage",
    "passages",
    "article",
    "document",
    "documents",
    "paragraph",
    "paragraphs",
    "background",
    "knowledge",
    "evidence",
    "story",
    "support",
    "fact",
    "facts",
    "Body",
    "body",
    "hint",
)
"""what a question is about"""
_COPIED = 16
"""a context of so many characters that stands in the question is not put there again"""
_OPTIONS = ("options", "choices")
_TEMPLATE = re.compile(
    r"<\|(im_start|user|system|prompter|begin_of_text|start_header_id)\|>|<s>\s*\[INST\]|\[INST\]|### Human:"
    r"|<start_of_turn>|<bos>"
)
_LETTERED = re.compile(r"\(?[A-Za-z0-9][).:]")
_TEXTS = ("text", "content", "body", "passage")


def asked(row: Row, keys: tuple[str, ...] = QUESTIONS) -> Messages:
    """The turns before the answer: `keys` say where the question may stand; a list of turns is
    taken as it is."""
    key = _key(row, keys)
    said = row.get(key)
    if isinstance(said, list):
        return messages(row, said, system(row))

    text = row.text(key)
    if key == "text" and _TEMPLATE.match(text):
        raise Skip("text in a model's template", "give its turns as a list")

    turns = prompt(text)
    opening = _system_turn(row)
    if len(turns) > 1 or turns[0].role != "user":
        return (*opening, *turns)

    return (*opening, Message("user", complete(row, turns[0].content, key in INSTRUCTIONS)))


def _key(row: Row, keys: tuple[str, ...]) -> str:
    """The first of `keys` that says something, else the first that the row has."""
    filled = (key for key in keys if is_filled(row.get(key)))
    present = (key for key in keys if key in row.value)
    return next(filled, next(present, keys[0]))


def complete(row: Row, said: str, instruction: bool) -> str:
    """A question or an instruction joined with its context, its input and its options."""
    contexts = [
        text
        for key in CONTEXTS
        for text in texts(row, key)
        if len(text) < _COPIED or text not in said
    ]
    given = [text for text in [row.text("input", optional=True)] if text != said]
    if not said and not instruction:
        return ""  # a passage alone asks nothing
    if instruction:
        return join(said, *given, *contexts, _options(row))

    return join(*contexts, said, *given, _options(row))


def system(row: Row) -> str:
    """The system turn, in the column that is called after it."""
    return row.text("system", "system_prompt", "system_message", "sys", optional=True)


def category_of(row: Row, *keys: str) -> str:
    """What kind of question it is, in the first of `keys` (`category`) that holds text; others are
    left unread."""
    for key in keys or ("category",):
        value = row.get(key)
        if isinstance(value, str) and tidy(value):
            return tidy(value)

        row.asked.discard(key)

    return ""


def _system_turn(row: Row) -> Messages:
    said = system(row)
    return (Message("system", said),) if said else ()


def texts(row: Row, key: str) -> list[str]:
    """The texts of a column: one, a list of them, or a list of mappings that hold one each."""
    value = row.get(key)
    if not is_filled(value):
        return []

    items = value if isinstance(value, list) else [value]
    found = [_text(row, item) for item in items if is_filled(item)]
    if not all(isinstance(item, str) for item in found):
        raise row.error(
            f"'{key}' must be text, or a list of texts",
            f"write it so, or leave it out: --sources.NAME.ignore {key}",
        )

    return [tidy(item) for item in found]


def _text(row: Row, item: Any) -> Any:
    if not isinstance(item, dict):
        return item

    part = row.part(item)
    return join(*(part.text(key, optional=True) for key in ("title", *_TEXTS))) or None


def _options(row: Row) -> str:
    """The answers to choose from, one a line; letters are put before them where they have none."""
    lines: list[str] = []
    for key in _OPTIONS:
        value = row.get(key)
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            labels = value.get("label") or []
            items, value = [str(label) for label in labels], value["text"]
        elif isinstance(value, dict):  # MedQA: {"A": "the first", ...}
            value = {label: item for label, item in value.items() if item is not None}
            items, value = list(value), list(value.values())
        else:
            items = []

        if not is_filled(value):
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise row.error(
                f"'{key}' must be a list of texts",
                f"write it so, or leave it out: --sources.NAME.ignore {key}",
            )

        if not all(_LETTERED.match(item) for item in value):
            names = (
                items
                if len(items) == len(value)
                else [chr(ord("A") + index) for index in range(len(value))]
            )
            value = [f"{name}. {item.strip()}" for name, item in zip(names, value)]

        lines += [tidy(item) for item in value]

    return "\n".join(lines)
