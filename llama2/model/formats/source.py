"""A checkpoint as it lies on disk, in whatever format: its shape, and tensors that are read one at a time.

Every format has a reader that gives a `Source` and a writer that takes one, so each can be turned into each, and two
copies in different formats can be compared. Names and layout of tensors are those of `Llama.state_dict` (Hugging
Face's: rotary pairs lie half a head apart), whatever the file has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
