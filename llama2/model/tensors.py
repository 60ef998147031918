"""Names and shapes of a language model's tensors, and the two orders of rows inside rotary heads.

Shapes: R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from llama2.model.llama import LlamaConfig

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a language model, in the order of its state dict."""
    return {name: shape_of(name, config) for name in _names(config)}


def _names(config: LlamaConfig) -> Iterator[str]:
    kinds = (
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
    yield EMBEDDINGS
    yield from (
        f"model.layers.{layer}.{kind}.weight"
        for layer in range(config.num_hidden_layers)
        for kind in kinds
    )
    yield NORM

    if not config.tie_word_embeddings:
        yield HEAD


def shape_of(name: str, config: LlamaConfig) -> tuple[int, ...]:
    """The shape of a tensor. Plain arithmetic: a damaged header may ask for sizes at which a model
    would overflow."""
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
    return rows.get(kind, dim), config.intermediate_size if kind == "down_proj" else dim


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """How many heads the rows of a tensor divide into if it makes queries or keys, which alone are
    rotated."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads

    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def interleaved(weight_RD: Tensor, heads: int) -> Tensor:
    """Rows whose rotary pairs lie half a head apart (ours), put so that pairs are neighbours
    (Meta's, llama.cpp's)."""
    rows, columns = weight_RD.shape
    return (
        weight_RD.reshape(heads, 2, rows // heads // 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
    )


def halved(weight_RD: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    rows, columns = weight_RD.shape
    return (
        weight_RD.reshape(heads, rows // heads // 2, 2, columns)
        .transpose(1, 2)
        .reshape(rows, columns)
    )
