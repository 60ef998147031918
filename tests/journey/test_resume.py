"""Every stage that trains, stopped by a signal or killed at any step, ends with the bytes of the
run never stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import in_a_process, llama2

from llama2.runs import WARNINGS, Run, read_metrics

Words = tuple[object, ...]
SAVE = (
    "--training.plan.save-every",
    3,
    "--training.plan.log-every",
    2,
    "--training.optimizer.learning-rate",
    1e-3,
)


@pytest.fixture(scope="session")
def shards(shared: Path, world: Path, tokenizer: Any) -> Path:
    documents, tokens = shared / "clean", shared / "shards"
    assert (
        llama2(
            "clean",
            "--out",
            documents,
            "--heldout",
            0.1,
            "--sources.stories.path",
            world / "documents/stories.jsonl",
            "--sources.lists.path",
            world / "documents/lists.jsonl",
        )
        == 0
    )
    assert (
        llama2(
            "tokenize",
            "--out",
            tokens,
            "--documents",
            documents,
            "--tokenizer",
            shared / "tokenizer",
        )
        == 0
    )

    return tokens


@pytest.fixture(scope="session")
def commands(
    base: Path,
    policy: Path,
    scorers: tuple[Path, Path],
    preferences: Path,
    prompts: Path,
    world: Path,
    shards: Path,
) -> dict[str, Words]:
    """A short run of each stage that trains: about a dozen updates."""
    helpful, safe = scorers
    return {
        "pretrain": (
            "pretrain",
            "--shards",
            shards,
            "--size",
            "tiny",
            "--architecture.hidden_size",
            32,
            "--architecture.num_hidden_layers",
            2,
            "--architecture.intermediate_size",
            48,
            "--sequence-length",
            64,
            "--batch-size",
            4,
            "--micro-batch-size",
            3,
            "--training.plan.max-steps",
            11,
            "--training.plan.warmup-steps",
            2,
            "--training.plan.validate-every",
            4,
            *SAVE,
        ),
        "sft": (
            "sft",
            "--model",
            base,
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--sequence-length",
            128,
            "--batch-size",
            4,
            "--micro-batch-size",
            3,
            "--heldout",
            0.1,
            "--training.plan.max-steps",
            11,
            *SAVE,
        ),
        "reward": (
            "reward",
            "--model",
            policy,
            "--preferences.all.path",
            preferences,
            "--heldout.all.path",
            preferences,
            "--batch-size",
            12,
            "--micro-batch-size",
            5,
            "--auxiliary-weight",
            0.5,
            *SAVE,
        ),
        # four updates an iteration, so that every third step is inside of one
        "ppo": (
            "ppo",
            "--policy",
            policy,
            "--rewards.helpful",
            helpful,
            "--rewards.safe",
            safe,
            "--prompts",
            prompts,
            "--heldout",
            prompts,
            "--heldout-limit",
            6,
            "--iterations",
            3,
            "--batch-size",
            8,
            "--minibatch-size",
            4,
            "--micro-batch-size",
            3,
            "--epochs",
            2,
            "--validate-iterations",
            1,
            "--sample.max-tokens",
            24,
            *SAVE,
        ),
    }


@pytest.fixture(scope="session")
def whole(shared: Path, commands: dict[str, Words]) -> Path:
    """Each stage once, never stopped."""
    for verb, words in commands.items():
        assert llama2(*words, "--out", shared / "whole" / verb) == 0

    return shared / "whole"


def content(run: Path) -> dict[str, Any]:
    """What a finished run holds, measured times aside."""
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in sorted(run.iterdir())
        if path.is_file()
        and path.name not in ("manifest.json", "COMPLETE", "metrics.jsonl", ".lock")
    }
    timed = ("perf/", "time/")
    found["metrics"] = [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in read_metrics(run)
    ]
    found["outputs"] = json.loads((run / "COMPLETE").read_text())["outputs"]

    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
@pytest.mark.parametrize("verb", ["pretrain", "sft", "reward", "ppo"])
def test_a_run_stopped_twice_is_the_run_never_stopped(
    tmp_path, whole, commands, verb, number, capsys
):
    words = (*commands[verb], "--out", tmp_path / verb)
    for step in (2, 7):  # before the first checkpoint, and inside of PPO's second iteration
        status = in_a_process(tmp_path / "log", *words, number=number, step=step)
        log = (tmp_path / "log").read_text()
        if number == signal.SIGTERM:
            assert status == 0, log
            assert (
                log.splitlines()[-1]
                == f"llama2: stopped after step {step + 1}; the same command resumes"
            )
        else:
            assert status == -signal.SIGKILL, log

        assert not (tmp_path / verb / "COMPLETE").exists()

    capsys.readouterr()
    assert llama2(*words) == 0
    heard = capsys.readouterr()
    assert heard.err.splitlines()[0] == f"{tmp_path / verb}: resuming"
    assert heard.out == f"{tmp_path / verb}\n"
    expected, found = content(whole / verb), content(tmp_path / verb)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not (tmp_path / verb / "checkpoints").exists()


@pytest.mark.parametrize("verb", ["pretrain", "sft", "reward", "ppo"])
def test_stopped_between_the_last_step_and_the_end_nothing_is_trained_again(
    tmp_path, whole, commands, verb, monkeypatch, capsys
):
    """Measuring a reward model takes long at size; being killed there must not cost the
    training."""
    words = (*commands[verb], "--out", tmp_path / verb)

    def killed(run: Run, name: str, value: object) -> None:
        if name != WARNINGS:  # those come before training
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llama2.runs.run.Run.write_json", killed)
        assert llama2(*words) == 130

    capsys.readouterr()
    assert llama2(*words) == 0
    assert "ETA" not in capsys.readouterr().err  # no progress: nothing to train
    expected, found = content(whole / verb), content(tmp_path / verb)
    assert [name for name in expected if found[name] != expected[name]] == []
