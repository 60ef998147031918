"""Shapes and exact parameter counts of the models of the paper."""

from __future__ import annotations

import pytest
import torch

from llama2.errors import UserError
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.sizes import SIZES, ffn_size

PAPER = {"7b": 6_738_415_616, "13b": 13_015_864_320, "34b": 33_743_970_304, "70b": 68_976_648_192}
SMALL = {
    "tiny": 1_066_112,
    "3m": 3_148_224,
    "15m": 15_191_712,
    "110m": 109_529_856,
    "1b": 1_100_048_384,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count_is_exact(name: str) -> None:
    config = SIZES[name]
    assert config.parameters() == (PAPER | SMALL)[name]
    with torch.device("meta"):
        model = Llama(config)

    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters()


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, 1.0, 11008),
        (5120, 256, 1.0, 13824),
        (8192, 256, 1.0, 22016),
        (8192, 4096, 1.3, 28672),
    ],
)
def test_feed_forward_width_is_the_papers(
    dim: int, multiple_of: int, multiplier: float, width: int
) -> None:
    assert ffn_size(dim, multiple_of, multiplier) == width


@pytest.mark.parametrize(
    ("name", "layers", "heads", "kv_heads"),
    [("7b", 32, 32, 32), ("13b", 40, 40, 40), ("34b", 48, 64, 8), ("70b", 80, 64, 8)],
)
def test_only_the_large_models_group_queries(
    name: str, layers: int, heads: int, kv_heads: int
) -> None:
    config = SIZES[name]
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert config.num_key_value_heads == kv_heads
    assert (config.head_dim, config.max_position_embeddings, config.vocab_size) == (
        128,
        4096,
        32000,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 60}, "hidden_size 60"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "hidden_size 36"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, int], named: str) -> None:
    values = {**SIZES["tiny"].__dict__, "head_dim": 0, "num_attention_heads": 8, **change}
    with pytest.raises(UserError, match=named):
        LlamaConfig(**values)
