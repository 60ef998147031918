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
from llama2.errors import UserError, explain_missing_extra
from llama2.reading.packed import explain_damage, open_unpacked
from llama2.reading.rows import (
    TO_UTF8,
    BadRow,
    File,
    Numbered,
    read_lines,
    read_text,
    unify_line_ends,
)
from llama2.reading.values import COLUMNS

_NULLS = frozenset(("NaN", "nan", "<NA>", "#N/A", "NULL"))
"""what tables of text write where there is nothing; words such as None may be meant"""
_OTHER_SEPARATORS = {
    ";": ("semicolons", "save it with commas"),
    "\t": ("tabs", "name the file .tsv"),
}
_UNREADABLE = (ValueError, OverflowError, ImportError)
"""what pyarrow raises over a value that Python cannot hold"""
_Line = tuple[int, str, str]
_Cells = tuple[int, list[str]]


def read_csv(file: File) -> Numbered:
    """Mappings of the names in the header to texts."""
    records = _Records(file, ",")
    for header in records:
        if not isinstance(header, BadRow) and header[1] == ["sep=", ""]:
            continue  # Excel's first line, which names the comma

        names = _read_header(header, file.label)
        for separator, (what, cure) in _OTHER_SEPARATORS.items():
            if len(names) == 1 and separator in names[0]:
                raise UserError(
                    f"{file.label}: the cells are separated by {what}, not by commas", cure
                )

        yield from _name_cells(records, names, file.label)


def read_tsv(file: File) -> Numbered:
    """Under a header: mappings of its names to texts, quoted as in CSV. Without one: lists of
    texts, in which a quote is a character like any other.

    The first line is a header if its cells are different short names, of which half, and two at
    least, are among `values.COLUMNS` (one, if there is one cell).
    """
    first = next(((text, flaw) for _, text, flaw in read_lines(file) if text.strip()), ("", ""))
    if first[0] and not first[1] and _is_header(first[0]):
        records = _Records(file, "\t")
        names = _read_header(next(records), file.label)
        yield from _name_cells(records, names, file.label)
        return

    for row in read_text(file):
        yield row if isinstance(row, BadRow) else (row[0], row[1].split("\t"))


def _is_header(text: str) -> bool:
    cells = [cell.strip().strip('"').lower() for cell in text.split("\t")]
    known = sum(cell in COLUMNS for cell in cells)
    if len(set(cells)) < len(cells) or known < max(len(cells) / 2, min(2, len(cells))):
        return False

    return all(re.fullmatch(r"[\w .-]{0,40}", cell) for cell in cells)


def _read_header(record: _Cells | BadRow, label: str) -> list[str]:
    """Return the names of columns; one without a name is called after its place."""
    if isinstance(record, BadRow):
        raise record.error()

    line, cells = record
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, 1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{label}:{line}: two columns are called '{name}'",
                "give each column a name of its own",
            )

    return names


def _name_cells(records: Iterator[_Cells | BadRow], names: list[str], label: str) -> Numbered:
    """Records as mappings of the names to their cells."""
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue

        line, cells = record
        if len(cells) == len(names):
            texts = ["" if cell.strip() in _NULLS else cell for cell in cells]
            yield line, dict(zip(names, texts))
            continue

        more = len(cells) > len(names)
        yield BadRow(
            f"{label}:{line}",
            f"this row has {'more' if more else 'fewer'} cells than the header "
            f"({len(cells)}, not {len(names)})",
            "quote cells that hold separators" if more else "mend the row",
        )


class _Records(Iterator["_Cells | BadRow"]):
    """The records of a table of text, each with the line on which it begins.

    After a bad one reading goes on in its second line: a quote that is never closed does not
    swallow the rows behind it.
    """

    def __init__(self, file: File, delimiter: str) -> None:
        csv.field_size_limit(sys.maxsize)
        self._label, self._delimiter = file.label, delimiter
        self._source = read_lines(file)
        self._again: list[_Line] = []  # lines to be read once more, the next one last
        self._taken: list[_Line] = []  # the lines of the current record

    def __next__(self) -> _Cells | BadRow:
        cells: list[str] = []
        while not cells:  # a blank line has none
            self._taken = []
            try:
                cells = next(csv.reader(self._feed(), delimiter=self._delimiter, strict=True))
            except csv.Error as error:
                return self._explain(error)

        for number, _, flaw in self._taken:
            if flaw:
                return BadRow(f"{self._label}:{number}", flaw, TO_UTF8)

        return self._taken[0][0], cells

    def _feed(self) -> Iterator[str]:
        while line := self._again.pop() if self._again else next(self._source, None):
            self._taken.append(line)
            yield line[1] + "\n"

    def _explain(self, error: csv.Error) -> BadRow:
        self._again += reversed(self._taken[1:])
        unclosed = _find_unclosed(self._taken, self._delimiter)
        if unclosed:
            return BadRow(
                f"{self._label}:{unclosed}",
                "a quote is opened here and never closed",
                "close it, or double it",
            )

        return BadRow(
            f"{self._label}:{self._taken[-1][0]}",
            f"a quoted cell goes on behind its quote ({error}); "
            f"it begins in line {self._taken[0][0]}",
            "double the quotes inside a quoted cell",
        )


def _find_unclosed(taken: list[_Line], delimiter: str) -> int:
    """Return the line where a quoted cell begins that the lines do not end; 0 if there is none."""
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


# --- Parquet ---


def read_parquet(file: File) -> Numbered:
    """Mappings of columns to values. Whole floats become integers, NaN None: pandas keeps integers
    among nulls so."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise explain_missing_extra("pyarrow", "data") from None

    number = 0
    with explain_damage(lambda: f"{file.label}:{number + 1}"), _open_seekable(file) as content:
        try:
            # of the pages that have one
            table = parquet.ParquetFile(content, page_checksum_verification=True)
            for batch in table.iter_batches(batch_size=1024):
                for value in _list_rows(batch):
                    number += 1
                    if isinstance(value, Exception):
                        cause = f"a value that cannot be read ({value})"
                        yield BadRow(f"{file.label}:{number}", cause, "mend the row")
                    else:
                        yield number, _restore_integers(unify_line_ends(value))
        except (pyarrow.ArrowException, MemoryError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file.label}:{number + 1}: truncated or corrupt Parquet file ({reason})",
                "fetch it again",
            ) from error


def _list_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch, or the exception that a row raises."""
    try:
        yield from batch.to_pylist()
    except _UNREADABLE:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except _UNREADABLE as error:
                yield error


def _restore_integers(value: Any) -> Any:
    """Return a value with whole floats as integers, and None for NaN."""
    if isinstance(value, dict):
        return {key: _restore_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore_integers(item) for item in value]
    if not isinstance(value, float):
        return value
    if value != value:
        return None

    return int(value) if value.is_integer() and abs(value) < 2**53 else value


@contextmanager
def _open_seekable(file: File) -> Iterator[IO[bytes]]:
    """Open a file that can be read in any order: itself, or a copy of what is packed."""
    if not file.member and file.path.suffix.lower() == file.kind:
        with json_files.open_file(file.path) as content:
            yield content

        return

    with tempfile.TemporaryFile() as copy:
        with open_unpacked(file.path, file.member) as packed:
            shutil.copyfileobj(packed, copy)

        copy.seek(0)
        yield copy
