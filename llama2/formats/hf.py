"""Read and write Hugging Face directories of language models and reward models.

Weights are safetensors, or PyTorch's pickled files (`pytorch_model.bin`), which are read without
running their code. transformers, vLLM and llama.cpp's converter load the written directories as
they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from llama2.errors import UserError
from llama2.formats import hf_config, hf_directory, safetensors_file, torch_legacy
from llama2.formats.hf_directory import CHECKSUMS, CONFIG, INDEX, WEIGHTS
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.hashing import hash_file
from llama2.model.llama import LlamaConfig
from llama2.model.tensors import EMBEDDINGS, HEAD
from llama2.tokenizer.chat_settings import GENERATION, read_chat_template
from llama2.tokenizer.directory import find_tokenizer

SHARD_BYTES = 5 << 30
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


# --- reading ---
def read(path: Path) -> StoredModel:
    """Open the checkpoint in a directory.

    UserError names the file, key or tensor that is damaged or does not fit.
    """
    config, scorer = hf_config.read_config(path)
    files = hf_directory.list_weight_files(path)
    hf_directory.verify_checksums(path)

    return StoredModel(
        path,
        "Hugging Face",
        config,
        scorer,
        select_tensors(path, list_tensors(files), config, scorer),
        find_tokenizer(path),
        read_chat_template(path),
        hf_config.list_remarks(path, config),
    )


def list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of several weight files, safetensors or PyTorch's, by name."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        reader = safetensors_file if file.suffix == ".safetensors" else torch_legacy
        for name, stored in reader.list_tensors(file).items():
            if tensors.setdefault(name, stored) is not stored:
                raise UserError(
                    f"{stored.place} is in another file as well: {tensors[name].place}",
                    "remove the file that does not belong there",
                )

    return tensors


def select_tensors(
    place: Path, tensors: Mapping[str, StoredTensor], config: LlamaConfig, scorer: bool
) -> dict[str, StoredTensor]:
    """Return the tensors of a model in the order of its state dict; UserError for others.

    Left out are tensors without information: rotary tables of early conversions, and a head that a
    model shares.
    """
    shapes = hf_directory.list_shapes(config, scorer=scorer)
    selected = {
        name: stored for name, stored in tensors.items() if not name.endswith("rotary_emb.inv_freq")
    }
    if HEAD in selected and HEAD not in shapes and EMBEDDINGS in selected and not scorer:
        head = selected.pop(HEAD)
        if not torch.equal(head.read(), selected[EMBEDDINGS].read()):
            raise UserError(
                f"{place}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDINGS}",
                f"set tie_word_embeddings to false in {CONFIG}",
            )

    actual = {name: stored.shape for name, stored in selected.items()}
    hf_directory.check_shapes(place, shapes, actual)
    for stored in selected.values():
        if stored.dtype not in _FLOATS:
            raise UserError(
                f"{stored.place} is {stored.dtype}, not floating point",
                "quantized checkpoints cannot be loaded",
            )

    return {name: selected[name] for name in shapes}


# --- writing ---
def write(
    model: StoredModel,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write a checkpoint directory, one tensor in memory at a time; `dtype` converts the weights.

    Weights are split into shards of at most `shard_bytes`. `beside` writes other files (a
    tokenizer) into the directory it is given. A failure leaves the old content; other files of a
    directory that exists stay.
    """
    with hf_directory.replace_directory(path) as work:
        shards = list(_divide(model.tensors, dtype, shard_bytes))
        sums: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) == 1:
                name = WEIGHTS

            sums[name] = safetensors_file.write(work / name, shard, dtype)
            weight_map |= dict.fromkeys(shard, name)

        if len(shards) > 1:
            metadata = {"total_size": model.count_bytes(dtype)}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            hf_directory.write_json(work / INDEX, index)

        config = hf_config.make_config_json(
            model.config,
            scorer=model.scorer,
            dtype=dtype or find_prevailing_dtype(model.tensors),
        )
        hf_directory.write_json(work / CONFIG, config)
        if not model.scorer:
            hf_directory.write_json(work / GENERATION, hf_config.make_generation_json(model.config))

        beside(work)
        for file in work.iterdir():
            if file.name not in sums:
                sums[file.name] = hash_file(file)

        hf_directory.write_json(work / CHECKSUMS, dict(sorted(sums.items())))


def find_prevailing_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the type that most of the numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        counts[stored.dtype] += stored.numel

    return counts.most_common(1)[0][0]


def _divide(
    tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None, shard_bytes: int
) -> Iterator[dict[str, StoredTensor]]:
    """Divide tensors, in their order, into shards of at most `shard_bytes`.

    A larger tensor has a shard for itself.
    """
    shard: dict[str, StoredTensor] = {}
    used = 0
    for name, stored in tensors.items():
        size = stored.count_bytes(dtype)
        if shard and used + size > shard_bytes:
            yield shard
            shard, used = {}, 0

        shard[name] = stored
        used += size

    yield shard
