"""A checkpoint on disk, in whatever format: its shape, and tensors that are read one at a time.

Every format has a reader that returns a `StoredModel` and a writer that takes one, so each can be
converted to each, and two copies in different formats can be compared. Names and layout of tensors
are those of `Llama.state_dict` (Hugging Face's: rotary pairs lie half a head apart), whatever the
layout of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling
from llama2.model.tensors import interleave_pairs, rotary_heads, separate_pairs
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import Vocabulary
from llama2.tokenizer.stored import StoredTokenizer

# one type for all weights, or that of each by its name
Kinds = torch.dtype | Callable[[str], torch.dtype]
SMALL = 32 << 20  # bytes that do not matter
GIVE_ITS_OWN = "put the tokenizer there with which the model was trained"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read; `read` returns a copy on the CPU that the caller owns.

    `place` is the file, and the name there, for errors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    place: str

    @property
    def numel(self) -> int:
        """The count of its numbers."""
        return math.prod(self.shape)

    def count_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the size of its numbers as `dtype`, or as they are."""
        return self.numel * (dtype or self.dtype).itemsize

    def list_parts(self) -> Sequence[StoredTensor]:
        """Return the same numbers as short flat tensors in turn, if the file has them so.

        For callers that go through the numbers once.
        """
        return self.read.list_parts() if isinstance(self.read, PartwiseRead) else (self,)


@dataclass(frozen=True)
class PartwiseRead:
    """The way to read a tensor whose numbers lie in order: whole, or one part after another."""

    whole: Callable[[], Tensor]
    list_parts: Callable[[], Sequence[StoredTensor]]

    def __call__(self) -> Tensor:
        return self.whole()


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint whose tensors are complete and have the shapes of `config`: its reader checked.

    The SentencePiece model of `tokenizer` is not read yet; `template` is the chat template, in
    Jinja; `remarks` list, for the user, the settings left out because they are unknown; `quantized`
    names the types of quantized tensors in the file.
    """

    path: Path
    format: str
    config: LlamaConfig
    scorer: bool
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path | StoredTokenizer | None
    template: str | None = None
    remarks: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """The count of all numbers."""
        return sum(stored.numel for stored in self.tensors.values())

    def count_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the size of all weights as `dtype`, or as they are."""
        return sum(stored.count_bytes(dtype) for stored in self.tensors.values())


def observe(model: StoredModel, see: Callable[[StoredTensor, Tensor], None]) -> StoredModel:
    """Return the same checkpoint; `see` gets every tensor, or part, that is read, and may refuse.

    It refuses by raising an error.
    """

    def watch(stored: StoredTensor) -> StoredTensor:
        def read() -> Tensor:
            tensor = stored.read()
            see(stored, tensor)
            return tensor

        if not isinstance(stored.read, PartwiseRead):
            return replace(stored, read=read)

        partwise = PartwiseRead(read, lambda: list(map(watch, stored.list_parts())))
        return replace(stored, read=partwise)

    return replace(model, tensors={name: watch(stored) for name, stored in model.tensors.items()})


def read_ahead(tensors: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """Yield the tensors in turn, and read the next while the caller works on one.

    It is read ahead if both are small, or together no larger than the largest. So memory holds one
    tensor, as far as size goes, provided that the caller drops each before it asks for the next.
    """
    waiting = list(tensors)[::-1]
    most = max((SMALL, *(stored.count_bytes() for stored in waiting)))
    following: Future[Tensor] | None = None

    with ThreadPoolExecutor(1) as reader:
        while waiting:
            stored = waiting.pop()
            current = [stored.read() if following is None else following.result()]
            fits = waiting and stored.count_bytes() + waiting[-1].count_bytes() <= most
            following = reader.submit(waiting[-1].read) if fits else None
            yield current.pop()  # not a name of ours, which would keep it


def choose_dtype(dtype: Kinds, name: str) -> torch.dtype:
    """Return the type that the tensor of this name shall have."""
    return dtype if isinstance(dtype, torch.dtype) else dtype(name)


# --- rules that several formats share ---
def split_rotary_pairs(name: str, stored: StoredTensor, config: LlamaConfig) -> StoredTensor:
    """Return a tensor of a file in which rotary pairs are neighbours as one in our order."""
    heads = rotary_heads(name, config)
    if heads is None:
        return stored

    return replace(stored, read=lambda: separate_pairs(stored.read(), heads))


def join_rotary_pairs(name: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """Return a tensor for a file in which rotary pairs are neighbours."""
    heads = rotary_heads(name, config)
    return tensor if heads is None else interleave_pairs(tensor, heads)


def require_language_model(model: StoredModel, program: str) -> None:
    """UserError for a reward model, whose head most formats have no place for."""
    if model.scorer:
        raise UserError(
            f"{model.path}: this is a reward model, and {program} has no place for its head",
            "export it in Hugging Face's format, or export a language model",
        )


def list_variations(config: LlamaConfig, scaling: RopeScaling | None = None) -> list[str]:
    """List, in words, in what a shape differs from those of the paper.

    `scaling` of rotary positions counts as none.
    """
    variations = []
    if config.query_size != config.hidden_size:
        variations.append(f"{config.num_attention_heads} heads of size {config.head_dim}")
    if config.attention_bias:
        variations.append("biases in attention")
    if config.rope_scaling is not None and config.rope_scaling != scaling:
        variations.append(
            f"rotary positions scaled by '{config.rope_scaling.rope_type}' "
            f"(factor {config.rope_scaling.factor:g})"
        )

    return variations


def require_tokenizer(model: StoredModel, reason: str) -> Path | StoredTokenizer:
    """Return the tokenizer of a checkpoint. UserError if it has none."""
    if model.tokenizer is None:
        raise UserError(
            f"{model.path}: there is no tokenizer, {reason}",
            "put tokenizer.model beside the weights",
        )

    return model.tokenizer


def require_vocabulary(model: StoredModel, reason: str) -> Vocabulary:
    """Return the vocabulary of a SentencePiece model.

    UserError if a checkpoint has no tokenizer, or a byte-level one.
    """
    return sentencepiece_model.load(require_tokenizer(model, reason))
