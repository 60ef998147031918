"""Meta's files: written for any number of ranks, read back bit for bit, and refused in one line
when they are wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import frugal, model_of, same, scorer_of, source_of, state
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import meta, torch_zip
from llama2.formats.stored_model import StoredModel
from llama2.model.llama import LlamaConfig
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import Vocabulary, VocabularyItem

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)
ROWS = ("output", "wq", "wk", "wv", "w1", "w3")
COLUMNS = ("tok_embeddings", "wo", "w2")


VOCABULARY = sentencepiece_model.build(
    Vocabulary(
        [
            VocabularyItem("<unk>", 0.0, sentencepiece_model.UNKNOWN),
            VocabularyItem("<s>", 0.0, sentencepiece_model.CONTROL),
            VocabularyItem("</s>", 0.0, sentencepiece_model.CONTROL),
            *(
                VocabularyItem(f"{letter}", -index)
                for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
            ),
        ]
    )
)


@pytest.fixture
def source(tmp_path: Path) -> StoredModel:
    (tmp_path / "vocabulary").write_bytes(VOCABULARY)
    return source_of(model_of(CONFIG), tmp_path, tmp_path / "vocabulary")


@pytest.fixture
def written(tmp_path: Path, source: StoredModel) -> Path:
    meta.write(source, tmp_path / "model", shards=2)
    return tmp_path / "model"


def their_files(directory: Path) -> list[dict[str, Tensor]]:
    return [
        torch.load(path, weights_only=True, mmap=True)
        for path in sorted(directory.glob("consolidated.*.pth"))
    ]


def test_a_base_that_metas_code_of_llama_2_does_not_read_is_said(
    tmp_path: Path, source: StoredModel
) -> None:
    assert meta.write(source, tmp_path / "plain") == []
    longer = replace(source, config=replace(CONFIG, rope_theta=1e6))
    assert meta.write(longer, tmp_path / "longer") == [
        "params.json has rope_theta 1e+06, which Code Llama's code reads; that of Llama 2 knows no such key and takes "
        "10000 for granted"
    ]
    assert meta.read(tmp_path / "longer").config.rope_theta == 1e6


@pytest.mark.parametrize(
    ("key", "value"),
    [("norm_eps", None), ("rope_theta", None), ("n_kv_heads", None), ("max_seq_len", None)],
)
def test_null_says_nothing(written: Path, key: str, value: object) -> None:
    file = written / "params.json"
    values = {"n_kv_heads": 4} | json.loads(file.read_text())
    wanted = meta.read(written).config
    file.write_text(json.dumps(values | {key: value}))

    if key == "n_kv_heads":
        with pytest.raises(UserError, match=r"wk\.weight \[16, 64\] instead of \[32, 64\]"):
            meta.read(written)
    else:
        assert meta.read(written).config == wanted


# --- what is written ---
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [8, 4], ids=["mha", "gqa"])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, kv_heads: int, shards: int) -> None:
    source = source_of(model_of(replace(CONFIG, num_key_value_heads=kv_heads)), tmp_path)
    meta.write(source, tmp_path / "model", shards=shards)
    again = meta.read(tmp_path / "model")
    assert again.config == source.config
    assert same(state(again), state(source))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_pytorch_reads_the_parts_that_each_rank_needs(
    tmp_path: Path, source: StoredModel, shards: int
) -> None:
    meta.write(source, tmp_path / "model", shards=shards)
    files = their_files(tmp_path / "model")
    assert len(files) == shards
    ours = state(source)
    joined = {}

    for name in files[0]:
        kind = name.split(".")[-2]
        if kind in ROWS:
            joined[name] = torch.cat([file[name] for file in files], 0)
        elif kind in COLUMNS:
            joined[name] = torch.cat([file[name] for file in files], 1)
        else:
            assert all(torch.equal(file[name], files[0][name]) for file in files)
            joined[name] = files[0][name]

    assert len(joined) == len(ours)
    assert torch.equal(joined["tok_embeddings.weight"], ours["model.embed_tokens.weight"])
    assert torch.equal(joined["output.weight"], ours["lm_head.weight"])
    assert torch.equal(joined["norm.weight"], ours["model.norm.weight"])

    for theirs, name in (
        ("attention.wv", "self_attn.v_proj"),
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
    ):
        assert torch.equal(
            joined[f"layers.1.{theirs}.weight"], ours[f"model.layers.1.{name}.weight"]
        )

    # the pair (i, i + 4) of each head of 8 becomes the neighbours (2 i, 2 i + 1)
    for theirs, name in (("wq", "q_proj"), ("wk", "k_proj")):
        for row, value in enumerate(joined[f"layers.0.attention.{theirs}.weight"]):
            head, place = divmod(row, 8)
            origin = head * 8 + place // 2 + 4 * (place % 2)
            assert torch.equal(value, ours[f"model.layers.0.self_attn.{name}.weight"][origin])


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_files_that_torch_saved_are_read_like_ours(
    tmp_path: Path, written: Path, old: bool
) -> None:
    expected = state(meta.read(written))
    for path in written.glob("*.pth"):
        held = OrderedDict(torch.load(path, weights_only=True))
        held["rope.freqs"] = torch.ones(4)  # the published files hold it, and nobody needs it
        held["layers.0.attention.wq.weight"] = (
            held["layers.0.attention.wq.weight"].t().contiguous().t()
        )
        torch.save(held, path, _use_new_zipfile_serialization=not old)

    assert same(state(meta.read(written)), expected)


def test_weights_are_converted_on_the_way(tmp_path: Path, source: StoredModel) -> None:
    meta.write(source, tmp_path / "model", dtype=torch.bfloat16)
    again = state(meta.read(tmp_path / "model"))
    assert same(again, {name: tensor.to(torch.bfloat16) for name, tensor in state(source).items()})


def test_tied_embeddings_are_written_twice(tmp_path: Path) -> None:
    source = source_of(model_of(replace(CONFIG, tie_word_embeddings=True)), tmp_path)
    meta.write(source, tmp_path / "model")
    again = meta.read(tmp_path / "model")
    assert not again.config.tie_word_embeddings
    assert torch.equal(
        again.tensors["lm_head.weight"].read(), source.tensors["model.embed_tokens.weight"].read()
    )


@pytest.mark.parametrize("shards", [1, 4])
def test_one_tensor_at_a_time_is_in_memory(
    tmp_path: Path, source: StoredModel, shards: int
) -> None:
    meta.write(frugal(source), tmp_path / "model", shards=shards)
    meta.write(frugal(meta.read(tmp_path / "model")), tmp_path / "again", shards=2)
    assert same(state(meta.read(tmp_path / "again")), state(source))


def test_the_same_source_gives_the_same_bytes(
    tmp_path: Path, source: StoredModel, written: Path
) -> None:
    meta.write(source, tmp_path / "again", shards=2)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


# --- params.json ---
@pytest.mark.parametrize(
    ("dim", "size", "multiple", "multiplier"),
    [
        (4096, 11008, 256, None),
        (5120, 13824, 256, None),
        (8192, 22016, 256, None),
        (8192, 28672, 4096, 1.3),
    ],
    ids=["7b", "13b", "34b", "70b"],
)
def test_the_published_widths(dim: int, size: int, multiple: int, multiplier: float | None) -> None:
    assert meta.compute_width(dim, multiple, multiplier) == size
    values = meta.make_parameters(replace(CONFIG, hidden_size=dim, intermediate_size=size))
    assert values["multiple_of"] == multiple
    assert ("ffn_dim_multiplier" in values) == (multiplier is not None)


@pytest.mark.parametrize("size", [1, 7, 48, 63, 64, 65, 112, 171, 172, 1000, 4099])
def test_any_width_is_written_so_that_metas_reckoning_gives_it(size: int) -> None:
    values = meta.make_parameters(replace(CONFIG, intermediate_size=size))
    assert meta.compute_width(64, values["multiple_of"], values.get("ffn_dim_multiplier")) == size


def test_parameters_are_those_that_metas_code_takes(written: Path) -> None:
    values = json.loads((written / "params.json").read_text())
    assert values.keys() <= {
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
    }
    assert (values["dim"], values["n_layers"], values["n_heads"], values["n_kv_heads"]) == (
        64,
        2,
        8,
        4,
    )


def test_what_params_json_may_leave_open(written: Path, tmp_path: Path) -> None:
    (written / "params.json").write_text(
        json.dumps(
            {
                "dim": 64,
                "n_layers": 2,
                "n_heads": 8,
                "n_kv_heads": 4,
                "vocab_size": -1,
                "norm_eps": 1e-6,
                "rope_theta": 1e6,
            }
        )
    )
    config = meta.read(written).config
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (
        96,
        112,
        4096,
    )
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 1e6)
    assert meta.read(written, context=2048).config.max_position_embeddings == 2048


def test_the_tokenizer_lies_beside_or_above(written: Path) -> None:
    assert meta.read(written).tokenizer == written / "tokenizer.model"
    shutil.move(written / "tokenizer.model", written.parent / "tokenizer.model")
    found = meta.read(written).tokenizer
    assert found is not None
    items = sentencepiece_model.load(found).items
    assert [item.text for item in items[3:6]] == ["a", "b", "c"]
    # Meta's code makes a row for each item
    assert [item.text for item in items[29:31]] == ["[PAD29]", "[PAD30]"]
    assert len(items) == CONFIG.vocab_size
    found.unlink()
    assert meta.read(written).tokenizer is None


# --- what is refused ---
def change(
    name: str, to: Callable[[Tensor], Tensor], file: str = "consolidated.01.pth"
) -> Callable[[Path], None]:
    def mistake(directory: Path) -> None:
        held = torch.load(directory / file, weights_only=True)
        held[name] = to(held[name])
        torch.save(held, directory / file)

    return mistake


def parameter(name: str, value: Any) -> Callable[[Path], None]:
    def mistake(directory: Path) -> None:
        values = json.loads((directory / "params.json").read_text())
        (directory / "params.json").write_text(json.dumps({**values, name: value}))

    return mistake


def truncate(directory: Path) -> None:
    path = directory / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-5000])


def flip(directory: Path) -> None:
    path = directory / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop(name: str) -> Callable[[Path], None]:
    def mistake(directory: Path) -> None:
        held = torch.load(directory / "consolidated.01.pth", weights_only=True)
        del held[name]
        torch.save(held, directory / "consolidated.01.pth")

    return mistake


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


MISTAKES = {
    "truncated": (truncate, r"consolidated\.01\.pth: truncated"),
    "empty": (
        lambda d: (d / "consolidated.01.pth").write_bytes(b""),
        r"consolidated\.01\.pth: truncated",
    ),
    "another's zip": (
        lambda d: (
            shutil.make_archive(str(d / "x"), "zip", d / "..", "vocabulary")
            and os.replace(d / "x.zip", d / "consolidated.01.pth")
        ),
        r"consolidated\.01\.pth: .*compressed",
    ),
    "a bit": (flip, r"consolidated\.01\.pth: .* do(es)? not match"),
    "first lost": (
        lambda d: (d / "consolidated.00.pth").unlink(),
        r"consolidated\.00\.pth: missing",
    ),
    "last lost": (
        lambda d: (d / "consolidated.01.pth").unlink(),
        r"tok_embeddings\.weight has 32 columns: it is one of 2 shards, of which 1 are here",
    ),
    "one too many": (
        lambda d: shutil.copy(d / "consolidated.01.pth", d / "consolidated.02.pth"),
        r"tok_embeddings\.weight has 32 columns",
    ),
    "nothing": (lambda d: [path.unlink() for path in d.glob("*.pth")], r"no consolidated\.00\.pth"),
    "a tensor lost": (
        drop("layers.1.ffn_norm.weight"),
        r"01\.pth: .*1 missing: layers\.1\.ffn_norm\.weight",
    ),
    "a tensor cut": (
        change("layers.1.attention.wk.weight", lambda x: x[:8]),
        r"01\.pth: .*layers\.1\.attention\.wk\.weight \[8, 64\] instead of \[16, 64\]",
    ),
    "another kind": (
        change("layers.0.attention.wo.weight", lambda x: x.half()),
        r"wo\.weight' is torch\.float16, in consolidated\.00\.pth torch\.float32",
    ),
    "whole numbers": (
        change("norm.weight", lambda x: x.int(), "consolidated.00.pth"),
        r"norm\.weight' is torch\.int32",
    ),
    "norms differ": (
        change("layers.1.ffn_norm.weight", lambda x: x + 1),
        r"01\.pth: tensor 'layers\.1\.ffn_norm\.weight' differs",
    ),
    "dim": (parameter("dim", 128), r"00\.pth: tok_embeddings\.weight has 32 columns"),
    "layers": (parameter("n_layers", 3), r"9 missing: layers\.2"),
    "many layers": (parameter("n_layers", 10**9), r"num_hidden_layers is 1000000000"),
    "heads": (parameter("n_kv_heads", 2), r"wk\.weight \[16, 64\] instead of \[8, 64\]"),
    "odd heads": (parameter("n_kv_heads", 3), r"params\.json: .*3"),
    "vocabulary": (
        parameter("vocab_size", 97),
        r"vocab_size is 97, tok_embeddings\.weight has 96 rows",
    ),
    "text": (parameter("dim", "64"), r"params\.json: dim is '64'"),
    "no width": (parameter("dim", None), r"params\.json: the key 'dim' is missing"),
    "no end": (
        parameter("norm_eps", float("inf")),
        r"norm_eps is inf; a finite number was expected",
    ),
    "a thousand values": (
        parameter("n_heads", [8] * 1000),
        r"n_heads is \[8, 8, 8, .{,90}\.\.\.; a whole number",
    ),
    "no number": (parameter("norm_eps", "small"), r"norm_eps is 'small'"),
    "later": (parameter("moe", {"num_experts": 8}), r"later model"),
    "scaled somehow": (parameter("use_scaled_rope", 8), r"use_scaled_rope is 8; true or false"),
    "no JSON": (lambda d: (d / "params.json").write_text("{"), r"params\.json:1: not valid JSON"),
    "no key": (
        lambda d: (d / "params.json").write_text("{}"),
        r"params\.json: the key 'dim' is missing",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_directory_is_refused_with_its_place(
    written: Path, tmp_path: Path, name: str
) -> None:
    mistake, words = MISTAKES[name]
    mistake(written)
    with pytest.raises(UserError, match=words) as refused:
        meta.write(meta.read(written), tmp_path / "target", shards=2)

    assert "\n" not in str(refused.value)
    # no target, nothing left over
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "vocabulary"]


def test_code_in_a_pickle_is_refused_and_not_run(written: Path, tmp_path: Path) -> None:
    torch.save({"norm.weight": Hostile(tmp_path / "ran")}, written / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"consolidated\.01\.pth: refused, .*mkdir"):
        meta.read(written)

    assert not (tmp_path / "ran").exists()


def test_every_truncation_and_every_damaged_byte_of_a_small_file_is_noticed_or_harmless(
    tmp_path: Path,
) -> None:
    """No damage gives other numbers, and none an exception but the one for users."""
    path = tmp_path / "small.pth"
    expected = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(expected, path)
    content = path.read_bytes()
    broken = [content[:length] for length in range(0, len(content), 7)]
    broken += [
        content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        for place in range(len(content))
    ]
    noticed = 0

    for bytes_ in broken:
        path.write_bytes(bytes_)
        try:
            found = {name: stored.read() for name, stored in torch_zip.list_tensors(path).items()}
        except UserError:
            noticed += 1
        else:
            assert same(found, expected)

    assert noticed > len(content) / 4


def test_what_does_not_fit_the_format_is_refused(tmp_path: Path, source: StoredModel) -> None:
    with pytest.raises(UserError, match="reward model"):
        meta.write(source_of(scorer_of(CONFIG), tmp_path), tmp_path / "model")

    with pytest.raises(UserError, match="num_key_value_heads 4 does not divide into 8 shards"):
        meta.write(source, tmp_path / "model", shards=8)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with pytest.raises(UserError, match="something is there already"):
        meta.write(source, tmp_path / "model")

    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_a_tensor_that_cannot_be_read_leaves_no_target(tmp_path: Path, source: StoredModel) -> None:
    def fails() -> Tensor:
        raise UserError("the disk is gone", "buy another")

    last = "lm_head.weight"
    broken = replace(
        source, tensors={**source.tensors, last: replace(source.tensors[last], read=fails)}
    )
    with pytest.raises(UserError, match=re.escape("the disk is gone")):
        meta.write(broken, tmp_path / "model", shards=2)

    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary"]
