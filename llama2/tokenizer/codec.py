"""State what a `Tokenizer` needs of its engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama2.errors import UserError
from llama2.tokenizer.stored import ByteLevelModel

_TAG = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)


class Codec(Protocol):
    """One of the two engines, SentencePiece or byte-level BPE, with a vocabulary loaded.

    `unknown` is the id of unknown text, where there is one; `ends` are ids that end an answer
    beside `eos`; `has_bos`: `bos` is an item of its own, not `eos` in the place of one that is
    missing; `adds_bos`: a raw text begins with BOS; `dummy_prefix`: `encode` puts a space in
    front of a text, which is none of it. The other attributes are those of `Tokenizer`.
    """

    is_byte_level: bool
    vocab_size: int
    bos: int
    eos: int
    unknown: int | None
    ends: tuple[int, ...]
    has_bos: bool
    adds_bos: bool
    dummy_prefix: bool
    controls: dict[str, int]
    fingerprint: str

    @property
    def model(self) -> bytes | ByteLevelModel:
        """Return what the engine was made of."""

    def with_template(self, template: str | None) -> Codec:
        """Return the same codec, in which no text spells a tag that a chat template writes."""

    def pad(self, size: int) -> Codec:
        """Return the same codec with items, which no text spells, up to `size`."""

    def is_same(self, other: Codec) -> bool:
        """Return whether both give the same ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, never a control id."""

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of several texts."""

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text."""

    def name_of(self, token: int) -> str:
        """Return the name of a token in the vocabulary."""

    def dump_files(
        self, eos: int, template: str | None, space_once: bool = False
    ) -> Mapping[str, bytes]:
        """Return the files of the tokenizer, name -> content; `eos` is what others take for EOS.

        `space_once`: they put a space in front of a whole text alone, if they put any.
        """

    def describe_differences(self) -> tuple[str, ...]:
        """List, in sentences, where transformers gives other ids."""

    def describe_disagreement(self, directory: Path) -> str | None:
        """Describe where a second file in the directory of the tokenizer gives other ids."""


def is_tag(text: str) -> bool:
    """Return whether a text stands in brackets, as `<tool_call>`, `[INST]` and `<|im_start|>` do;
    no run of spaces and no word does."""
    return _TAG.fullmatch(text) is not None


def refuse_halves(texts: Sequence[str]) -> None:
    """UserError names the first text with half of a surrogate pair, which is no character."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} holds half of a surrogate pair at character "
                f"{error.start + 1}",
                "leave it out, or write U+FFFD in its place",
            ) from None
