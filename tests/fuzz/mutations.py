"""How a file is damaged: bytes of any format, numbers in binary heads, values in JSON and in lines
of JSON.

A mutation is a function of a random generator and the bytes; the same seed gives the same damage.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import yaml

Mutation = Callable[[random.Random, bytes], bytes]
HEAD = 4096  # bytes at the front, where most formats have what they are read by
ESCAPES = "\x1b]0;title\x07\x1b[2J\u202e"
ODD_BYTES = [
    b"\0",
    b"\r",
    b"\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"\\ud800",
    b"NaN",
    b"[" * 3000,
    b"{",
    b"9" * 5000,
    b"null",
    b"\xed\xa0\x80",
    b"1e999",
    b",",
    b"\x1b[2J",
    b"-0",
    b"\x80",
    b"PK\3\4",
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    2**31,
    2**32,
    2**63,
    2**64,
    10**400,
    "",
    " ",
    "\0",
    "x",
    "1",
    "\ud800",
    "../../x",
    "/dev/zero",
    ESCAPES,
    "a" * 3000,
    [],
    {},
    [None],
    [[]],
    {"": None},
    [0] * 1000,
    [1, 2],
]
ODD_LENGTHS = [
    0,
    1,
    2,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]
ODD_YAML = [
    "a: &a [*a]",
    "<<: 1",
    "x: !!python/object/apply:os.getcwd []",
    "? [a, b]\n: c",
    "x: 2001-01-01",
    "y: yes",
    "x: 0o17",
    "x: 1:30",
    "x: *nothing",
    "x: |\n  a\n b",
    "\tx: 1",
    "x: " + "[" * 3000,
    "---\nx: 1",
    "%YAML 9.9",
    "x: !!binary zzz",
    "steps: {}",
    "x: ${y}",
    "x: ${",
    "x: .nan",
    "x: !!set {a, b}",
    "null: 1",
    "1: 2",
]
DEEP = 100_000


# --- bytes ---
def place(chance: random.Random, content: bytes) -> int:
    """Somewhere in a file, often near its begin or its end: weights in between look all alike."""
    size = len(content)
    if not size:
        return 0

    where = chance.random()
    if where < 0.5:
        return chance.randrange(min(size, HEAD))
    if where < 0.7:
        return size - 1 - chance.randrange(min(size, HEAD // 4))

    return chance.randrange(size)


def flip(chance: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 4])):
        found[place(chance, content)] ^= 1 << chance.randrange(8)

    return bytes(found)


def set_bytes(chance: random.Random, content: bytes) -> bytes:
    start, length = place(chance, content), chance.choice([1, 2, 4, 8, 40])
    piece = chance.choice([b"\0" * length, b"\xff" * length, chance.randbytes(length)])
    return content[:start] + piece[: len(content) - start] + content[start + length :]


def truncate(chance: random.Random, content: bytes) -> bytes:
    return content[
        : chance.choice([0, 1, len(content) // 2, len(content) - 1, place(chance, content)])
    ]


def insert(chance: random.Random, content: bytes) -> bytes:
    start = place(chance, content)
    return content[:start] + chance.choice([*ODD_BYTES, chance.randbytes(16)]) + content[start:]


def duplicate(chance: random.Random, content: bytes) -> bytes:
    start, length = place(chance, content), chance.choice([1, 8, 64, 512])
    return content[: start + length] + content[start : start + length] + content[start + length :]


def delete(chance: random.Random, content: bytes) -> bytes:
    start = place(chance, content)
    return content[:start] + content[start + chance.choice([1, 2, 8, 64]) :]


def zero(chance: random.Random, content: bytes) -> bytes:
    start, length = place(chance, content), chance.choice([16, 256, 4096])
    return (
        content[:start] + b"\0" * len(content[start : start + length]) + content[start + length :]
    )


def swap(chance: random.Random, content: bytes) -> bytes:
    length = chance.choice([4, 32, 256])
    one, two = sorted((place(chance, content), place(chance, content)))
    if two < one + length or two + length > len(content):
        return flip(chance, content)

    return (
        content[:one]
        + content[two : two + length]
        + content[one + length : two]
        + content[one : one + length]
        + content[two + length :]
    )


def grow(chance: random.Random, content: bytes) -> bytes:
    """Another number where a length may stand."""
    kind = chance.choice(["<I", "<Q", "<i", "<H"])
    size = struct.calcsize(kind)
    start = chance.randrange(min(len(content), chance.choice([32, 256, HEAD])) or 1) // size * size

    if start + size > len(content):
        return flip(chance, content)

    (number,) = struct.unpack_from(kind, content, start)
    other = chance.choice([*ODD_LENGTHS, number + 1, number - 1, number * 2, number * 1000])
    packed = (other % (1 << 8 * size)).to_bytes(size, "little")

    return content[:start] + packed + content[start + size :]


BYTES: tuple[Mutation, ...] = (
    flip,
    flip,
    set_bytes,
    truncate,
    insert,
    duplicate,
    delete,
    zero,
    swap,
)
BINARY: tuple[Mutation, ...] = (*BYTES, grow, grow)


# --- values of JSON ---
def disturbed(chance: random.Random, value: Any) -> Any:
    """The value with one place in it changed: another value, a key lost, renamed or added, an item
    lost or doubled."""
    places = list(_places(value, ()))
    where = chance.choice(places)
    return _changed(chance, value, where)


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from _places(item, (*path, key))


def _changed(chance: random.Random, value: Any, path: Sequence[Any]) -> Any:
    if path:
        key, *rest = path
        if isinstance(value, dict):
            return {
                name: _changed(chance, item, rest) if name == key else item
                for name, item in value.items()
            }

        return [
            _changed(chance, item, rest) if index == key else item
            for index, item in enumerate(value)
        ]

    if isinstance(value, dict) and value and chance.random() < 0.7:
        name = chance.choice(list(value))
        match chance.randrange(4):
            case 0:
                return {key: item for key, item in value.items() if key != name}
            case 1:
                other = chance.choice(
                    [name.upper(), name + " ", "_" + name, ESCAPES, "", "\ud800", "x" * 3000]
                )
                return {other if key == name else key: item for key, item in value.items()}
            case 2:
                return {
                    **value,
                    chance.choice(["x", ESCAPES, name + "s", "__proto__"]): chance.choice(
                        ODD_VALUES
                    ),
                }
            case _:
                return {**value, name: chance.choice(ODD_VALUES)}

    if isinstance(value, list) and value and chance.random() < 0.5:
        index = chance.randrange(len(value))
        return chance.choice(
            [value[:index] + value[index + 1 :], value[: index + 1] + value[index:], value[:index]]
        )

    if isinstance(value, int | float) and not isinstance(value, bool) and chance.random() < 0.4:
        return chance.choice(
            [
                -value,
                value + 1,
                value - 1,
                value * 2,
                str(value),
                float(value),
                value * 1000,
                [value],
            ]
        )
    if isinstance(value, str) and chance.random() < 0.4:
        return chance.choice(
            [value + ESCAPES, value + "\ud800", value.upper(), value * 200, [value], value[:-1]]
        )

    return chance.choice(ODD_VALUES)


def in_json(chance: random.Random, content: bytes) -> bytes:
    """One value of a JSON file changed; or a key that stands there twice, or nesting without
    end."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # it is damaged already
        return flip(chance, content) if content else b"x"

    trick = chance.random()
    if trick < 0.05:
        return b"[" * DEEP + b"]" * DEEP

    if trick < 0.1 and isinstance(value, dict) and value:
        name = chance.choice(list(value))
        again = json.dumps({name: chance.choice(ODD_VALUES)})[1:-1]
        return (json.dumps(value)[:-1] + f", {again}}}").encode()

    if trick < 0.13 and isinstance(value, dict) and value:
        deep = "{" + json.dumps(chance.choice(list(value))) + ": " + "[" * DEEP + "]" * DEEP
        return (deep + ", " + json.dumps(value)[1:]).encode()

    return json.dumps(disturbed(chance, value)).encode()


def in_lines(chance: random.Random, content: bytes) -> bytes:
    """One value in one line of JSON Lines changed."""
    lines = content.split(b"\n")
    index = chance.randrange(len(lines))
    lines[index] = in_json(chance, lines[index]) if lines[index].strip() else b"{}"

    return b"\n".join(lines)


def in_yaml(chance: random.Random, content: bytes) -> bytes:
    """One value of a YAML file changed, or a line put into it."""
    if chance.random() < 0.3:
        lines = content.decode().split("\n")
        lines.insert(chance.randrange(len(lines) + 1), chance.choice(ODD_YAML))
        return "\n".join(lines).encode()

    return yaml.safe_dump(disturbed(chance, yaml.safe_load(content)), sort_keys=False).encode()


def in_safetensors(chance: random.Random, content: bytes) -> bytes:
    """One value of the head of a safetensors file changed; its length fits."""
    (size,) = struct.unpack_from("<Q", content)
    head = in_json(chance, content[8 : 8 + size])
    return struct.pack("<Q", len(head)) + head + content[8 + size :]


JSON: tuple[Mutation, ...] = (*(in_json,) * 12, *BYTES)


def in_pages(chance: random.Random, content: bytes) -> bytes:
    """Bytes of a Parquet file before its foot, which has the names of the columns and no
    checksum."""
    foot = 8 + int.from_bytes(content[-8:-4], "little")
    return chance.choice(BINARY)(chance, content[:-foot]) + content[-foot:]


YAML: tuple[Mutation, ...] = (*(in_yaml,) * 12, *BYTES)
LINES: tuple[Mutation, ...] = (*(in_lines,) * 9, *BYTES)
SAFETENSORS: tuple[Mutation, ...] = (*(in_safetensors,) * 6, *BINARY)
