"""GGUF files against transformers' own reader of them: it must arrive at the model that was
written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sources import RATIOS, SHAPE, model_of, source_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama2.formats import gguf
from llama2.tokenizer import CHAT_TEMPLATE, Tokenizer


def theirs(file: Path) -> nn.Module:
    """What `AutoModelForCausalLM.from_pretrained(gguf_file=...)` makes of a file, without the
    package it needs to move weights."""
    values = load_gguf_checkpoint(file)["config"]
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]

    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_logits_equal_transformers(
    tmp_path: Path, shared: Path, tokenizer: Tokenizer, kv_heads: int, tied: bool
) -> None:
    model = model_of(
        replace(SHAPE, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=20000.0)
    )
    source = source_of(model, tmp_path, shared / "tokenizer" / "tokenizer.model")
    gguf.write(source, tmp_path / "model.gguf", precision="f32", chat_template=CHAT_TEMPLATE)
    tokens_BT = torch.randint(3, 420, (1, 500), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        ours_BTV, theirs_BTV = model(tokens_BT), theirs(tmp_path / "model.gguf")(tokens_BT).logits

    assert ours_BTV.std() > 0.5
    assert (ours_BTV - theirs_BTV).abs().max() < 1e-4


def test_quantized_logits_equal_transformers(
    tmp_path: Path, shared: Path, tokenizer: Tokenizer
) -> None:
    """Both read the same integers and scales, so what is left is the order of sums."""
    source = source_of(model_of(SHAPE), tmp_path, shared / "tokenizer" / "tokenizer.model")
    gguf.write(source, tmp_path / "model.gguf", precision="q4_0")
    found = gguf.read(tmp_path / "model.gguf")
    model = model_of(SHAPE)
    model.load_state_dict({name: stored.read() for name, stored in found.tensors.items()})
    tokens_BT = torch.randint(3, 420, (1, 100), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        assert (
            model(tokens_BT) - theirs(tmp_path / "model.gguf")(tokens_BT).logits
        ).abs().max() < 1e-4
