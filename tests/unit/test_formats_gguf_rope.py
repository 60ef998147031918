"""Llama 2's relatives in GGUF: what is written is read alike, and what llama.cpp does not have is
refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from relatives import HOLDABLE, PLAIN, QWEN, RELATIVES
from sources import exact, model_of, source_of

from llama2.errors import UserError
from llama2.formats import gguf, gguf_rope
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling, rotary_frequencies
from llama2.model.tensors import separate_pairs
from llama2.tokenizer import Tokenizer

FACTORS = "rope_freqs.weight"


@pytest.fixture(scope="module")
def pieces(shared: Path, tokenizer: Tokenizer) -> Path:
    assert tokenizer.vocab_size == 420
    return shared / "tokenizer" / "tokenizer.model"


def written(shape: LlamaConfig, directory: Path, pieces: Path) -> Path:
    source = source_of(model_of(shape), directory, pieces)
    gguf.write(source, directory / "m.gguf", precision="f32")
    return directory / "m.gguf"


def frequencies(shape: LlamaConfig, scaling: RopeScaling) -> torch.Tensor:
    return rotary_frequencies(shape.head_dim, shape.rope_theta, scaling, torch.device("cpu"))


@pytest.mark.parametrize("shape", HOLDABLE.values(), ids=HOLDABLE)
def test_nothing_is_lost(tmp_path: Path, pieces: Path, shape: LlamaConfig) -> None:
    file = written(shape, tmp_path, pieces)
    found = gguf.read(file)
    scaling, expected = found.config.rope_scaling, shape.rope_scaling
    if scaling is not None and expected is not None and scaling != expected:
        # a quotient that went through fp32; limits between which no more than one frequency lies
        assert scaling.amplitude == pytest.approx(expected.amplitude, rel=1e-6)
        assert torch.allclose(*(frequencies(shape, each) for each in (scaling, expected)))
        scaling = expected

    assert replace(found.config, rope_scaling=scaling) == shape
    assert exact(found, model_of(shape))

    factors = {tensor.name: tensor.data for tensor in library.GGUFReader(file).tensors}
    assert (FACTORS in factors) == (expected is not None and expected.rope_type == "llama3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dynamic", "rotary positions are scaled by 'dynamic', which llama.cpp does not read"),
        ("yarn, not truncated", "scaled by 'yarn' with beta_fast 32, .* truncate false, which"),
        ("yarn, other ramp", "scaled by 'yarn' with beta_fast 16, beta_slow 2, truncate true"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(
    tmp_path: Path, pieces: Path, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        written(replace(RELATIVES[name], vocab_size=420), tmp_path, pieces)

    assert not (tmp_path / "m.gguf").exists()


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def edited(file: Path, target: Path, edit: Edit, architecture: str = "llama") -> Path:
    """A file with other metadata and tensors."""
    reader = library.GGUFReader(file)
    fields = {
        key.replace("llama.", f"{architecture}.") if key.startswith("llama.") else key: (
            field.contents()
        )
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.architecture"
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    edit(fields, tensors)

    writer = library.GGUFWriter(target, architecture)
    for key, value in fields.items():
        kind = library.GGUFValueType
        items = kind.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(key, value, kind.get_type(value), items)

    for name, data in tensors.items():
        writer.add_tensor(name, data)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_file_of_qwen_2_is_read(tmp_path: Path, pieces: Path) -> None:
    """Its rotary pairs lie half a head apart, as ours do."""
    shape = replace(QWEN, vocab_size=420, rope_scaling=RopeScaling("yarn", 4.0, 128))
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}

    def separate(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for name, data in tensors.items():
            if (part := name.split(".")[-2]) in heads:
                tensors[name] = separate_pairs(torch.tensor(data), heads[part]).numpy()

    file = edited(written(shape, tmp_path, pieces), tmp_path / "q.gguf", separate, "qwen2")
    found = gguf.read(file)
    assert found.config == shape
    assert exact(found, model_of(shape))


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "yarn"}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            RopeScaling("yarn", 4.0, 512),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_ext_factor": 1.0,
            },
            RopeScaling("yarn", 4.0, 128, beta_fast=16.0),
        ),
    ],
)
def test_metadata_of_scaled_positions(
    tmp_path: Path, pieces: Path, change: dict[str, Any], scaling: RopeScaling | None
) -> None:
    shape = replace(PLAIN, vocab_size=420)
    named = {f"llama.{key}": value for key, value in change.items()}
    file = edited(
        written(shape, tmp_path, pieces),
        tmp_path / "changed.gguf",
        lambda fields, tensors: fields.update(named),
    )
    assert gguf.read(file).config == replace(shape, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.scaling.type": "longrope"}, r"scaling\.type is 'longrope', which is not known"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
            | {"rope.scaling.yarn_ext_factor": 0.5},
            r"yarn_ext_factor is 0\.5",
        ),
        ({"attention.key_length": 24}, r"rope\.dimension_count is 16, Llama 2 has 24"),
        (
            {"attention.key_length": 24, "rope.dimension_count": 24},
            r"attn_k\.weight \[32, 64\] instead of \[48, 64\]",
        ),
        ({"attention.value_length": 24}, r"attention\.value_length is 24, Llama 2 has 16"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, pieces: Path, change: dict[str, Any], message: str
) -> None:
    named = {f"llama.{key}": value for key, value in change.items()}
    file = edited(
        written(replace(PLAIN, vocab_size=420), tmp_path, pieces),
        tmp_path / "changed.gguf",
        lambda fields, tensors: fields.update(named),
    )
    with pytest.raises(UserError, match=message):
        gguf.read(file)


# --- factors of frequencies ---
LLAMA_3 = LlamaConfig(100, 128, 8, 1, 2, 2, 131072, rope_theta=5e5)


@pytest.mark.parametrize("told", [True, False], ids=["told", "guessed"])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 8192),
        RopeScaling("llama3", 32.0, 8192),
        RopeScaling("llama3", 2.5, 8192, 0.5, 8.0),
    ],
)
def test_factors_are_the_scaling_that_made_them(scaling: RopeScaling, told: bool) -> None:
    factors = gguf_rope.make_factors(replace(LLAMA_3, rope_scaling=scaling))
    assert factors is not None
    original = 8192 if told else None
    assert gguf_rope.recognise_factors("file", factors, LLAMA_3, original) == scaling


def test_equal_factors_are_linear_scaling() -> None:
    found = gguf_rope.recognise_factors("file", torch.full((32,), 4.0), LLAMA_3, None)
    assert found == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("limits", [(2.0, 3.0), (2.0, 2.5), (1.9, 2.1)])
def test_of_a_narrow_ramp_the_frequencies_are_found(limits: tuple[float, float]) -> None:
    scaling = RopeScaling("llama3", 4.0, 8192, *limits)
    factors = gguf_rope.make_factors(replace(LLAMA_3, rope_scaling=scaling))
    assert factors is not None
    found = gguf_rope.recognise_factors("file", factors, LLAMA_3, None)
    assert found is not None
    assert torch.allclose(frequencies(LLAMA_3, found), frequencies(LLAMA_3, scaling), rtol=2e-6)


def test_factors_of_another_context_are_the_same_positions() -> None:
    """Files of llama.cpp's converter do not say the context of pretraining: 8,192 with other limits
    makes the same frequencies."""
    scaling = RopeScaling("llama3", 8.0, 4096)
    factors = gguf_rope.make_factors(replace(LLAMA_3, rope_scaling=scaling))
    assert factors is not None
    found = gguf_rope.recognise_factors("file", factors, LLAMA_3, None)
    assert found == RopeScaling("llama3", 8.0, 8192, 2.0, 8.0)


@pytest.mark.parametrize(
    "factors",
    [
        torch.linspace(1, 8, 32),
        torch.full((32,), 0.25),
        torch.tensor([1.0] * 31 + [float("nan")]),
        torch.tensor([1.0] * 31 + [-8.0]),
        torch.tensor([0.5] * 32),
    ],
)
def test_other_factors_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"file scales rotary positions in a way that is not"):
        gguf_rope.recognise_factors("file", factors, LLAMA_3, None)
