"""Tests of what only a CUDA device can show; each is held against the CPU, which the rest of the
suite proves right.

They skip themselves where there is no such device. With LLAMA2_GPU_TINY=1 they run on the CPU
instead, so that the tests themselves are known to work before a GPU sees them. A test writes
figures worth knowing with `record_property`; `benchmarks/gpu.py` puts them on its page. None needs
a file of another folder: dependencies may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TINY = os.environ.get("LLAMA2_GPU_TINY") == "1"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not TINY else torch.device("cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if DEVICE.type != "cuda" and not TINY:
                item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _tell(
            report.nodeid,
            report.outcome,
            report.duration,
            dict(report.user_properties),
            report.longreprtext,
        )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _tell(f"{report.nodeid}::import", "failed", 0.0, {}, report.longreprtext)


def _tell(test: str, outcome: str, seconds: float, figures: dict[str, object], words: str) -> None:
    """A line for `benchmarks/gpu.py`, which may have to end a test that hangs."""
    if report := os.environ.get("LLAMA2_GPU_REPORT"):
        file, _, name = test.partition("::")
        with open(report, "a") as lines:
            lines.write(
                json.dumps(
                    {
                        "file": Path(file).stem,
                        "name": name,
                        "outcome": outcome,
                        "seconds": seconds,
                        "figures": figures,
                        "words": words[-3000:] if outcome == "failed" else "",
                    }
                )
                + "\n"
            )


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def on_cuda() -> bool:
    """Whether there is a GPU, and not its stand-in."""
    return DEVICE.type == "cuda"


@dataclass(frozen=True)
class Checkpoints:
    """What a user would have: dialogs, comparisons, prompts, and models that fit one tokenizer."""

    folder: Path
    base: Path
    helpful: Path
    dialogs: Path
    preferences: Path
    prompts: Path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    from llama2 import records
    from llama2.formats import checkpoint
    from llama2.model.llama import Llama, LlamaConfig
    from llama2.records import Dialog, Message, Preference, Prompt, Response
    from llama2.tokenizer.train import train

    folder = tmp_path_factory.mktemp("checkpoints")
    names = ("salt", "iron", "rain", "wool", "clay", "corn", "snow", "wine")
    talks = [
        Dialog(
            (
                Message("user", f"What is {name} number {number}?"),
                Message("assistant", f"The {name} of number {number} is good {name}."),
            )
        )
        for number in range(12)
        for name in names
    ]
    tokenizer = train(
        [turn.content for talk in talks for turn in talk.messages], 320, folder / "tokenizer"
    )
    shape = LlamaConfig(tokenizer.vocab_size, 128, 256, 2, 4, 2, 256)
    model = Llama(shape, 0)
    checkpoint.save(model, folder / "base")
    tokenizer.save(folder / "base")
    checkpoint.save(checkpoint.load_scorer(folder / "base", seed=1), folder / "helpful")
    tokenizer.save(folder / "helpful")
    records.write(folder / "dialogs.jsonl", talks)
    records.write(folder / "prompts.jsonl", [Prompt(talk.messages[:1]) for talk in talks[:32]])
    records.write(
        folder / "preferences.jsonl",
        [
            Preference(
                f"p{index}",
                talk.messages[:1],
                (Response(talk.messages[1].content), Response("No idea.")),
                0,
                "better",
            )
            for index, talk in enumerate(talks[:32])
        ],
    )

    return Checkpoints(
        folder,
        folder / "base",
        folder / "helpful",
        folder / "dialogs.jsonl",
        folder / "preferences.jsonl",
        folder / "prompts.jsonl",
    )


@pytest.fixture
def llama2() -> Callable[..., int]:
    """Carry out one command in this process; its exit status."""
    from llama2 import cli

    return lambda *words: cli._guarded([str(word) for word in words])
