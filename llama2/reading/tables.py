"""Rows of tables: CSV, TSV and Parquet.

CSV is strict: a quote that is not closed, a row of more or fewer cells than the header and a name
that stands twice in the header are refused, for each of them would put texts into the wrong places
in silence.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from llama2 import json_files
from llama2.errors import UserError, missing_extra
from llama2.reading.packed import explained, opened
from llama2.reading.rows import TO_UTF8, Bad, File, Found, lines, text_rows, unified
from llama2.reading.values import COLUMNS

_NULLS = frozenset(("NaN", "nan", "<NA>", "#N/A", "NULL"))
"""what tables of text write where there is nothing; words such as None may be meant"""
_Line = tuple[int, str, str]


def csv_rows(file: File) -> Found:
    """Mappings of the names in the header to texts."""
    records = _Records(file, ",")
    for header in records:
        if not isinstance(header, Bad) and header[1] == ["sep=", ""]:
            continue  # Excel's first line, which names the comma

        names = _header(header, file.label)
        for separator, what, cure in (
            (";", "semicolons", "save it with commas"),
            ("\t", "tabs", "name the file .tsv"),
        ):
            if len(names) == 1 and separator in names[0]:
                raise UserError(
                    f"{file.label}: the cells are separated by {what}, not by commas", cure
                )

        yield from _mapped(records, names, file.label)


def tsv_rows(file: File) -> Found:
    """Under a header: mappings of its names to texts, quoted as in CSV. Without one: lists of
    texts, in which a quote is a character like any other.

    The first line is a header if its cells are different short names, of which half, and two at
    least, are among `values.COLUMNS` (one, if there is one cell).
    """
    for _, text, flaw in lines(file):
        if text.strip() and not flaw and _is_header(text):
            records = _Records(file, "\t")
            yield from _mapped(records, _header(next(records), file.label), file.label)
            return

        if text.strip():
            break

    for found in text_rows(file):
        yield found if isinstance(found, Bad) else (found[0], found[1].split("\t"))


def _is_header(text: str) -> bool:
    cells = [cell.strip().strip('"').lower() for cell in text.split("\t")]
    known = sum(cell in COLUMNS for cell in cells)
    return (
        len(set(cells)) == len(cells)
        and all(re.fullmatch(r"[\w .-]{0,40}", cell) for cell in cells)
        and 2 * known >= len(cells)
        and known >= min(2, len(cells))
    )


def _header(found: tuple[int, list[str]] | Bad, label: str) -> list[str]:
    """The names of columns; one without a name is called after its place."""
    if isinstance(found, Bad):
        raise found.error()

    line, cells = found
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{label}:{line}: two columns are called '{name}'",
                "give each column a name of its own",
            )

    return names


def _mapped(records: Iterator[tuple[int, list[str]] | Bad], names: list[str], label: str) -> Found:
    for record in records:
        if isinstance(record, Bad):
            yield record
            continue

        line, cells = record
        if len(cells) == len(names):
            yield (
                line,
                {name: "" if cell.strip() in _NULLS else cell for name, cell in zip(names, cells)},
            )
        elif len(cells) > len(names):
            yield Bad(
                f"{label}:{line}",
                f"this row has more cells than the header ({len(cells)}, not {len(names)})",
                "quote cells that hold separators",
            )
        else:
            yield Bad(
                f"{label}:{line}",
                f"this row has fewer cells than the header ({len(cells)}, not {len(names)})",
                "mend the row",
            )


class _Records(Iterator["tuple[int, list[str]] | Bad"]):
    """The records of a table of text, each with the line on which it begins. After a bad one
    reading goes on in its second line: a quote that is never closed does not swallow the rows
    behind it."""

    def __init__(self, file: File, delimiter: str) -> None:
        csv.field_size_limit(sys.maxsize)
        self._label, self._delimiter = file.label, delimiter
        self._source = lines(file)
        self._again: list[_Line] = []  # lines to be read once more, the next one last
        self._taken: list[_Line] = []

    def __next__(self) -> tuple[int, list[str]] | Bad:
        cells: list[str] = []
        while not cells:  # a blank line has none
            self._taken = []
            try:
                cells = next(csv.reader(self._feed(), delimiter=self._delimiter, strict=True))
            except csv.Error as error:
                return self._bad(error)

        for number, _, flaw in self._taken:
            if flaw:
                return Bad(f"{self._label}:{number}", flaw, TO_UTF8)

        return self._taken[0][0], cells

    def _feed(self) -> Iterator[str]:
        while (line := self._again.pop() if self._again else next(self._source, None)) is not None:
            self._taken.append(line)
            yield line[1] + "\n"

    def _bad(self, error: csv.Error) -> Bad:
        self._again += reversed(self._taken[1:])
        unclosed = _opening(self._taken, self._delimiter)
        if unclosed:
            return Bad(
                f"{self._label}:{unclosed}",
                "a quote is opened here and never closed",
                "close it, or double it",
            )

        return Bad(
            f"{self._label}:{self._taken[-1][0]}",
            f"a quoted cell goes on behind its quote ({error}); "
            f"it begins in line {self._taken[0][0]}",
            "double the quotes inside a quoted cell",
        )


def _opening(taken: list[_Line], delimiter: str) -> int:
    """The line where a quoted cell begins that the lines do not end; 0 if there is none."""
    begun, state = 0, "start"
    for number, text, _ in taken:
        for character in text:
            if state == "quoted":
                state = "closed" if character == '"' else state
            elif state == "closed" and character == '"':
                state = "quoted"
            elif state == "start" and character == '"':
                state, begun = "quoted", number
            else:
                state = "start" if character == delimiter else "plain"

        state = state if state == "quoted" else "start"

    return begun if state == "quoted" else 0


# --- Parquet
# --------------------------------------------------------------------------------------------------------


def parquet_rows(file: File) -> Found:
    """Mappings of columns to values. Whole floats become integers, NaN None: pandas keeps integers
    among nulls so."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "data") from None

    number = 0
    with explained(lambda: f"{file.label}:{number + 1}"), _seekable(file) as content:
        try:
            # of the pages that have one
            found = parquet.ParquetFile(content, page_checksum_verification=True)
            for batch in found.iter_batches(batch_size=1024):
                for value in _values(batch):
                    number += 1
                    yield (
                        (number, _whole_numbers(unified(value)))
                        if not isinstance(value, Exception)
                        else Bad(
                            f"{file.label}:{number}",
                            f"a value that cannot be read ({value})",
                            "mend the row",
                        )
                    )
        except (pyarrow.ArrowException, MemoryError, OSError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{file.label}:{number + 1}: truncated or corrupt Parquet file ({said})",
                "fetch it again",
            ) from error


def _values(batch: Any) -> Iterator[Any]:
    """The rows of a batch, or the exception that a row raises."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, ImportError):
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError, ImportError) as error:
                yield error


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float):
        return (
            None
            if value != value
            else int(value)
            if value.is_integer() and abs(value) < 2**53
            else value
        )
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}

    return [_whole_numbers(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _seekable(file: File) -> Iterator[IO[bytes]]:
    """A file that can be read in any order: itself, or a copy of what is packed."""
    if not file.member and file.path.suffix.lower() == file.kind:
        with json_files.opened(file.path) as content:
            yield content

        return

    with tempfile.TemporaryFile() as copy:
        with opened(file.path, file.member) as packed:
            shutil.copyfileobj(packed, copy)

        copy.seek(0)
        yield copy
