"""What many tests share: a tiny world, a tokenizer, checkpoints that answer, and a check for users'
mistakes.

Everything lies in one directory a session and must not be written to; a test that changes a file
copies it first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import hypothesis
import pytest
import torch
from commands import llama2, vouch
from safetensors.torch import load_file, save_file

from llama2 import records
from llama2.formats import checkpoint
from llama2.model.llama import Llama, LlamaConfig
from llama2.records import DEGREES, Dialog, Preference, Prompt, Response
from llama2.tokenizer.tokenizer import Tokenizer
from llama2.tokenizer.train import train

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("patient")
torch.set_num_threads(1)  # tests share the machine with one another and compare bits


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def world(shared: Path) -> Path:
    """A world of 120 demonstrations and 180 prompts."""
    assert llama2("world", "--scale", 0.02, "--out", shared / "world") == 0
    return shared / "world"


@pytest.fixture(scope="session")
def tokenizer(world: Path, shared: Path) -> Tokenizer:
    dialogs = records.read(Dialog, world / "demonstrations.jsonl")
    return train(
        [f"[INST] {turn.content} [/INST]" for one in dialogs for turn in one.messages],
        420,
        shared / "tokenizer",
    )


@pytest.fixture(scope="session")
def base(shared: Path, tokenizer: Tokenizer) -> Path:
    """A language model fresh from its initialisation."""
    checkpoint.save(Llama(LlamaConfig(tokenizer.vocab_size, **SHAPE)), shared / "base")
    tokenizer.save(shared / "base")
    return shared / "base"


@pytest.fixture(scope="session")
def policy(shared: Path, base: Path, world: Path) -> Path:
    """A language model that has learnt to end its answers, and little else."""
    assert (
        llama2(
            "sft",
            "--model",
            base,
            "--dialogs.all.path",
            world / "demonstrations.jsonl",
            "--out",
            shared / "policy",
            "--sequence-length",
            192,
            "--batch-size",
            4,
            "--epochs",
            3,
            "--training.optimizer.learning-rate",
            1e-2,
            "--training.plan.warmup-steps",
            3,
        )
        == 0
    )
    return shared / "policy"


@pytest.fixture
def ruined(policy: Path, tmp_path: Path) -> Path:
    """A language model whose log-probabilities are not finite."""
    ruined = Path(shutil.copytree(policy, tmp_path / "ruined"))
    weights = load_file(ruined / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, ruined / "model.safetensors")
    (ruined / "checksums.json").unlink()
    vouch(ruined)

    return ruined


@pytest.fixture(scope="session")
def scorers(shared: Path, policy: Path, tokenizer: Tokenizer) -> tuple[Path, Path]:
    """A helpfulness and a safety model of differing opinions."""
    paths = []
    for seed, name in enumerate(("helpful", "safe")):
        scorer = checkpoint.load_scorer(policy, seed=seed)
        with torch.no_grad():
            scorer.score.weight.mul_(20)

        checkpoint.save(scorer, shared / name)
        tokenizer.save(shared / name)
        paths.append(shared / name)

    return paths[0], paths[1]


@pytest.fixture(scope="session")
def preferences(shared: Path, world: Path) -> Path:
    """Comparisons on both axes: the demonstrated answer against another prompt's."""
    dialogs = list(records.read(Dialog, world / "demonstrations.jsonl"))
    found = []
    for index, (one, other) in enumerate(pairwise(dialogs)):
        right, wrong = (Response(d.messages[-1].content) for d in (one, other))
        answers = (right, wrong) if index % 2 else (wrong, right)
        labels = ("preferred_only", "both", "neither")
        axis, label = ("helpful", None) if index % 3 else ("safe", labels[index % 9 // 3])
        found.append(
            Preference(
                f"p{index}",
                one.messages[:-1],
                answers,
                0 if index % 2 else 1,
                DEGREES[index % 4],
                label,
                axis,
            )
        )  # type: ignore[arg-type]

    records.write(shared / "preferences.jsonl", found)
    return shared / "preferences.jsonl"


@pytest.fixture(scope="session")
def prompts(shared: Path, world: Path) -> Path:
    """Sixteen prompts, helpful, unsafe and borderline."""
    records.write(
        shared / "prompts.jsonl", list(records.read(Prompt, world / "prompts-train.jsonl"))[:16]
    )
    return shared / "prompts.jsonl"


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail as users' mistakes do: exit status 2 and exactly one line; the
    line."""

    def refused(*words: object) -> str:
        capsys.readouterr()
        status = llama2(*words)
        heard = capsys.readouterr()
        assert status == 2, heard.err
        lines = heard.err.splitlines()
        assert len(lines) == 1, heard.err
        assert lines[0].startswith("llama2: error: ")
        assert heard.out == ""

        return lines[0].removeprefix("llama2: error: ")

    return refused
