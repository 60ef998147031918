"""Rows of JSON and of JSON Lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from typing import Any

import pydantic_core

from llama2.errors import UserError
from llama2.json_files import is_deep
from llama2.reading.rows import AGAIN, TO_UTF8, Bad, File, Found, lines, unified

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


def json_lines(file: File) -> Found:
    """The values of the lines that are not blank."""
    for number, text, flaw in lines(file):
        if flaw:
            yield Bad(f"{file.label}:{number}", flaw, TO_UTF8)
        elif text.strip():
            yield _one(text, number, file.label)


def json_values(file: File) -> Found:
    """The elements of a list, the rows of a table that is written by columns, or the one value of
    the file.

    JSON Lines under the name .json are read as such. Memory holds the file.
    """
    numbered: list[tuple[int, str]] = []
    for number, line, flaw in lines(file):
        if flaw:
            raise UserError(f"{file.label}:{number}: {flaw}", TO_UTF8)

        numbered.append((number, line))

    text = "\n".join(line for _, line in numbered)
    filled = [(number, line) for number, line in numbered if line.strip()]
    if text.lstrip().startswith("["):
        yield from _elements(text, file.label)
    elif filled:
        whole = _one(text, filled[0][0], file.label)
        if not isinstance(whole, Bad):
            yield from _table(whole, file.label)
        elif any(
            _is_record(_one(line, number, file.label))
            for number, line in filled[:9]
            if len(filled) > 1
        ):
            yield from (_one(line, number, file.label) for number, line in filled)
        else:
            raise _refused(text, file.label) or UserError(f"{whole.where}: {whole.cause}", AGAIN)


def _one(text: str, number: int, label: str) -> tuple[int, Any] | Bad:
    """The value of a line."""
    where = f"{label}:{number}"
    try:
        value = pydantic_core.from_json(text)  # unlike json, it refuses what UTF-8 cannot hold
    except ValueError as error:
        if text.strip() == "[":
            return Bad(
                where, "a JSON list, where each line should be a record", "name the file .json"
            )

        cause = _NO_TEXT if _has_half(text) else f"not valid JSON ({error})"
        return Bad(where, cause.replace(" at line 1 column", " at column"))

    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return Bad(
            where, "a JSON list of records, where each line should be one", "name the file .json"
        )

    twice = _twice(text, value)
    if twice:
        return Bad(where, f"the key '{twice}' stands twice in a mapping", "keep one of them")

    return number, unified(value) if _RETURN.search(text) else value


def _is_record(found: tuple[int, Any] | Bad) -> bool:
    return not isinstance(found, Bad) and isinstance(found[1], dict)


def _has_half(text: str) -> bool:
    """Whether JSON is valid but for halves of surrogate pairs."""
    try:
        return _HALF.search(text) is not None and not _encodable(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False

    return True


def _twice(text: str, value: Any) -> str:
    """A key that a mapping in the text has twice, of which `value` holds the last; "" if there is
    none."""
    if text.count('":') + text.count('" :') == _keys(value):
        return ""  # so it mostly is: nothing needs to be read again

    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        count = Counter(key for key, _ in pairs)
        found.extend(key for key in count if count[key] > 1)

    with suppress(ValueError, RecursionError):
        json.loads(text, object_pairs_hook=note)

    return found[0] if found else ""


def _keys(value: Any) -> int:
    """How many keys the mappings in a value have."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            count += len(item)
            left += item.values()
        elif isinstance(item, list):
            left += item

    return count


def _refused(text: str, label: str) -> UserError | None:
    """The error that names the line where JSON of several lines goes wrong."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return UserError(
            f"{label}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})", AGAIN
        )
    except (ValueError, RecursionError):
        pass

    return None


# --- tables
# ---------------------------------------------------------------------------------------------------------


def _table(found: tuple[int, Any], label: str) -> Found:
    """The rows of a table given by its columns, or what was found; a table below a key is refused
    by name."""
    line, value = found
    columns = _columns(value)
    if columns is not None:
        for number, cells in enumerate(zip(*columns.values()), 1):
            yield number, dict(zip(columns, cells))

        return

    for key, item in value.items() if isinstance(value, dict) else ():
        if (
            key in _TABLES
            and isinstance(item, list)
            and item
            and all(isinstance(row, dict) for row in item)
        ):
            raise UserError(
                f"{label}:{line}: the records lie below '{key}'",
                f"keep that list alone (jq .{key})",
            )

    yield found


def _columns(value: Any) -> dict[str, list[Any]] | None:
    """The columns of a table written by columns: name -> list as `datasets` does, name -> {"0": ..}
    as pandas does."""
    if not isinstance(value, dict) or not any(key.lower() in COLUMNS for key in value):
        return None

    columns = list(value.values())
    if all(
        isinstance(column, dict) and column and all(key.isdigit() for key in column)
        for column in columns
    ):
        same = len({tuple(column) for column in columns}) == 1
        return {key: list(column.values()) for key, column in value.items()} if same else None

    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return None

    turns = any(isinstance(item, dict) for column in columns for item in column)  # one conversation
    named = len(columns) > 1 or set(value) <= {"text", "prompt", "messages", "conversations"}
    return value if named and not turns else None


def _elements(text: str, label: str) -> Found:
    """The elements of a JSON list with the lines on which they begin."""
    decode = json.JSONDecoder().raw_decode
    position, line, counted, more = text.index("[") + 1, 1, 0, False
    while True:
        position = _BLANK.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and not more:
            break

        try:
            value, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{label}:{line}: not valid JSON ({error})", AGAIN) from None

        yield _element(value, text[position:end], line, label)
        position = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        more = text[position : position + 1] == ","

        if more:
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise UserError(f"{label}:{line}: not valid JSON (',' or ']' expected)", AGAIN)

    if text[position + 1 :].strip():
        behind = _BLANK.match(text, position + 1).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, behind)
        raise UserError(f"{label}:{line}: there is text behind the JSON list", AGAIN)


def _element(value: Any, written: str, line: int, label: str) -> tuple[int, Any] | Bad:
    if is_deep(value, _DEEPEST):
        return Bad(
            f"{label}:{line}", f"nested more than {_DEEPEST} levels deep", "mend the element"
        )
    if _HALF.search(written) and not _encodable(value):
        return Bad(f"{label}:{line}", _NO_TEXT, "mend the element")

    twice = _twice(written, value)
    if twice:
        return Bad(
            f"{label}:{line}", f"the key '{twice}' stands twice in a mapping", "keep one of them"
        )

    return line, unified(value) if _RETURN.search(written) else value
