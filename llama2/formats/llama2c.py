"""The files of llama2.c: `model.bin` for its programs run.c and runq.c, and `tokenizer.bin` beside
it.

Three versions, all little-endian, without names: what comes where follows from the seven numbers of
the header.

- 0, which run.c reads: the numbers, a negative vocabulary size if the output matrix is one of its
own; embeddings,
  then each kind of tensor of all layers, the last norm, rotary tables that nobody reads, the output
  matrix. All fp32.
- 1: a magic number, the version, the numbers, whether embeddings serve as output, zeros up to 256
bytes; norms first,
  then the embeddings and the matrices. All fp32.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from llama2 import json_files
from llama2.errors import UserError, explain_os_errors
from llama2.formats import llama2c_vocabulary
from llama2.formats.binary import FETCH_AGAIN, in_single, read_array, replacing
from llama2.formats.stored_model import StoredModel, StoredTensor
from llama2.model.llama import LlamaConfig, rotary_tables
from llama2.model.tensors import (
    EMBEDDINGS,
    HEAD,
    NORM,
    halved,
    interleaved,
    rotary_heads,
    shape_of,
    shapes,
)
from llama2.tokenizer import sentencepiece_model

MAGIC = 0x616B3432
_HEADER = 256  # bytes, of versions 1 and 2
_LARGEST_GROUP = 64
_THETA, _EPS = 10000.0, 1e-5
_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
_TABLES = "rotary tables"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")


@dataclass(frozen=True)
class _Header:
    version: int
    config: LlamaConfig
    group: int | None
    """numbers that share a scale, in version 2"""

    @property
    def size(self) -> int:
        return _HEADER if self.version else 4 * len(_NUMBERS)

    def bytes_of(self, name: str) -> int:
        """How many bytes a tensor takes."""
        if name == _TABLES:
            return self.config.max_position_embeddings * self.config.head_dim * 4

        shape = shape_of(name, self.config)
        count = math.prod(shape)
        return (
            count * 4 if self.group is None or len(shape) == 1 else count + count // self.group * 4
        )


def _order(header: _Header) -> Iterator[str]:
    """The names of the tensors as they follow one another."""

    def each(*kinds: str) -> Iterator[str]:
        return (
            f"model.layers.{layer}.{kind}.weight"
            for kind in kinds
            for layer in range(header.config.num_hidden_layers)
        )

    if header.version == 0:
        yield EMBEDDINGS
        yield from each("input_layernorm", *_ATTENTION, "post_attention_layernorm", *_FEED_FORWARD)
        yield from (NORM, _TABLES)
    else:
        yield from each("input_layernorm", "post_attention_layernorm")
        yield from (NORM, EMBEDDINGS)
        yield from each(*_ATTENTION, *_FEED_FORWARD)

    if not header.config.tie_word_embeddings:
        yield HEAD


# ---- writing
# --------------------------------------------------------------------------------------------------------
def write(source: StoredModel, file: Path, *, version: Literal[0, 2] = 0) -> list[str]:
    """Write a language model for run.c (version 0, fp32) or runq.c (version 2, int8), and
    `tokenizer.bin` beside it.

    One tensor at a time is in memory, and the same source gives the same bytes. Returns, in
    sentences for the user, what the files cannot say. UserError for a reward model, for constants
    that the format cannot hold, a vocabulary of another size than the model's, and another model's
    `tokenizer.bin` in the way.
    """
    if version not in (0, 2):
        raise UserError(
            f"version {version} of llama2.c's format is not written",
            "choose 0 (run.c) or 2 (runq.c)",
        )

    _check_writable(source)
    header = _Header(version, source.config, _group(source.config) if version else None)
    beside = file.parent / llama2c_vocabulary.FILE

    if file == beside:
        raise UserError(
            f"{file}: this name is the tokenizer's", "choose another name for the model"
        )

    vocabulary = _vocabulary(source)
    content = llama2c_vocabulary.pack(vocabulary.items)
    with explain_os_errors(beside):
        if beside.exists() and beside.read_bytes() != content:
            raise UserError(
                f"{beside}: the tokenizer of another model is there", "choose another directory"
            )

    with replacing(beside) as other, replacing(file) as stream:
        other.write(content)
        stream.write(_packed(header))
        for name in _order(header):
            if name == _TABLES:
                _write_tables(stream, source.config)
            else:
                _write_tensor(stream, header, name, source.tensors[name])

    return vocabulary.describe_losses("llama2.c")


def _check_writable(source: StoredModel) -> None:
    if source.scorer:
        raise UserError(
            f"{source.path}: this is a reward model, and llama2.c has no place for its head",
            "export a language model",
        )

    config = source.config
    if (in_single(config.rope_theta), in_single(config.rms_norm_eps)) != (_THETA, in_single(_EPS)):
        raise UserError(
            f"{source.path}: rope_theta is {config.rope_theta}, rms_norm_eps {config.rms_norm_eps}",
            f"llama2.c takes {_THETA} and {_EPS} for granted: export in another format",
        )
    if (config.bos_token_id, config.eos_token_id) != (1, 2):
        raise UserError(
            f"{source.path}: BOS and EOS are {config.bos_token_id} and {config.eos_token_id}",
            "llama2.c takes 1 and 2 for granted: export in another format",
        )


def _vocabulary(source: StoredModel) -> sentencepiece_model.Vocabulary:
    if source.tokenizer is None:
        raise UserError(
            f"{source.path}: there is no tokenizer, without which llama2.c cannot run a model",
            "put tokenizer.model beside the weights",
        )

    vocabulary = sentencepiece_model.load(source.tokenizer)
    if len(vocabulary.items) != source.config.vocab_size:
        raise UserError(
            f"{source.tokenizer}: the tokenizer has {len(vocabulary.items)} pieces, the model "
            f"{source.config.vocab_size}",
            "llama2.c wants as many of one as of the other",
        )

    return vocabulary


def _group(config: LlamaConfig) -> int:
    """The largest power of two up to 64 that divides the rows of every matrix."""
    group = _LARGEST_GROUP
    while config.hidden_size % group or config.intermediate_size % group:
        group //= 2

    return group


def _packed(header: _Header) -> bytes:
    config = header.config
    numbers = {name: getattr(config, name) for name in _NUMBERS}
    if header.version == 0:
        numbers["vocab_size"] *= 1 if config.tie_word_embeddings else -1
        return struct.pack("<7i", *numbers.values())

    packed = struct.pack(
        "<Ii7iBi",
        MAGIC,
        header.version,
        *numbers.values(),
        config.tie_word_embeddings,
        header.group or 0,
    )
    return packed.ljust(_HEADER, b"\0")


def _write_tensor(stream: IO[bytes], header: _Header, name: str, stored: StoredTensor) -> None:
    tensor = stored.read().float()
    if heads := rotary_heads(name, header.config):
        tensor = interleaved(tensor, heads)

    if header.group is None or tensor.dim() == 1:
        stream.write(_bytes(tensor))
        return

    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"{stored.place}: it has values that are not finite", "these weights are damaged"
        )

    groups_NG = tensor.reshape(-1, header.group)
    scales_N1 = groups_NG.abs().amax(1, keepdim=True) / 127
    integers_NG = (groups_NG / scales_N1.masked_fill(scales_N1 == 0, 1.0)).round_().to(torch.int8)
    stream.write(_bytes(integers_NG))
    stream.write(_bytes(scales_N1))


def _write_tables(stream: IO[bytes], config: LlamaConfig) -> None:
    """Cosines and sines, which early programs read and today's compute."""
    cos_1P1E, sin_1P1E = rotary_tables(
        torch.arange(config.max_position_embeddings)[None], config.head_dim, _THETA
    )
    half = config.head_dim // 2
    for table_1P1E in (cos_1P1E, sin_1P1E):  # the sine is negative in the first half
        stream.write(_bytes(table_1P1E[..., half:]))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


# ---- reading
# --------------------------------------------------------------------------------------------------------
def read(path: Path) -> StoredModel:
    """A model of llama2.c as a `StoredModel`, in fp32, with the tokenizer of a `tokenizer.bin` beside it
    if there is one.

    UserError for another file, another version, and a size that is not what the header asks for.
    """
    with explain_os_errors(path), json_files.opened(path) as file:
        head = file.read(_HEADER)
        size = file.seek(0, 2)

    header = _unpacked(path, head)
    places = _places(path, header, size)
    tensors = {
        name: _stored(path, header, name, places[name], shape)
        for name, shape in shapes(header.config).items()
    }
    beside = path.parent / llama2c_vocabulary.FILE
    tokenizer = None

    if beside.exists():
        tokenizer = llama2c_vocabulary.held(beside, header.config.vocab_size)

    return StoredModel(path, "llama2c", header.config, False, tensors, tokenizer)


def _unpacked(path: Path, head: bytes) -> _Header:
    other = UserError(
        f"{path}: not a model of llama2.c: the numbers at its beginning are no sizes of a model",
        "check the path",
    )
    if len(head) < 4 * len(_NUMBERS):
        raise UserError(
            f"{path}: truncated: {len(head)} bytes are less than the header takes", FETCH_AGAIN
        )

    version, group = 0, None
    numbers = list(struct.unpack_from("<7i", head))
    tied = numbers[5] > 0

    if struct.unpack_from("<I", head)[0] == MAGIC:
        if len(head) < _HEADER:
            raise UserError(
                f"{path}: truncated: {len(head)} bytes are less than the header takes", FETCH_AGAIN
            )

        _, version, *numbers, shared, size = struct.unpack_from("<Ii7iBi", head)
        if version not in (1, 2):
            raise UserError(
                f"{path}: version {version} of llama2.c's format", "versions 0, 1 and 2 can be read"
            )
        if shared > 1:
            raise other

        tied, group = bool(shared), size if version == 2 else None
    else:
        numbers[5] = abs(numbers[5])

    if min(numbers) < 1 or (group is not None and group < 1):
        raise other

    try:
        config = LlamaConfig(
            **dict(zip(_NUMBERS, numbers)),
            rms_norm_eps=_EPS,
            rope_theta=_THETA,
            tie_word_embeddings=tied,
        )
    except UserError as error:
        raise UserError(
            f"{path}: not a model of llama2.c, or a damaged one: {error.cause}", error.cure
        ) from None

    if group is not None and (config.hidden_size % group or config.intermediate_size % group):
        raise UserError(
            f"{path}: groups of {group} do not divide rows of {config.hidden_size} and "
            f"{config.intermediate_size}",
            FETCH_AGAIN,
        )

    return _Header(version, config, group)


def _places(path: Path, header: _Header, size: int) -> dict[str, int]:
    """Where each tensor begins. The file must be exactly as long as they take."""
    at = header.size
    places: dict[str, int] = {}
    for name in _order(header):
        places[name] = at
        at += header.bytes_of(name)
        if at > size:
            raise UserError(
                f"{path}: {name}: truncated: the file ends at byte {size}, the tensor at {at}",
                FETCH_AGAIN,
            )

    if at != size:
        raise UserError(
            f"{path}: {size} bytes, but its header describes a model of {at}",
            "it is no model of llama2.c, or a damaged one",
        )

    return places


def _stored(
    path: Path, header: _Header, name: str, offset: int, shape: tuple[int, ...]
) -> StoredTensor:
    place = f"{path}: {name}"
    heads, group = rotary_heads(name, header.config), header.group if len(shape) > 1 else None
    count = header.bytes_of(name)

    def load() -> Tensor:
        data = torch.from_numpy(read_array(path, place, "u1", offset, count))
        if group is None:
            tensor = data.view(torch.float32).view(shape)
        else:
            middle = count // (group + 4) * group
            integers_NG = data[:middle].view(torch.int8).view(-1, group).float()
            tensor = integers_NG.mul_(data[middle:].clone().view(torch.float32)[:, None]).view(
                shape
            )

        return halved(tensor, heads) if heads else tensor

    return StoredTensor(shape, torch.float32, load, place)
