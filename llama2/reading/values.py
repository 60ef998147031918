"""Rows of JSON and of JSON Lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import pydantic_core

from llama2.errors import UserError
from llama2.json_files import is_deep
from llama2.reading.rows import AGAIN, TO_UTF8, BadRow, File, Numbered, read_lines, unify_line_ends

# columns that sets of instructions, conversations, prompts and comparisons have: what tells a
# header from a row
COLUMNS = frozenset(
    (
        "answer",
        "answers",
        "category",
        "chosen",
        "completion",
        "context",
        "conversation",
        "conversations",
        "goal",
        "history",
        "human_ref_a",
        "human_ref_b",
        "id",
        "input",
        "instruction",
        "instructions",
        "label",
        "labels",
        "messages",
        "metadata",
        "model",
        "output",
        "output_1",
        "output_2",
        "passage",
        "preference",
        "preferred",
        "prompt",
        "query",
        "question",
        "rationale",
        "rejected",
        "response",
        "response_0",
        "response_1",
        "response_j",
        "response_k",
        "role",
        "score_chosen",
        "score_rejected",
        "source",
        "system",
        "target",
        "text",
        "title",
        "tools",
        "type",
        "url",
        "weight",
        "winner",
    )
)
_TABLES = ("data", "rows", "train", "examples", "records", "items")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_RETURN = re.compile(r"\\r|\\u000[dD]")
_BLANK = re.compile(r"\s*")
_DEEPEST = 200
"""levels of a value, as in JSON Lines"""
_NO_TEXT = "half of a surrogate pair, which is no character"


def read_json_lines(file: File) -> Numbered:
    """The values of the lines that are not blank."""
    for number, text, flaw in read_lines(file):
        if flaw:
            yield BadRow(f"{file.label}:{number}", flaw, TO_UTF8)
        elif text.strip():
            yield _read_line(text, number, file.label)


def read_json(file: File) -> Numbered:
    """The elements of a list, the rows of a table that is written by columns, or the one value of
    the file.

    JSON Lines under the name .json are read as such. Memory holds the file.
    """
    numbered: list[tuple[int, str]] = []
    for number, line, flaw in read_lines(file):
        if flaw:
            raise UserError(f"{file.label}:{number}: {flaw}", TO_UTF8)

        numbered.append((number, line))

    text = "\n".join(line for _, line in numbered)
    filled = [(number, line) for number, line in numbered if line.strip()]
    if text.lstrip().startswith("["):
        yield from _read_elements(text, file.label)
    elif filled:
        value = _read_line(text, filled[0][0], file.label)
        if not isinstance(value, BadRow):
            yield from _read_table(value, file.label)
            return

        rows = (_read_line(line, number, file.label) for number, line in filled)
        first = list(islice(rows, 9))
        if len(filled) == 1 or not any(map(_is_record, first)):
            raise _explain_json(text, file.label) or UserError(
                f"{value.where}: {value.cause}", AGAIN
            )

        yield from chain(first, rows)


def _read_line(text: str, number: int, label: str) -> tuple[int, Any] | BadRow:
    """Return the value of a line."""
    where = f"{label}:{number}"
    try:
        value = pydantic_core.from_json(text)  # unlike json, it refuses what UTF-8 cannot hold
    except ValueError as error:
        if text.strip() == "[":
            return BadRow(
                where, "a JSON list, where each line should be a record", "name the file .json"
            )

        cause = _NO_TEXT if _has_half(text) else f"not valid JSON ({error})"
        return BadRow(where, cause.replace(" at line 1 column", " at column"))

    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return BadRow(
            where, "a JSON list of records, where each line should be one", "name the file .json"
        )

    return _check_value(value, text, number, label)


def _check_value(value: Any, text: str, number: int, label: str) -> tuple[int, Any] | BadRow:
    """Return a value as it is kept, or what is wrong with it."""
    twice = _find_second_key(text, value)
    if twice:
        cause = f"the key '{twice}' stands twice in a mapping"
        return BadRow(f"{label}:{number}", cause, "keep one of them")

    return number, unify_line_ends(value) if _RETURN.search(text) else value


def _is_record(row: tuple[int, Any] | BadRow) -> bool:
    return not isinstance(row, BadRow) and isinstance(row[1], dict)


def _has_half(text: str) -> bool:
    """Return whether JSON is valid but for halves of surrogate pairs."""
    try:
        return _HALF.search(text) is not None and not _is_encodable(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False

    return True


def _find_second_key(text: str, value: Any) -> str:
    """Return a key that a mapping in the text has twice, of which `value` holds the last; "" if
    there is none."""
    if text.count('":') + text.count('" :') == _count_keys(value):
        return ""  # so it mostly is: nothing needs to be read again

    twice: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        twice.extend(key for key, count in counts.items() if count > 1)

    with suppress(ValueError, RecursionError):
        json.loads(text, object_pairs_hook=note)

    return twice[0] if twice else ""


def _count_keys(value: Any) -> int:
    """Return how many keys the mappings in a value have."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            count += len(item)
            left += item.values()
        elif isinstance(item, list):
            left += item

    return count


def _explain_json(text: str, label: str) -> UserError | None:
    """Return the error that names the line where JSON of several lines goes wrong."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            place = f"{error.msg} at column {error.colno}"
            return UserError(f"{label}:{error.lineno}: not valid JSON ({place})", AGAIN)

    return None


# --- tables ---


def _read_table(row: tuple[int, Any], label: str) -> Numbered:
    """The rows of a table given by its columns, or the row itself; a table below a key is refused
    by name."""
    line, value = row
    columns = _find_columns(value)
    if columns is not None:
        for number, cells in enumerate(zip(*columns.values()), 1):
            yield number, dict(zip(columns, cells))

        return

    for key in _TABLES:
        records = value.get(key) if isinstance(value, dict) else None
        if isinstance(records, list) and records and all(isinstance(row, dict) for row in records):
            raise UserError(
                f"{label}:{line}: the records lie below '{key}'",
                f"keep that list alone (jq .{key})",
            )

    yield row


def _find_columns(value: Any) -> dict[str, list[Any]] | None:
    """Return the columns of a table written by columns: name -> list as `datasets` does, name ->
    {"0": ..} as pandas does."""
    if not isinstance(value, dict) or not any(key.lower() in COLUMNS for key in value):
        return None

    columns = list(value.values())
    if all(isinstance(column, dict) and column for column in columns):
        indices = {tuple(column) for column in columns}
        numbered = all(index.isdigit() for index in chain(*indices))
        if not numbered or len(indices) > 1:
            return None

        return {key: list(column.values()) for key, column in value.items()}

    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return None

    turns = any(isinstance(item, dict) for item in chain(*columns))  # one conversation
    named = len(columns) > 1 or set(value) <= {"text", "prompt", "messages", "conversations"}
    return value if named and not turns else None


# --- lists ---


def _read_elements(text: str, label: str) -> Numbered:
    """The elements of a JSON list with the lines on which they begin."""
    decode = json.JSONDecoder().raw_decode
    position, line, counted, more = text.index("[") + 1, 1, 0, False
    while True:
        position = _skip_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and not more:
            break

        try:
            value, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{label}:{line}: not valid JSON ({error})", AGAIN) from None

        yield _read_element(value, text[position:end], line, label)
        position = _skip_blanks(text, end)
        more = text[position : position + 1] == ","
        if more:
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise UserError(f"{label}:{line}: not valid JSON (',' or ']' expected)", AGAIN)

    behind = _skip_blanks(text, position + 1)
    if behind < len(text):
        line += text.count("\n", counted, behind)
        raise UserError(f"{label}:{line}: there is text behind the JSON list", AGAIN)


def _skip_blanks(text: str, position: int) -> int:
    blanks = _BLANK.match(text, position)
    return blanks.end() if blanks else position


def _read_element(value: Any, written: str, line: int, label: str) -> tuple[int, Any] | BadRow:
    """Return an element of a list, of which the file holds the text `written`."""
    cause = ""
    if is_deep(value, _DEEPEST):
        cause = f"nested more than {_DEEPEST} levels deep"
    elif _HALF.search(written) and not _is_encodable(value):
        cause = _NO_TEXT

    if cause:
        return BadRow(f"{label}:{line}", cause, "mend the element")

    return _check_value(value, written, line, label)
