"""What readers and writers of binary files share: arrays at an offset, files that appear whole or not at all, the
order of dimensions inside heads, and the shapes a configuration asks for.

Shapes: R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from llama2 import durable
from llama2.errors import UserError, explain_os_errors
from llama2.model.llama import LlamaConfig

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
FETCH_AGAIN = "fetch the file again, or make it again"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a language model, in the order of its state dict."""
    return {name: shape_of(name, config) for name in _names(config)}


def _names(config: LlamaConfig) -> Iterator[str]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    yield EMBEDDINGS
    yield from (f"model.layers.{layer}.{kind}.weight" for layer in range(config.num_hidden_layers) for kind in kinds)
    yield NORM
    if not config.tie_word_embeddings:
        yield HEAD


def shape_of(name: str, config: LlamaConfig) -> tuple[int, ...]:
    """The shape of a tensor. Plain arithmetic: a damaged header may ask for sizes at which a model would overflow."""
    dim, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        return (dim,)
    rows = {"k_proj": kv, "v_proj": kv, "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size,
            "embed_tokens": config.vocab_size, "lm_head": config.vocab_size}
    return rows.get(kind, dim), config.intermediate_size if kind == "down_proj" else dim


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor divide into if it makes queries or keys, which alone are rotated."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def interleaved(weight_RD: Tensor, heads: int) -> Tensor:
    """Rows whose rotary pairs lie half a head apart (ours), put so that pairs are neighbours (Meta's, llama.cpp's)."""
    rows, columns = weight_RD.shape
    return weight_RD.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def halved(weight_RD: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    rows, columns = weight_RD.shape
    return weight_RD.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def in_single(number: float) -> float:
    """A number as fp32 holds it."""
    return float(np.float32(number))


def read_array(path: Path, place: str, dtype: str, offset: int, count: int) -> np.ndarray[Any, Any]:
    """`count` numbers from `offset` on. UserError if the file ends before, which it did not when it was opened."""
    with explain_os_errors(path):
        found = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if found.size != count:
        raise UserError(f"{place}: the file became shorter while it was read", FETCH_AGAIN)
    return found


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `file` when the block ends, and vanishes if it ends with an error."""
    temporary = file.with_name(f".{file.name}.tmp")
    with explain_os_errors(file):
        try:
            durable.make(file.parent)
            with open(temporary, "wb") as stream:
                yield stream
            durable.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
