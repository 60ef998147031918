"""A checkpoint directory *is* a Hugging Face model directory: config.json and safetensors, in
shards if large.

transformers, vLLM and llama.cpp's converter read it as it is, and we read what `save_pretrained`
writes. This module makes models of such directories and directories of models; `formats/` knows the
files, and other programs' formats.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama2.errors import UserError
from llama2.formats import hf
from llama2.formats.hf_config import make_config_json, read_config
from llama2.formats.hf_directory import CHECKSUMS, CONFIG, INDEX, WEIGHTS
from llama2.formats.stored_model import StoredModel, StoredTensor, read_ahead
from llama2.model.llama import Linear, Llama, LlamaConfig, initialise
from llama2.model.scorer import Scorer
from llama2.terminal_text import say

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "config_of",
    "is_scorer",
    "load",
    "load_scorer",
    "make_config_json",
    "save",
    "save_tensors",
]
Directory = str | os.PathLike[str]
Kinds = torch.dtype | Callable[[str], torch.dtype]
"""one type for all weights, or that of each by its name"""


# ---- saving
# ---------------------------------------------------------------------------------------------------------
def save(
    model: nn.Module,
    directory: Directory,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = hf.SHARD_BYTES,
) -> None:
    """Write a `Llama` or a `Scorer` as a checkpoint directory; `dtype` converts the weights on the
    way.

    Weights are split into shards of at most `shard_bytes`. Other files of an existing directory
    stay.
    """
    if not isinstance(model, Llama | Scorer):
        raise TypeError(f"cannot save a {type(model).__name__}")

    save_tensors(
        model.state_dict(),
        model.config,
        directory,
        scorer=isinstance(model, Scorer),
        dtype=dtype,
        shard_bytes=shard_bytes,
    )


def save_tensors(
    tensors: Mapping[str, Tensor],
    config: LlamaConfig,
    directory: Directory,
    *,
    scorer: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = hf.SHARD_BYTES,
) -> None:
    """`save` for a state dict gathered elsewhere (a model whose weights are spread over ranks)."""

    def stored(name: str, tensor: Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu(), name)

    source = StoredModel(
        Path(directory),
        "in memory",
        config,
        scorer,
        {name: stored(name, tensor) for name, tensor in tensors.items()},
        tokenizer=None,
    )
    hf.write(source, Path(directory), dtype=dtype, shard_bytes=shard_bytes)


# ---- loading
# --------------------------------------------------------------------------------------------------------
def load(
    directory: Directory,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Llama:
    """The language model in a checkpoint directory, its weights converted to `dtype` and moved to
    `device`.

    Strict: every missing, unknown or wrongly shaped tensor and every damaged file is named in a
    `UserError`.
    """
    source = hf.read(Path(directory))
    if source.scorer:
        raise UserError(
            f"{directory}: this is a reward model, a language model was expected",
            "give the directory of a model from pretrain, sft, select or ppo",
        )

    with torch.device("meta"):
        model = Llama(source.config)

    _fill(model, source, dtype, device)
    return model


def load_scorer(
    directory: Directory,
    *,
    dtype: Kinds = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Scorer:
    """A scorer: from a scorer's checkpoint, or the trunk of a language model with a fresh head
    drawn from `seed`."""
    source = hf.read(Path(directory))
    with torch.device("meta"):
        model = Scorer(source.config)

    _fill(model, source, dtype, device)
    if not source.scorer:
        model.score = Linear(source.config.hidden_size, 1)
        initialise(model.score, seed)
        model.score.to(device or "cpu", _kind(dtype, "score.weight"))

    return model


def _fill(
    model: Llama | Scorer, source: StoredModel, dtype: Kinds, device: torch.device | str | None
) -> None:
    """Give a model on the meta device the weights it shares with `source`, so that no second copy
    of them ever exists.
    """
    for remark in source.remarks:
        _say(remark)

    names = [name for name in model.state_dict() if name in source.tensors]
    tensors = read_ahead(source.tensors[name] for name in names)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        weight = nn.Parameter(next(tensors).to(device or "cpu", _kind(dtype, name)))
        setattr(model.get_submodule(owner), attribute, weight)


@functools.cache
def _say(remark: str) -> None:
    """Once, however often a checkpoint is loaded; of several processes the first."""
    if os.environ.get("RANK", "0") == "0":
        say(f"llama2: note: {remark}")


def _kind(dtype: Kinds, name: str) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else dtype(name)


def config_of(directory: Directory) -> LlamaConfig:
    """The shape of the model in a checkpoint directory."""
    return read_config(Path(directory))[0]


def is_scorer(directory: Directory) -> bool:
    """Whether a checkpoint directory holds a scorer, not a language model."""
    return read_config(Path(directory))[1]
