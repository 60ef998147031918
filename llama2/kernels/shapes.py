"""Shapes of models that the kernels take.

Everything of a shape that is a size goes: heads of any even size, any number of them for a key
head, any width. Rotary positions come as tables, however they are scaled. A projection with a bias
is left to PyTorch, and with it the decoding step, which computes a whole layer.
"""

from __future__ import annotations

from llama2.model.config import LlamaConfig


def takes_decoding(config: LlamaConfig) -> bool:
    """Tell whether a decoding step of a model of this shape is one of ours."""
    return not config.attention_bias


def describe(config: LlamaConfig) -> str:
    """Say what computes a model of this shape on a CPU that has a compiler."""
    if takes_decoding(config):
        return "C++ kernels"

    return "PyTorch in attention and decoding (biases), C++ kernels elsewhere"
