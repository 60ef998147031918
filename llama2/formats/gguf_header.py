"""Read the head of a GGUF file: its metadata and the offsets of its tensors.

By hand, because `gguf.GGUFReader` believes a damaged count until memory is full. Here every length
is checked against the size of the file first, so a file cut or changed anywhere is an error that
says where.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats.binary import FETCH_AGAIN

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensors, where the file does not say otherwise
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the head: `shape` with rows first, `kind` by ggml's number, `offset` in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The content of the head of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    size: int
    """of the file"""


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False

    with explain_os_errors(path), json_files.open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Read the head of a GGUF file. UserError for another file or version, and a damaged one."""
    with explain_os_errors(path), json_files.open_file(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(
                f"{path}: not a GGUF file: it does not begin with 'GGUF'", "check the path"
            )

        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).read_header()


class _Cursor:
    """A position in the file that advances with everything read; `what` is being read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, len(MAGIC)
        self.what = "the counts at its beginning"

    def read_header(self) -> Header:
        """Read everything behind the magic number."""
        version = self.read_number("<I")
        if version not in _VERSIONS:
            order = " (big-endian)" if version & 0xFFFF == 0 else ""
            raise UserError(
                f"{self.path}: GGUF version {version}{order}",
                f"only versions {' and '.join(map(str, _VERSIONS))}, little-endian, can be read",
            )

        tensors, keys = self.read_number("<Q"), self.read_number("<Q")
        metadata = self.read_table(keys, "metadata key", self.read_value)
        entries = self.read_table(tensors, "tensor", self.read_entry)
        alignment = metadata.get("general.alignment", ALIGNMENT)

        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damage(f"general.alignment is {alignment!r}, not a power of two")

        start = -(-self.at // alignment) * alignment
        for name, entry in entries.items():
            if entry.offset % alignment:
                raise self.damage(
                    f"tensor '{name}' does not begin at a multiple of {alignment} bytes"
                )

            entries[name] = replace(entry, offset=start + entry.offset)

        return Header(metadata, entries, len(self.data))

    def read_table(self, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
        """Read `count` names, each with what `read` reads behind it."""
        table: dict[str, Any] = {}
        for index in range(count):
            self.what = f"{what} {index + 1} of {count}"
            name = self.read_string()
            self.what = f"{what} '{name}'"

            if name in table:
                raise self.damage(f"{self.what} is there twice")

            table[name] = read()

        return table

    def read_bytes(self, count: int) -> bytes:
        """Read `count` bytes. UserError if the file ends before."""
        if self.at + count > len(self.data):
            raise self.damage(f"it ends at byte {len(self.data)}, inside {self.what}")

        self.at += count
        return self.data[self.at - count : self.at]

    def read_number(self, code: str) -> int:
        """Read a whole number; `code` is that of `struct`."""
        return int(struct.unpack(code, self.read_bytes(struct.calcsize(code)))[0])

    def read_string(self) -> str:
        """Read a text with its length before it."""
        try:
            return self.read_bytes(self.read_number("<Q")).decode()
        except UnicodeDecodeError:
            raise self.damage(f"{self.what} holds bytes that are no text") from None

    def read_value(self) -> Any:
        """Read a value with its type before it: a number, a text, or a list of either."""
        kind = self.read_number("<I")
        if kind != _ARRAY:
            return self.read_values(kind, 1)[0]

        kind = self.read_number("<I")
        return self.read_values(kind, self.read_number("<Q"))

    def read_values(self, kind: int, count: int) -> list[Any]:
        """Read `count` values of one type, by ggml's number."""
        if kind == _STRING:
            return [self.read_string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.damage(f"{self.what} is of the unknown type {kind}")

        dtype = np.dtype(_NUMBERS[kind])
        return list(np.frombuffer(self.read_bytes(count * dtype.itemsize), dtype).tolist())

    def read_entry(self) -> TensorEntry:
        """Read the shape, type and offset of a tensor."""
        dimensions = self.read_number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.damage(f"{self.what} has {dimensions} dimensions")

        shape = tuple(self.read_number("<Q") for _ in range(dimensions))[::-1]
        return TensorEntry(shape, self.read_number("<I"), self.read_number("<Q"))

    def damage(self, cause: str) -> UserError:
        """Return the error for a damaged file."""
        return UserError(f"{self.path}: truncated or damaged: {cause}", FETCH_AGAIN)
