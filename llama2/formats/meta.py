"""Read and write Meta's own files: `consolidated.NN.pth`, one a model-parallel rank, `params.json`.

Rank r of N holds its part of every matrix: of queries, keys, values, gate, up and the head their
outputs (rows) from r/N to (r+1)/N, of the two projections that write to the residual stream and of
the embeddings their inputs (columns). Norms are in every file, equal. Rows of queries and keys are
ordered so that rotary pairs are neighbours.

The format has no place for the context (4,096 in the paper), the ids of BOS and EOS, and whether
embeddings and head are tied (both are written). Meta's code computes the width of the feed-forward
network from `multiple_of` and `ffn_dim_multiplier`; the tensors have it, too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2 import json_files
from llama2.errors import UserError
from llama2.formats import hf_directory, torch_legacy, torch_zip
from llama2.formats.settings import build_config
from llama2.formats.stored_model import (
    StoredModel,
    StoredTensor,
    join_rotary_pairs,
    list_variations,
    require_language_model,
    split_rotary_pairs,
)
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling
from llama2.model.tensors import EMBEDDINGS, HEAD, shapes
from llama2.terminal_text import show_value
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.chat_settings import MODEL
from llama2.tokenizer.stored import StoredTokenizer

FORMAT, PARAMETERS = "meta", "params.json"
CONTEXT = 4096
_FAMILY = "only models of the Llama 2 family can be read"
# Meta's code for Llama 3.1 has these numbers, and params.json nothing but `use_scaled_rope`
_SCALED = RopeScaling("llama3", 8.0, 8192)
_OTHER_MODEL = "they are of different models"
_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
}
_DIVIDED = (
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)
ROWS, COLUMNS = 0, 1
_OUTSIDE = {
    "model.embed_tokens": ("tok_embeddings", COLUMNS),
    "model.norm": ("norm", None),
    "lm_head": ("output", ROWS),
}
_INSIDE = {
    "self_attn.q_proj": ("attention.wq", ROWS),
    "self_attn.k_proj": ("attention.wk", ROWS),
    "self_attn.v_proj": ("attention.wv", ROWS),
    "self_attn.o_proj": ("attention.wo", COLUMNS),
    "mlp.gate_proj": ("feed_forward.w1", ROWS),
    "mlp.down_proj": ("feed_forward.w2", COLUMNS),
    "mlp.up_proj": ("feed_forward.w3", ROWS),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def translate(name: str) -> tuple[str, int | None]:
    """Return Meta's name of a tensor, and the axis along which ranks divide it.

    The axis is None if every rank has the whole tensor.
    """
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        theirs, axis = _OUTSIDE[stem]
        return f"{theirs}.weight", axis

    _, _, layer, inside = stem.split(".", 3)  # model.layers.N.<inside>
    theirs, axis = _INSIDE[inside]
    return f"layers.{layer}.{theirs}.weight", axis


# --- reading ---
def read(path: Path, *, context: int = CONTEXT) -> StoredModel:
    """Open a directory of Meta's, its model-parallel parts joined.

    `context` is the most positions, where params.json does not say. UserError for a missing shard,
    shards that disagree, params.json that does not fit, a truncated or damaged file, and one that
    holds more than tensors. Norms are compared between ranks when they are read.
    """
    files = _list_shards(path)
    shards = [torch_legacy.list_tensors(file) for file in files]
    config = _read_config(path, shards, context)
    _check_shards(config, files, shards)
    tensors = {name: _join(name, shape, shards, config) for name, shape in shapes(config).items()}
    tokenizers = [path / MODEL, path.resolve().parent / MODEL]
    tokenizer = next(filter(os.path.lexists, tokenizers), None)

    remarks = () if config.rope_scaling is None else (_describe_scaling(path),)
    return StoredModel(path, FORMAT, config, False, tensors, tokenizer, remarks=remarks)


def _describe_scaling(path: Path) -> str:
    return (
        f"{path / PARAMETERS}: use_scaled_rope does not say by how much: as Meta's code for Llama "
        f"3.1, the factor is {_SCALED.factor:g}; Llama 3.2's models of 1B and 3B have 32 elsewhere"
    )


def _list_shards(path: Path) -> list[Path]:
    numbers: dict[int, Path] = {}
    for file in path.glob("consolidated.*.pth"):
        if match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name):
            numbers[int(match[1])] = file

    if not numbers:
        raise UserError(f"{path}: there is no consolidated.00.pth", "fetch the weights")

    last = max(numbers)
    for number in range(last):
        if number not in numbers:
            raise UserError(
                f"{path / f'consolidated.{number:02}.pth'}: missing, though there is "
                f"{numbers[last].name}",
                "fetch this shard",
            )

    return [numbers[number] for number in sorted(numbers)]


def _read_config(
    path: Path, shards: Sequence[Mapping[str, StoredTensor]], context: int
) -> LlamaConfig:
    file = path / PARAMETERS
    settings = json_files.read_object(file)
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("moe"):
        raise UserError(f"{file}: a later model than Llama 3", _FAMILY)
    if settings.get("use_scaled_rope") not in (None, False, True):
        raise UserError(
            f"{file}: use_scaled_rope is {show_value(settings['use_scaled_rope'])}",
            "true or false was expected",
        )

    rows, columns = _find_size(path, shards[0], "tok_embeddings.weight")
    width, _ = _find_size(path, shards[0], "layers.0.feed_forward.w1.weight")
    known = {
        "n_kv_heads": settings.get("n_heads"),
        "max_seq_len": context,
        "norm_eps": LlamaConfig.rms_norm_eps,
        "rope_theta": LlamaConfig.rope_theta,
        **settings,
    }
    values = {field: known.get(name) for field, name in _NAMES.items()}
    values |= {"vocab_size": rows, "intermediate_size": width * len(shards)}
    if settings.get("use_scaled_rope"):
        values["rope_scaling"] = _SCALED

    config = build_config(file, values, _NAMES, settings)

    if columns * len(shards) != config.hidden_size:
        written, rest = divmod(config.hidden_size, columns or config.hidden_size + 1)
        fault = (
            f"{PARAMETERS} and {len(shards)} shards make it {config.hidden_size / len(shards):g}"
        )
        if written > 1 and not rest:
            fault = f"it is one of {written} shards, of which {len(shards)} are here"

        raise UserError(
            f"{path}/consolidated.00.pth: tok_embeddings.weight has {columns} columns: {fault}",
            "the directory must hold the files of one model, all of them",
        )
    if settings.get("vocab_size", -1) not in (-1, rows):
        raise UserError(
            f"{file}: vocab_size is {show_value(settings['vocab_size'])}, tok_embeddings.weight "
            f"has {rows} rows",
            _OTHER_MODEL,
        )

    _require_divisible(path, config, len(shards))
    return config


def _find_size(path: Path, shard: Mapping[str, StoredTensor], name: str) -> tuple[int, int]:
    if name not in shard or len(shard[name].shape) != 2:
        fault = "no matrix" if name in shard else "missing"
        raise UserError(f"{path}/consolidated.00.pth: tensor '{name}' is {fault}", _FAMILY)

    rows, columns = shard[name].shape
    return rows, columns


def _check_shards(
    config: LlamaConfig, files: Sequence[Path], shards: Sequence[Mapping[str, StoredTensor]]
) -> None:
    """UserError unless every file has its part of every tensor, in one type, and no other."""
    expected = {}
    for name, shape in shapes(config).items():
        theirs, axis = translate(name)
        expected[theirs] = _divide(shape, axis, len(files))

    for file, shard in zip(files, shards):
        actual = {
            name: stored.shape for name, stored in shard.items() if not name.endswith("rope.freqs")
        }
        hf_directory.check_shapes(file, expected, actual, f"{PARAMETERS} and {len(files)} shards")
        for name in expected:
            stored, first = shard[name], shards[0][name].dtype
            if stored.dtype != first or not stored.dtype.is_floating_point:
                raise UserError(
                    f"{stored.place} is {stored.dtype}, in {files[0].name} {first}",
                    "the same floating-point numbers are expected in every shard",
                )


def _divide(shape: tuple[int, ...], axis: int | None, shards: int) -> tuple[int, ...]:
    """Return the shape of one rank's part."""
    return tuple(size // shards if index == axis else size for index, size in enumerate(shape))


def _join(
    name: str,
    shape: tuple[int, ...],
    shards: Sequence[Mapping[str, StoredTensor]],
    config: LlamaConfig,
) -> StoredTensor:
    theirs, axis = translate(name)
    parts = [shard[theirs] for shard in shards]

    def read() -> Tensor:
        if axis is None:
            return _read_equal(parts)
        if len(parts) == 1:
            return parts[0].read()

        tensor = torch.empty(shape, dtype=parts[0].dtype)
        for target, part in zip(tensor.chunk(len(parts), axis), parts):
            target.copy_(part.read())

        return tensor

    joined = StoredTensor(shape, parts[0].dtype, read, parts[0].place)
    return split_rotary_pairs(name, joined, config)


def _read_equal(copies: Sequence[StoredTensor]) -> Tensor:
    """Read a tensor that every rank has whole; UserError if two differ."""
    first = copies[0].read()
    for copy in copies[1:]:
        if not torch.equal(copy.read(), first):
            raise UserError(f"{copy.place} differs from that of the first shard", _OTHER_MODEL)

    return first


# --- writing ---
def write(
    model: StoredModel, directory: Path, *, dtype: torch.dtype | None = None, shards: int = 1
) -> list[str]:
    """Write a language model as Meta's code loads it on `shards` model-parallel ranks.

    One tensor at a time is in memory, whatever the number of files. `dtype` converts the weights;
    without it each keeps its own. Return, in sentences for the user, the settings that Meta's code
    does not read. UserError for a reward model, a shape that does not divide into so many ranks,
    and a directory that holds something already.
    """
    config = model.config
    require_language_model(model, "Meta's format")
    _require_holdable(model)
    _require_divisible(model.path, config, shards)
    hf_directory.require_free(directory)

    names = list(shapes(config))
    if config.tie_word_embeddings:
        names.append(HEAD)

    stored = {name: model.tensors.get(name, model.tensors[EMBEDDINGS]) for name in names}
    layout = {}
    for name, tensor in stored.items():
        theirs, axis = translate(name)
        layout[theirs] = _divide(tensor.shape, axis, shards), dtype or tensor.dtype

    with hf_directory.replace_directory(directory) as work:
        with ExitStack() as stack:
            files = [work / f"consolidated.{rank:02}.pth" for rank in range(shards)]
            targets = [stack.enter_context(torch_zip.create(file, layout)) for file in files]
            for name, tensor in stored.items():
                _write_parts(name, tensor, dtype, config, targets)

        hf_directory.write_json(work / PARAMETERS, make_parameters(config))
        if model.tokenizer is not None:
            (work / MODEL).write_bytes(_pad_tokenizer(model.tokenizer, config.vocab_size))

    if config.rope_theta == LlamaConfig.rope_theta and config.rope_scaling is None:
        return []

    scaled = "" if config.rope_scaling is None else " and use_scaled_rope"
    reader = "Code Llama's" if config.rope_scaling is None else "Llama 3's"
    return [
        f"{PARAMETERS} has rope_theta {config.rope_theta:g}{scaled}, which {reader} code reads; "
        f"that of Llama 2 knows no such key and takes {LlamaConfig.rope_theta:g} for granted"
    ]


def _require_holdable(model: StoredModel) -> None:
    """UserError for a shape that Meta's code does not have."""
    if faults := list_variations(model.config, _SCALED):
        raise UserError(
            f"{model.path}: Meta's code does not have {', '.join(faults)}",
            "export the model in Hugging Face's format",
        )


def _pad_tokenizer(tokenizer: Path | StoredTokenizer, size: int) -> bytes:
    """Return a tokenizer with an item for each row of the embeddings.

    Meta's code makes as many rows as it has items.
    """
    content = sentencepiece_model.read_model(tokenizer)
    count = len(sentencepiece_model.parse(content, str(tokenizer)).items)
    return sentencepiece_model.pad(content, count, size)


def _write_parts(
    name: str,
    stored: StoredTensor,
    dtype: torch.dtype | None,
    config: LlamaConfig,
    targets: Sequence[Callable[[Tensor], None]],
) -> None:
    """Give each rank's file its part of a tensor."""
    tensor = join_rotary_pairs(name, stored.read().to(dtype or stored.dtype), config)
    _, axis = translate(name)
    parts = [tensor] * len(targets) if axis is None else tensor.chunk(len(targets), axis)
    for write_part, part in zip(targets, parts):
        write_part(part)


def _require_divisible(place: Path, config: LlamaConfig, shards: int) -> None:
    if shards < 1:
        raise UserError(f"shards is {shards}", "it must be at least 1")

    for name in _DIVIDED:
        size = getattr(config, name)
        if size % shards:
            raise UserError(
                f"{place}: {name} {size} does not divide into {shards} shards",
                "choose a number of shards that divides it",
            )


def make_parameters(config: LlamaConfig) -> dict[str, Any]:
    """Return params.json: the arguments of Meta's `ModelArgs`.

    They make Meta's code compute the width of our feed-forward network.
    """
    parameters: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        **_choose_width(config),
    }
    if config.num_key_value_heads != config.num_attention_heads:
        parameters["n_kv_heads"] = config.num_key_value_heads

    if config.rope_theta != LlamaConfig.rope_theta:
        parameters["rope_theta"] = config.rope_theta

    if config.rope_scaling is not None:
        parameters["use_scaled_rope"] = True

    return parameters


def compute_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Return the width of the feed-forward network that Meta's code computes.

    It is two thirds of four times the width of the model, times the multiplier, rounded up.
    """
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)

    return multiple_of * math.ceil(size / multiple_of)


def _choose_width(config: LlamaConfig) -> dict[str, Any]:
    """Return `multiple_of`, and `ffn_dim_multiplier` if needed, that give `intermediate_size`."""
    dim, wanted = config.hidden_size, config.intermediate_size
    divisors = [2**power for power in range(12, -1, -1) if wanted % 2**power == 0]
    # 256 in most of the published models
    for multiple in sorted(divisors, key=lambda multiple: abs(multiple - 256)):
        if compute_width(dim, multiple, None) == wanted:
            return {"multiple_of": multiple}

    multiple = divisors[0]
    # about the middle of the numbers that are rounded up to it
    exact = (wanted - (multiple - 1) / 2 + 0.25) / compute_width(dim, 1, None)
    for digits in range(1, 17):
        multiplier = round(exact, digits)
        if compute_width(dim, multiple, multiplier) == wanted:
            return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}

    return {"multiple_of": multiple, "ffn_dim_multiplier": exact}
