"""The network and its files against transformers, on random weights: what one writes the other must
read alike."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from llama2.formats import checkpoint
from llama2.kernels import fused, install
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer

transformers.utils.logging.disable_progress_bar()


def config(kv_heads: int = 2, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


def theirs(
    shape: LlamaConfig, kind: type = transformers.LlamaForCausalLM, **extra: object
) -> nn.Module:
    values = {
        name: getattr(shape, name)
        for name in LlamaConfig.__dataclass_fields__
        if name != "rope_theta"
    }
    torch.manual_seed(0)
    # A wide initialisation, so that attention is far from uniform and logits are of order one.
    model = kind(
        transformers.LlamaConfig(
            **values,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            initializer_range=0.2,
            pad_token_id=0,
            **extra,
        )
    ).eval()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))

    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("length", [37, 2048])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_logits_equal_transformers(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, length: int
) -> None:
    monkeypatch.setattr(fused, "supports", lambda x: False)
    hf = theirs(config(kv_heads))
    ours = install(Llama(config(kv_heads)))
    ours.load_state_dict(hf.state_dict())
    tokens_BT = tokens(2 if length < 100 else 1, length)
    expected = hf(tokens_BT).logits
    assert expected.std() > 0.5
    assert distance(ours(tokens_BT), expected) < 1e-5


@pytest.mark.parametrize("length", [37, 400])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_our_kernels_err_no_more_than_transformers(kv_heads: int, length: int) -> None:
    """They sum in another order, so what they are held to is the distance from the truth in
    fp64."""
    hf = theirs(config(kv_heads))
    ours = install(Llama(config(kv_heads)))
    ours.load_state_dict(hf.state_dict())
    tokens_BT = tokens(2, length)
    truth = hf.double()(tokens_BT).logits.float()
    expected = hf.float()(tokens_BT).logits
    assert distance(ours(tokens_BT), truth) < max(1e-5, 2 * distance(expected, truth))


def test_logits_agree_at_positions_beyond_the_first_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hf = theirs(config())
    ours = install(Llama(config()))
    ours.load_state_dict(hf.state_dict())
    positions_BT = torch.arange(4000, 4064)[None]
    expected = hf(tokens(1, 64), position_ids=positions_BT).logits
    assert distance(ours(tokens(1, 64), positions_BT=positions_BT), expected) < 3e-5
    monkeypatch.setattr(fused, "supports", lambda x: False)
    assert distance(ours(tokens(1, 64), positions_BT=positions_BT), expected) < 1e-5


def test_bf16_logits_agree_to_its_rounding() -> None:
    """Both sides in bf16 stay within 3 % of the spread of the fp32 logits on average, and agree on
    the best token where it leads clearly."""
    hf = theirs(config())
    ours = install(Llama(config()))
    ours.load_state_dict(hf.state_dict())
    tokens_BT = tokens(2, 100)
    exact = hf(tokens_BT).logits

    with torch.autocast("cpu", torch.bfloat16):
        autocast = ours(tokens_BT)

    pure = ours.to(torch.bfloat16)(tokens_BT)
    theirs_pure = hf.to(torch.bfloat16)(tokens_BT).logits.float()
    for logits in (autocast, pure, theirs_pure):
        assert (logits - exact).abs().mean() < 0.03 * exact.std()

    first, second = exact.topk(2).values.unbind(-1)
    clear = first - second > 0.5 * exact.std()
    assert clear.sum() > 20
    assert torch.equal(autocast.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one-file", "shards"])
def test_we_load_what_transformers_writes(tmp_path: Path, tied: bool, shard: str) -> None:
    hf = theirs(config(tied=tied))
    hf.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / checkpoint.INDEX).exists() == (shard == "60KB")
    ours = checkpoint.load(tmp_path)
    assert ours.config == config(tied=tied)
    expected = hf(tokens(2, 20)).logits
    assert distance(ours(tokens(2, 20)), expected) < 3e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 60_000], ids=["one-file", "shards"])
def test_transformers_loads_what_we_write(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    ours = Llama(config(tied=tied), seed=3)
    checkpoint.save(ours, tmp_path, shard_bytes=shard_bytes)
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert isinstance(hf, transformers.LlamaForCausalLM)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.dtype == torch.float32
    assert distance(ours(tokens(2, 20)), hf(tokens(2, 20)).logits) < 1e-6


def test_rope_theta_and_precision_survive_both_ways(tmp_path: Path) -> None:
    shape = LlamaConfig(**{**config().__dict__, "rope_theta": 50000.0})
    ours = Llama(shape)
    checkpoint.save(ours, tmp_path / "ours", dtype=torch.bfloat16)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert hf.dtype == torch.bfloat16
    assert hf.config.rope_parameters["rope_theta"] == 50000.0
    hf.float().save_pretrained(tmp_path / "theirs")
    assert checkpoint.config_of(tmp_path / "theirs") == shape


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens_BT = tokens(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        tokens_BT[row, length:] = 0

    return tokens_BT, torch.tensor(lengths)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_scores_equal_transformers_both_ways(tmp_path: Path, tied: bool) -> None:
    tokens_BT, lengths_B = padded([9, 23, 1, 16])
    hf = theirs(config(tied=tied), transformers.LlamaForSequenceClassification, num_labels=1)
    hf.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load_scorer(tmp_path / "theirs")
    expected = hf(tokens_BT).logits[:, 0]
    assert expected.std() > 0.1
    assert distance(ours(tokens_BT, lengths_B=lengths_B), expected) < 1e-5

    fresh = Scorer(config(tied=tied), seed=4)
    checkpoint.save(fresh, tmp_path / "ours")
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert isinstance(again, transformers.LlamaForSequenceClassification)
    assert again.num_labels == 1
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert distance(fresh(tokens_BT, lengths_B=lengths_B), again(tokens_BT).logits[:, 0]) < 1e-6


def test_config_has_both_spellings_of_renamed_keys(tmp_path: Path) -> None:
    checkpoint.save(Llama(config()), tmp_path, dtype=torch.bfloat16)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 10000.0


# --- config.json of others ---
LEAST = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
ACCEPTED: dict[str, dict[str, object]] = {
    "absent": {},
    "nulls": {
        "num_key_value_heads": None,
        "rope_scaling": None,
        "pad_token_id": None,
        "head_dim": None,
    },
    "at the top": {
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-3,
        "num_key_value_heads": 2,
        "max_position_embeddings": 99,
    },
    "in its section": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "in both places": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
    "linear by 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "dynamic by 1": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
    "llama3 by 1": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 1.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "swish": {"hidden_act": "swish"},
    "tied": {"tie_word_embeddings": True},
    "several ends": {"eos_token_id": [2, 5], "bos_token_id": 3},
    "of training": {"attention_dropout": 0.3, "pretraining_tp": 2, "initializer_range": 0.5},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_config_that_is_taken_means_what_transformers_takes_it_for(
    tmp_path: Path, name: str
) -> None:
    """Small weights, so that the epsilon counts."""
    (tmp_path / "config.json").write_text(json.dumps(LEAST | ACCEPTED[name]))
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(tmp_path)).eval()

    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(0.002 * torch.randn(96, 64))

    save_file(
        {key: value.clone() for key, value in hf.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    ours, expected = checkpoint.load(tmp_path), hf(tokens(2, 90)).logits
    assert distance(ours(tokens(2, 90)), expected) < 1e-4 * expected.abs().max()
    theirs, mine = hf.config, ours.config
    assert (
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
        theirs.bos_token_id,
        theirs.tie_word_embeddings,
    ) == (
        mine.rms_norm_eps,
        mine.max_position_embeddings,
        mine.bos_token_id,
        mine.tie_word_embeddings,
    )
    assert theirs.eos_token_id == (
        mine.eos_token_id if isinstance(mine.eos_token_id, int) else list(mine.stops)
    )
    assert theirs.rope_parameters["rope_theta"] == mine.rope_theta


def test_a_config_means_what_transformers_4_takes_it_for(tmp_path: Path) -> None:
    """transformers 5 renamed and moved keys; the values of absent ones are the same."""
    python = os.environ.get("LLAMA2_PEER_TRANSFORMERS4")
    if not python:
        pytest.skip("LLAMA2_PEER_TRANSFORMERS4 names no interpreter with transformers 4")

    fields = [
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    ]
    for name, changes in ACCEPTED.items():
        if "rope_parameters" in changes:
            continue  # unknown to it

        (tmp_path / "config.json").write_text(json.dumps(LEAST | changes))
        code = (
            f"import json, transformers; c = transformers.LlamaConfig.from_pretrained({str(tmp_path)!r}); "
            f"print(json.dumps([getattr(c, name) for name in {fields}]))"
        )
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        told = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True, env=environment
        )
        found = checkpoint.config_of(tmp_path)
        mine = [getattr(found, field) for field in fields]
        mine[-1] = mine[-1] if isinstance(mine[-1], int) else list(mine[-1])
        assert json.loads(told.stdout.splitlines()[-1]) == mine, name


@pytest.mark.parametrize("ends", [2, (2, 5, 7)])
def test_transformers_ends_answers_where_we_do(tmp_path: Path, ends: int | tuple[int, ...]) -> None:
    checkpoint.save(Llama(replace(config(), eos_token_id=ends)), tmp_path)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        hf.generation_config.eos_token_id
        == hf.config.eos_token_id
        == (ends if isinstance(ends, int) else list(ends))
    )
