"""The models of the paper (table 1) and smaller ones of the same family, by name.

34b was never released: its shape is that of Code Llama 34B. The small sizes are for laptops and
tests: `3m` and `15m` train in minutes on two cores, `110m` in hours, `1b` fits one GPU.
"""

from __future__ import annotations

from llama2.model.llama import LlamaConfig


def ffn_size(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """The width of SwiGLU's three matrices: 2/3 of 4 · dim (as many weights as two matrices of 4 ·
    dim), times `multiplier`, rounded up to `multiple_of`. Grouped-query models widen it to keep
    their size (§A.2.1)."""
    width = int(multiplier * int(2 * 4 * dim / 3))
    return -(-width // multiple_of) * multiple_of


def _size(
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 32000,
    multiple_of: int = 256,
    multiplier: float = 1.0,
    context: int = 4096,
    tied: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=ffn_size(dim, multiple_of, multiplier),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )


SIZES: dict[str, LlamaConfig] = {
    "tiny": _size(128, 4, 4, 4, vocab=1024, multiple_of=32, context=1024),
    "3m": _size(192, 6, 6, 2, vocab=2048, multiple_of=32, context=1024),
    "15m": _size(288, 6, 6, 6, multiple_of=32, context=1024, tied=True),
    "110m": _size(768, 12, 12, 12, multiple_of=32, context=1024, tied=True),
    "1b": _size(2048, 22, 32, 4),
    "7b": _size(4096, 32, 32, 32),
    "13b": _size(5120, 40, 40, 40),
    "34b": _size(8192, 48, 64, 8),
    "70b": _size(8192, 80, 64, 8, multiple_of=4096, multiplier=1.3),
}
