"""Load models from checkpoint directories, and save them.

A checkpoint directory *is* a Hugging Face model directory: config.json and safetensors, in shards
if large. transformers, vLLM and llama.cpp's converter read it as it is, and `save_pretrained`
writes such directories. The other modules of `formats/` know the files, and other programs'
formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama2 import devices, kernels
from llama2.errors import UserError
from llama2.formats import hf
from llama2.formats.hf_config import make_config_json, read_config
from llama2.formats.hf_directory import CHECKSUMS, CONFIG, INDEX, SCORE, WEIGHTS
from llama2.formats.stored_model import StoredModel, StoredTensor, read_ahead
from llama2.model.llama import Llama, LlamaConfig, initialise
from llama2.model.scorer import ScalarHead, Scorer
from llama2.terminal_text import say_once
from llama2.tokenizer.tokenizer import Tokenizer

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "config_of",
    "is_scorer",
    "load",
    "load_scorer",
    "load_tokenizer",
    "make_config_json",
    "save",
    "save_tensors",
]
Directory = str | os.PathLike[str]
# one type for all weights, or that of each by its name
Kinds = torch.dtype | Callable[[str], torch.dtype]


# --- saving ---
def save(
    model: nn.Module,
    directory: Directory,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = hf.SHARD_BYTES,
) -> None:
    """Write a `Llama` or a `Scorer` as a checkpoint directory; `dtype` converts the weights.

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
    """Write a state dict gathered elsewhere, as of a model whose weights are spread over ranks."""

    def store(name: str, tensor: Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu(), name)

    stored = {name: store(name, tensor) for name, tensor in tensors.items()}
    model = StoredModel(Path(directory), "in memory", config, scorer, stored, tokenizer=None)
    hf.write(model, Path(directory), dtype=dtype, shard_bytes=shard_bytes)


# --- loading ---
def load(
    directory: Directory,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Llama:
    """Load the language model in a checkpoint directory as `dtype` on `device`.

    Strict: every missing, unknown or wrongly shaped tensor and every damaged file is named in a
    `UserError`.
    """
    stored = hf.read(Path(directory))
    if stored.scorer:
        raise UserError(
            f"{directory}: this is a reward model, a language model was expected",
            "give the directory of a model from pretrain, sft, select or ppo",
        )

    with torch.device("meta"):
        model = Llama(stored.config)

    _fill(model, stored, dtype, device)
    return kernels.install(model)


def load_scorer(
    directory: Directory,
    *,
    dtype: Kinds = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Scorer:
    """Load a scorer, or the trunk of a language model with a fresh head drawn from `seed`."""
    stored = hf.read(Path(directory))
    with torch.device("meta"):
        model = Scorer(stored.config)

    _fill(model, stored, dtype, device)
    if not stored.scorer:
        model.score = ScalarHead(stored.config.hidden_size)
        initialise(model.score, seed)
        model.score.to(device or devices.CPU, _choose_dtype(dtype, SCORE))

    return kernels.install(model)


def _fill(
    model: Llama | Scorer, stored: StoredModel, dtype: Kinds, device: torch.device | str | None
) -> None:
    """Give a model on the meta device the weights that it shares with a stored one.

    So no second copy of them ever exists.
    """
    for remark in stored.remarks:
        say_once(f"note: {remark}")

    names = [name for name in model.state_dict() if name in stored.tensors]
    tensors = read_ahead(stored.tensors[name] for name in names)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        weight = nn.Parameter(next(tensors).to(device or devices.CPU, _choose_dtype(dtype, name)))
        setattr(model.get_submodule(owner), attribute, weight)


def _choose_dtype(dtype: Kinds, name: str) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else dtype(name)


def config_of(directory: Directory) -> LlamaConfig:
    """Return the shape of the model in a checkpoint directory."""
    return read_config(Path(directory))[0]


def is_scorer(directory: Directory) -> bool:
    """Return whether a checkpoint directory holds a scorer, not a language model."""
    return read_config(Path(directory))[1]


def load_tokenizer(directory: Directory, config: LlamaConfig | None = None) -> Tokenizer:
    """Load the tokenizer in a checkpoint directory. UserError unless it fits the model there.

    `config` is the model's, where it is known.
    """
    config = config or config_of(directory)
    tokenizer = Tokenizer.load(directory)
    tokenizer.require_fit(directory, config.vocab_size, config.bos_token_id)
    return tokenizer
