"""Models of random weights as the readers of other formats give them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer

SHAPE = LlamaConfig(
    vocab_size=420,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
Model = TypeVar("Model", Llama, Scorer)
RATIOS = [8, 4, 2, 1]
"""key heads for eight query heads: plain attention and three ratios of grouped queries"""
STRINGS = [
    "Hello, the river",
    "a\nb\n\n  c",
    "x ",
    " x",
    "  x",
    "",
    "日本語 été 🙂",
    "year 1987, 3.14",
    "[INST] hi [/INST]",
    "tab\there",
    "<0x41>",
    ". . .",
    "the    old    mill   ",
    "<<SYS>>\nx\n<</SYS>>",
    "\x01\x7f",
    "ﬁ ½ Å",
    "▁a",
    "\r\n",
    "\n<s>\n",
    "<s>x</s>",
    "<unk>",
    "e\u0301",
    "\u200b\u202e",
    "a" * 300,
    "[PAD400]",
]


def model_of(config: LlamaConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    """Wide weights, so that attention is far from uniform and logits are of order one; norms that
    are not one."""
    return _drawn(Llama(config), seed).to(dtype)


def scorer_of(config: LlamaConfig, seed: int = 0) -> Scorer:
    """The same for reward models."""
    return _drawn(Scorer(config), seed)


def _drawn(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)

    return model


def source_of(
    model: Llama | Scorer,
    path: Path,
    tokenizer: Path | None = None,
    read: Callable[[str, Tensor], Tensor] | None = None,
) -> StoredModel:
    """A model in memory as a source; `read` may do something else than copy."""

    def stored(name: str, tensor: Tensor) -> StoredTensor:
        return StoredTensor(
            tuple(tensor.shape),
            tensor.dtype,
            (lambda: read(name, tensor)) if read else tensor.clone,
            f"{path}: {name}",
        )

    tensors = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    return StoredModel(path, "memory", model.config, isinstance(model, Scorer), tensors, tokenizer)


def exact(source: StoredModel, model: Llama) -> bool:
    """Whether a source has the weights of a model, bit for bit, wherever they are of the same
    precision."""
    weights = model.state_dict()
    return source.tensors.keys() == weights.keys() and all(
        stored.read().dtype == stored.dtype
        and torch.equal(stored.read().float(), weights[name].float())
        for name, stored in source.tensors.items()
    )


def frugal(source: StoredModel) -> StoredModel:
    """The same checkpoint, whose tensors cannot be read while another of them is still held."""
    held: list[tuple[str, weakref.ref[Tensor]]] = []

    def watched(name: str, stored: StoredTensor) -> StoredTensor:
        def read() -> Tensor:
            for other, reference in held:
                assert reference() is None, f"{other} is still in memory when {name} is read"

            tensor = stored.read()
            held[:] = [(name, weakref.ref(tensor))]
            return tensor

        return StoredTensor(stored.shape, stored.dtype, read, stored.place)

    tensors = {name: watched(name, stored) for name, stored in source.tensors.items()}
    return StoredModel(
        source.path, source.format, source.config, source.scorer, tensors, source.tokenizer
    )


def state(source: StoredModel) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: stored.read() for name, stored in source.tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, kinds and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )
