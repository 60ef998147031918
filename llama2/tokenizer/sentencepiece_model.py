"""The items of a SentencePiece model, read from its file and made into one.

Other formats keep a tokenizer as three lists: text, score and kind of each item. SentencePiece's
Python interface does not tell all kinds and cannot build a model of given items, so this reads and
writes the few fields needed of its file, which is one protocol buffer: `pieces` (1), `trainer_spec`
(2) and `normalizer_spec` (3).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # how SentencePiece writes a space

_BPE = 2
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # how protocol buffers mark the length of a field


@dataclass(frozen=True)
class VocabularyItem:
    """An item of a vocabulary; `kind` is one of the constants above, whose numbers llama.cpp has
    taken over."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary, and what is done to a text before it is looked up."""

    items: Sequence[VocabularyItem]
    dummy_prefix: bool = True
    """a space is put in front of a text"""
    extra_spaces_removed: bool = False
    normalised: bool = False
    """characters are replaced by others first (NFKC and the like), which no other format can say"""

    def describe_losses(self, program: str) -> list[str]:
        """In sentences for the user, what `program` does not do to a text, so that it gives other
        tokens for some."""
        kept = f"which {program} does not: some texts get other tokens there"
        notes = (
            [f"the tokenizer replaces characters before it looks them up, {kept}"]
            if self.normalised
            else []
        )
        if self.extra_spaces_removed:
            notes.append(
                f"the tokenizer drops spaces at the ends of a text and all but one inside, {kept}"
            )

        return notes


@dataclass(frozen=True)
class StoredTokenizer:
    """A SentencePiece model that stands inside another file, or that several files make; read when
    it is asked for."""

    place: str
    """names it in errors"""
    make: Callable[[], bytes]
    """the content of a model file. UserError if what is at the place cannot be made into one"""

    def __str__(self) -> str:
        return self.place


def content(where: Path | StoredTokenizer) -> bytes:
    """The content of a SentencePiece model file."""
    if isinstance(where, StoredTokenizer):
        return where.make()

    return json_files.content(where)


def load(where: Path | StoredTokenizer) -> Vocabulary:
    """The vocabulary of a SentencePiece model. UserError if it is none, or damaged."""
    return parse(content(where), str(where))


def parse(model: bytes, place: str) -> Vocabulary:
    """`load` for the content of a file; `place` names it in errors."""
    items: list[VocabularyItem] = []
    # as SentencePiece has them when the file does not say
    prefix, removed, charsmap = True, True, b""
    try:
        for number, value in _fields(model):
            if number == 1:
                items.append(_piece(dict(_fields(value))))
            elif number == 3:
                normalizer = dict(_fields(value))
                charsmap = normalizer.get(2, b"")
                prefix, removed = bool(normalizer.get(3, prefix)), bool(normalizer.get(4, removed))
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise UserError(
            f"{place}: not a SentencePiece model, or a damaged one", "copy the file again"
        ) from None

    if not items:
        raise UserError(
            f"{place}: not a SentencePiece model: it has no items", "copy the file again"
        )

    return Vocabulary(items, prefix, removed, bool(charsmap))


def check(items: Sequence[VocabularyItem], place: str, cure: str) -> None:
    """UserError if SentencePiece cannot have these items: no unknown one, or one that stands there
    twice."""
    if not any(item.kind == UNKNOWN for item in items):
        raise UserError(f"{place}: no item of its tokenizer is the one for unknown text", cure)

    seen: set[str] = set()
    for token, item in enumerate(items):
        if not item.text or item.text in seen:
            raise UserError(
                f"{place}: item {token} of its tokenizer, {item.text!a}, is "
                f"{'there twice' if item.text else 'empty'}",
                cure,
            )

        seen.add(item.text)


def build(pieces: Vocabulary, *, unknown: int = 0, bos: int = 1, eos: int = 2) -> bytes:
    """The content of a SentencePiece BPE model file with these items, that encodes as the original
    does."""
    items = pieces.items
    body = extended(b"", items)
    trainer = _varint_field(3, _BPE) + _varint_field(4, len(items))
    trainer += _varint_field(35, any(item.kind == BYTE for item in items))  # byte_fallback

    # the last: no padding item
    for number, token in ((40, unknown), (41, bos), (42, eos), (43, -1)):
        trainer += _varint_field(number, token)

    for number, token in ((45, unknown), (46, bos), (47, eos)):
        trainer += _field(number, items[token].text.encode())

    normalizer = _field(1, b"identity") + _field(2, b"")
    normalizer += _varint_field(3, pieces.dummy_prefix) + _varint_field(
        4, pieces.extra_spaces_removed
    )
    return body + _field(2, trainer) + _field(3, normalizer)


def padding(token: int) -> VocabularyItem:
    """The item that fills an id of which nothing is known: no text spells it, and it has no
    text."""
    return VocabularyItem(f"[PAD{token}]", 0.0, CONTROL)


def padded(model: bytes, count: int, size: int) -> bytes:
    """A SentencePiece model of `count` items, made one of `size`."""
    return extended(model, [padding(token) for token in range(count, size)])


def extended(model: bytes, items: Sequence[VocabularyItem]) -> bytes:
    """A SentencePiece model with more items behind its own."""
    return model + b"".join(_item(item) for item in items)


def _item(item: VocabularyItem) -> bytes:
    return _field(
        1, _field(1, item.text.encode()) + _float(2, item.score) + _varint_field(3, item.kind)
    )


def _piece(fields: dict[int, bytes]) -> VocabularyItem:
    score: float = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return VocabularyItem(fields[1].decode(), score, int(fields.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The number and value of every field of a message. IndexError or ValueError where it is
    none."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue

        size = {_DOUBLE: 8, _FLOAT: 4}.get(kind)
        if kind == _BYTES:
            size, at = _read_varint(data, at)

        if size is None or at + size > len(data):
            raise ValueError("no such field")

        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1

        if byte < 128:
            return value, at

    raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written in two's complement
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7

    return bytes([*out, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(int(value))


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | _FLOAT) + struct.pack("<f", value)


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
