"""Held-out text as bytes: bits per byte are counted over them, and general compressors are given
the same.

A language model and a compressor are compared on the very targets that were scored. A document's
end costs the model its EOS and the compressor a line break; neither counts as a byte of text.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Iterable

from llama2.data.pack import Row, Segment
from llama2.tokenizer.tokenizer import Tokenizer


def spell_targets(segment: Segment, tokenizer: Tokenizer) -> bytes:
    """Return the bytes that the targets of a segment spell. The space that encoding puts in front
    of a document is none of its text."""
    text = b"".join(map(tokenizer.bytes_of, segment.ids[1:].tolist()))
    has_space = tokenizer.dummy_prefix and segment.ids[0] == tokenizer.document_start
    return text.removeprefix(b" ") if has_space else text


class HeldoutText:
    """The text of consecutive rows of a stream: its `size` in bytes, and the bits a byte that
    compressors need."""

    def __init__(self, rows: Iterable[Row], tokenizer: Tokenizer) -> None:
        documents: list[list[bytes]] = []
        for row in rows:
            for segment in row:
                if segment.ids[0] == tokenizer.document_start or not documents:
                    documents.append([])

                documents[-1].append(spell_targets(segment, tokenizer))

        texts = [b"".join(parts) for parts in documents]
        self.size = sum(map(len, texts))
        # no order is the model's: the compressor gets like beside like
        self._text = b"\n".join(sorted(texts))

    def measure_bits_per_byte(self) -> dict[str, float]:
        """Return the bars that a language model should clear, of `xz -9` and `bzip2 -9`; {} where
        there is no text."""
        if not self.size:
            return {}

        sizes = {
            "xz": len(lzma.compress(self._text, preset=9)),
            "bzip2": len(bz2.compress(self._text, 9)),
        }
        return {f"{name}_bits_per_byte": 8 * size / self.size for name, size in sizes.items()}
