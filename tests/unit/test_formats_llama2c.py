"""llama2.c's files, read and written here by offsets alone, as its programs do."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from sources import RATIOS, SHAPE, STRINGS, exact, model_of, source_of
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import llama2c
from llama2.formats.stored_model import StoredModel
from llama2.model.llama import Llama, LlamaConfig
from llama2.tokenizer import Tokenizer, sentencepiece_model

KINDS = {
    "att": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn": "post_attention_layernorm",
    "1": "mlp.gate_proj",
    "2": "mlp.down_proj",
    "3": "mlp.up_proj",
}


@pytest.fixture(scope="module")
def model_file(shared: Path, tokenizer: Tokenizer) -> Path:
    assert tokenizer.vocab_size == SHAPE.vocab_size
    return shared / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def source(model_file: Path) -> StoredModel:
    return source_of(model_of(SHAPE), Path("model"), model_file)


# --- an independent account of the layout ---
def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + E/2 of every head of E rows as rows 2 i and 2 i + 1."""
    size = len(weight) // heads
    order = [
        head * size + pair + half * size // 2
        for head in range(heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return weight[order]


def in_order(model: Llama, version: int) -> Iterator[np.ndarray]:
    """The tensors of a model as llama2.c's exporter goes through them, in Meta's order of rows."""
    config, weights = (
        model.config,
        {name: tensor.float().numpy() for name, tensor in model.state_dict().items()},
    )

    def every(kind: str) -> Iterator[np.ndarray]:
        for layer in range(config.num_hidden_layers):
            weight = weights[f"model.layers.{layer}.{KINDS[kind]}.weight"]
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(kind)
            yield neighbours(weight, heads) if heads else weight

    if version == 0:
        yield weights["model.embed_tokens.weight"]
        for kind in ("att", "q", "k", "v", "o", "ffn", "1", "2", "3"):
            yield from every(kind)

        yield weights["model.norm.weight"]
        angles = np.outer(
            np.arange(config.max_position_embeddings),
            10000.0 ** -(np.arange(0, config.head_dim, 2) / config.head_dim),
        )
        yield from (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    else:
        yield from every("att")
        yield from every("ffn")
        yield from (weights["model.norm.weight"], weights["model.embed_tokens.weight"])

        for kind in ("q", "k", "v", "o", "1", "2", "3"):
            yield from every(kind)

    if not config.tie_word_embeddings:
        yield weights["lm_head.weight"]


def sizes(config: LlamaConfig) -> list[int]:
    return [
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.max_position_embeddings,
    ]


def plain(model: Llama, version: int) -> bytes:
    """A file of version 0 or 1."""
    numbers, tied = sizes(model.config), model.config.tie_word_embeddings
    if version == 0:
        head = struct.pack("<7i", *numbers[:5], numbers[5] if tied else -numbers[5], numbers[6])
    else:
        head = (b"24ka" + struct.pack("<8iB", 1, *numbers, tied)).ljust(256, b"\0")

    return head + b"".join(tensor.tobytes() for tensor in in_order(model, version))


# --- what is written ---
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_version_0_is_what_run_reads(
    tmp_path: Path, model_file: Path, kv_heads: int, tied: bool
) -> None:
    model = model_of(replace(SHAPE, num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    llama2c.write(source_of(model, tmp_path, model_file), tmp_path / "model.bin")
    written, expected = (tmp_path / "model.bin").read_bytes(), plain(model, 0)
    assert written[:28] == expected[:28]
    assert len(written) == len(expected)
    found, wanted = (np.frombuffer(data, "<f4", offset=28) for data in (written, expected))
    differing = np.flatnonzero(found != wanted)  # only in rotary tables, which here come from fp64
    assert np.abs(found - wanted).max(initial=0) < 1e-4
    end = len(found) - (0 if tied else 420 * 64)
    assert ((end - 512 * 8 <= differing) & (differing < end)).all()


@pytest.mark.parametrize(
    ("config", "group"),
    [
        (SHAPE, 32),
        (replace(SHAPE, intermediate_size=128, tie_word_embeddings=True), 64),
        (replace(SHAPE, intermediate_size=88, num_key_value_heads=1), 8),
    ],
    ids=["32", "64-tied", "8"],
)
def test_version_2_is_what_runq_reads(
    tmp_path: Path, model_file: Path, config: LlamaConfig, group: int
) -> None:
    model = model_of(config)
    llama2c.write(source_of(model, tmp_path, model_file), tmp_path / "model.bin", version=2)
    data = (tmp_path / "model.bin").read_bytes()
    assert data[:4] == b"24ka"
    assert struct.unpack_from("<8i", data, 4) == (2, *sizes(config))
    assert struct.unpack_from("<Bi", data, 36) == (config.tie_word_embeddings, group)
    assert not any(data[41:256])
    at = 256

    for tensor in in_order(model, 2):
        if tensor.ndim == 1:
            assert np.array_equal(np.frombuffer(data, "<f4", tensor.size, at), tensor)
            at += tensor.size * 4
            continue

        integers = np.frombuffer(data, "i1", tensor.size, at).reshape(-1, group).astype(np.float32)
        scales = np.frombuffer(data, "<f4", tensor.size // group, at + tensor.size)[:, None]
        at += tensor.size + tensor.size // group * 4
        wanted = tensor.reshape(-1, group)
        assert np.allclose(scales, np.abs(wanted).max(1, keepdims=True) / 127, rtol=1e-6)
        assert np.abs(integers).max() == 127
        assert (np.abs(integers * scales - wanted) <= scales * 0.5001).all()

    assert at == len(data)


def test_tokenizer_bin_is_what_run_reads(
    tmp_path: Path, source: StoredModel, tokenizer: Tokenizer
) -> None:
    llama2c.write(source, tmp_path / "model.bin")
    data = (tmp_path / "tokenizer.bin").read_bytes()
    processor, at, rows = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model), 4, []

    for token in range(SHAPE.vocab_size):
        score, length = struct.unpack_from("<fi", data, at)
        rows.append(data[at + 8 : at + 8 + length])
        at += 8 + length
        assert score == processor.get_score(token)

    assert at == len(data)
    assert rows[:4] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    assert rows[259:] == [
        processor.id_to_piece(token).replace("▁", " ").encode() for token in range(259, 420)
    ]
    assert struct.unpack_from("<I", data) == (max(map(len, rows)),)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, source: StoredModel) -> None:
    for version in (0, 2):
        for name in ("a", "b"):
            llama2c.write(source, tmp_path / name, version=version)  # type: ignore[arg-type]

        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- what is read ---
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_reads_plain_files(tmp_path: Path, kv_heads: int, version: int, tied: bool) -> None:
    model = model_of(replace(SHAPE, num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    (tmp_path / "model.bin").write_bytes(plain(model, version))
    found = llama2c.read(tmp_path / "model.bin")
    assert found.config == model.config
    assert (found.format, found.scorer, found.tokenizer) == ("llama2c", False, None)
    assert exact(found, model)


@pytest.mark.parametrize(
    "config", [SHAPE, replace(SHAPE, tie_word_embeddings=True, intermediate_size=88)]
)
def test_reads_the_integers_it_wrote(tmp_path: Path, model_file: Path, config: LlamaConfig) -> None:
    model = model_of(config, torch.bfloat16)
    llama2c.write(source_of(model, tmp_path, model_file), tmp_path / "model.bin", version=2)
    found = llama2c.read(tmp_path / "model.bin")
    assert found.config == config
    weights = model.state_dict()
    assert found.tensors.keys() == weights.keys()

    for name, stored in found.tensors.items():
        before, after = weights[name].float(), stored.read()
        assert (before - after).abs().max() <= before.abs().max() / 254 * 1.001
        assert torch.equal(before, after) == (before.dim() == 1)


@pytest.mark.parametrize("text", STRINGS)
def test_the_tokenizer_encodes_as_the_original(
    tmp_path: Path, source: StoredModel, tokenizer: Tokenizer, text: str
) -> None:
    llama2c.write(source, tmp_path / "model.bin")
    beside = llama2c.read(tmp_path / "model.bin").tokenizer
    assert beside is not None
    again = Tokenizer.load(beside)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


# --- refusals ---
def test_what_cannot_be_written(tmp_path: Path, source: StoredModel, model_file: Path) -> None:
    target = tmp_path / "model.bin"
    for change, message in (
        ({"rope_theta": 5e5}, "rope_theta is 500000.0"),
        ({"rms_norm_eps": 1e-6}, "1e-06"),
        ({"vocab_size": 421}, "420 pieces, the model 421"),
        ({"eos_token_id": 3}, "BOS and EOS are 1 and 3"),
    ):
        other = source_of(model_of(replace(SHAPE, **change)), tmp_path, model_file)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            llama2c.write(other, target)

    with pytest.raises(UserError, match="reward model"):
        llama2c.write(replace(source, scorer=True), target)

    with pytest.raises(UserError, match="no tokenizer"):
        llama2c.write(replace(source, tokenizer=None), target)

    with pytest.raises(UserError, match="version 1 of llama2"):
        llama2c.write(source, target, version=1)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="this name is the tokenizer's"):
        llama2c.write(source, tmp_path / "tokenizer.bin")

    items = [sentencepiece_model.VocabularyItem(f"w{token}", 0.0) for token in range(420)]
    strange = tmp_path / "tokenizer.model"
    strange.write_bytes(sentencepiece_model.build(sentencepiece_model.Vocabulary(items)))

    with pytest.raises(UserError, match="does not begin with unknown, BOS, EOS and the 256 bytes"):
        llama2c.write(replace(source, tokenizer=strange), target)

    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_what_the_tokenizer_does_beside_is_told(
    tmp_path: Path, source: StoredModel, model_file: Path
) -> None:
    assert llama2c.write(source, tmp_path / "model.bin") == []
    other = tmp_path / "tokenizer.model"
    other.write_bytes(
        sentencepiece_model.build(
            replace(sentencepiece_model.load(model_file), extra_spaces_removed=True)
        )
    )
    notes = llama2c.write(replace(source, tokenizer=other), tmp_path / "model.bin")
    assert len(notes) == 1
    assert "drops spaces at the ends of a text" in notes[0]


def test_another_tokenizer_in_the_way_stays(tmp_path: Path, source: StoredModel) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(b"another")
    with pytest.raises(UserError, match=r"tokenizer\.bin: the tokenizer of another model is there"):
        llama2c.write(source, tmp_path / "model.bin")

    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.bin"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, model_file: Path) -> None:
    def read(name: str, tensor: Tensor) -> Tensor:
        return tensor.clone().fill_(math.inf) if name == "lm_head.weight" else tensor.clone()

    (tmp_path / "model.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"lm_head\.weight: it has values that are not finite"):
        llama2c.write(
            source_of(model_of(SHAPE), tmp_path, model_file, read),
            tmp_path / "model.bin",
            version=2,
        )

    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
    assert (tmp_path / "model.bin").read_bytes() == b"precious"


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_of_another_length_is_refused(
    tmp_path: Path, source: StoredModel, version: int
) -> None:
    if version == 1:
        whole = plain(model_of(SHAPE), 1)
    else:
        llama2c.write(source, tmp_path / "whole.bin", version=version)  # type: ignore[arg-type]
        whole = (tmp_path / "whole.bin").read_bytes()

    cut, draw = tmp_path / "cut.bin", random.Random(0)
    for size in [
        0,
        4,
        27,
        28,
        255,
        256,
        len(whole) - 1,
        *(draw.randrange(len(whole)) for _ in range(60)),
    ]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.bin: (.*: )?truncated"):
            llama2c.read(cut)

    cut.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=r"cut\.bin: lm_head\.weight: truncated: the file ends at byte"
    ):
        llama2c.read(cut)

    cut.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="its header describes a model of"):
        llama2c.read(cut)


def refusal(file: Path) -> str | None:
    """What a user is told of a file that cannot be read; any error but a `UserError` fails the
    test."""
    try:
        llama2c.read(file)
    except UserError as error:
        return error.cause

    return None


@pytest.mark.parametrize("version", [0, 2])
def test_a_changed_head_is_refused(tmp_path: Path, source: StoredModel, version: Any) -> None:
    """Whatever byte of a size changes, the file no longer has the length it should have. (Not so
    the number of heads, whose change may leave all sizes as they are.)"""
    llama2c.write(source, tmp_path / "model.bin", version=version)
    whole = bytearray((tmp_path / "model.bin").read_bytes())
    start = 8 if version else 0

    for place in [*range(start), *range(start, start + 12), *range(start + 20, start + 24)]:
        for value in (0, 1, 77, 127, 128, 255):
            if whole[place] != value:
                (tmp_path / "model.bin").write_bytes(
                    whole[:place] + bytes([value]) + whole[place + 1 :]
                )
                assert "model.bin" in (refusal(tmp_path / "model.bin") or "")


def test_other_files_and_versions(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for content, message in (
        (b"x" * 1000, "other: .*truncated|other: not a model"),
        (bytes(300), "not a model of llama2.c"),
        (
            b"24ka" + struct.pack("<8i", 3, *sizes(SHAPE)) + bytes(300),
            "version 3 of llama2.c's format",
        ),
        (
            b"24ka" + struct.pack("<8iB", 1, *sizes(SHAPE), 7) + bytes(300),
            "not a model of llama2.c",
        ),
        (
            b"24ka" + struct.pack("<8iBi", 2, *sizes(SHAPE), 0, 7) + bytes(300),
            "groups of 7 do not divide",
        ),
        (
            struct.pack("<7i", 64, 96, 2, 7, 2, 420, 512),
            "hidden_size 64 does not divide into 7 heads",
        ),
    ):
        other.write_bytes(content)
        with pytest.raises(UserError, match=message):
            llama2c.read(other)

    with pytest.raises(UserError, match="no such file"):
        llama2c.read(tmp_path / "nothing")


def load(model: Path) -> Tokenizer:
    beside = llama2c.read(model).tokenizer
    assert beside is not None
    return Tokenizer.load(beside)


def test_a_damaged_tokenizer_is_named(tmp_path: Path, source: StoredModel) -> None:
    llama2c.write(source, tmp_path / "model.bin")
    file = tmp_path / "tokenizer.bin"
    whole = file.read_bytes()
    draw = random.Random(0)

    for size in [0, 3, 4, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]:
        file.write_bytes(whole[:size])
        with pytest.raises(
            UserError,
            match=r"tokenizer\.bin: (truncated or damaged: item|the tokenizer has \d+ pieces)",
        ):
            load(tmp_path / "model.bin")

    file.write_bytes(whole.replace(b"<0x41>", b"<0x42>"))
    with pytest.raises(
        UserError, match="it does not begin with unknown, BOS, EOS and the 256 bytes"
    ):
        load(tmp_path / "model.bin")
