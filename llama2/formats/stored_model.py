"""A checkpoint as it lies on disk, in whatever format: its shape, and tensors that are read one at
a time.

Every format has a reader that gives a `StoredModel` and a writer that takes one, so each can be turned
into each, and two copies in different formats can be compared. Names and layout of tensors are
those of `Llama.state_dict` (Hugging Face's: rotary pairs lie half a head apart), whatever the file
has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama2.model.llama import LlamaConfig
from llama2.tokenizer.sentencepiece_model import StoredTokenizer

SMALL = 32 << 20  # bytes that do not matter


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read. `read` gives a copy of it on the CPU, which the caller may
    keep or drop."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    place: str
    """file and name there, for errors"""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def parts(self) -> Sequence[StoredTensor]:
        """The same numbers as short flat tensors in turn, if the file has them so; for who goes
        through them once."""
        return self.read.parts() if isinstance(self.read, InOrder) else (self,)


@dataclass(frozen=True)
class InOrder:
    """How to read a tensor whose numbers lie in the file in their order: whole, or a part after
    another."""

    whole: Callable[[], Tensor]
    parts: Callable[[], Sequence[StoredTensor]]

    def __call__(self) -> Tensor:
        return self.whole()


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose tensors are all there and have the shapes of `config`: a reader has
    checked that."""

    path: Path
    format: str
    config: LlamaConfig
    scorer: bool
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path | StoredTokenizer | None
    """the SentencePiece model that came with it, read when it is asked for"""
    template: str | None = None
    """the chat template that came with it, in Jinja"""
    remarks: tuple[str, ...] = ()
    """in sentences for the user, what was left out because nobody knows what it means"""


def observe(source: StoredModel, see: Callable[[StoredTensor, Tensor], None]) -> StoredModel:
    """The same checkpoint; `see` is shown every tensor, or part of one, when it is read, and may
    refuse it."""

    def watched(stored: StoredTensor) -> StoredTensor:
        def read() -> Tensor:
            tensor = stored.read()
            see(stored, tensor)
            return tensor

        if isinstance(stored.read, InOrder):
            return replace(
                stored, read=InOrder(read, lambda: [watched(part) for part in stored.parts()])
            )

        return replace(stored, read=read)

    return replace(
        source, tensors={name: watched(stored) for name, stored in source.tensors.items()}
    )


def read_ahead(tensors: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """The tensors in turn. While the caller works on one the next is read, if both are small, or
    together no larger than the largest.

    So memory holds one tensor, as far as size goes, provided that the caller drops each before it
    asks for the next.
    """
    waiting = list(tensors)[::-1]
    most = max((SMALL, *(stored.nbytes for stored in waiting)))
    following: Future[Tensor] | None = None

    with ThreadPoolExecutor(1) as reader:
        while waiting:
            stored = waiting.pop()
            held = [stored.read() if following is None else following.result()]
            fits = waiting and stored.nbytes + waiting[-1].nbytes <= most
            following = reader.submit(waiting[-1].read) if fits else None
            yield held.pop()  # not a name of ours, which would keep it
