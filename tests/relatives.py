"""Shapes of Llama 2's relatives, each of which varies something, and models of them in transformers."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers
from torch import nn

from llama2.formats.hf_config import make_config_json
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling

PLAIN = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
# of a context of 64, so that most of the positions lie beyond it
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "dynamic": RopeScaling("dynamic", 8.0, 64),
    "llama3": RopeScaling("llama3", 8.0, 64),
    "llama3, other limits": RopeScaling("llama3", 5.0, 64, 0.5, 3.0),
    "yarn": RopeScaling("yarn", 8.0, 64),
    "yarn, attention factor": RopeScaling("yarn", 8.0, 64, attention_factor=1.4),
    "yarn, other ramp": RopeScaling("yarn", 2.5, 200, beta_fast=16.0, beta_slow=2.0),
    "yarn, not truncated": RopeScaling("yarn", 8.0, 64, truncate=False),
}
QWEN = replace(PLAIN, attention_bias=True)
RELATIVES = {
    **{name: replace(PLAIN, rope_scaling=scaling) for name, scaling in SCALINGS.items()},
    "wide heads": replace(PLAIN, head_dim=24),
    "narrow heads": replace(PLAIN, head_dim=10),
    "bias": QWEN,
    "bias everywhere": replace(QWEN, attention_output_bias=True),
    "mixed": replace(
        QWEN, head_dim=24, rope_scaling=SCALINGS["yarn"], tie_word_embeddings=True, rope_theta=5e5
    ),
    "mixed, llama3": replace(
        QWEN,
        head_dim=8,
        attention_output_bias=True,
        rope_scaling=SCALINGS["llama3"],
        tie_word_embeddings=True,
    ),
}


UNHOLDABLE = ("dynamic", "yarn, other ramp", "yarn, not truncated")
HOLDABLE = {
    name: replace(shape, vocab_size=420)
    for name, shape in RELATIVES.items()
    if name not in UNHOLDABLE
}
"""those that llama.cpp has, with the vocabulary of the tests' tokenizer"""


def theirs(shape: LlamaConfig, **extra: object) -> nn.Module:
    """Return transformers' model of a shape. The weights are wide, so that attention is far from
    uniform and logits are of order one; norms are not one and biases not zero."""
    values = make_config_json(shape) | {"initializer_range": 0.1} | extra
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) / 2)

    return model
