"""Hugging Face directories of language models and reward models: what we write ourselves, and what
most others have.

Weights are safetensors, or PyTorch's pickled files (`pytorch_model.bin`), which are read without
running what is in them. What is written loads in transformers, vLLM and llama.cpp's converter as it
is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from llama2 import json_files
from llama2.errors import UserError
from llama2.formats import hf_config, hf_directory, safetensors_file, torch_legacy
from llama2.formats.hf_directory import CHECKSUMS, CONFIG, INDEX, WEIGHTS
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.llama import LlamaConfig
from llama2.model.tensors import EMBEDDINGS, HEAD
from llama2.tokenizer.chat_settings import GENERATION, read_chat_template
from llama2.tokenizer.directory import find_tokenizer

TOKENIZER = "tokenizer.model"
SHARD_BYTES = 5 << 30
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def read(path: Path) -> StoredModel:
    """The checkpoint in a directory. UserError names the file, key or tensor that is damaged or
    does not fit."""
    shape, scorer = hf_config.read_config(path)
    files = hf_directory.list_weight_files(path)
    hf_directory.verify_checksums(path)

    return StoredModel(
        path,
        "Hugging Face",
        shape,
        scorer,
        fitting(path, list_tensors(files), shape, scorer),
        find_tokenizer(path),
        read_chat_template(path),
        hf_config.list_remarks(path, shape),
    )


def list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of several weight files, safetensors or PyTorch's, by name."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        here = (
            safetensors_file.list_tensors(file)
            if file.suffix == ".safetensors"
            else torch_legacy.list_tensors(file)
        )
        for name in here.keys() & found.keys():
            raise UserError(
                f"{here[name].place} is in another file as well: {found[name].place}",
                "remove the file that does not belong there",
            )

        found |= here

    return found


def fitting(
    place: Path, found: Mapping[str, StoredTensor], shape: LlamaConfig, scorer: bool
) -> dict[str, StoredTensor]:
    """The tensors of a model in the order of its state dict, if these are they; else a UserError
    that names them.

    Left out is what carries nothing: rotary tables of early conversions, and a head that a model
    shares.
    """
    shapes = hf_directory.list_shapes(shape, scorer=scorer)
    kept = {
        name: stored for name, stored in found.items() if not name.endswith("rotary_emb.inv_freq")
    }
    if HEAD in kept and HEAD not in shapes and EMBEDDINGS in kept and not scorer:
        if not torch.equal(kept[HEAD].read(), kept[EMBEDDINGS].read()):
            raise UserError(
                f"{place}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDINGS}",
                f"set tie_word_embeddings to false in {CONFIG}",
            )

        del kept[HEAD]

    hf_directory.check_shapes(place, shapes, {name: stored.shape for name, stored in kept.items()})
    for stored in kept.values():
        if stored.dtype not in _FLOATS:
            raise UserError(
                f"{stored.place} is {stored.dtype}, not floating point",
                "quantized checkpoints cannot be loaded",
            )

    return {name: kept[name] for name in shapes}


def write(
    source: StoredModel,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write a checkpoint directory, one tensor in memory at a time; `dtype` converts the weights on
    the way.

    Weights are split into shards of at most `shard_bytes`. `beside` writes what else belongs into
    the directory it is given (a tokenizer). A failure leaves what was there; other files of a
    directory that exists stay.
    """
    with hf_directory.replacing(path) as work:
        shards = _shards(source.tensors, dtype, shard_bytes)
        names = (
            [WEIGHTS]
            if len(shards) == 1
            else [
                f"model-{number:05}-of-{len(shards):05}.safetensors"
                for number in range(1, len(shards) + 1)
            ]
        )
        sums = {
            name: safetensors_file.write(
                work / name, {key: source.tensors[key] for key in shard}, dtype
            )
            for name, shard in zip(names, shards, strict=True)
        }

        if len(shards) > 1:
            size = sum(
                stored.numel * (dtype or stored.dtype).itemsize
                for stored in source.tensors.values()
            )
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            hf_directory.write_json(
                work / INDEX,
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))},
            )

        kept = dtype or find_prevailing_dtype(source.tensors)
        hf_directory.write_json(
            work / CONFIG,
            hf_config.make_config_json(source.config, scorer=source.scorer, dtype=kept),
        )
        if not source.scorer:
            hf_directory.write_json(
                work / GENERATION, hf_config.make_generation_json(source.config)
            )

        beside(work)
        sums |= {
            file.name: json_files.sha256(file) for file in work.iterdir() if file.name not in sums
        }
        hf_directory.write_json(work / CHECKSUMS, dict(sorted(sums.items())))


def find_prevailing_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The type that most of the numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        counts[stored.dtype] += stored.numel

    return counts.most_common(1)[0][0]


def _shards(
    tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[list[str]]:
    """Tensor names in order, cut so that no shard exceeds `shard_bytes` (a larger tensor has one
    for itself)."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, stored in tensors.items():
        size = stored.numel * (dtype or stored.dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0

        shards[-1].append(key)
        used += size

    return shards
