"""Public formats as functions from a row to records (§3.1, §3.2.1), and the one reader of them.

`dialogs`, `preferences` and `prompts` hold the tables of formats. A format is recognised by what
the first rows of a file have in common. Rows that cannot be used are counted by reason in a
`Tally`, and so are the columns that were not read; a row that would lose its meaning with one of
them is refused.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeGuard, TypeVar

import pydantic_core

from llama2.errors import UserError, did_you_mean
from llama2.importers.columns import find_unread
from llama2.reading.files import BadRow, Row, read_tables
from llama2.reading.rows import unify_line_ends
from llama2.tally import Tally

Malformed = Literal["stop", "skip"]
T = TypeVar("T")
SAMPLE = 64
"""rows by which a format is recognised"""
_FILES = 16
_TYPES: dict[type, str] = {dict: "a mapping", list: "a list of cells", str: "a text"}
_TURNS = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "conversation_a",
    "conversation_b",
    "preferred_output",
    "non_preferred_output",
)
"""columns in which a list of turns may be written as text, as CSV must"""
_WRITTEN = re.compile(r"""\s*(array\()?\[\s*\{\s*(["'])(role|content|from|value|name)\2\s*:""")


class SkippedRow(Exception):
    """A row, or one record of it, that is well formed but of no use; `reason` is counted. Raised or
    yielded."""

    def __init__(self, reason: str, cure: str = "") -> None:
        self.reason, self.cure = reason, cure
        super().__init__(reason)


class LostColumns(UserError):
    """The refusal of a row that has more to say than its format reads."""

    def __init__(self, row: Row, format: str, columns: Sequence[str]) -> None:
        ignore = f"--sources.NAME.ignore {shlex.join(columns)}"
        self.skipped = SkippedRow(f"column {', '.join(columns)} would be lost", ignore)
        names = ", ".join(f"'{column}'" for column in columns)
        super().__init__(
            f"{row.where}: {names} would be lost: the format '{format}' does not read that",
            f"put it into the prompt, name another format, or leave it out: {ignore}",
        )


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """A public format. A row is in it if it is `of` its type, has all `keys` ("a|b": either) and
    passes `test`.

    `known` are columns of the set that its records do not need. A format `on_request` is never
    recognised.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Iterable[T | SkippedRow]]
    test: Callable[[Row], bool] = lambda row: True
    known: tuple[str, ...] = ()
    on_request: bool = False
    of: type = dict

    def find_missing_key(self, value: Any) -> str:
        """Return the first key that a value lacks, "" if it has all."""
        present = {*value} if isinstance(value, dict) else set()
        for key in self.keys:
            if present.isdisjoint(key.split("|")):
                return key.partition("|")[0]

        return ""

    def matches(self, row: Row) -> bool:
        """Return whether a row can be in this format, as far as its keys tell."""
        if (
            self.on_request
            or not isinstance(row.value, self.of)
            or self.find_missing_key(row.value)
        ):
            return False

        return self.test(Row(row.value, row.where, row.name))


@dataclass(frozen=True)
class ReadOptions:
    """Choices for the reading of a source.

    format: a name, or "auto": recognised file by file. malformed: whether a row that is none ends
    the import or is counted. ignore: columns to leave out. worth: whether it matters how good the
    answers are.
    """

    format: str = "auto"
    malformed: Malformed = "stop"
    ignore: tuple[str, ...] = ()
    worth: bool = True


AUTO = ReadOptions()


def read_records(
    path: str | os.PathLike[str],
    formats: Sequence[RowFormat[T]],
    options: ReadOptions,
    tally: Tally,
) -> Iterator[tuple[Row, T]]:
    """The records of a file, directory or archive, each with its row.

    Where malformed rows are skipped, so are those that are damaged or of no known format.
    """
    named = {format.name: format for format in formats}
    if options.format != "auto" and options.format not in named:
        raise UserError(
            f"unknown format '{options.format}'", did_you_mean(options.format, ["auto", *named])
        )

    possible = formats if options.format == "auto" else [named[options.format]]
    for rows in read_tables(path, tally):
        head, everything = _peek(map(_parse_turns, rows))
        header = _find_header(possible, head)
        sample = [_name_cells(row, header) for row in head[bool(header) :] if _fits(row, header)]
        chosen = named.get(options.format) or _recognise(formats, options, sample)
        for row in islice(everything, bool(header), None):
            tally.read += 1
            for record in _read_row(row, header, chosen, options, tally):
                if isinstance(record, SkippedRow):
                    tally.skip(record.reason, record.cure)
                elif isinstance(row, Row):
                    yield row, record


def _read_row(
    row: Row | BadRow,
    header: list[str],
    chosen: RowFormat[T] | None,
    options: ReadOptions,
    tally: Tally,
) -> list[T | SkippedRow]:
    """Return what a row holds. A row that is malformed is an error, or something to skip."""
    try:
        if isinstance(row, BadRow):
            raise row.error(", or import with malformed: skip")
        if chosen is None:
            raise _explain_unknown(row)

        row = _name_cells(row, header)
        if options.ignore:
            row = replace(row, value=_drop_columns(row.value, options.ignore))

        return _convert(row, chosen, options, tally)
    except SkippedRow as skipped:
        return [skipped]
    except (ValueError, UserError) as error:
        if options.malformed == "skip":
            return [error.skipped if isinstance(error, LostColumns) else SkippedRow("malformed")]
        if isinstance(error, UserError) or isinstance(row, BadRow):
            raise

        raise row.error(str(error)) from None


def _convert(
    row: Row, chosen: RowFormat[T], options: ReadOptions, tally: Tally
) -> list[T | SkippedRow]:
    """Return the records of a row in its format; UserError where it is not in it, or where a column
    would be lost."""
    if not isinstance(row.value, chosen.of):
        raise row.error(
            f"the format '{chosen.name}' has {_TYPES[chosen.of]} for a row, "
            f"this is {_describe_shape(row.value)}"
        )

    missing = chosen.find_missing_key(row.value)
    if missing:
        raise row.error(f"'{missing}' is missing: this row is not in the format '{chosen.name}'")

    tally.note("format", chosen.name)
    records = [*chosen.convert(row)]
    if all(isinstance(record, SkippedRow) for record in records):
        return records

    unread = find_unread(row, chosen.known, options.worth)
    if unread.tools:
        raise SkippedRow("tools", "a Llama 2 dialogue has no place for their calls")
    if unread.lost:
        raise LostColumns(row, chosen.name, unread.lost)

    for column in unread.harmless:
        tally.note("columns not read", column)

    return records


def read_sample(path: str | os.PathLike[str]) -> Iterator[list[Row]]:
    """The first rows of the first files: what is at a path, as far as it can be read."""
    for rows in islice(read_tables(path, Tally()), _FILES):
        head, _ = _peek(map(_parse_turns, rows))
        yield [row for row in head if isinstance(row, Row)]


def _peek(
    rows: Iterator[Row | BadRow],
) -> tuple[list[Row | BadRow], Iterator[Row | BadRow]]:
    """Return the first rows, and all of them; an error on the way is raised in its turn."""
    head: list[Row | BadRow] = []
    failure: UserError | None = None
    try:
        for row in islice(rows, SAMPLE):
            head.append(row)
    except UserError as error:
        failure = error

    def replay() -> Iterator[Row | BadRow]:
        yield from head
        if failure is not None:
            raise failure

        yield from rows

    return head, replay()


# --- rows ---


def _parse_turns(row: Row | BadRow) -> Row | BadRow:
    """Return a row in which lists of turns that are written as text are lists again."""
    if isinstance(row, BadRow) or not isinstance(row.value, dict):
        return row

    parsed: dict[str, list[Any]] = {}
    for key in _TURNS:
        text = row.value.get(key)
        if not isinstance(text, str) or not _WRITTEN.match(text):
            continue

        turns = _parse_list(text)
        if turns is None:
            return BadRow(
                row.where,
                f"'{key}' is a list of turns written as text, in a way that cannot be read back",
                "write the turns as JSON, best into a file of JSON Lines",
            )

        parsed[key] = turns

    return replace(row, value=row.value | parsed) if parsed else row


def _parse_list(text: str) -> list[Any] | None:
    """Return a list of mappings that is written as JSON or as Python writes it, None where it is
    neither."""
    for parse in (pydantic_core.from_json, ast.literal_eval):
        try:
            turns = unify_line_ends(parse(text.strip()))
            pydantic_core.to_json(turns)  # refuses what UTF-8 cannot hold
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue

        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return turns

    return None


def _find_header(formats: Sequence[RowFormat[T]], head: list[Row | BadRow]) -> list[str]:
    """Return the first row of a table of cells, if a format knows its cells as keys, else []."""
    first = head[0] if head else None
    if not isinstance(first, Row) or not isinstance(first.value, list):
        return []

    cells = [str(cell).strip() for cell in first.value]
    row = dict.fromkeys(cells)
    return cells if any(f.keys and not f.find_missing_key(row) for f in formats) else []


def _fits(row: Row | BadRow, header: list[str]) -> TypeGuard[Row]:
    """Return whether a row has a cell for each name of the header, if there is one."""
    if not isinstance(row, Row):
        return False

    return not header or not isinstance(row.value, list) or len(row.value) == len(header)


def _name_cells(row: Row, header: list[str]) -> Row:
    """Return a row of cells as a mapping, under the names of its header."""
    if not header or not isinstance(row.value, list):
        return row
    if not _fits(row, header):
        raise row.error(f"this row has {len(row.value)} cells, the header {len(header)}")

    return replace(row, value=dict(zip(header, row.value)))


def _drop_columns(value: Any, columns: tuple[str, ...]) -> Any:
    """Return a value without some columns, wherever in it they stand."""
    if isinstance(value, dict):
        items = value.items()
        return {key: _drop_columns(item, columns) for key, item in items if key not in columns}

    return [_drop_columns(item, columns) for item in value] if isinstance(value, list) else value


# --- formats ---


def _recognise(
    formats: Sequence[RowFormat[T]], options: ReadOptions, rows: list[Row]
) -> RowFormat[T] | None:
    """Return the first format that fits every row of the sample which any fits."""
    fitting: list[tuple[Row, list[RowFormat[T]]]] = []
    for row in rows:
        matching = [format for format in formats if format.matches(row)]
        if matching:
            fitting.append((row, matching))

    if not fitting:
        return None

    counts = Counter(format.name for _, matching in fitting for format in matching)
    best = max(formats, key=lambda format: counts[format.name])
    if options.malformed == "stop":
        for row, matching in fitting:
            if best not in matching:
                raise row.error(
                    f"the rows are of several formats: this one is '{matching[0].name}', "
                    f"most are '{best.name}'",
                    "split the file by format; or name one format and import with malformed: skip",
                )

    return best


def _explain_unknown(row: Row) -> UserError:
    """Return the error for a row of no known format."""
    shape = _describe_shape(row.value)
    if isinstance(row.value, dict):
        shape = ", ".join(map(repr, row.value))

    return row.error(
        f"the format is not recognised; the first record has {shape[:200]}",
        "name the format (docs/data.md), rename its columns, or import with malformed: skip",
    )


def _describe_shape(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} cells"

    return _TYPES.get(type(value), type(value).__name__)
