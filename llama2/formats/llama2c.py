"""Read and write llama2.c's `model.bin`, for its programs run.c and runq.c.

Three versions, all little-endian, without names: the seven numbers of the header give the order and
the sizes of the tensors.

- 0, which run.c reads: the numbers, a negative vocabulary size if the output matrix is one of its
  own; embeddings, then each kind of tensor of all layers, the last norm, rotary tables that no
  program reads, the output matrix. All fp32.
- 1: a magic number, the version, the numbers, whether embeddings serve as output, zeros up to 256
  bytes; norms first, then the embeddings and the matrices. All fp32.
- 2, which runq.c reads: as 1, with the size of a group; matrices are int8 numbers followed by one
  fp32 scale a group.

Queries and keys are in Meta's order, where rotary pairs are neighbours. The file has no place for
the constants that the programs take for granted: rotary base 10000 and epsilon 1e-5. Shapes: N
groups, G numbers of a group, P positions, E half a head.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats import llama2c_vocabulary
from llama2.formats.binary import FETCH_AGAIN, read_array, replace_file, round_to_single
from llama2.formats.settings import build_config
from llama2.formats.stored_model import (
    StoredModel,
    StoredTensor,
    join_rotary_pairs,
    list_variations,
    require_language_model,
    require_vocabulary,
    split_rotary_pairs,
)
from llama2.model.config import LlamaConfig
from llama2.model.positions import rotary_tables
from llama2.model.tensors import EMBEDDINGS, HEAD, NORM, shape_of, shapes
from llama2.tokenizer.sentencepiece_model import Vocabulary, require_fitting_size

FORMAT = "llama2c"
_MAGIC = b"24ka"
_LEGACY, _VERSIONED = struct.Struct("<7i"), struct.Struct("<4si7iBi")
_HEADER = 256  # bytes, of versions 1 and 2
_LARGEST_GROUP = 64
_THETA, _EPS = 10000.0, 1e-5
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_VOCABULARY = _FIELDS.index("vocab_size")
_TABLES = "rotary tables"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")


@dataclass(frozen=True)
class _Header:
    """The head of a file; in version 2, `group` numbers share a scale."""

    version: int
    config: LlamaConfig
    group: int | None

    def group_of(self, shape: tuple[int, ...]) -> int | None:
        """Return the numbers of a tensor that share a scale; None for one in fp32."""
        return self.group if len(shape) > 1 else None

    def count_bytes(self, name: str) -> int:
        """Return the size of a tensor in bytes."""
        if name == _TABLES:
            return self.config.max_position_embeddings * self.config.head_dim * 4

        shape = shape_of(name, self.config)
        count, group = math.prod(shape), self.group_of(shape)
        return count * 4 if group is None else count + count // group * 4


def _list_names(header: _Header) -> Iterator[str]:
    """Yield the names of the tensors in the order of the file."""

    def each_layer(*kinds: str) -> Iterator[str]:
        for kind in kinds:
            for layer in range(header.config.num_hidden_layers):
                yield f"model.layers.{layer}.{kind}.weight"

    norms = ("input_layernorm", "post_attention_layernorm")
    if header.version == 0:
        yield EMBEDDINGS
        yield from each_layer(norms[0], *_ATTENTION, norms[1], *_FEED_FORWARD)
        yield from (NORM, _TABLES)
    else:
        yield from each_layer(*norms)
        yield from (NORM, EMBEDDINGS)
        yield from each_layer(*_ATTENTION, *_FEED_FORWARD)

    if not header.config.tie_word_embeddings:
        yield HEAD


# --- writing ---
def write(model: StoredModel, file: Path, *, version: Literal[0, 2] = 0) -> list[str]:
    """Write a language model for run.c (version 0, fp32) or runq.c (version 2, int8).

    `tokenizer.bin` is written beside it. One tensor at a time is in memory, and the same model
    gives the same bytes. Return, in sentences for the user, the differences from the model.
    UserError for a reward model, for constants that the format cannot hold, a vocabulary of another
    size than the model's, and another model's `tokenizer.bin` in the way.
    """
    if version not in (0, 2):
        raise UserError(
            f"version {version} of llama2.c's format is not written",
            "choose 0 (run.c) or 2 (runq.c)",
        )

    vocabulary = _check_writable(model)
    # the largest power of two up to 64 that divides the rows of every matrix
    group = math.gcd(_LARGEST_GROUP, model.config.hidden_size, model.config.intermediate_size)
    header = _Header(version, model.config, group if version else None)
    beside = file.parent / llama2c_vocabulary.FILE
    if file == beside:
        raise UserError(
            f"{file}: this name is the tokenizer's", "choose another name for the model"
        )

    content = llama2c_vocabulary.pack(vocabulary.items)
    with explain_os_errors(beside):
        if beside.exists() and beside.read_bytes() != content:
            raise UserError(
                f"{beside}: the tokenizer of another model is there", "choose another directory"
            )

    with replace_file(beside) as other, replace_file(file) as stream:
        other.write(content)
        stream.write(_pack_header(header))
        for name in _list_names(header):
            if name == _TABLES:
                _write_tables(stream, model.config)
            else:
                _write_tensor(stream, header, name, model.tensors[name])

    return vocabulary.describe_losses("llama2.c")


def _check_writable(model: StoredModel) -> Vocabulary:
    """Return the vocabulary of a model that the format has a place for; UserError for others."""
    require_language_model(model, "llama2.c")
    vocabulary = require_vocabulary(model, "without which llama2.c cannot run a model")
    if variations := list_variations(model.config):
        raise UserError(
            f"{model.path}: llama2.c does not have {', '.join(variations)}",
            "export the model in another format",
        )

    config, cure = model.config, "for granted: export in another format"
    constants = [round_to_single(value) for value in (config.rope_theta, config.rms_norm_eps)]
    if constants != [_THETA, round_to_single(_EPS)]:
        raise UserError(
            f"{model.path}: rope_theta is {config.rope_theta}, rms_norm_eps {config.rms_norm_eps}",
            f"llama2.c takes {_THETA} and {_EPS} {cure}",
        )
    if (config.bos_token_id, config.eos_token_id) != (1, 2):
        raise UserError(
            f"{model.path}: BOS and EOS are {config.bos_token_id} and {config.eos_token_id}",
            f"llama2.c takes 1 and 2 {cure}",
        )

    require_fitting_size(
        model.tokenizer,
        len(vocabulary.items),
        config.vocab_size,
        "llama2.c wants as many of one as of the other",
    )
    return vocabulary


def _pack_header(header: _Header) -> bytes:
    config = header.config
    numbers = [getattr(config, name) for name in _FIELDS]
    if header.version == 0:
        numbers[_VOCABULARY] *= 1 if config.tie_word_embeddings else -1
        return _LEGACY.pack(*numbers)

    tied, group = config.tie_word_embeddings, header.group or 0
    return _VERSIONED.pack(_MAGIC, header.version, *numbers, tied, group).ljust(_HEADER, b"\0")


def _write_tensor(stream: IO[bytes], header: _Header, name: str, stored: StoredTensor) -> None:
    tensor = join_rotary_pairs(name, stored.read().float(), header.config)
    group = header.group_of(stored.shape)
    if group is None:
        stream.write(_to_bytes(tensor))
        return

    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"{stored.place}: it has values that are not finite", "these weights are damaged"
        )

    groups_NG = tensor.reshape(-1, group)
    scales_N1 = groups_NG.abs().amax(1, keepdim=True) / 127
    integers_NG = (groups_NG / scales_N1.masked_fill(scales_N1 == 0, 1.0)).round_().to(torch.int8)
    stream.write(_to_bytes(integers_NG))
    stream.write(_to_bytes(scales_N1))


def _write_tables(stream: IO[bytes], config: LlamaConfig) -> None:
    """Write cosines and sines, which early programs read and today's compute."""
    positions_1P = torch.arange(config.max_position_embeddings)[None]
    half = config.head_dim // 2
    # the sine is negative in the first half
    for table_1P1E in rotary_tables(positions_1P, config.head_dim, _THETA):
        stream.write(_to_bytes(table_1P1E[..., half:]))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


# --- reading ---
def read(path: Path) -> StoredModel:
    """Open a model of llama2.c, in fp32, with the `tokenizer.bin` beside it if there is one.

    UserError for another file, another version, and a size that is not what the header asks for.
    """
    with explain_os_errors(path), json_files.open_file(path) as file:
        head = file.read(_HEADER)
        size = file.seek(0, 2)

    header = _parse_header(path, head)
    config, offsets = header.config, _find_offsets(path, header, size)
    tensors = {
        name: split_rotary_pairs(name, _open_tensor(path, header, name, offsets[name]), config)
        for name in shapes(config)
    }
    tokenizer = None
    beside = path.parent / llama2c_vocabulary.FILE
    if beside.exists():
        tokenizer = llama2c_vocabulary.open_tokenizer(beside, config.vocab_size)

    return StoredModel(path, FORMAT, config, False, tensors, tokenizer)


def is_model(path: Path, head: bytes) -> bool:
    """Return whether the first bytes of a file may be those of a model, of any version.

    Version 0 has no mark of its own: its seven numbers must be the sizes of a model.
    """
    if head.startswith(_MAGIC):
        return True

    with suppress(UserError):
        return bool(_parse_header(path, head))

    return False


def _parse_header(path: Path, head: bytes) -> _Header:
    versioned = head.startswith(_MAGIC)
    if len(head) < (_HEADER if versioned else _LEGACY.size):
        raise UserError(
            f"{path}: truncated: {len(head)} bytes are less than the header takes", FETCH_AGAIN
        )

    if versioned:
        _, version, *numbers, tied, group = _VERSIONED.unpack_from(head)
    else:
        numbers = list(_LEGACY.unpack_from(head))
        version, tied, group = 0, numbers[_VOCABULARY] > 0, 0
        numbers[_VOCABULARY] = abs(numbers[_VOCABULARY])

    if versioned and version not in (1, 2):
        raise UserError(
            f"{path}: version {version} of llama2.c's format", "versions 0, 1 and 2 can be read"
        )
    if min(numbers) < 1 or tied > 1 or (version == 2 and group < 1):
        raise UserError(
            f"{path}: not a model of llama2.c: the numbers at its beginning are no sizes of a "
            "model",
            "check the path",
        )

    values = dict(zip(_FIELDS, numbers)) | {"rms_norm_eps": _EPS, "rope_theta": _THETA}
    values["tie_word_embeddings"] = bool(tied)
    config = build_config(f"{path}: not a model of llama2.c, or a damaged one", values)
    if version != 2:
        return _Header(version, config, None)

    if config.hidden_size % group or config.intermediate_size % group:
        raise UserError(
            f"{path}: groups of {group} do not divide rows of {config.hidden_size} and "
            f"{config.intermediate_size}",
            FETCH_AGAIN,
        )

    return _Header(version, config, group)


def _find_offsets(path: Path, header: _Header, size: int) -> dict[str, int]:
    """Return the offset of each tensor. UserError unless the file is as long as they take."""
    end = _HEADER if header.version else _LEGACY.size
    offsets: dict[str, int] = {}
    for name in _list_names(header):
        offsets[name] = end
        end += header.count_bytes(name)
        if end > size:
            raise UserError(
                f"{path}: {name}: truncated: the file ends at byte {size}, the tensor at {end}",
                FETCH_AGAIN,
            )

    if end != size:
        raise UserError(
            f"{path}: {size} bytes, but its header describes a model of {end}",
            "it is no model of llama2.c, or a damaged one",
        )

    return offsets


def _open_tensor(path: Path, header: _Header, name: str, offset: int) -> StoredTensor:
    place, shape = f"{path}: {name}", shape_of(name, header.config)
    group, size = header.group_of(shape), header.count_bytes(name)

    def read() -> Tensor:
        data = torch.from_numpy(read_array(path, place, "u1", offset, size))
        if group is None:
            return data.view(torch.float32).view(shape)

        end = math.prod(shape)
        integers_NG = data[:end].view(torch.int8).view(-1, group).float()
        scales_N1 = data[end:].clone().view(torch.float32)[:, None]
        return integers_NG.mul_(scales_N1).view(shape)

    return StoredTensor(shape, torch.float32, read, place)
