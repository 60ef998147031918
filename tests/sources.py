"""Checkpoints for tests of formats: random models whose logits are of order one, as a reader would give them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama2.model.formats.source import Source, Stored
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer


def random_model(config: LlamaConfig, seed: int = 0, kind: type = Llama) -> Llama | Scorer:
    """Wide matrices, so that attention is far from uniform, and norms that are not one."""
    model = kind(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape)
            parameter.copy_(noise.uniform_(0.5, 1.5, generator=generator) if "norm" in name
                            else noise.normal_(0, 0.2, generator=generator))
    return model.eval()


def source_of(model: Llama | Scorer, tokenizer: Path | None = None) -> Source:
    """A model in memory as a `Source`."""
    tensors = {name: Stored(tuple(value.shape), value.dtype, value.clone, f"memory: {name}")
               for name, value in model.state_dict().items()}
    return Source(Path("memory"), "memory", model.config, isinstance(model, Scorer), tensors, tokenizer)


def frugal(source: Source) -> Source:
    """The same checkpoint, whose tensors cannot be read while another of them is still held."""
    held: list[tuple[str, weakref.ref[Tensor]]] = []

    def watched(name: str, stored: Stored) -> Stored:
        def read() -> Tensor:
            for other, reference in held:
                assert reference() is None, f"{other} is still in memory when {name} is read"
            tensor = stored.read()
            held[:] = [(name, weakref.ref(tensor))]
            return tensor
        return Stored(stored.shape, stored.dtype, read, stored.place)

    tensors = {name: watched(name, stored) for name, stored in source.tensors.items()}
    return Source(source.path, source.format, source.config, source.scorer, tensors, source.tokenizer)


def state(source: Source) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: stored.read() for name, stored in source.tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names, kinds and bits."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
