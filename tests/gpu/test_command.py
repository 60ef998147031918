"""The commands on a GPU: SFT, a reward model, rejection sampling and PPO, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SHORT = (
    "--training.plan.max-steps",
    6,
    "--training.plan.warmup-steps",
    1,
    "--training.optimizer.learning-rate",
    3e-3,
)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "extra",
    [(), ("--training.gradient-checkpointing",), ("--training.precision", "fp32")],
    ids=["bf16", "recomputed", "fp32"],
)
def test_sft(checkpoints, llama2, tmp_path: Path, record_property, extra) -> None:
    out = tmp_path / "sft"
    assert (
        llama2(
            "sft",
            "--model",
            checkpoints.base,
            "--dialogs.all.path",
            checkpoints.dialogs,
            "--out",
            out,
            "--sequence-length",
            128,
            "--batch-size",
            8,
            *SHORT,
            "--training.plan.log-every",
            1,
            *extra,
        )
        == 0
    )
    losses = [row["train/loss"] for row in metrics(out) if "train/loss" in row]
    record_property("loss, first and last", f"{losses[0]:.3f} {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    assert (out / "model.safetensors").is_file()


def test_reward(checkpoints, llama2, tmp_path: Path) -> None:
    out = tmp_path / "helpful"
    assert (
        llama2(
            "reward",
            "--model",
            checkpoints.base,
            "--preferences.all.path",
            checkpoints.preferences,
            "--out",
            out,
            "--batch-size",
            16,
            *SHORT[:2],
        )
        == 0
    )
    assert (out / "model.safetensors").is_file()


def test_rejection(checkpoints, llama2, tmp_path: Path) -> None:
    out = tmp_path / "rejection"
    assert (
        llama2(
            "rejection",
            "--policy",
            checkpoints.base,
            "--rewards.helpful",
            checkpoints.helpful,
            "--prompts",
            checkpoints.prompts,
            "--limit",
            6,
            "--sample.max-tokens",
            16,
            "--out",
            out,
        )
        == 0
    )
    assert (out / "summary.json").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_iteration_of_ppo(
    checkpoints, llama2, tmp_path: Path, record_property, precision
) -> None:
    out = tmp_path / "ppo"
    assert (
        llama2(
            "ppo",
            "--policy",
            checkpoints.base,
            "--rewards.helpful",
            checkpoints.helpful,
            "--prompts",
            checkpoints.prompts,
            "--iterations",
            1,
            "--batch-size",
            16,
            "--minibatch-size",
            16,
            "--micro-batch-size",
            8,
            "--sample.max-tokens",
            24,
            "--training.precision",
            precision,
            "--sample.precision",
            precision,
            "--out",
            out,
        )
        == 0
    )
    found = {name: value for row in metrics(out) for name, value in row.items()}

    for name in ("ppo/ratio_deviation", "ppo/kl_reference", "ppo/engine_gap", "ppo/clip_fraction"):
        record_property(name, f"{found[name]:.2e}")

    assert abs(found["ppo/ratio_deviation"]) < 1e-3
    assert (out / "model.safetensors").is_file()
