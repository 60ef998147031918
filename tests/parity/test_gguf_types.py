"""Every quantized type of GGUF against the library's own numbers, in each precision that a load may
want."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from sources import SHAPE, model_of, source_of

from llama2.errors import UserError
from llama2.formats import gguf as ours
from llama2.formats import gguf_tensors
from llama2.formats.stored_model import StoredModel
from llama2.tokenizer import Tokenizer

CONFIG = replace(SHAPE, hidden_size=512, head_dim=64, intermediate_size=768, num_hidden_layers=1)
TYPES = sorted(
    kind.name for kind in gguf.quants._type_traits if kind.name not in gguf_tensors.PLAIN
)
NAMED = {
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def template(shared: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model in fp32."""
    place = tmp_path_factory.mktemp("types")
    source = source_of(model_of(CONFIG), place, shared / "tokenizer" / "tokenizer.model")
    ours.write(source, place / "model.gguf", precision="f32")
    return place / "model.gguf"


def write(template: Path, target: Path, name: str, scale: bytes = b"") -> dict[str, np.ndarray]:
    """Write a model whose matrices are random bytes of a type; return what the library makes of
    them."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    draw, numbers = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(target, "llama")
    reader = gguf.GGUFReader(template)

    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = field.contents()
            inside = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value), inside)

    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
            continue

        rows, width = tensor.data.shape
        data = draw.integers(0, 256, (rows, width // block, size), np.uint8)
        data[..., : len(scale)] = list(scale)
        data = data.reshape(rows, -1)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        with np.errstate(all="ignore"):
            numbers[tensor.name] = gguf.quants.dequantize(data, kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def same(theirs: np.ndarray, model: StoredModel, name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor has the library's numbers, rounded, bit for bit; an undefined number has
    many spellings, of which the processor chooses one."""
    stored = model.tensors[name]
    expected, actual = torch.from_numpy(theirs).to(dtype), stored.read()
    parts = torch.cat([part.read() for part in stored.list_parts()]).view(actual.shape)
    assert stored.dtype == actual.dtype == dtype
    return all(torch.equal(spell(tensor), spell(expected)) for tensor in (actual, parts))


def spell(numbers: torch.Tensor) -> torch.Tensor:
    """The bits of numbers, undefined ones in one spelling."""
    bits = torch.int32 if numbers.dtype == torch.float32 else torch.int16
    return numbers.masked_fill(numbers.isnan(), torch.nan).view(bits)


def test_all_types_that_are_promised_can_be_read() -> None:
    assert set(TYPES) >= NAMED


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TYPES)
def test_numbers_are_those_of_the_library(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    """Random bytes are any block, infinite and undefined scales among them. Chunks and parts are
    made small, so that a tensor has several of both."""
    monkeypatch.setattr(gguf_tensors, "_CHUNK", 3 * 512)
    monkeypatch.setattr(gguf_tensors, "_PART", 100 * 512)
    theirs = write(template, tmp_path / "m.gguf", name)
    model = ours.read(tmp_path / "m.gguf", DTYPES[precision])

    assert model.quantized == (name,)
    for other, mine in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        assert same(theirs[other], model, mine, DTYPES[precision])

    query, heads = theirs["blk.0.attn_q.weight"], CONFIG.num_attention_heads
    pairs = query.reshape(heads, -1, 2, query.shape[1]).swapaxes(1, 2).reshape(query.shape)
    assert same(pairs, model, "model.layers.0.self_attn.q_proj.weight", DTYPES[precision])
    assert model.tensors["model.norm.weight"].dtype == torch.float32


def test_fp16_takes_what_fits_and_refuses_what_does_not(template: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    small = write(template, tmp_path / "m.gguf", "Q8_0", bytes((0, 0x20)))  # 2^-7
    model = ours.read(tmp_path / "m.gguf", torch.float16)
    assert same(small["token_embd.weight"], model, name, torch.float16)

    write(template, tmp_path / "large.gguf", "Q8_0", bytes((0, 0x7A)))  # 49,152, up to 128 times
    model = ours.read(tmp_path / "large.gguf", torch.float16)
    with pytest.raises(UserError, match=r"token_embd\.weight: a number is too large for float16"):
        model.tensors[name].read()


def test_a_matrix_passes_in_small_pieces(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that never more of it is in fp32 than what the threads are at work on."""
    write(template, tmp_path / "m.gguf", "Q4_1")
    monkeypatch.setattr(gguf_tensors, "_CHUNK", 4 * 512)
    dequantize, sizes = gguf.quants.dequantize, []

    def watch(data: np.ndarray, kind: Any) -> np.ndarray:
        numbers: np.ndarray = dequantize(data, kind)
        sizes.append(numbers.size)
        return numbers

    monkeypatch.setattr(gguf.quants, "dequantize", watch)
    stored = ours.read(tmp_path / "m.gguf", torch.bfloat16).tensors["model.embed_tokens.weight"]
    sizes.clear()
    assert stored.read().dtype == torch.bfloat16
    assert max(sizes) == 4 * 512
    assert sum(sizes) == CONFIG.vocab_size * 512
