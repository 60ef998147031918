"""Read and write the vocabulary in a SentencePiece model file.

Other formats keep a tokenizer as three lists: the text, score and kind of each item.
SentencePiece's Python interface hides some kinds and cannot build a model of given items, so this
module reads and writes the few fields it needs of the file, a protocol buffer: `pieces` (1),
`trainer_spec` (2) and `normalizer_spec` (3).

By hand, because `sentencepiece_model_pb2` refuses any protobuf older than the one that generated
it, and the package does not require one: a core dependency that other packages' pins would break.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.tokenizer.stored import ByteLevelModel, StoredTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNKNOWN_ID, BOS_ID, EOS_ID = 0, 1, 2  # as in Llama 2's own model
SPACE = "\u2581"  # SentencePiece's mark for a space

_BPE = 2
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # protocol buffers mark the length of a field so
_FIXED_SIZES = {_DOUBLE: 8, _FLOAT: 4}
_COPY_AGAIN = "copy the file again"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


@dataclass(frozen=True)
class VocabularyItem:
    """An item of a vocabulary; `kind` is one of the constants above, which llama.cpp shares."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class Vocabulary:
    """The items of a tokenizer, and the changes to a text before it is looked up.

    `dummy_prefix`: a space is put in front. `normalised`: characters are replaced first (NFKC and
    the like), which no other format can express.
    """

    items: Sequence[VocabularyItem]
    dummy_prefix: bool = True
    extra_spaces_removed: bool = False
    normalised: bool = False

    def describe_losses(self, program: str) -> list[str]:
        """List, in sentences for the user, the changes to a text that `program` does not make."""
        ending = f"which {program} does not: some texts get other tokens there"
        changes = {
            "replaces characters before it looks them up": self.normalised,
            "drops spaces at the ends of a text and all but one inside": self.extra_spaces_removed,
        }
        return [f"the tokenizer {change}, {ending}" for change, made in changes.items() if made]


def read_model(where: Path | StoredTokenizer) -> bytes:
    """Return the content of a SentencePiece model file. UserError for a byte-level tokenizer."""
    content = where.read() if isinstance(where, StoredTokenizer) else json_files.read_bytes(where)
    if isinstance(content, bytes) and _TIKTOKEN.match(content):
        raise UserError(
            f"{where}: a list of tiktoken, as Meta's Llama 3 has, which does not name its special "
            "tokens",
            "give the tokenizer.json of the model in Hugging Face's format (import has --tokenizer "
            "FILE)",
        )
    if isinstance(content, ByteLevelModel):
        raise UserError(
            f"{where}: a byte-level BPE tokenizer, where one of Llama 2's kind (SentencePiece BPE) "
            "is needed",
            "formats that hold a byte-level tokenizer are Hugging Face's and GGUF",
        )

    return content


def is_tiktoken(file: Path) -> bool:
    """Return whether a file is a list of items in base64, each with its rank."""
    with explain_os_errors(file), json_files.open_file(file) as stream:
        return _TIKTOKEN.match(stream.read(256)) is not None


def load(where: Path | StoredTokenizer) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model. UserError if it is none, or damaged."""
    return parse(read_model(where), str(where))


def parse(model: bytes, place: str) -> Vocabulary:
    """Return the vocabulary in the content of a file; `place` names it in errors."""
    items: list[VocabularyItem] = []
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _read_fields(model):
            if number == 1:
                items.append(_parse_item(dict(_read_fields(value))))
            elif number == 3:
                normalizer |= _read_fields(value)
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise UserError(
            f"{place}: not a SentencePiece model, or a damaged one", _COPY_AGAIN
        ) from None

    if not items:
        raise UserError(f"{place}: not a SentencePiece model: it has no items", _COPY_AGAIN)

    # an absent field has SentencePiece's own value: both are true
    return Vocabulary(
        items,
        dummy_prefix=bool(normalizer.get(3, True)),
        extra_spaces_removed=bool(normalizer.get(4, True)),
        normalised=bool(normalizer.get(2, b"")),
    )


def check_items(items: Sequence[VocabularyItem], place: str, cure: str) -> None:
    """UserError unless SentencePiece can have these items: one for unknown text, each only once."""
    if not any(item.kind == UNKNOWN for item in items):
        raise UserError(f"{place}: no item of its tokenizer is the one for unknown text", cure)

    seen: set[str] = set()
    for token, item in enumerate(items):
        if not item.text or item.text in seen:
            fault = "there twice" if item.text else "empty"
            raise UserError(
                f"{place}: item {token} of its tokenizer, {item.text!a}, is {fault}", cure
            )

        seen.add(item.text)


def require_fitting_size(place: object, pieces: int, vocab_size: int, cure: str) -> None:
    """UserError unless a tokenizer has as many pieces as its model has embeddings."""
    if pieces != vocab_size:
        raise UserError(
            f"{place}: the tokenizer has {pieces:,} pieces, the model {vocab_size:,}", cure
        )


def build(vocabulary: Vocabulary, *, unknown: int = UNKNOWN_ID) -> bytes:
    """Return a SentencePiece BPE model file that encodes by this vocabulary."""
    items = vocabulary.items
    numbers = {
        3: _BPE,
        4: len(items),
        35: any(item.kind == BYTE for item in items),
        40: unknown,
        41: BOS_ID,
        42: EOS_ID,
        43: -1,  # no padding item
    }
    trainer = b"".join(_number_field(number, value) for number, value in numbers.items())

    for number, token in ((45, unknown), (46, BOS_ID), (47, EOS_ID)):
        trainer += _bytes_field(number, items[token].text.encode())

    normalizer = _bytes_field(1, b"identity") + _bytes_field(2, b"")
    normalizer += _number_field(3, vocabulary.dummy_prefix)
    normalizer += _number_field(4, vocabulary.extra_spaces_removed)

    return extend(b"", items) + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def make_padding(token: int) -> VocabularyItem:
    """Return the item that fills an unused id: no text spells it, and it has no text."""
    return VocabularyItem(f"[PAD{token}]", 0.0, CONTROL)


def pad(model: bytes, count: int, size: int) -> bytes:
    """Extend a SentencePiece model of `count` items to `size` items."""
    return extend(model, [make_padding(token) for token in range(count, size)])


def extend(model: bytes, items: Sequence[VocabularyItem]) -> bytes:
    """Append items to a SentencePiece model."""
    return model + b"".join(_bytes_field(1, _pack_item(item)) for item in items)


def _pack_item(item: VocabularyItem) -> bytes:
    score = _varint(2 << 3 | _FLOAT) + struct.pack("<f", item.score)
    return _bytes_field(1, item.text.encode()) + score + _number_field(3, item.kind)


def _parse_item(fields: dict[int, bytes]) -> VocabularyItem:
    score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
    return VocabularyItem(fields[1].decode(), score, int(fields.get(3, NORMAL)))


def _read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of every field of a message.

    IndexError, KeyError or ValueError where there is no field.
    """
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue

        size, at = _read_varint(data, at) if kind == _BYTES else (_FIXED_SIZES[kind], at)
        if at + size > len(data):
            raise ValueError("the message ends in a field")

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


def _number_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(int(value))


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
