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
    biased = set(_PARTS[:3]) if config.attention_bias else set()
    if config.attention_output_bias:
        biased.add(_PARTS[3])

    yield EMBEDDINGS
    for layer in range(config.num_hidden_layers):
        for part in _PARTS:
            yield f"model.layers.{layer}.{part}.weight"
            if part in biased:
                yield f"model.layers.{layer}.{part}.bias"

    yield NORM
    if not config.tie_word_embeddings:
        yield HEAD


def shape_of(name: str, config: LlamaConfig) -> tuple[int, ...]:
    """Return the shape of a tensor. Plain arithmetic: a damaged header may ask for sizes at which a
    model would overflow."""
    dim = config.hidden_size
    kind, leaf = name.split(".")[-2:]
    if kind.endswith("norm"):
        return (dim,)

    rows = {
        "q_proj": config.query_size,
        "k_proj": config.key_size,
        "v_proj": config.key_size,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "embed_tokens": config.vocab_size,
        "lm_head": config.vocab_size,
    }
    columns = {"o_proj": config.query_size, "down_proj": config.intermediate_size}
    size = rows.get(kind, dim)
    return (size,) if leaf == "bias" else (size, columns.get(kind, dim))


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """Count the heads in the rows of a tensor that makes queries or keys, which alone are rotated;
    None for any other."""
    kind = name.split(".")[-2]
    if kind == "q_proj":
        return config.num_attention_heads

    return config.num_key_value_heads if kind == "k_proj" else None


def interleave_pairs(weight: Tensor, heads: int) -> Tensor:
    """Make neighbours of the rows of a rotary pair (as Meta and llama.cpp have them), which lie
    half a head apart in our weights [R, D] and biases [R]."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def separate_pairs(weight: Tensor, heads: int) -> Tensor:
    """Undo `interleave_pairs`."""
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
