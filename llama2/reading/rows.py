"""Rows, and the lines of text that most of them come from.

Text is UTF-8, or UTF-16 and UTF-32 where a byte order mark says so; the mark is dropped. A line
ends with LF, CR LF or CR, with nothing else: U+2028, U+0085 and their like are characters of a
text. Line ends inside a value become LF.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llama2.errors import UserError
from llama2.reading.packed import explain_damage, open_unpacked

TO_UTF8 = "convert the file to UTF-8"
AGAIN = "mend the file, or fetch it again"
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FORMATS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"\xfd7zXZ\0": "xz data",
    b"BZh91AY&": "bzip2 data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "Parquet data",
}
_LATIN_UTF16 = ([False, True, False, True], [True, False, True, False])
"""which bytes of two Latin letters in UTF-16 are zero"""


@dataclass(frozen=True)
class File:
    """A file of rows, or a member of a zip archive: where it is, the path as messages write it, its
    set, and its kind (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt` or `.parquet`)."""

    path: Path
    member: str
    label: str
    name: str
    kind: str


@dataclass(frozen=True)
class Row:
    """One record of a file: `value` is a mapping, a list of cells or a line of text; `where` is
    file and line; `name` is the set it belongs to, after the file (`test.jsonl` and its like are
    named with their directory).

    A row remembers which of its keys were read, and the mappings inside it that were: what is left
    shows what a reader overlooks.
    """

    value: Any
    where: str
    name: str
    read: set[str] = field(default_factory=set, compare=False, repr=False)
    parts: list[Row] = field(default_factory=list, compare=False, repr=False)

    def error(
        self, cause: str, cure: str = "mend the row, or import with malformed: skip"
    ) -> UserError:
        """Return the error that names this row."""
        return UserError(f"{self.where}: {cause}", cure)

    def part(self, value: Any) -> Row:
        """Return a mapping inside this row as a row whose keys are watched likewise."""
        self.parts.append(Row(value, self.where, self.name))
        return self.parts[-1]

    def read_all(self) -> Any:
        """Return the value, all of it read."""
        if isinstance(self.value, dict):
            self.read.update(self.value)

        return self.value

    def get(self, key: str) -> Any:
        """Return the value of a key, None where there is none; NaN, the null of tables, is None."""
        self.read.add(key)
        value = self.value.get(key) if isinstance(self.value, dict) else None
        return None if value != value else value

    def text(self, *keys: str, optional: bool = False) -> str:
        """Return the text of the first of `keys` that says something, tidy, "" where all are empty
        or null.

        UserError where the row has none of them, unless that is `optional`, or where one is no
        text.
        """
        for key in keys:
            value = self.get(key)
            if value is not None and not isinstance(value, str):
                raise self.error(f"'{key}' must be text, it is {type(value).__name__}")
            if value and tidy(value):
                return tidy(value)

        if optional or (isinstance(self.value, dict) and not self.value.keys().isdisjoint(keys)):
            return ""

        raise self.error(f"'{keys[0]}' is missing")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: `where` is file and line."""

    where: str
    cause: str
    cure: str = "mend the line"

    def error(self, also: str = "") -> UserError:
        """Return the error that names it; `also` is another way out."""
        return UserError(f"{self.where}: {self.cause}", f"{self.cure}{also}")


Numbered = Iterator[tuple[int, Any] | BadRow]
"""values with the number of their line or row, and what stands in place of some"""


def tidy(text: str) -> str:
    """Return a text with "\\n" as its only line end, and no space around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def unify_line_ends(value: Any) -> Any:
    """Return a value of JSON with LF for every line end in its texts."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
    if isinstance(value, dict):
        return {key: unify_line_ends(item) for key, item in value.items()}

    return [unify_line_ends(item) for item in value] if isinstance(value, list) else value


# --- lines ---


def read_lines(file: File) -> Iterator[tuple[int, str, str]]:
    """Every line with its number, without its end, and what is wrong with its encoding (mostly
    nothing)."""
    number = 0
    damage = explain_damage(lambda: f"{file.label}:{number + 1}")
    with damage, open_unpacked(file.path, file.member) as content:
        for text, flaw in _decode(content, file.label):
            number += 1
            yield number, text.removeprefix("\ufeff"), flaw


def read_text(file: File) -> Numbered:
    """The lines of a file that are not blank."""
    for number, text, flaw in read_lines(file):
        if flaw:
            yield BadRow(f"{file.label}:{number}", flaw, TO_UTF8)
        elif text.strip():
            yield number, text


def detect_encoding(head: bytes) -> str:
    """Return the encoding that a byte order mark at the beginning of a text names, "" without
    one; UTF-8 needs none."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")


def _decode(content: IO[bytes], label: str) -> Iterator[tuple[str, str]]:
    """Every line, and what is wrong with its encoding."""
    head = content.peek(8)[:8]  # type: ignore[attr-defined]
    encoding = detect_encoding(head)
    if encoding:
        yield from _decode_wide(content, encoding, label)
        return

    packed = next((what for mark, what in _FORMATS.items() if head.startswith(mark)), "")
    if packed:
        raise UserError(
            f"{label}: holds {packed}, not text", "give the file the ending that it should have"
        )
    if [byte == 0 for byte in head[:4]] in _LATIN_UTF16:
        raise UserError(
            f"{label}: not UTF-8 (it looks like UTF-16 without a byte order mark)", TO_UTF8
        )

    for raw in content:
        try:
            text, flaw = raw.decode("utf-8"), ""
        except UnicodeDecodeError as error:
            text = raw.decode("utf-8", "replace")
            flaw = f"not UTF-8 ({error.reason} at byte {error.start})"

        for part in text.removesuffix("\n").removesuffix("\r").split("\r"):
            yield part, flaw


def _decode_wide(content: IO[bytes], encoding: str, label: str) -> Iterator[tuple[str, str]]:
    try:
        with io.TextIOWrapper(content, encoding) as text:
            for line in text:
                yield line.removesuffix("\n"), ""
    except UnicodeError as error:
        raise UserError(
            f"{label}: not {encoding.upper()}, as its first bytes say ({error})", TO_UTF8
        ) from error
