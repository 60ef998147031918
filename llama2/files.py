"""Rows of files that other people made: JSON, JSON Lines, CSV, TSV, plain lines, Parquet; packed or in a zip archive.

Which files a path stands for, how their bytes become text and text becomes rows is decided here, once. A row knows the
file and the line it came from. `tables` makes records of rows.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llama2.errors import UserError, explain_os_errors, missing_extra
from llama2.records import open_bytes

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_NAMELESS = re.compile(r"(train|test|valid|validation|dev|data|dataset|questions?|all)([-_.].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One record of a file: `value` is a mapping, a list of cells or a line of text; `where` is file and line;
    `name` is the set it belongs to, after the file (`test.jsonl` and its like are named with their directory).

    A row remembers which of its keys were asked for, and which mappings inside it were read: what is left says what a
    reader overlooks.
    """

    value: Any
    where: str
    name: str
    asked: set[str] = field(default_factory=set, compare=False, repr=False)
    parts: list[Row] = field(default_factory=list, compare=False, repr=False)

    def error(self, cause: str, cure: str = "mend the row, or import with malformed: skip") -> UserError:
        """The error that names this row."""
        return UserError(f"{self.where}: {cause}", cure)

    def part(self, value: Any) -> Row:
        """A mapping inside this row, as a row whose keys are watched likewise."""
        self.parts.append(Row(value, self.where, self.name))
        return self.parts[-1]

    def whole(self) -> Any:
        """The value, all of it read."""
        if isinstance(self.value, dict):
            self.asked.update(self.value)
        return self.value

    def get(self, key: str) -> Any:
        """The value of a key, None where there is none; NaN, the null of tables, is None."""
        self.asked.add(key)
        value = self.value.get(key) if isinstance(self.value, dict) else None
        return None if value != value else value

    def text(self, *keys: str, optional: bool = False) -> str:
        """The text of the first of `keys` that says something, tidy, "" where all are empty or null.

        UserError where the row has none of them, unless that is `optional`, or where one is no text.
        """
        empty = optional
        for key in keys:
            value = self.get(key)
            if isinstance(value, str) and tidy(value):
                return tidy(value)
            if value is not None and not isinstance(value, str):
                raise self.error(f"'{key}' must be text, it is {type(value).__name__}")
            empty = empty or (isinstance(self.value, dict) and key in self.value)
        if empty:
            return ""
        raise self.error(f"'{keys[0]}' is missing")


def tidy(text: str) -> str:
    """A text with "\\n" as its only line end, and no space around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def tables(path: str | os.PathLike[str]) -> Iterator[Iterator[Row]]:
    """One iterator of rows for every file at `path`: itself, all files below a directory, all members of a zip."""
    path = Path(path)
    if not path.is_dir():
        yield from _tables_of_file(path, path.name)
        return
    files = sorted(p for p in path.rglob("*") if p.is_file() and (_kind(p.name) or p.suffix == ".zip"))
    if not files:
        raise UserError(f"{path}: no file to import in this directory", f"known endings: {', '.join(KINDS)}, .zip")
    for file in files:
        yield from _tables_of_file(file, file.relative_to(path).as_posix())


def _tables_of_file(path: Path, label: str) -> Iterator[Iterator[Row]]:
    if path.suffix != ".zip":
        if not _kind(path.name):
            raise UserError(f"{path}: cannot tell what kind of file this is",
                            f"known endings: {', '.join(KINDS)}, each also with .gz or .zst, and .zip")
        yield _rows(path, str(path), set_name(path.parent.name + "/" + label))
        return
    with _readable(path), zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if _kind(member) not in ("", ".parquet") and not member.startswith("__MACOSX"):
                yield _rows(path, f"{path}!{member}", set_name(f"{path.stem}/{member}"), member)


def _kind(name: str) -> str:
    suffix = Path(_unpacked(name)).suffix
    return suffix if suffix in KINDS else ""


def _unpacked(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".zst")


def set_name(file: str) -> str:
    """What to call the records of a file: its stem, with its directory where the stem says nothing."""
    parent, _, leaf = file.rpartition("/")
    stem = _unpacked(leaf).rpartition(".")[0] or leaf
    return f"{parent.rpartition('/')[2]}/{stem}".lstrip("/") if _NAMELESS.fullmatch(stem) else stem


def _rows(path: Path, label: str, name: str, member: str = "") -> Iterator[Row]:
    """The rows of one file, or of one member of an archive."""
    kind = _kind(member or path.name)
    if kind == ".parquet":
        values = _parquet(path)
    else:
        values = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _lines}[kind](
            _decoded(path, label, member), label)
    for line, value in values:
        yield Row(value, f"{label}:{line}", name)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    with explain_os_errors(path):
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: truncated or corrupt archive ({error})", "fetch it again") from error


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    with _readable(path):
        if member:
            with zipfile.ZipFile(path) as archive, archive.open(member) as inner:
                if not member.endswith(".gz"):
                    yield inner
                    return
                with gzip.open(inner, "rb") as file:
                    yield file  # type: ignore[misc]
        else:
            with open_bytes(path) as file:
                yield file


def _decoded(path: Path, label: str, member: str) -> Iterator[str]:
    """The lines of a file as text, their ends kept."""
    with _opened(path, member) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{label}:{number}: not UTF-8 ({error.reason} at byte {error.start})",
                                "convert the file to UTF-8") from error


def _parse(text: str, label: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{label}:{line}: not valid JSON ({error})", "mend the line") from None


def _json_lines(lines: Iterator[str], label: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse(line, label, number)


def _json(lines: Iterator[str], label: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list with their lines, a single JSON value, or JSON Lines under a wrong name."""
    text = "".join(lines)
    start = len(text) - len(text.lstrip())
    if not text[start:].startswith("["):
        if text[start:].startswith("{") and "\n" in text.strip() and _is_json(text.strip().partition("\n")[0]):
            yield from _json_lines(iter(text.splitlines(keepends=True)), label)
        elif text.strip():
            yield 1, _parse(text, label, 1)
        return
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    position, line, counted = start + 1, 1, 0
    while True:
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text[position:position + 1] == "]":
            return
        try:
            value, position = decode(text, position)
        except ValueError as error:
            raise UserError(f"{label}:{line}: not valid JSON ({error})", "mend the file, or fetch it again") from None
        yield line, value
        position = blank.match(text, position).end()  # type: ignore[union-attr]
        if text[position:position + 1] == ",":
            position += 1
        elif text[position:position + 1] != "]":
            line += text.count("\n", counted, position)
            raise UserError(f"{label}:{line}: not valid JSON (',' or ']' expected)", "mend the file, or fetch it again")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _csv(lines: Iterator[str], label: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines)
    line = 2
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{label}:{line}: this row has more cells than the header", "quote cells with commas")
            yield line, {key: cell for key, cell in row.items() if cell is not None}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{label}:{line}: not valid CSV ({error})", "mend the row") from None


def _tsv(lines: Iterator[str], label: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(lines, label):
        yield number, line.split("\t")


def _lines(lines: Iterator[str], label: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_extra("pyarrow", "data") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})", "fetch it again") from error
