"""Adapters merged into their base: sums worked out by hand, every option that changes them, and
what is refused."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import model_of, same, scorer_of, source_of, state
from torch import Tensor

from llama2.errors import UserError
from llama2.formats import hf, peft
from llama2.formats.detect import open_model
from llama2.model.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
QUERY, DOWN, TABLE, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
)
PREFIX = "base_model.model."
State = dict[str, Tensor]


def pair(module: str, inputs: int, outputs: int, rank: int = 4) -> State:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


PAIRS = pair(QUERY, 16, 16) | pair(DOWN, 24, 16)


def adapter(directory: Path, tensors: State = PAIRS, **settings: object) -> Path:
    directory.mkdir()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "base_model_name_or_path": str(directory.parent / "base"),
        "fan_in_fan_out": False,
        "use_dora": False,
        "target_modules": ["q_proj", "down_proj"],
        "inference_mode": True,
    } | settings
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "adapter_model.safetensors")

    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hf.write(source_of(model_of(CONFIG), tmp_path), tmp_path / "base")
    return tmp_path / "base"


def merged_by_hand(base: Path, scales: dict[str, float], tensors: State = PAIRS) -> State:
    """W + s · B·A in double precision, one element after another, rounded to the kind of W."""
    found = state(hf.read(base))
    for module, scale in scales.items():
        a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].tolist() for letter in "AB")
        weight = found[f"{module}.weight"]
        summed = [
            [
                value + scale * math.fsum(b[o][r] * a[r][i] for r in range(len(a)))
                for i, value in enumerate(row)
            ]
            for o, row in enumerate(weight.tolist())
        ]
        found[f"{module}.weight"] = torch.tensor(summed, dtype=torch.float64).to(weight.dtype)

    return found


def close(found: State, expected: State, steps: float = 4) -> bool:
    """Equal but for the rounding of fp32 sums; what has no adapter is equal."""
    return found.keys() == expected.keys() and all(
        torch.allclose(
            found[name],
            expected[name],
            rtol=steps * torch.finfo(expected[name].dtype).eps,
            atol=1e-6,
        )
        for name in found
    )


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {QUERY: 1.5, DOWN: 1.5}),
        ({"use_rslora": True}, {QUERY: 3.0, DOWN: 3.0}),
        ({"alpha_pattern": {"q_proj": 8}}, {QUERY: 2.0, DOWN: 1.5}),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 2, "proj": 99}}, {QUERY: 1.5, DOWN: 0.5}),
        ({"alpha_pattern": {r"model\.layers\.\d+\.self_attn\..*": 2}}, {QUERY: 0.5, DOWN: 1.5}),
        ({"rank_pattern": {"q_proj": 4}, "r": 2, "alpha_pattern": {"down_proj": 1}}, {QUERY: 1.5}),
        ({"fan_in_fan_out": True}, {QUERY: 1.5, DOWN: 1.5}),
        (
            {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "bias": "all"},
            {QUERY: 1.5, DOWN: 1.5},
        ),
    ],
)
def test_the_sum_is_the_one_that_was_trained(
    tmp_path: Path, base: Path, settings: dict[str, object], scales: dict[str, float]
) -> None:
    tensors = {
        name: tensor for name, tensor in PAIRS.items() if any(module in name for module in scales)
    }
    path = adapter(tmp_path / "adapter", tensors, **settings)
    assert close(state(open_model(path)), merged_by_hand(base, scales))
    before = state(hf.read(base))
    assert not torch.allclose(
        state(open_model(path))[f"{QUERY}.weight"], before[f"{QUERY}.weight"], atol=0.1
    )


def test_a_rank_of_its_own(tmp_path: Path, base: Path) -> None:
    tensors = pair(QUERY, 16, 16, rank=2) | pair(DOWN, 24, 16)
    path = adapter(tmp_path / "adapter", tensors, rank_pattern={"q_proj": 2})
    assert close(state(open_model(path)), merged_by_hand(base, {QUERY: 3.0, DOWN: 1.5}, tensors))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_sum_is_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(peft, "_CHUNK", 16 * rows)
    hf.write(source_of(model_of(CONFIG, torch.bfloat16), tmp_path), tmp_path / "base")
    tensors = pair(QUERY, 16, 16)
    path = adapter(tmp_path / "adapter", tensors)
    weight, (a, b) = state(hf.read(tmp_path / "base"))[f"{QUERY}.weight"], tensors.values()
    exact = weight.double() + 1.5 * b.double() @ a.double()

    for dtype, source in (
        (torch.bfloat16, open_model(path)),
        (torch.float32, open_model(path, dtype=torch.float32)),
    ):
        stored = source.tensors[f"{QUERY}.weight"]
        found = stored.read()
        assert stored.dtype == found.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6
        assert bool(((found.double() - exact).abs() <= half_a_step).all())

    assert {stored.dtype for stored in open_model(path).tensors.values()} == {torch.bfloat16}


def test_a_table_of_embeddings_lies_the_other_way_round(tmp_path: Path, base: Path) -> None:
    a, b = torch.randn(4, 40), torch.randn(16, 4)
    path = adapter(
        tmp_path / "adapter",
        {f"{PREFIX}{TABLE}.lora_embedding_A": a, f"{PREFIX}{TABLE}.lora_embedding_B": b},
    )
    found, before = (
        state(open_model(path))[f"{TABLE}.weight"],
        state(hf.read(base))[f"{TABLE}.weight"],
    )

    for token in (0, 7, 39):
        assert torch.allclose(found[token], before[token] + 1.5 * (b @ a[:, token]), atol=1e-5)


def test_weights_trained_as_they_are_take_the_place_of_the_base(tmp_path: Path, base: Path) -> None:
    larger = {
        f"{PREFIX}{TABLE}.weight": torch.randn(42, 16),
        f"{PREFIX}{HEAD}.modules_to_save.weight": torch.randn(42, 16),
        f"{PREFIX}model.norm.weight": torch.randn(16).half(),
    }
    found = open_model(adapter(tmp_path / "adapter", PAIRS | larger, modules_to_save=[TABLE, HEAD]))
    assert found.config == replace(CONFIG, vocab_size=42)
    weights = state(found)
    assert torch.equal(weights[f"{TABLE}.weight"], larger[f"{PREFIX}{TABLE}.weight"])
    assert torch.equal(weights[f"{HEAD}.weight"], larger[f"{PREFIX}{HEAD}.modules_to_save.weight"])
    assert torch.equal(weights["model.norm.weight"], larger[f"{PREFIX}model.norm.weight"].float())


def test_an_adapter_on_a_weight_that_came_with_it(tmp_path: Path, base: Path) -> None:
    whole = {f"{PREFIX}{QUERY}.base_layer.weight": torch.randn(16, 16)}
    tensors = pair(QUERY, 16, 16)
    a, b = tensors.values()
    found = state(open_model(adapter(tmp_path / "adapter", tensors | whole)))[f"{QUERY}.weight"]
    assert torch.allclose(found, *whole.values(), atol=0) is False
    assert torch.allclose(
        found, whole[f"{PREFIX}{QUERY}.base_layer.weight"] + 1.5 * b @ a, atol=1e-5
    )


def test_a_reward_model_of_a_language_model(tmp_path: Path, base: Path) -> None:
    score = {f"{PREFIX}score.weight": torch.randn(1, 16)}
    found = open_model(adapter(tmp_path / "adapter", PAIRS | score, task_type="SEQ_CLS"))
    assert found.scorer
    expected = merged_by_hand(base, {QUERY: 1.5, DOWN: 1.5}) | {
        "score.weight": score[f"{PREFIX}score.weight"]
    }
    del expected["lm_head.weight"]
    assert close(state(found), expected)
    hf.write(source_of(scorer_of(CONFIG), tmp_path), tmp_path / "scorer")
    assert open_model(tmp_path / "adapter", base=tmp_path / "scorer").scorer


def test_pickled_adapters_and_a_base_that_is_named(tmp_path: Path, base: Path) -> None:
    path = adapter(tmp_path / "adapter", base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    torch.save(PAIRS, path / "adapter_model.bin")
    expected = state(open_model(path, base=base))
    (path / "adapter_model.safetensors").unlink()
    assert same(state(open_model(path, base=base)), expected)

    with pytest.raises(
        UserError, match="'meta-llama/Llama-2-7b-hf' is not on this machine; name its place: --base"
    ):
        open_model(path)

    with pytest.raises(UserError, match="only an adapter has a base"):
        open_model(base, base=base)

    with pytest.raises(UserError, match="this is an adapter, too"):
        open_model(path, base=path)


def test_its_tokenizer_goes_before_that_of_the_base(tmp_path: Path, base: Path) -> None:
    path = adapter(tmp_path / "adapter")
    assert open_model(path).tokenizer is None
    (base / "tokenizer.model").write_bytes(b"pieces")
    assert str(open_model(path).tokenizer) == str(base / "tokenizer.model")
    (path / "tokenizer.model").write_bytes(b"pieces")
    assert str(open_model(path).tokenizer) == str(path / "tokenizer.model")


def test_what_ends_its_answers_is_added_to_what_ends_those_of_the_base(
    tmp_path: Path, base: Path
) -> None:
    path = adapter(tmp_path / "adapter")
    assert open_model(path).config.stops == (2,)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 39}))
    assert open_model(path).config.stops == (39, 2)
    # which the model cannot say
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 40}))
    assert open_model(path).config.stops == (2,)


SETTINGS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"use_dora": True}, "use_dora is True"),
    ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"never_heard_of": {"a": 1}}, "never_heard_of"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
    ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ({"alpha_pattern": {"(": 1}}, r"alpha_pattern has '\('"),
    ({"r": math.inf}, "r is inf; a finite number"),
    ({"r": 4.5}, "r is 4.5; a whole number above 0"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan; a finite number"),
    ({"r": 10**400}, "r is inf; a finite number"),
    ({"r": True}, "r is True; a finite number"),
    (
        {"alpha_pattern": {"q_proj": -math.inf}},
        "alpha_pattern of 'q_proj' is -inf; a finite number",
    ),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0; a whole number above 0"),
    ({"rank_pattern": {"q_proj": [4]}}, r"rank_pattern of 'q_proj' is \[4\]; a finite number"),
    ({"r": "4"}, "r is '4'"),
    ({"r": None}, "r is None"),
    ({"r": 0}, "r is 0; a whole number above 0"),
    ({"lora_alpha": None}, "lora_alpha is None"),
    ({"r": 8}, r"q_proj\.lora_A\.weight' is \[4, 16\] instead of \[8, 16\]"),
]


@pytest.mark.parametrize(
    ("settings", "message"), SETTINGS, ids=[message for _, message in SETTINGS]
)
def test_other_sums_are_refused_by_name(
    tmp_path: Path, base: Path, settings: dict[str, object], message: str
) -> None:
    path = adapter(tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=message) as raised:
        open_model(path)

    assert str(path) in str(raised.value)


def drop(name: str) -> Callable[[State], Any]:
    return lambda tensors: tensors.pop(f"{PREFIX}{name}")


def put(name: str, *shape: int) -> Callable[[State], Any]:
    return lambda tensors: tensors.update({f"{PREFIX}{name}": torch.ones(shape)})


FAULTS = [
    (drop(f"{QUERY}.lora_B.weight"), f"{QUERY} has no lora_B"),
    (
        put("model.layers.7.mlp.up_proj.lora_A.weight", 4, 16),
        "has no model.layers.7.mlp.up_proj.weight",
    ),
    (put("model.extra.weight", 3), "1 unknown: model.extra.weight"),
    (put(f"{QUERY}.lora_magnitude_vector", 16), "this is no part of a plain LoRA adapter"),
    (put(f"{QUERY}.lora_B.bias", 16), "this is no part of a plain LoRA adapter"),
    (put(f"{QUERY}.lora_B.weight", 17, 4), "is [17, 4] instead of [16, 4]"),
    (
        put(f"{TABLE}.weight", 41, 16),
        "1 wrongly shaped: lm_head.weight [40, 16] instead of [41, 16]",
    ),
    (
        lambda tensors: tensors.clear() or put("lm_head.weight", 40, 16)(tensors),
        "there is no adapter in it",
    ),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, base: Path, damage: Callable[[State], Any], message: str
) -> None:
    tensors = dict(PAIRS)
    damage(tensors)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        open_model(adapter(tmp_path / "adapter", tensors))

    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_grown_vocabulary_is_saved_three_times_of_which_one_counts(
    tmp_path: Path, base: Path
) -> None:
    """As PEFT saves `modules_to_save` after `resize_token_embeddings`."""
    tensors = dict(PAIRS)
    for module in (TABLE, HEAD):
        trained = torch.randn(42, 16)
        tensors |= {
            f"{PREFIX}{module}.weight": trained,
            f"{PREFIX}{module}.modules_to_save.weight": trained.clone(),
            f"{PREFIX}{module}.original_module.weight": torch.randn(42, 16),
        }

    found = open_model(
        adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens", "lm_head"])
    )
    assert found.config == replace(CONFIG, vocab_size=42)
    weights = state(found)

    for module in (TABLE, HEAD):
        assert torch.equal(weights[f"{module}.weight"], tensors[f"{PREFIX}{module}.weight"])


@pytest.mark.parametrize("other", ["modules_to_save", "base_layer"])
def test_two_names_of_one_weight_must_agree(tmp_path: Path, base: Path, other: str) -> None:
    twice = {
        f"{PREFIX}{HEAD}.weight": torch.ones(40, 16),
        f"{PREFIX}{HEAD}.{other}.weight": torch.zeros(40, 16),
    }
    with pytest.raises(
        UserError, match=r"are both lm_head\.weight, and differ; save the adapter again"
    ):
        open_model(adapter(tmp_path / "adapter", PAIRS | twice))


def test_what_was_replaced_alone_is_no_adapter(tmp_path: Path, base: Path) -> None:
    alone = {f"{PREFIX}{HEAD}.original_module.weight": torch.ones(40, 16)}
    with pytest.raises(UserError, match=r"1 unknown: lm_head\.original_module\.weight"):
        open_model(adapter(tmp_path / "adapter", PAIRS | alone))


TIED = replace(CONFIG, tie_word_embeddings=True)


@pytest.fixture
def tied(tmp_path: Path) -> dict[str, Tensor]:
    """A base that shares its embeddings with its output."""
    hf.write(source_of(model_of(TIED), tmp_path), tmp_path / "base")
    return state(hf.read(tmp_path / "base"))


def test_shared_tables_that_grew_alike_stay_shared(tmp_path: Path, tied: State) -> None:
    table = torch.randn(42, 16)
    both = {f"{PREFIX}{TABLE}.weight": table, f"{PREFIX}{HEAD}.weight": table.clone()}
    found = open_model(adapter(tmp_path / "adapter", PAIRS | both))
    assert found.config == replace(TIED, vocab_size=42)
    assert "lm_head.weight" not in found.tensors
    assert torch.equal(state(found)[f"{TABLE}.weight"], table)
    assert open_model(adapter(tmp_path / "plain", PAIRS)).config == TIED


@pytest.mark.parametrize("changed", [(TABLE,), (HEAD,), (TABLE, HEAD)], ids="+".join)
def test_shared_tables_are_parted_by_what_changes_one_of_them(
    tmp_path: Path, tied: State, changed: tuple[str, ...]
) -> None:
    new = {f"{PREFIX}{module}.weight": torch.randn(40, 16) for module in changed}
    found = open_model(adapter(tmp_path / "adapter", PAIRS | new))
    assert found.config == CONFIG

    for module in (TABLE, HEAD):
        expected = new.get(f"{PREFIX}{module}.weight", tied[f"{TABLE}.weight"])
        assert torch.equal(state(found)[f"{module}.weight"], expected)


def test_an_adapter_on_a_shared_table_is_on_one_side_alone(tmp_path: Path, tied: State) -> None:
    a, b = torch.randn(4, 40), torch.randn(16, 4)
    pair = {f"{PREFIX}{TABLE}.lora_embedding_A": a, f"{PREFIX}{TABLE}.lora_embedding_B": b}
    found = open_model(adapter(tmp_path / "adapter", pair))
    assert found.config == CONFIG
    assert torch.equal(state(found)["lm_head.weight"], tied[f"{TABLE}.weight"])
    assert torch.allclose(
        state(found)[f"{TABLE}.weight"], tied[f"{TABLE}.weight"] + 1.5 * (b @ a).T, atol=1e-5
    )


def test_a_cut_or_hostile_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    path = adapter(tmp_path / "adapter")
    file = path / "adapter_model.safetensors"
    assert load_file(file).keys() == PAIRS.keys()
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(UserError, match=r"adapter_model\.safetensors: truncated"):
        open_model(path)

    file.unlink()
    with pytest.raises(
        UserError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"
    ):
        open_model(path)

    torch.save({**PAIRS, "bomb": Bomb()}, path / "adapter_model.bin")
    with pytest.raises(UserError, match="refused"):
        open_model(path)

    assert not (tmp_path / "it ran").exists()
