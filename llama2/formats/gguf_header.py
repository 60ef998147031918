"""The head of a GGUF file: its metadata and where its tensors lie.

The `gguf` library reads this as well, but takes a damaged length at its word. Here every length is
checked against the size of the file first, so a file cut or changed anywhere is an error that says
where.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
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
class Entry:
    """A tensor as the head describes it: `shape` with rows first, `kind` as ggml numbers it,
    `offset` in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, Entry]
    size: int
    """of the file"""


def read_header(path: Path) -> Header:
    """The head of a GGUF file. UserError if it is another file, of another version, truncated or
    damaged."""
    with explain_os_errors(path), json_files.open_file(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(
                f"{path}: not a GGUF file: it does not begin with 'GGUF'", "check the path"
            )

        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()


class _Cursor:
    """A place in the file that moves on with everything read; `what` says what is being read, for
    errors."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.what = (
            data,
            path,
            len(MAGIC),
            "the counts at its beginning",
        )

    def header(self) -> Header:
        version = self.number("<I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            raise UserError(
                f"{self.path}: GGUF version {version}" + (" (big-endian)" if swapped else ""),
                f"only versions {' and '.join(map(str, _VERSIONS))}, little-endian, can be read",
            )

        tensors, keys = self.number("<Q"), self.number("<Q")
        metadata = self.table(keys, "metadata key", self.typed)
        entries = self.table(tensors, "tensor", self.entry)
        alignment = metadata.get("general.alignment", ALIGNMENT)

        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")

        start = -(-self.at // alignment) * alignment
        placed = {
            name: Entry(entry.shape, entry.kind, start + entry.offset)
            for name, entry in entries.items()
        }
        for name, entry in placed.items():
            if entry.offset % alignment:
                raise self.damaged(
                    f"tensor '{name}' does not begin at a multiple of {alignment} bytes"
                )

        return Header(metadata, placed, len(self.data))

    def table(self, count: int, what: str, read: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index in range(count):
            self.what = f"{what} {index + 1} of {count}"
            name = self.string()
            self.what = f"{what} '{name}'"

            if name in found:
                raise self.damaged(f"{self.what} is there twice")

            found[name] = read()

        return found

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise self.damaged(f"it ends at byte {len(self.data)}, inside {self.what}")

        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{self.what} holds bytes that are no text") from None

    def typed(self) -> Any:
        """A value with its type before it: a number, a string, or a list of either."""
        kind = self.number("<I")
        if kind != _ARRAY:
            return self.values(kind, 1)[0]

        kind = self.number("<I")
        return self.values(kind, self.number("<Q"))

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.damaged(f"{self.what} is of the unknown type {kind}")

        dtype = np.dtype(_NUMBERS[kind])
        found: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return found

    def entry(self) -> Entry:
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.damaged(f"{self.what} has {dimensions} dimensions")

        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        return Entry(shape, self.number("<I"), self.number("<Q"))

    def damaged(self, cause: str) -> UserError:
        return UserError(f"{self.path}: truncated or damaged: {cause}", FETCH_AGAIN)
