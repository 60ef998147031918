"""Public formats as functions from a row to records (§3.1, §3.2.1).

The importers of `data` and `preferences` describe formats; what they share lives here: rows that cannot be used are
counted by reason in a `Tally`, and a format is recognised by the keys of a file's first record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from llama2.errors import UserError, did_you_mean
from llama2.files import Bad, Row, tables
from llama2.tally import Tally

Malformed = Literal["stop", "skip"]
T = TypeVar("T")


class Skip(Exception):
    """This row, or one record of it, is well formed but of no use; `reason` is counted. Raised or yielded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Format(Generic[T]):
    """A public format. A row is in it if it has every one of `keys` ("a|b": either) and passes `test`."""

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row], Iterable[T | Skip]]
    test: Callable[[Any], bool] = lambda value: True

    def matches(self, value: Any) -> bool:
        has = isinstance(value, dict) and all(any(k in value for k in key.split("|")) for key in self.keys)
        return (has or not self.keys) and self.test(value)


def convert(path: str | os.PathLike[str], formats: Sequence[Format[T]], name: str, tally: Tally,
            malformed: Malformed = "stop") -> Iterator[tuple[Row, T]]:
    """The records of a file, directory or archive, each with its row. `name` "auto": recognised file by file.

    With `malformed` "skip", rows that are damaged or of no known format are counted and reading goes on behind them.
    """
    if name != "auto" and name not in {f.name for f in formats}:
        raise UserError(f"unknown format '{name}'", did_you_mean(name, ["auto", *(f.name for f in formats)]))
    for rows in tables(path, tally):
        chosen: Format[T] | None = None
        for row in rows:
            tally.read += 1
            try:
                if isinstance(row, Bad):
                    raise row.error(", or import with malformed: skip")
                chosen = chosen or _choose(formats, name, row)
                records = [*chosen.convert(row)]
            except Skip as skip:
                records = [skip]
            except (ValueError, UserError) as error:
                if malformed == "stop":
                    raise error if isinstance(error, UserError) else row.error(str(error)) from None
                records = [Skip("malformed")]
            for record in records:
                if isinstance(record, Skip):
                    tally.skipped[record.reason] += 1
                elif isinstance(row, Row):
                    yield row, record


def _choose(formats: Sequence[Format[T]], name: str, row: Row) -> Format[T]:
    for candidate in formats:
        if candidate.name == name or (name == "auto" and candidate.matches(row.value)):
            return candidate
    shown = ", ".join(map(repr, row.value)) if isinstance(row.value, dict) else type(row.value).__name__
    raise row.error(f"the format is not recognised; the first record has {shown[:200]}",
                    f"name the format, one of {', '.join(f.name for f in formats)} (docs/data.md)")


def digest(*parts: str) -> int:
    """A number in [0, 2^64) that depends on the parts alone: the one source of chance in imports."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
