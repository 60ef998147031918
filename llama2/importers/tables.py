"""Public formats as functions from a row to records (§3.1, §3.2.1).

The importers of `data` and `preferences` describe formats; what they share lives here. A format is
recognised by what the first rows of a file have in common. Rows that cannot be used are counted by
reason in a `Tally`, and so are the columns that were not read; a row that would lose its meaning
with one of them is refused.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeGuard, TypeVar

import pydantic_core

from llama2.errors import UserError, did_you_mean
from llama2.importers.columns import unread
from llama2.reading.files import Bad, Row, tables
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
_MEND = "mend the row, or import with malformed: skip"


class Skip(Exception):
    """This row, or one record of it, is well formed but of no use; `reason` is counted. Raised or
    yielded."""

    def __init__(self, reason: str, cure: str = "") -> None:
        self.reason, self.cure = reason, cure
        super().__init__(reason)


class Lost(UserError):
    """A row that has more to say than its format reads."""

    def __init__(self, row: Row, format: str, columns: Sequence[str]) -> None:
        self.skip = Skip(
            f"column {', '.join(columns)} would be lost",
            f"--sources.NAME.ignore {shlex.join(columns)}",
        )
        names = ", ".join(f"'{column}'" for column in columns)
        super().__init__(
            f"{row.where}: {names} would be lost: the format '{format}' does not read that",
            "put it into the prompt, name another format, or leave it out: "
            f"--sources.NAME.ignore {shlex.join(columns)}",
        )


@dataclass(frozen=True)
class Format(Generic[T]):
    """A public format. A row is in it if it is `of` its type, has all `keys` ("a|b": either) and
    passes `test`.

    `known` are columns of the set that its records do not need. A format `on_request` is never
    recognised.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Iterable[T | Skip]]
    test: Callable[[Row], bool] = lambda row: True
    known: tuple[str, ...] = ()
    on_request: bool = False
    of: type = dict

    def missing(self, value: Any) -> str:
        """The first key that a value lacks, "" if it has all."""
        present = {*value} if isinstance(value, dict) else set()
        return next((key.split("|")[0] for key in self.keys if not present & {*key.split("|")}), "")

    def matches(self, row: Row) -> bool:
        """Whether a row can be in this format, as far as its keys tell."""
        return (
            not self.on_request
            and isinstance(row.value, self.of)
            and not self.missing(row.value)
            and self.test(Row(row.value, row.where, row.name))
        )


@dataclass(frozen=True)
class Reading:
    """How a source is to be read.

    format: a name, or "auto": recognised file by file. malformed: whether a row that is none ends
    the import or is counted. ignore: columns to leave out. worth: whether it matters how good the
    answers are.
    """

    format: str = "auto"
    malformed: Malformed = "stop"
    ignore: tuple[str, ...] = ()
    worth: bool = True


AUTO = Reading()


def convert(
    path: str | os.PathLike[str], formats: Sequence[Format[T]], how: Reading, tally: Tally
) -> Iterator[tuple[Row, T]]:
    """The records of a file, directory or archive, each with its row.

    Where malformed rows are skipped, so are those that are damaged or of no known format.
    """
    if how.format != "auto" and how.format not in {f.name for f in formats}:
        raise UserError(
            f"unknown format '{how.format}'",
            did_you_mean(how.format, ["auto", *(f.name for f in formats)]),
        )

    for rows in tables(path, tally):
        head, everything = _peek(map(_with_turns, rows))
        header = _header(formats, how.format, head)
        chosen = _choose(
            formats,
            how,
            [_named(row, header) for row in head[bool(header) :] if _is_whole(row, header)],
        )

        for row in islice(everything, bool(header), None):
            tally.read += 1
            for record in _records(row, header, chosen, how, tally):
                if isinstance(record, Skip):
                    tally.skip(record.reason, record.cure)
                elif isinstance(row, Row):
                    yield row, record


def _records(
    row: Row | Bad, header: list[str], chosen: Format[T] | None, how: Reading, tally: Tally
) -> list[T | Skip]:
    """What a row holds. A row that is malformed is an error, or something to skip."""
    try:
        if isinstance(row, Bad):
            raise row.error(", or import with malformed: skip")
        if chosen is None:
            raise _unknown(row)

        return _read(_without(_named(row, header), how.ignore), chosen, how, tally)
    except Skip as skip:
        return [skip]
    except (ValueError, UserError) as error:
        if how.malformed == "stop":
            raise (
                error if isinstance(error, UserError) else UserError(f"{row.where}: {error}", _MEND)
            ) from None

        return [error.skip if isinstance(error, Lost) else Skip("malformed")]


def _read(row: Row, chosen: Format[T], how: Reading, tally: Tally) -> list[T | Skip]:
    if not isinstance(row.value, chosen.of):
        raise row.error(
            f"the format '{chosen.name}' has {_TYPES[chosen.of]} for a row, this is {_shape(row.value)}"
        )

    missing = chosen.missing(row.value)
    if missing:
        raise row.error(f"'{missing}' is missing: this row is not in the format '{chosen.name}'")

    tally.note("format", chosen.name)
    records = [*chosen.convert(row)]
    if all(isinstance(record, Skip) for record in records):
        return records

    left = unread(row, chosen.known, how.worth)
    if left.tools:
        raise Skip("tools", "a Llama 2 dialogue has no place for their calls")
    if left.lost:
        raise Lost(row, chosen.name, left.lost)

    for column in left.harmless:
        tally.note("columns not read", column)

    return records


def sample(path: str | os.PathLike[str]) -> Iterator[list[Row]]:
    """The first rows of the first files: what is at a path, as far as it can be read."""
    for rows in islice(tables(path, Tally()), _FILES):
        yield [row for row in _peek(map(_with_turns, rows))[0] if isinstance(row, Row)]


def _with_turns(row: Row | Bad) -> Row | Bad:
    """A row in which lists of turns that are written as text are lists again."""
    if isinstance(row, Bad) or not isinstance(row.value, dict):
        return row

    written = {
        key: said
        for key in _TURNS
        if isinstance(said := row.value.get(key), str) and _WRITTEN.match(said)
    }
    read = {key: _turns_of(said) for key, said in written.items()}
    for key, turns in read.items():
        if turns is None:
            return Bad(
                row.where,
                f"'{key}' is a list of turns written as text, in a way that cannot be read back",
                "write the turns as JSON, best into a file of JSON Lines",
            )

    return replace(row, value=row.value | read) if read else row


def _turns_of(said: str) -> list[Any] | None:
    """A list of mappings that is written as JSON or as Python writes it, None where it is
    neither."""
    for read in (pydantic_core.from_json, ast.literal_eval):
        try:
            turns = read(said.strip())
            pydantic_core.to_json(turns)  # refuses what UTF-8 cannot hold
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue

        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            return turns

    return None


def _peek(rows: Iterator[Row | Bad]) -> tuple[list[Row | Bad], Iterator[Row | Bad]]:
    """The first rows, and all of them; an error on the way is raised in its turn."""
    head: list[Row | Bad] = []
    failures: list[UserError] = []
    try:
        for row in islice(rows, SAMPLE):
            head.append(row)
    except UserError as error:
        failures.append(error)

    def everything() -> Iterator[Row | Bad]:
        yield from head
        for failure in failures:
            raise failure

        yield from rows

    return head, everything()


def _header(formats: Sequence[Format[T]], name: str, head: list[Row | Bad]) -> list[str]:
    """The first row of a table of cells, if a format knows its cells as keys, else []."""
    if not head or not isinstance(head[0], Row) or not isinstance(head[0].value, list):
        return []

    cells = [str(cell).strip() for cell in head[0].value]
    known = any(
        f.keys and not f.missing(dict.fromkeys(cells)) for f in formats if name in ("auto", f.name)
    )
    return cells if known else []


def _is_whole(row: Row | Bad, header: list[str]) -> TypeGuard[Row]:
    return isinstance(row, Row) and (
        not header or not isinstance(row.value, list) or len(row.value) == len(header)
    )


def _named(row: Row, header: list[str]) -> Row:
    """A row of cells as a mapping, under the names of its header."""
    if not header or not isinstance(row.value, list):
        return row
    if not _is_whole(row, header):
        raise row.error(f"this row has {len(row.value)} cells, the header {len(header)}")

    return replace(row, value=dict(zip(header, row.value)), asked=set(), parts=[])


def _without(row: Row, columns: tuple[str, ...]) -> Row:
    """A row without some columns, wherever in it they stand."""
    return (
        replace(row, value=_pruned(row.value, columns), asked=set(), parts=[]) if columns else row
    )


def _pruned(value: Any, columns: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner, columns) for key, inner in value.items() if key not in columns}

    return [_pruned(inner, columns) for inner in value] if isinstance(value, list) else value


def _choose(formats: Sequence[Format[T]], how: Reading, rows: list[Row]) -> Format[T] | None:
    """The format that was named, else the first that fits every row of the sample which any
    fits."""
    if how.format != "auto":
        return next(f for f in formats if f.name == how.format)

    fitting = [[f for f in formats if f.matches(row)] for row in rows]
    recognised = [row for row, fit in zip(rows, fitting) if fit]
    counts = {f.name: sum(f in fit for fit in fitting) for f in formats}
    best = max(formats, key=lambda f: counts[f.name])

    if not recognised:
        return None

    if counts[best.name] < len(recognised) and how.malformed == "stop":
        other, fit = next((row, fit) for row, fit in zip(rows, fitting) if fit and best not in fit)
        raise other.error(
            f"the rows are of several formats: this one is '{fit[0].name}', most are '{best.name}'",
            "split the file by format; or name one format and import with malformed: skip",
        )

    return best


def _unknown(row: Row) -> UserError:
    shown = ", ".join(map(repr, row.value)) if isinstance(row.value, dict) else _shape(row.value)
    return row.error(
        f"the format is not recognised; the first record has {shown[:200]}",
        "name the format (docs/data.md), rename its columns, or import with malformed: skip",
    )


def _shape(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} cells"

    return _TYPES.get(type(value), type(value).__name__)
