"""Load models from checkpoints, and save them.

A checkpoint directory *is* a Hugging Face model directory: config.json and safetensors, in shards
if large. transformers, vLLM and llama.cpp's converter read it as it is, and `save_pretrained`
writes such directories. A GGUF file is a checkpoint that can be loaded as it is, too, with the
tokenizer and the chat template inside; whatever else there is must be imported first. The other
modules of `formats/` know the files, and other programs' formats.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama2 import devices, kernels
from llama2.errors import UserError
from llama2.formats import detect, gguf, gguf_header, hf
from llama2.formats.hf_config import make_config_json, read_config
from llama2.formats.hf_directory import CHECKSUMS, CONFIG, INDEX, SCORE, WEIGHTS
from llama2.formats.stored_model import (
    Kinds,
    StoredModel,
    StoredTensor,
    choose_dtype,
    read_ahead,
)
from llama2.model.llama import Llama, LlamaConfig, initialise
from llama2.model.scorer import ScalarHead, Scorer
from llama2.terminal_text import say_once
from llama2.tokenizer.chat_settings import read_chat_template
from llama2.tokenizer.tokenizer import Tokenizer

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "config_of",
    "exists",
    "is_scorer",
    "load",
    "load_scorer",
    "load_tokenizer",
    "make_config_json",
    "open_checkpoint",
    "open_tokenizer",
    "read_template",
    "save",
    "save_tensors",
]
Directory = str | os.PathLike[str]
Place = str | os.PathLike[str]  # of a checkpoint directory, or a GGUF file


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
def open_checkpoint(place: Place, dtype: Kinds = torch.float32) -> StoredModel:
    """Open a checkpoint that can be loaded as it is; `dtype` is that of quantized tensors.

    UserError for one that must be imported first, with the command.
    """
    path = Path(place)
    if not path.is_file():
        return hf.read(path)

    stored = detect.open_file(path, dtype)
    if stored.format != gguf.FORMAT:
        raise UserError(
            f"{path}: a model of {stored.format} is not used as it is",
            f"llama2 import {path} --out DIRECTORY makes a checkpoint of it",
        )

    return stored


def load(
    place: Place,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Llama:
    """Load the language model at a place as `dtype` on `device`.

    Strict: every missing, unknown or wrongly shaped tensor and every damaged file is named in a
    `UserError`.
    """
    stored = open_checkpoint(place, dtype)
    if stored.scorer:
        raise UserError(
            f"{place}: this is a reward model, a language model was expected",
            "give the directory of a model from pretrain, sft, select or ppo",
        )

    with torch.device("meta"):
        model = Llama(stored.config)

    _fill(model, stored, dtype, device)
    return kernels.install(model)


def load_scorer(
    place: Place,
    *,
    dtype: Kinds = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Scorer:
    """Load a scorer, or the trunk of a language model with a fresh head drawn from `seed`."""
    stored = open_checkpoint(place, dtype)
    with torch.device("meta"):
        model = Scorer(stored.config)

    _fill(model, stored, dtype, device)
    if not stored.scorer:
        model.score = ScalarHead(stored.config.hidden_size)
        initialise(model.score, seed)
        model.score.to(device or devices.CPU, choose_dtype(dtype, SCORE))

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
        weight = nn.Parameter(next(tensors).to(device or devices.CPU, choose_dtype(dtype, name)))
        setattr(model.get_submodule(owner), attribute, weight)


# --- what belongs to a model ---
def exists(place: Place) -> bool:
    """Return whether a checkpoint is there: a directory with a config.json, or a file."""
    path = Path(place)
    return path.is_file() or (path / CONFIG).is_file()


def config_of(place: Place) -> LlamaConfig:
    """Return the shape of the model in a checkpoint."""
    path = Path(place)
    return _look_into(path).config if path.is_file() else read_config(path)[0]


def is_scorer(place: Place) -> bool:
    """Return whether a checkpoint holds a scorer, not a language model."""
    path = Path(place)
    return _look_into(path).scorer if path.is_file() else read_config(path)[1]


def read_template(place: Place) -> str | None:
    """Return the chat template of a checkpoint, in Jinja; None if there is none."""
    path = Path(place)
    return _look_into(path).template if path.is_file() else read_chat_template(path)


def load_tokenizer(place: Place, config: LlamaConfig | None = None) -> Tokenizer:
    """Load the tokenizer in a checkpoint. UserError unless it fits the model there.

    `config` is the model's, where it is known.
    """
    config = config or config_of(place)
    tokenizer = open_tokenizer(place)
    tokenizer.require_fit(place, config.vocab_size, config.bos_token_id)
    return tokenizer


def open_tokenizer(place: Place) -> Tokenizer:
    """Load the tokenizer in a GGUF file, or at any place that `Tokenizer.load` knows."""
    path = Path(place)
    if not gguf_header.is_gguf(path):
        return Tokenizer.load(path)

    status = path.stat()
    return _make_tokenizer(path, status.st_size, status.st_mtime_ns)


def _look_into(path: Path) -> StoredModel:
    """Return what is in a file, for anything but its weights."""
    status = path.stat()
    return _open_unchanged(path, status.st_size, status.st_mtime_ns)


# a stage asks for the shape, the tokenizer and the template of one file again and again
@functools.lru_cache(maxsize=4)
def _open_unchanged(path: Path, size: int, changed_ns: int) -> StoredModel:
    return open_checkpoint(path)


@functools.lru_cache(maxsize=4)
def _make_tokenizer(path: Path, size: int, changed_ns: int) -> Tokenizer:
    stored = _open_unchanged(path, size, changed_ns)
    if stored.tokenizer is None:
        raise UserError(
            f"{path}: there is no tokenizer in it",
            f"give it its own: llama2 import {path} --tokenizer FILE --out DIRECTORY",
        )

    tokenizer = Tokenizer.load(stored.tokenizer)
    tokenizer.stops = tuple(dict.fromkeys((*tokenizer.stops, *stored.config.stops)))
    return tokenizer.with_chat_template(stored.template, stored.config.stops, str(path))
