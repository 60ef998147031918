"""Plain files read whole, and the JSON in them: configurations, indices, manifests, whatever is no
row of data.

What stands in a file's place is looked at before it is opened: a pipe or a device would be waited
for, or read for ever. JSON is UTF-8, or UTF-16 and UTF-32 behind a byte order mark. A whole number
of more than 20 digits becomes a float, which others write for "without bound"; NaN and Infinity are
taken, for our own metrics have them: who wants a number asks whether it is finite.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from llama2.errors import UserError, explain_os_errors
from llama2.terminal_text import show_value

LARGEST = 1 << 30
"""bytes of a file that is read whole"""
DEEPEST = 100
"""levels of JSON"""
AGAIN = "fetch it again"
_DIGITS = 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check(path: str | os.PathLike[str]) -> int:
    """Return the size of the plain file at a path, links followed; UserError for anything else that
    stands there."""
    with explain_os_errors(path):
        status = os.stat(path)

    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise UserError(
            f"{path}: this is {kind}, a file was expected",
            "check the path"
            if kind == "a directory"
            else "write its content to a file, and name that",
        )

    return status.st_size


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a plain file for reading."""
    check(path)
    with explain_os_errors(path):
        return open(path, "rb")


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST) -> bytes:
    """Read the bytes of a plain file; UserError if there are more than `most`."""
    size = check(path)
    if size > most:
        raise UserError(f"{path}: {size:,} bytes, at most {most:,} were expected", "check the path")

    with explain_os_errors(path), open(path, "rb") as file:
        return file.read()


def check_room(path: str | os.PathLike[str], size: int, or_else: str) -> None:
    """UserError if less than `size` bytes are free where a path is or will be; `or_else` would take
    fewer."""
    place = next(
        parent
        for parent in (Path(path).absolute(), *Path(path).absolute().parents)
        if parent.exists()
    )
    with explain_os_errors(place):
        free = shutil.disk_usage(place).free

    if size > free:
        raise UserError(
            f"{path}: the weights take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            f"free some space, choose another --out, or {or_else}",
        )


def read_json(path: str | os.PathLike[str], cure: str = AGAIN) -> Any:
    """Read the JSON value in a file. UserError that names the file, and the line where there is
    one; `cure` mends it."""
    text = read_bytes(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty, JSON was expected", cure)

    try:
        return parse(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})", cure
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})", cure) from None


def read_object(path: str | os.PathLike[str], cure: str = AGAIN) -> dict[str, Any]:
    """Read the JSON object in a file."""
    value = read_json(path, cure)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, this is {_named(value)}", cure)

    return value


def read_list(path: str | os.PathLike[str], cure: str = AGAIN) -> list[Any]:
    """Read the JSON list in a file."""
    value = read_json(path, cure)
    if not isinstance(value, list):
        raise UserError(f"{path}: a JSON list was expected, this is {_named(value)}", cure)

    return value


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text. ValueError, and nothing else, if it is none, is nested more
    than `DEEPEST` levels, or says two things of one key."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"no text in {error.encoding}: {error.reason} at byte {error.start}"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None

    if is_deep(value, DEEPEST):
        raise ValueError(f"nested more than {DEEPEST} levels deep")

    return value


def is_deep(value: Any, most: int) -> bool:
    """Tell whether lists and objects are nested more than `most` levels: recursion would fail on
    them."""
    here = [value]
    for _ in range(most):
        here = [item for each in here for item in _items(each)]
        if not here:
            return False

    return any(isinstance(each, (dict, list)) for each in here)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for key, value in pairs if len(result) < len(pairs) else ():
        if result[key] != value:
            raise ValueError(f"the key {show_value(key)} stands twice, with two values")

    return result


def _whole(digits: str) -> float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())

    return value if isinstance(value, list) else ()


def _named(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), show_value(value))


def is_file_name(name: Any) -> bool:
    """Tell whether a value is the name of a file in one directory, and no path that leads
    elsewhere."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and "\0" not in name
    )
