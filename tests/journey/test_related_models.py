"""Llama 2's relatives through the commands: imported, trained, scored, sampled, exported, verified;
what a format does not have is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import llama2
from sources import model_of

from llama2.formats import checkpoint
from llama2.model.config import LlamaConfig
from llama2.model.rope import RopeScaling
from llama2.tokenizer import Tokenizer

PLAIN = LlamaConfig(420, 32, 48, 2, 4, 2, max_position_embeddings=256)
MIXED = replace(
    PLAIN,
    head_dim=12,
    attention_bias=True,
    rope_scaling=RopeScaling("yarn", 4.0, 64),
    tie_word_embeddings=True,
)
LLAMA_3 = replace(PLAIN, rope_scaling=RopeScaling("llama3", 8.0, 8192), rope_theta=5e5)
DYNAMIC = replace(PLAIN, rope_scaling=RopeScaling("dynamic", 4.0, 64))


def saved(shape: LlamaConfig, directory: Path, tokenizer: Tokenizer) -> Path:
    checkpoint.save(model_of(shape), directory)
    tokenizer.save(directory)
    return directory


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("shape", [MIXED, LLAMA_3], ids=["mixed", "llama3"])
def test_a_relative_goes_out_and_comes_in(
    tmp_path: Path, tokenizer: Tokenizer, shape: LlamaConfig, form: str
) -> None:
    model, out = saved(shape, tmp_path / "model", tokenizer), tmp_path / "out"
    assert llama2("export", model, "--to", form, "--out", out) == 0
    written = out if form == "hf" else out / "model-f32.gguf"
    assert llama2("import", written, "--out", tmp_path / "again") == 0
    assert checkpoint.config_of(tmp_path / "again") == shape
    assert llama2("verify", model, tmp_path / "again") == 0


def test_llama_3_goes_out_and_comes_in_as_meta_has_it(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(replace(LLAMA_3, max_position_embeddings=4096), tmp_path / "model", tokenizer)
    assert llama2("export", model, "--to", "meta", "--out", tmp_path / "meta") == 0
    assert "use_scaled_rope, which Llama 3's code reads" in capsys.readouterr().err
    parameters = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert parameters["use_scaled_rope"] is True

    assert llama2("import", tmp_path / "meta", "--out", tmp_path / "again") == 0
    assert "the factor is 8; Llama 3.2's models of 1B and 3B have 32" in capsys.readouterr().err
    assert llama2("verify", model, tmp_path / "again") == 0


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        (
            "meta",
            MIXED,
            "Meta's code does not have 4 heads of size 12, biases in attention, rotary",
        ),
        ("meta", DYNAMIC, r"does not have rotary positions scaled by 'dynamic' \(factor 4\)"),
        (
            "llama2c",
            MIXED,
            "llama2.c does not have 4 heads of size 12, biases in attention, rotary",
        ),
        ("llama2c", LLAMA_3, r"does not have rotary positions scaled by 'llama3' \(factor 8\)"),
        ("gguf", DYNAMIC, "scaled by 'dynamic', which llama.cpp does not read of a file"),
    ],
    ids=["meta", "meta-dynamic", "llama2c", "llama2c-llama3", "gguf-dynamic"],
)
def test_what_a_format_does_not_have_is_refused(
    tmp_path: Path,
    tokenizer: Tokenizer,
    one_line: Callable[..., str],
    form: str,
    shape: LlamaConfig,
    message: str,
) -> None:
    model = saved(shape, tmp_path / "model", tokenizer)
    told = one_line("export", model, "--to", form, "--out", tmp_path / "out")
    assert message.replace("\\", "") in told
    assert not (tmp_path / "out").exists()


def test_two_scalings_are_two_models(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(LLAMA_3, tmp_path / "model", tokenizer)
    scaling = RopeScaling("llama3", 32.0, 8192)
    other = saved(replace(LLAMA_3, rope_scaling=scaling), tmp_path / "other", tokenizer)
    assert llama2("verify", model, other) == 1
    assert "rope_scaling" in capsys.readouterr().out


def test_every_kind_of_stage_takes_a_relative(
    tmp_path: Path, tokenizer: Tokenizer, world: Path, preferences: Path, prompts: Path
) -> None:
    """Fine-tuning, a reward model on the tied trunk, and sampling judged by it."""
    model = saved(MIXED, tmp_path / "model", tokenizer)
    few = ["--training.plan.max-steps", 2, "--training.plan.warmup-steps", 1]
    dialogs = ["--dialogs.all.path", world / "demonstrations.jsonl", "--sequence-length", 128]
    sft = tmp_path / "sft"
    assert llama2("sft", "--model", model, *dialogs, "--batch-size", 4, *few, "--out", sft) == 0
    judged = ["--preferences.a.path", preferences, "--preferences.a.axis", "helpful"]
    reward = tmp_path / "reward"
    assert llama2("reward", "--model", sft, *judged, "--batch-size", 8, *few, "--out", reward) == 0
    best = tmp_path / "best"
    sampled = ["--prompts", prompts, "--limit", 4, "--k", 2, "--temperatures", "1.0"]
    assert (
        llama2(
            "rejection",
            "--policy",
            sft,
            "--rewards.helpful",
            reward,
            "--rewards.safe",
            reward,
            *sampled,
            "--sample.max-tokens",
            16,
            "--out",
            best,
        )
        == 0
    )
    for run in (sft, reward):
        assert checkpoint.config_of(run) == MIXED


def test_a_dry_run_says_what_computes_a_shape(
    tmp_path: Path, tokenizer: Tokenizer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for name, shape in (("plain", PLAIN), ("mixed", MIXED)):
        model = saved(shape, tmp_path / name, tokenizer)
        words = ["--dialogs.all.path", world / "demonstrations.jsonl", "--out", tmp_path / "out"]
        assert llama2("sft", "--model", model, *words, "--dry-run") == 0
        paths[name] = yaml.safe_load(capsys.readouterr().out)["on_a_cpu"]

    assert paths == {
        "plain": "C++ kernels",
        "mixed": "PyTorch in attention and decoding (biases), C++ kernels elsewhere",
    }
