"""llama2.c's `tokenizer.bin`: the length of the longest item, then of each item its score, its
length and its bytes.

Its exporter writes a plain space for SentencePiece's mark, and BOS and EOS between line breaks,
where no text can spell them. Kinds are not told: ids 0, 1, 2 are unknown, BOS and EOS, the next 256
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
    StoredTokenizer,
    VocabularyItem,
)

FILE = "tokenizer.bin"
_SPECIAL = (
    VocabularyItem("<unk>", 0.0, UNKNOWN),
    VocabularyItem("<s>", 0.0, CONTROL),
    VocabularyItem("</s>", 0.0, CONTROL),
)
_FIRST_TEXT = len(_SPECIAL) + 256


def pack(items: Sequence[VocabularyItem]) -> bytes:
    """The content of tokenizer.bin. UserError for a vocabulary in another order than llama2.c takes
    for granted."""
    kinds = [item.kind for item in items]
    if kinds[:_FIRST_TEXT] != [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]:
        raise UserError(
            "the tokenizer does not begin with unknown, BOS, EOS and the 256 bytes",
            "llama2.c takes this order for granted: export in another format",
        )
    if other := next((item for item in items[_FIRST_TEXT:] if item.kind != NORMAL), None):
        raise UserError(
            f"the tokenizer's item {other.text!r} is no plain text",
            "llama2.c has no other kinds: export in another format",
        )

    texts = [
        f"\n{item.text}\n" if item.kind == CONTROL else item.text.replace(SPACE, " ")
        for item in items
    ]
    rows = [text.encode() for text in texts]
    body = b"".join(
        struct.pack("<fI", item.score, len(row)) + row for item, row in zip(items, rows)
    )

    return struct.pack("<I", max(map(len, rows))) + body


def held(path: Path, size: int) -> StoredTokenizer:
    """A tokenizer.bin of `size` items as a SentencePiece model."""
    return StoredTokenizer(
        str(path),
        functools.cache(
            lambda: sentencepiece_model.build(sentencepiece_model.Vocabulary(load(path, size)))
        ),
    )


def load(path: Path, size: int) -> list[VocabularyItem]:
    """The items of a tokenizer.bin of `size` items. UserError if it has another number, or is no
    such file."""
    data = json_files.content(path)
    found: list[tuple[str, float]] = []
    at = 4

    try:
        struct.unpack_from("<I", data)
        while at < len(data):
            score, length = struct.unpack_from("<fI", data, at)
            at += 8 + length
            if at > len(data):
                raise ValueError

            found.append((data[at - length : at].decode(), score))
    except (struct.error, ValueError):
        raise UserError(
            f"{path}: truncated or damaged: item {len(found)} cannot be read", FETCH_AGAIN
        ) from None

    if len(found) != size or size < _FIRST_TEXT:
        raise UserError(
            f"{path}: it has {len(found)} items, the model {size}",
            "put the tokenizer.bin of this model beside it",
        )
    if [text for text, _ in found[1:3]] != ["\n<s>\n", "\n</s>\n"] or any(
        text != f"<0x{byte:02X}>"
        for byte, (text, _) in enumerate(found[len(_SPECIAL) : _FIRST_TEXT])
    ):
        raise UserError(
            f"{path}: it does not begin with unknown, BOS, EOS and the 256 bytes",
            "it is no tokenizer of llama2.c, or a damaged one",
        )

    kinds = [BYTE] * 256 + [NORMAL] * (size - _FIRST_TEXT)
    texts = [
        VocabularyItem(text.replace(" ", SPACE), score, kind)
        for (text, score), kind in zip(found[len(_SPECIAL) :], kinds, strict=True)
    ]
    return [*_SPECIAL, *texts]
