"""GGUF: what is written is what the library reads, what is read is what was written, and damage is
named."""

from __future__ import annotations

import random
import re
import struct
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from commands import llama2
from sources import RATIOS, SHAPE, STRINGS, exact, model_of, same, source_of, state
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import gguf as ours
from llama2.formats import gguf_metadata
from llama2.formats.stored_model import StoredModel
from llama2.tokenizer import CHAT_TEMPLATE, Tokenizer


@pytest.fixture(scope="module")
def pieces(shared: Path, tokenizer: Tokenizer) -> Path:
    assert tokenizer.vocab_size == SHAPE.vocab_size
    return shared / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def source(pieces: Path) -> StoredModel:
    return source_of(model_of(SHAPE), Path("model"), pieces)


@pytest.fixture
def file(source: StoredModel, tmp_path: Path) -> Path:
    ours.write(source, tmp_path / "model.gguf", precision="q8_0", chat_template=CHAT_TEMPLATE)
    return tmp_path / "model.gguf"


# --- round trips ---
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", RATIOS)
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("f32", torch.float32),
        ("bf16", torch.bfloat16),
        ("f16", torch.float16),
        ("f32", torch.bfloat16),
    ],
)
def test_nothing_is_lost(
    tmp_path: Path,
    pieces: Path,
    kv_heads: int,
    tied: bool,
    precision: gguf_metadata.Precision,
    dtype: torch.dtype,
) -> None:
    config = replace(
        SHAPE,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
    )
    model = model_of(config, dtype)
    assert (
        ours.write(source_of(model, tmp_path, pieces), tmp_path / "m.gguf", precision=precision)
        == []
    )
    found = ours.read(tmp_path / "m.gguf")
    assert found.config == config
    assert (found.format, found.scorer, found.path) == ("gguf", False, tmp_path / "m.gguf")
    assert exact(found, model)
    assert found.tensors["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_quantized_weights_err_by_less_than_their_steps(
    tmp_path: Path, source: StoredModel, precision: Any
) -> None:
    """A step of Q8_0 is a 127th of the block's largest number and what is lost is half of it; Q4_0
    has sixteen steps of an 8th, and at the end without a step of its own a whole one is lost.
    Scales are rounded to fp16 (2^-11)."""
    ours.write(source, tmp_path / "m.gguf", precision=precision)
    found = ours.read(tmp_path / "m.gguf")
    for name, stored in found.tensors.items():
        assert stored.dtype == torch.float32
        before, after = source.tensors[name].read(), stored.read()
        if before.dim() == 1:
            assert torch.equal(before, after)
            continue

        coarse = precision == "q4_0" and name != "lm_head.weight"
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert before.shape == after.shape  # rows change places, blocks lie inside rows

        largest = before.view(-1, 32).abs().amax(1, keepdim=True)
        error = (before - after).view(-1, 32).abs()
        bound = largest / 8 * (1 + 8 / 2048) if coarse else largest / 127 * (0.5 + 127 / 2048)
        assert (error <= bound * 1.0001).all(), name
        assert error.max() > 0


def test_a_quantized_file_is_quantized_no_further(tmp_path: Path, source: StoredModel) -> None:
    ours.write(source, tmp_path / "m.gguf", precision="q8_0")
    again = ours.read(tmp_path / "m.gguf")
    ours.write(again, tmp_path / "again.gguf", precision="f32")
    final = ours.read(tmp_path / "again.gguf")
    assert all(
        torch.equal(again.tensors[name].read(), final.tensors[name].read())
        for name in again.tensors
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_types_follow_llama_cpp(tmp_path: Path, pieces: Path, tied: bool) -> None:
    model = model_of(replace(SHAPE, tie_word_embeddings=tied, intermediate_size=80))
    source = source_of(model, tmp_path, pieces)
    notes = ours.write(source, tmp_path / "m.gguf", precision="q4_0")
    assert notes == ["down_proj: stored as f16, because their rows do not divide into blocks of 32"]
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    assert types["blk.1.ffn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["token_embd.weight"] == ("Q8_0" if tied else "Q4_0")
    assert types.get("output.weight") == (None if tied else "Q8_0")
    assert len(types) == 2 + 9 * 2 + (not tied)


@pytest.mark.parametrize("precision", ["f32", "q8_0"])
def test_tensors_in_the_file_are_in_llama_cpps_order(
    tmp_path: Path, source: StoredModel, precision: Any
) -> None:
    """Rows 2 i and 2 i + 1 of a head are a rotary pair there, i and i + 4 here; read by the library
    alone."""
    ours.write(source, tmp_path / "m.gguf", precision=precision)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for theirs, name, heads in (
        ("blk.1.attn_k", "model.layers.1.self_attn.k_proj", 2),
        ("blk.0.attn_q", "model.layers.0.self_attn.q_proj", 8),
    ):
        tensor = tensors[f"{theirs}.weight"]
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = source.tensors[f"{name}.weight"].read().numpy()

        for head in range(heads):
            for pair in range(4):
                for half in range(2):
                    there, here = (
                        rows[head * 8 + 2 * pair + half],
                        weight[head * 8 + pair + 4 * half],
                    )
                    assert np.abs(there - here).max() < 0.005

    assert np.array_equal(
        tensors["blk.0.attn_norm.weight"].data,
        source.tensors["model.layers.0.input_layernorm.weight"].read().numpy(),
    )


def test_metadata(file: Path, source: StoredModel, pieces: Path) -> None:
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 420,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: fields.get(key) for key in expected} == expected
    processor = sentencepiece.SentencePieceProcessor(model_proto=Tokenizer.load(pieces).model)
    assert fields["tokenizer.ggml.tokens"] == [processor.id_to_piece(token) for token in range(420)]
    assert fields["tokenizer.ggml.scores"] == [processor.get_score(token) for token in range(420)]
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 3, *[6] * 256, *[1] * 161]
    assert "general.name" not in fields


# --- tokenizer ---
@pytest.mark.parametrize("text", STRINGS)
def test_the_tokenizer_inside_encodes_as_the_original(
    file: Path, tokenizer: Tokenizer, text: str
) -> None:
    inside = ours.read(file).tokenizer
    assert inside is not None
    again = Tokenizer.load(inside)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_larger_vocabulary_is_filled_up(
    tmp_path: Path, pieces: Path, tokenizer: Tokenizer
) -> None:
    ours.write(
        source_of(model_of(replace(SHAPE, vocab_size=432)), tmp_path, pieces), tmp_path / "m.gguf"
    )
    found = ours.read(tmp_path / "m.gguf")
    assert found.config.vocab_size == 432
    assert found.tokenizer is not None
    again = Tokenizer.load(found.tokenizer)
    assert again.vocab_size == 432
    assert all(again.encode(text) == tokenizer.encode(text) for text in [*STRINGS, "[PAD421]"])

    with pytest.raises(UserError, match="420 pieces, the model 400"):
        ours.write(
            source_of(model_of(replace(SHAPE, vocab_size=400)), tmp_path, pieces),
            tmp_path / "n.gguf",
        )


def test_a_tokenizer_that_changes_text(tmp_path: Path, pieces: Path) -> None:
    """Extra spaces are dropped by the tokenizer read back as well; what llama.cpp does not do is
    told."""
    text = (
        "\n".join("a river runs past the mill " + word for word in ("twice", "once", "again")) * 20
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_prefix=str(tmp_path / "nfkc"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    source = source_of(model_of(SHAPE), tmp_path, tmp_path / "nfkc.model")
    notes = ours.write(source, tmp_path / "m.gguf")
    assert [note.split(",")[0] for note in notes] == [
        "the tokenizer replaces characters before it looks them up",
        "the tokenizer drops spaces at the ends of a text and all but one inside",
    ]
    files = (tmp_path / "nfkc.model", ours.read(tmp_path / "m.gguf").tokenizer)
    before, after = (Tokenizer.load(place) for place in files if place is not None)

    for spaced in ("  the  mill ", "a river", " "):
        assert before.encode(spaced) == after.encode(spaced)


def test_a_damaged_tokenizer_is_named(tmp_path: Path, source: StoredModel, pieces: Path) -> None:
    whole, damaged = pieces.read_bytes(), tmp_path / "tokenizer.model"
    for content in (b"", b"\x0a", whole[:2001], b"\xff" * 100, b"not a tokenizer", bytes(50)):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
            ours.write(replace(source, tokenizer=damaged), tmp_path / "m.gguf")


# --- how it is written ---
def test_the_same_model_gives_the_same_bytes(
    tmp_path: Path, source: StoredModel, file: Path
) -> None:
    ours.write(
        replace(source, path=Path("elsewhere")),
        tmp_path / "other.gguf",
        precision="q8_0",
        chat_template=CHAT_TEMPLATE,
    )
    assert (tmp_path / "other.gguf").read_bytes() == file.read_bytes()
    ours.write(source, tmp_path / "named.gguf", precision="q8_0", name="A model")
    assert gguf.GGUFReader(tmp_path / "named.gguf").fields["general.name"].contents() == "A model"


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, pieces: Path) -> None:
    living: set[int] = set()
    most = 0

    def read(name: str, tensor: Tensor) -> Tensor:
        nonlocal most
        copy = tensor.clone()
        living.add(id(copy))
        weakref.finalize(copy, living.discard, id(copy))
        most = max(most, len(living))

        return copy

    ours.write(
        source_of(model_of(SHAPE), tmp_path, pieces, read), tmp_path / "m.gguf", precision="q8_0"
    )
    assert most == 1
    assert not living


def test_a_failure_leaves_what_was_there(tmp_path: Path, pieces: Path) -> None:
    def read(name: str, tensor: Tensor) -> Tensor:
        return (
            torch.full_like(tensor, torch.nan)
            if name == "model.layers.1.mlp.up_proj.weight"
            else tensor.clone()
        )

    (tmp_path / "m.gguf").write_bytes(b"precious")
    with pytest.raises(
        UserError,
        match=r"layers\.1\.mlp\.up_proj\.weight: it has values that are not finite.*damaged",
    ):
        ours.write(
            source_of(model_of(SHAPE), tmp_path, pieces, read),
            tmp_path / "m.gguf",
            precision="q4_0",
        )

    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"precious"


def test_what_cannot_be_written(tmp_path: Path, source: StoredModel, pieces: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="reward model"):
        ours.write(replace(source, scorer=True), target)

    with pytest.raises(UserError, match=r"there is no tokenizer.*put tokenizer\.model beside"):
        ours.write(replace(source, tokenizer=None), target)

    with pytest.raises(UserError, match="precision 'q9' is unknown"):
        ours.write(source, target, precision="q9")  # type: ignore[arg-type]

    large = source_of(model_of(SHAPE), tmp_path, pieces, lambda name, tensor: tensor * 1e6)
    with pytest.raises(UserError, match="too large for f16; choose bf16 or f32"):
        ours.write(large, target, precision="f16")

    ours.write(large, target, precision="q8_0")  # its scales are fp16, their multiples are not
    assert ours.read(target).tensors["lm_head.weight"].read().isfinite().all()
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_without_the_library(
    monkeypatch: pytest.MonkeyPatch, source: StoredModel, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"llama2\[gguf\]"):
        ours.write(source, tmp_path / "m.gguf")

    with pytest.raises(UserError, match=r"llama2\[gguf\]"):
        ours.read(tmp_path / "m.gguf")


# --- reading what others write, and damage ---
def copy(
    file: Path,
    target: Path,
    *,
    drop: str = "",
    change: dict[str, Any] | None = None,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
) -> Path:
    """A GGUF file with other metadata or tensors, written by the library."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    change = change or {}

    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (drop, "general.architecture"):
            value = change.get(key, field.contents())
            writer.add_key_value(
                key,
                value,
                gguf.GGUFValueType.get_type(value),
                gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None,
            )

    for key, value in change.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))

    for tensor in reader.tensors:
        if tensor.name not in (drop, *(tensors or {})):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)

    for name, (data, kind) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    return target


def test_other_quantizations_are_read_as_the_library_reads_them(
    tmp_path: Path, pieces: Path
) -> None:
    config = replace(SHAPE, hidden_size=256)
    ours.write(source_of(model_of(config), tmp_path, pieces), tmp_path / "m.gguf")
    kind = gguf.GGMLQuantizationType.Q6_K
    # small bytes: scales stay finite
    data = np.random.default_rng(0).integers(0, 60, (420, 210), np.uint8)
    found = ours.read(
        copy(tmp_path / "m.gguf", tmp_path / "k.gguf", tensors={"output.weight": (data, kind)})
    )
    expected = gguf.quants.dequantize(data, kind)
    assert np.array_equal(found.tensors["lm_head.weight"].read().numpy(), expected)
    assert found.tensors["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "the architecture is 'gemma', not 'llama'"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8, Llama 2 has 0"),
        ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type is 'longrope'"),
        ({"llama.rope.dimension_count": 4}, r"rope\.dimension_count is 4, Llama 2 has 8"),
        (
            {"llama.attention.head_count_kv": [2, 1]},
            r"head_count_kv is \[2, 1\]; a whole number was expected",
        ),
        ({"llama.attention.head_count": 0}, r"m\.gguf: num_attention_heads is 0"),
        (
            {"llama.block_count": 1 << 30},
            r"m\.gguf: num_hidden_layers is 1073741824",
        ),
        (
            {"llama.feed_forward_length": 128},
            r"blk\.0\.ffn_gate\.weight \[96, 64\] instead of \[128, 64\]",
        ),
        ({"general.alignment": 24}, r"general\.alignment is 24, not a power of two"),
    ],
)
def test_what_is_not_llama_2(
    file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ours.read(copy(file, tmp_path / "changed-m.gguf", change=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer.ggml.scores": [0.0] * 419},
            r"tokenizer\.ggml\.tokens, \.scores and \.token_type do not all have 420",
        ),
        ({"tokenizer.ggml.token_type": [1] * 419}, r"do not all have 420 items.*--tokenizer FILE"),
        (
            {"tokenizer.ggml.token_type": [1] * 420},
            r"no item of its tokenizer is the one for unknown.*--tokenizer FILE",
        ),
        (
            {"tokenizer.ggml.model": "gpt2"},
            r"its tokenizer divides texts in the way 'default' .*--tokenizer FILE",
        ),
        (
            {"tokenizer.ggml.model": "bert"},
            r"its tokenizer is of the kind 'bert'; only 'llama' .*--tokenizer FILE",
        ),
        ({"tokenizer.ggml.add_space_prefix": False}, r"it puts no space in front of a text"),
    ],
)
def test_a_faulty_tokenizer_names_the_file_and_can_be_replaced(
    file: Path,
    pieces: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
    one_line: Callable[..., str],
) -> None:
    faulty = copy(file, tmp_path / "faulty.gguf", change=change)
    said = one_line("import", faulty, "--out", tmp_path / "ours")
    assert re.match(rf"{re.escape(str(faulty))}: .*{message}", said), said
    assert llama2("import", faulty, "--tokenizer", pieces, "--out", tmp_path / "ours") == 0
    assert Tokenizer.load(tmp_path / "ours").fingerprint == Tokenizer.load(pieces).fingerprint


def test_kinds_of_items_may_be_left_out(file: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """llama.cpp takes them for plain then; which are BOS, EOS, unknown and bytes is told
    elsewhere."""
    found = ours.read(copy(file, tmp_path / "m.gguf", drop="tokenizer.ggml.token_type")).tokenizer
    assert found is not None
    again = Tokenizer.load(found)

    for text in STRINGS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_scores_may_be_left_out_and_it_is_said(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copy(file, tmp_path / "m.gguf", drop="tokenizer.ggml.scores")
    assert llama2("import", place, "--out", tmp_path / "ours") == 0
    assert f"{place}: its tokenizer has no scores" in capsys.readouterr().err
    again = Tokenizer.load(tmp_path / "ours")
    assert again.decode(again.encode("the old mill")) == "the old mill"


def test_missing_unknown_and_unreadable_tensors(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 missing: blk\.1\.ffn_up\.weight"):
        ours.read(copy(file, tmp_path / "a.gguf", drop="blk.1.ffn_up.weight"))

    with pytest.raises(UserError, match=r"'llama\.embedding_length' is missing"):
        ours.read(copy(file, tmp_path / "b.gguf", drop="llama.embedding_length"))

    bias = {"blk.0.attn_q.bias": (np.zeros(64, np.float32), gguf.GGMLQuantizationType.F32)}
    with pytest.raises(UserError, match=r"5 missing: blk\.0\.attn_k\.bias"):
        ours.read(copy(file, tmp_path / "c.gguf", tensors=bias))

    double = {"output.weight": (np.zeros((420, 64)), gguf.GGMLQuantizationType.F64)}
    with pytest.raises(
        UserError, match=r"output\.weight: the library gguf cannot read the type F64"
    ):
        ours.read(copy(file, tmp_path / "d.gguf", tensors=double))


def test_a_file_cut_anywhere_is_refused_with_the_place(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    cut = tmp_path / "cut.gguf"
    draw = random.Random(0)

    for size in sorted({0, 3, 4, 7, 23, end - 1, *(draw.randrange(end) for _ in range(60))}):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            ours.read(cut)

    cut.write_bytes(whole[: end - 1])
    with pytest.raises(UserError, match=r"cut\.gguf: output\.weight: truncated"):
        ours.read(cut)

    cut.write_bytes(whole[:5000])
    with pytest.raises(
        UserError, match=r"it ends at byte 5000, inside metadata key 'tokenizer\.ggml\.tokens'"
    ):
        ours.read(cut)


def refusal(file: Path) -> str | None:
    """What a user is told of a file that cannot be read; any error but a `UserError` fails the
    test."""
    try:
        found = ours.read(file)
    except UserError as error:
        return error.cause

    assert found.config.hidden_size == SHAPE.hidden_size
    return None


def test_a_changed_head_is_refused_or_harmless(file: Path, tmp_path: Path) -> None:
    """Whatever byte of the head changes, there is an error that names the file, or a model of the
    same shape."""
    whole = bytearray(file.read_bytes())
    head = min(tensor.data_offset for tensor in gguf.GGUFReader(file).tensors)
    damaged = tmp_path / "damaged.gguf"
    draw = random.Random(1)
    refused = 0

    for _ in range(250):
        place, value = draw.randrange(head), draw.randrange(256)
        damaged.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        message = refusal(damaged)
        refused += message is not None
        assert message is None or "damaged.gguf" in message

    assert refused > 50


def test_other_files_and_versions(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="not a GGUF file"):
        ours.read(other)

    for version, message in ((1, "GGUF version 1;"), (3 << 24, r"\(big-endian\)")):
        other.write_bytes(b"GGUF" + struct.pack("<I", version) + file.read_bytes()[8:])
        with pytest.raises(UserError, match=message):
            ours.read(other)

    with pytest.raises(UserError, match="no such file"):
        ours.read(tmp_path / "nothing")


# --- metadata that change nothing, and such that do ---
@pytest.mark.parametrize(
    "change",
    [
        {"llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.factor": 0.0},
        {"llama.rope.scale_linear": 1.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "none"},
        {"llama.rope.scaling.attn_factor": 1.0},
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.sliding_window": 4096},
        {"llama.attention.scale": SHAPE.head_dim**-0.5},
        {"llama.logit_scale": 1.0},
        {"llama.attention.causal": True},
        {"llama.use_parallel_residual": False},
        {"llama.rope.scaling.original_context_length": 2048, "llama.rope.scaling.finetuned": False},
        {"general.anything": 5, "another.rope.scaling.factor": 4.0},
        {"split.count": 0},
    ],
)
def test_keys_at_which_nothing_changes_are_taken(
    file: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    assert ours.read(copy(file, tmp_path / "changed.gguf", change=change)).config == SHAPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.factor": -4.0}, r"factor of the rope type 'linear' is -4\.0"),
        ({"llama.rope.scaling.factor": "4"}, r"llama\.rope\.scaling\.factor is '4'"),
        ({"llama.rope.scaling.attn_factor": 1.2}, r"rope\.scaling\.attn_factor is 1\.2"),
        (
            {"llama.rope.scaling.yarn_log_multiplier": 0.1},
            r"rope\.scaling\.yarn_log_multiplier is 0\.1",
        ),
        ({"llama.attention.sliding_window": 16}, r"attention\.sliding_window is 16"),
        ({"llama.attention.causal": False}, r"attention\.causal is False, Llama 2 has True"),
        ({"llama.logit_scale": 0.5}, r"logit_scale is 0\.5"),
        ({"llama.residual_scale": 0.22}, r"residual_scale is 0\.22"),
        ({"llama.embedding_scale": 12.0}, r"embedding_scale is 12\.0"),
        ({"llama.attention.scale": 0.02}, r"attention\.scale is 0\.02"),
        (
            {"llama.use_parallel_residual": True},
            r"use_parallel_residual is True, a key that Llama 2 does not have",
        ),
        ({"llama.attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        ({"llama.rope.freq_base": 0.0}, r"rope_theta is 0\.0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "layer_norm_rms_epsilon is inf"),
        ({"tokenizer.ggml.eos_token_id": 420}, "eos_token_id is 420"),
        ({"tokenizer.chat_template": 5}, "chat_template is no text"),
    ],
)
def test_keys_that_change_the_outputs_are_refused_by_name(
    file: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ours.read(copy(file, tmp_path / "changed.gguf", change=change))

    assert "changed.gguf: " in str(raised.value)


def test_factors_of_rotary_frequencies(file: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.F32
    ones = np.ones(SHAPE.head_dim // 2, np.float32)
    found = ours.read(
        copy(file, tmp_path / "ones.gguf", tensors={"rope_freqs.weight": (ones, kind)})
    )
    assert same(state(found), state(ours.read(file)))
    scaled = ones.copy()
    scaled[1] = 8  # where shorter waves are scaled and longer ones are not

    with pytest.raises(UserError, match=r"rope_freqs\.weight scales rotary positions"):
        ours.read(
            copy(file, tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": (scaled, kind)})
        )

    with pytest.raises(UserError, match=r"rope_freqs\.weight \[5\] instead of \[4\]"):
        ours.read(
            copy(
                file,
                tmp_path / "five.gguf",
                tensors={"rope_freqs.weight": (np.ones(5, np.float32), kind)},
            )
        )


@pytest.mark.parametrize(
    ("ends", "noted"), [((2,), 0), ((2, 5), 0), ((300, 2, 7), 0), ((2, 5, 7, 9), 1)]
)
def test_the_ends_of_answers_go_out_and_come_in(
    source: StoredModel, tmp_path: Path, ends: tuple[int, ...], noted: int
) -> None:
    several = replace(source, config=replace(SHAPE, eos_token_id=ends))
    notes = ours.write(several, tmp_path / "m.gguf", precision="f32")
    assert len(notes) == noted
    found = ours.read(tmp_path / "m.gguf")
    assert found.config.stops == ends[:3]
    assert found.tokenizer is not None
    assert Tokenizer.load(found.tokenizer).eos == 2


def test_the_template_of_a_file_comes_with_it(
    source: StoredModel, file: Path, tmp_path: Path
) -> None:
    assert ours.read(file).template == CHAT_TEMPLATE
    ours.write(source, tmp_path / "bare.gguf")
    assert ours.read(tmp_path / "bare.gguf").template is None
