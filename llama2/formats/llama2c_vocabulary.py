"""Read and write llama2.c's `tokenizer.bin`.

It is the length of the longest item, then of each item its score, its length and its bytes. Its
exporter writes a plain space for SentencePiece's mark, and BOS and EOS between line breaks, where
no text can spell them. The file has no kinds: ids 0, 1, 2 are unknown, BOS and EOS, the next 256
the bytes, and the rest text.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from pathlib import Path

from llama2 import json_files
from llama2.errors import UserError
from llama2.formats.binary import FETCH_AGAIN
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    VocabularyItem,
    require_fitting_size,
)
from llama2.tokenizer.stored import StoredTokenizer

FILE = "tokenizer.bin"
_ITEM = struct.Struct("<fI")
_FIRST = (
    VocabularyItem("<unk>", 0.0, UNKNOWN),
    VocabularyItem("<s>", 0.0, CONTROL),
    VocabularyItem("</s>", 0.0, CONTROL),
    *(VocabularyItem(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
)
_TEXTS = ["\n<s>\n", "\n</s>\n", *(item.text for item in _FIRST[3:])]


def pack(items: Sequence[VocabularyItem]) -> bytes:
    """Return the content of tokenizer.bin.

    UserError for a vocabulary in another order than llama2.c takes for granted.
    """
    first, rest = items[: len(_FIRST)], items[len(_FIRST) :]
    if [item.kind for item in first] != [item.kind for item in _FIRST]:
        raise UserError(
            "the tokenizer does not begin with unknown, BOS, EOS and the 256 bytes",
            "llama2.c takes this order for granted: export in another format",
        )

    for item in rest:
        if item.kind != NORMAL:
            raise UserError(
                f"the tokenizer's item {item.text!r} is no plain text",
                "llama2.c has no other kinds: export in another format",
            )

    texts = [
        f"\n{item.text}\n" if item.kind == CONTROL else item.text.replace(SPACE, " ")
        for item in items
    ]
    rows = [text.encode() for text in texts]
    body = [_ITEM.pack(item.score, len(row)) + row for item, row in zip(items, rows)]
    return b"".join([struct.pack("<I", max(map(len, rows))), *body])


def open_tokenizer(path: Path, size: int) -> StoredTokenizer:
    """Return a tokenizer.bin of `size` items as a SentencePiece model."""
    return StoredTokenizer(
        str(path),
        functools.cache(lambda: sentencepiece_model.build(Vocabulary(load(path, size)))),
    )


def load(path: Path, size: int) -> list[VocabularyItem]:
    """Return the items of a tokenizer.bin. UserError if there are not `size`, and for damage."""
    data = json_files.read_bytes(path)
    entries: list[tuple[str, float]] = []
    at = 4

    try:
        struct.unpack_from("<I", data)
        while at < len(data):
            score, length = _ITEM.unpack_from(data, at)
            at += _ITEM.size + length
            if at > len(data):
                raise ValueError

            entries.append((data[at - length : at].decode(), score))
    except (struct.error, ValueError):
        raise UserError(
            f"{path}: truncated or damaged: item {len(entries)} cannot be read", FETCH_AGAIN
        ) from None

    require_fitting_size(path, len(entries), size, "put the tokenizer.bin of this model beside it")
    if [text for text, _ in entries[1 : len(_FIRST)]] != _TEXTS:
        raise UserError(
            f"{path}: it does not begin with unknown, BOS, EOS and the 256 bytes",
            "it is no tokenizer of llama2.c, or a damaged one",
        )

    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (size - len(_FIRST))]
    items = [
        VocabularyItem(text.replace(" ", SPACE), score, kind)
        for (text, score), kind in zip(entries, kinds)
    ]
    return [*_FIRST[:3], *items[3:]]
