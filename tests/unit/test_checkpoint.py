"""Checkpoint directories: round trips, atomic replacement, and one-line errors that name what is
wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama2.errors import UserError
from llama2.formats import checkpoint, safetensors_file
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
SHARDED = 20_000  # bytes a shard: several of them


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    checkpoint.save(Llama(CONFIG, seed=1), directory)
    return directory


@pytest.mark.parametrize("shard_bytes", [1 << 30, SHARDED])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    model = Llama(LlamaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": tied}), seed=1)
    checkpoint.save(model, tmp_path / "a" / "model", shard_bytes=shard_bytes)
    again = checkpoint.load(tmp_path / "a" / "model")
    assert again.config == model.config
    assert same(model, again)
    assert all(parameter.requires_grad for parameter in again.parameters())
    shards = list((tmp_path / "a" / "model").glob("model-*.safetensors"))
    assert len(shards) > 2 if shard_bytes == SHARDED else not shards
    assert all(path.stat().st_size < SHARDED + 5_000 for path in shards)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_dtype_on_the_way_out_and_in(tmp_path: Path) -> None:
    model = Llama(CONFIG, seed=1)
    checkpoint.save(model, tmp_path / "m", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "m" / checkpoint.WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in checkpoint.load(tmp_path / "m").parameters()} == {
        torch.float32
    }
    pure = checkpoint.load(tmp_path / "m", dtype=torch.bfloat16)
    assert same(pure, model.to(torch.bfloat16))


def test_replacing_a_checkpoint_keeps_other_files_and_leaves_no_old_shard(saved: Path) -> None:
    (saved / "tokenizer.model").write_bytes(b"pieces")
    second = Llama(CONFIG, seed=2)
    checkpoint.save(second, saved, shard_bytes=SHARDED)
    assert not (saved / checkpoint.WEIGHTS).exists()
    assert same(checkpoint.load(saved), second)
    third = Llama(CONFIG, seed=3)
    checkpoint.save(third, saved)
    assert same(checkpoint.load(saved), third)
    assert sorted(path.name for path in saved.iterdir()) == [
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]


def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "write", full)
    with pytest.raises(UserError, match="no space left"):
        checkpoint.save(Llama(CONFIG, seed=2), saved)

    assert same(checkpoint.load(saved), Llama(CONFIG, seed=1))
    assert sorted(path.name for path in saved.iterdir()) == [
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_scorer_starts_from_a_language_model_and_round_trips(saved: Path, tmp_path: Path) -> None:
    scorer = checkpoint.load_scorer(saved, seed=5)
    assert same(scorer.model, checkpoint.load(saved).model)
    assert scorer.score.weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert torch.equal(scorer.score.weight, checkpoint.load_scorer(saved, seed=5).score.weight)
    assert not torch.equal(scorer.score.weight, checkpoint.load_scorer(saved, seed=6).score.weight)
    checkpoint.save(scorer, tmp_path / "scorer")
    assert same(checkpoint.load_scorer(tmp_path / "scorer"), scorer)
    assert checkpoint.is_scorer(tmp_path / "scorer")
    assert not checkpoint.is_scorer(saved)

    with pytest.raises(UserError, match="reward model"):
        checkpoint.load(tmp_path / "scorer")


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(
            json.dumps({key: value for key, value in values.items() if value != "delete"})
        )
        (directory / checkpoint.CHECKSUMS).unlink()

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / checkpoint.WEIGHTS)
        change(tensors)
        save_file(tensors, directory / checkpoint.WEIGHTS)
        (directory / checkpoint.CHECKSUMS).unlink()

    return edit


def truncate(directory: Path) -> None:
    path = directory / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    (directory / checkpoint.CHECKSUMS).unlink()


def flip_a_bit(directory: Path) -> None:
    path = directory / checkpoint.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        edit_weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unknown tensor": (
        edit_weights(lambda t: t.update({"model.extra": torch.zeros(1)})),
        r"1 unknown: model\.extra",
    ),
    "wrong shape": (
        edit_weights(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"1 wrongly shaped: model\.norm\.weight \[31\] instead of \[32\]",
    ),
    "two faults": (
        edit_weights(lambda t: t.update({"model.extra": t.pop("lm_head.weight")})),
        r"1 missing: lm_head\.weight; 1 unknown: model\.extra",
    ),
    "integers": (
        edit_weights(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        r"'model\.norm\.weight' is torch\.int8",
    ),
    "truncated file": (truncate, r"model\.safetensors: truncated"),
    "flipped bit": (flip_a_bit, r"model\.safetensors: its checksum differs"),
    "checksummed file gone": (
        lambda d: (
            (d / "config.json").rename(d / "c")
            and (d / "config.json").write_text((d / "c").read_text() + " ")
        ),
        r"config\.json: its checksum differs",
    ),
    "no weights": (lambda d: (d / checkpoint.WEIGHTS).unlink(), r"neither model\.safetensors nor"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: missing"),
    "config is not JSON": (
        lambda d: (d / "config.json").write_text("{"),
        r"config\.json:1: not valid JSON",
    ),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        r"a JSON object was expected",
    ),
    "another architecture": (edit_config(model_type="gpt2"), r"model_type is 'gpt2', not 'llama'"),
    "key missing": (edit_config(hidden_size="delete"), r"key 'hidden_size' is missing"),
    "key of the wrong type": (edit_config(hidden_size="32"), r"hidden_size is '32'"),
    "scaled positions": (
        edit_config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        r"the key 'rope_parameters\.factor' is missing",
    ),
    "scaled positions, old key": (
        edit_config(rope_scaling={"type": "linear", "factor": 2}),
        r"rope_parameters\.rope_type is 'default' and rope_scaling\.type is 'linear'",
    ),
    "biases": (
        edit_config(attention_bias=True),
        r"missing: model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    "wide heads": (
        edit_config(head_dim=64),
        r"q_proj\.weight|o_proj\.weight \[32, 32\] instead of \[32, 256\]",
    ),
    "impossible shape": (
        edit_config(num_key_value_heads=3),
        r"config\.json: num_attention_heads 4 is not a multiple",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_that_names_it(saved: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(saved)
    with pytest.raises(UserError) as raised:
        checkpoint.load(saved)

    assert re.search(message, str(raised.value))
    assert str(saved) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.cure


def test_missing_directory_shard_and_index_entries_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint directory"):
        checkpoint.load(tmp_path / "nowhere")

    checkpoint.save(Llama(CONFIG), tmp_path / "m", shard_bytes=SHARDED)
    gone = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    gone.unlink()

    with pytest.raises(UserError, match=re.escape(gone.name)):
        checkpoint.load(tmp_path / "m")

    (tmp_path / "m" / checkpoint.INDEX).write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        checkpoint.load(tmp_path / "m")


def test_harmless_extras_of_old_conversions_are_ignored(saved: Path) -> None:
    edit_weights(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )(saved)
    assert same(checkpoint.load(saved), Llama(CONFIG, seed=1))


def test_a_tied_head_in_the_file_must_equal_the_embeddings(saved: Path) -> None:
    edit_config(tie_word_embeddings=True)(saved)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        checkpoint.load(saved)

    tensors = load_file(saved / checkpoint.WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, saved / checkpoint.WEIGHTS)
    assert checkpoint.load(saved).lm_head is None


def test_same_seed_same_weights_and_the_documented_deviations() -> None:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = Llama(config, seed=1)
    torch.manual_seed(1)
    assert same(model, Llama(config, seed=1))
    assert not same(model, Llama(config, seed=2))

    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            expected = 0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_only_models_of_this_package_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        checkpoint.save(torch.nn.Linear(1, 1), tmp_path / "m")

    checkpoint.save(Scorer(CONFIG), tmp_path / "scorer")
    assert json.loads((tmp_path / "scorer" / "config.json").read_text())["num_labels"] == 1


def test_a_folder_whose_name_is_not_utf8_is_read_like_any_other(base, tmp_path):
    """Old disks and archives have such names; the library of the format takes none of them."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(base, folder)
    for name, value in checkpoint.load(base).state_dict().items():
        assert torch.equal(checkpoint.load(folder).state_dict()[name], value), name
