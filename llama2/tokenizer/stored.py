"""Describe a tokenizer that has not been loaded: what its engine is made of, and where that lies.

There are two engines. SentencePiece takes the content of a `tokenizer.model`. Byte-level BPE, as
GPT-2, Llama 3, Qwen and SmolLM2 have, takes a `tokenizer.json` and the settings beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ByteLevelModel:
    """The files of a byte-level tokenizer as objects, and the roles of its ids.

    `values` is the content of `tokenizer.json`, `settings` that of `tokenizer_config.json` without
    a chat template, `special` that of `special_tokens_map.json`; {} where there is no such file.
    `bos` is None for a tokenizer without one. `ends` are ids that end an answer beside `eos`.
    `adds_bos`: a raw text begins with BOS. `controls` are the added tokens that no text spells.
    `size` is the model's vocabulary, if it is known. `original` is the file `tokenizer.json`, if it
    may be written again as it is.
    """

    values: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)
    special: Mapping[str, Any] = field(repr=False)
    bos: int | None
    eos: int
    ends: tuple[int, ...] = ()
    adds_bos: bool = False
    controls: frozenset[int] = frozenset()
    size: int | None = None
    original: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer inside another file, or made of several; read on demand.

    `place` is its name in errors. `read` returns the content of a SentencePiece model file, or what
    makes a byte-level tokenizer, with a UserError if there is none at the place.
    """

    place: str
    read: Callable[[], bytes | ByteLevelModel]

    def __str__(self) -> str:
        return self.place
