"""A checkpoint as it lies on disk, in whatever format: its shape, and tensors that are read one at a time.

Every format has a reader that gives a `Source` and a writer that takes one, so each can be turned into each, and two
copies in different formats can be compared. Names and layout of tensors are those of `Llama.state_dict` (Hugging
Face's: rotary pairs lie half a head apart), whatever the file has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama2.model.llama import LlamaConfig


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read. `read` gives a copy of it on the CPU, which the caller may keep or drop."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    place: str
    """file and name there, for errors"""
    read_once: Callable[[], Tensor] | None = None
    """`read` for those who do not come back: the operating system drops what it keeps of the file in memory"""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are all there and have the shapes of `config`: a reader has checked that."""

    path: Path
    format: str
    config: LlamaConfig
    scorer: bool
    tensors: Mapping[str, Stored]
    tokenizer: Path | None
    """the SentencePiece model that came with it"""


def read_ahead(tensors: Iterable[Stored]) -> Iterator[Tensor]:
    """The tensors in turn. While the caller works on one the next is read, if both are no larger than the largest.

    So memory holds one tensor, as far as size goes, provided that the caller drops each before it asks for the next.
    """
    waiting = list(tensors)[::-1]
    most = max((stored.nbytes for stored in waiting), default=0)
    following: Future[Tensor] | None = None
    with ThreadPoolExecutor(1) as reader:
        while waiting:
            stored = waiting.pop()
            held = [stored.read() if following is None else following.result()]
            fits = waiting and stored.nbytes + waiting[-1].nbytes <= most
            following = reader.submit(waiting[-1].read) if fits else None
            yield held.pop()  # not a name of ours, which would keep it
