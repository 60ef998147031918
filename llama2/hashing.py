"""Hashes that tell contents apart, and numbers that follow from texts alone.

Seeds, splits and choices are such numbers: the same on every machine, and another for every text.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal

from llama2.errors import explain_os_errors
from llama2.json_files import open_file


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a plain file's content, in hexadecimal."""
    with explain_os_errors(path), open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_content(content: str | bytes) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(_encode(content)).hexdigest()


def hash_number(text: str, size: int = 8, order: Literal["little", "big"] = "little") -> int:
    """Return a number of `size` bytes that depends on a text alone (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(_encode(text), digest_size=size).digest(), order)


def hash_fraction(text: str, order: Literal["little", "big"] = "little") -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return hash_number(text, order=order) / 2**64


def hash_parts(*parts: str) -> int:
    """Return a number in [0, 2^64) that depends on the texts alone: the chance in imports and
    splits (SHA-256, as the splits of earlier versions)."""
    return int(hash_content("\0".join(parts))[:16], 16)


def _encode(content: str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content

    return content.encode("utf-8", "surrogatepass")  # half of a pair may stand in any text
