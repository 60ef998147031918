"""A question with all that it is about: its context, its input, its options, the system turn.

What comes first is the custom of the sets: reading comprehension (SQuAD, BoolQ, RACE, SVAMP) puts
the passage before the question, instruction sets (Alpaca, Dolly) put the input after the
instruction, and options follow either.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from llama2.errors import UserError
from llama2.importers.columns import is_filled
from llama2.importers.tables import SkippedRow
from llama2.importers.turns import join, read_prompt, read_turns
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
    r"<\|(im_start|user|system|prompter|begin_of_text|start_header_id)\|>"
    r"|<s>\s*\[INST\]|\[INST\]|### Human:|<start_of_turn>|<bos>"
)
_LETTERED = re.compile(r"\(?[A-Za-z0-9][).:]")
_TEXTS = ("text", "content", "body", "passage")


def read_question(row: Row, keys: tuple[str, ...] = QUESTIONS) -> Messages:
    """Return the turns before the answer: `keys` say where the question may stand; a list of turns
    is taken as it is."""
    key = _find_key(row, keys)
    if isinstance(row.get(key), list):
        return read_turns(row, row.get(key), read_system(row))

    text = row.text(key)
    if key == "text" and _TEMPLATE.match(text):
        raise SkippedRow("text in a model's template", "give its turns as a list")

    turns, system = read_prompt(text), read_system(row)
    if len(turns) == 1 and turns[0].role == "user":
        question = complete(row, turns[0].content, key in INSTRUCTIONS)
        turns = (Message("user", question),)

    return (Message("system", system), *turns) if system else turns


def _find_key(row: Row, keys: tuple[str, ...]) -> str:
    """Return the first of `keys` that says something, else the first that the row has."""
    for key in keys:
        if is_filled(row.get(key)):
            return key

    return next((key for key in keys if key in row.value), keys[0])


def complete(row: Row, text: str, is_instruction: bool) -> str:
    """Join a question or an instruction with its context, its input and its options."""
    contexts = [context for key in CONTEXTS for context in read_texts(row, key)]
    new = [context for context in contexts if len(context) < _COPIED or context not in text]
    given = row.text("input", optional=True)
    given = "" if given == text else given
    if not text and not is_instruction:
        return ""  # a passage alone asks nothing
    if is_instruction:
        return join(text, given, *new, _read_options(row))

    return join(*new, text, given, _read_options(row))


def read_system(row: Row) -> str:
    """Return the system turn, in the column that is called after it."""
    return row.text("system", "system_prompt", "system_message", "sys", optional=True)


def read_category(row: Row, *keys: str) -> str:
    """Return what kind of question it is, in the first of `keys` (`category`) that holds text;
    others are left unread."""
    for key in keys or ("category",):
        value = row.get(key)
        if isinstance(value, str) and tidy(value):
            return tidy(value)

        row.read.discard(key)

    return ""


def read_texts(row: Row, key: str) -> list[str]:
    """Return the texts of a column: one, a list of them, or a list of mappings that hold one
    each."""
    value = row.get(key)
    if not is_filled(value):
        return []

    items = value if isinstance(value, list) else [value]
    texts = [_read_text(row, item) for item in items if is_filled(item)]
    if not all(isinstance(text, str) for text in texts):
        raise _explain_no_texts(row, key, "text, or a list of texts")

    return list(map(tidy, texts))


def _explain_no_texts(row: Row, key: str, wanted: str) -> UserError:
    return row.error(
        f"'{key}' must be {wanted}",
        f"write it so, or leave it out: --sources.NAME.ignore {key}",
    )


def _read_text(row: Row, item: Any) -> Any:
    if not isinstance(item, dict):
        return item

    part = row.part(item)
    return join(*(part.text(key, optional=True) for key in ("title", *_TEXTS))) or None


def _read_options(row: Row) -> str:
    """Return the answers to choose from, one a line; letters are put before them where they have
    none."""
    lines: list[str] = []
    for key in _OPTIONS:
        value, labels = row.get(key), list[Any]()
        if isinstance(value, dict) and isinstance(value.get("text"), list):
            value, labels = value["text"], value.get("label") or []
        elif isinstance(value, dict):  # MedQA: {"A": "the first", ...}
            labels = [label for label in value if value[label] is not None]
            value = [value[label] for label in labels]

        if not is_filled(value):
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _explain_no_texts(row, key, "a list of texts")

        if not all(map(_LETTERED.match, value)):
            names = labels if len(labels) == len(value) else map(chr, count(ord("A")))
            value = [f"{name}. {item.strip()}" for name, item in zip(names, value)]

        lines += map(tidy, value)

    return "\n".join(lines)
