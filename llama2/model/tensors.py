"""Names and shapes of a language model's tensors, and the two orders of rows inside rotary heads.

Shapes: R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from llama2.model.llama import LlamaConfig

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a language model, in the order of its state
    dict."""
    return {name: shape_of(name, config) for name in _names(config)}


def _names(config: LlamaConfig) -> Iterator[str]:
    yield EMBEDDINGS
    for layer in range(config.num_hidden_layers):
        for part in _PARTS:
            yield f"model.layers.{layer}.{part}.weight"

    yield NORM
    if not config.tie_word_embeddings:
        yield HEAD


def shape_of(name: str, config: LlamaConfig) -> tuple[int, ...]:
    """Return the shape of a tensor. Plain arithmetic: a damaged header may ask for sizes at which a
    model would overflow."""
    dim, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    kind = name.split(".")[-2]
    if kind.endswith("norm"):
        return (dim,)

    rows = {
        "k_proj": kv,
        "v_proj": kv,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "embed_tokens": config.vocab_size,
        "lm_head": config.vocab_size,
    }
    columns = {"down_proj": config.intermediate_size}
    return rows.get(kind, dim), columns.get(kind, dim)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """Count the heads in the rows of a tensor that makes queries or keys, which alone are rotated;
    None for any other."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads

    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def interleave_pairs(weight_RD: Tensor, heads: int) -> Tensor:
    """Make neighbours of the rows of a rotary pair (as Meta and llama.cpp have them), which lie
    half a head apart in our weights."""
    rows, columns = weight_RD.shape
    halves = weight_RD.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def separate_pairs(weight_RD: Tensor, heads: int) -> Tensor:
    """Undo `interleave_pairs`."""
    rows, columns = weight_RD.shape
    pairs = weight_RD.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
