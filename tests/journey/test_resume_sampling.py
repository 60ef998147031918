"""Every stage that samples, killed in the middle of writing a part: nothing finished is sampled
again, and the outputs are those of the run never stopped, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from commands import in_a_process, llama2

from llama2.generate.engine import Engine
from llama2.runs import parts

Words = tuple[object, ...]
# parts of sixteen answers
SMALL = ("--sample.max-tokens", 16, "--sample.slots", 4, "--sample.part", 4)


@pytest.fixture(scope="session")
def commands(
    policy: Path, scorers: tuple[Path, Path], world: Path, shared: Path
) -> dict[str, Words]:
    """A short run of each stage that samples, in several parts."""
    helpful, safe = scorers
    rewards, prompts = (
        ("--rewards.helpful", helpful, "--rewards.safe", safe),
        world / "prompts-train.jsonl",
    )
    rejection = (
        "rejection",
        "--policy",
        policy,
        *rewards,
        "--prompts",
        prompts,
        "--k",
        4,
        *SMALL,
        "--temperatures",
        0.7,
        1.0,
        "--search-prompts",
        6,
    )
    assert llama2(*rejection, "--limit", 16, "--out", shared / "earlier") == 0

    return {
        "rejection": (
            *rejection,
            "--limit",
            20,
            "--keep",
            2,
            "--seed",
            1,
            "--earlier",
            shared / "earlier",
        ),
        "distill": (
            "distill",
            "--policy",
            policy,
            *rewards,
            "--prompts",
            prompts,
            "--limit",
            18,
            "--k",
            2,
            *SMALL,
            "--preprompts",
            "Be a {a} and {b} assistant.",
            "--templates",
            "{}",
        ),
        "ghost": (
            "ghost",
            "--policy",
            policy,
            "--conversations",
            world / "ghost-train.jsonl",
            "--limit",
            10,
            *SMALL,
        ),
        "collect": (
            "collect",
            "--policies",
            policy,
            "--prompts",
            prompts,
            "--limit",
            40,
            "--swapped",
            0.3,
            "--preprompted",
            0.5,
            "--preprompts",
            "Be a {a} and {b} assistant.",
            "--both-axes",
            0.5,
            "--heldout",
            0.3,
            *SMALL,
        ),
    }


def outputs(run: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(run.iterdir())
        if path.is_file() and path.name not in ("manifest.json", "COMPLETE", ".lock")
    }


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many parts were made, and how many prompts sampled for."""
    found = {"parts": 0, "prompts": 0}
    append, generate = parts._Finished.append, Engine.generate

    def appended(self: Any, first: int, count: int, rows: Any) -> None:
        found["parts"] += 1
        append(self, first, count, rows)

    def generated(self: Any, prompts: Any, *more: Any) -> Any:
        found["prompts"] += len(prompts)
        return generate(self, prompts, *more)

    monkeypatch.setattr(parts._Finished, "append", appended)
    monkeypatch.setattr(Engine, "generate", generated)
    return found


@pytest.mark.parametrize("verb", ["rejection", "distill", "ghost", "collect"])
def test_a_stage_killed_twice_is_the_stage_never_stopped(tmp_path, commands, verb, counted, capsys):
    assert llama2(*commands[verb], "--out", tmp_path / "whole") == 0
    whole = dict(counted)
    assert whole["parts"] >= 4
    words = (*commands[verb], "--out", tmp_path / "run")

    for part in (1, 2):  # the first part again, and the one behind it
        status = in_a_process(tmp_path / "log", *words, number=signal.SIGKILL, part=part)
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not (tmp_path / "run/COMPLETE").exists()

    counted.update(parts=0, prompts=0)
    capsys.readouterr()
    assert llama2(*words) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"{tmp_path / 'run'}: resuming"
    assert counted["parts"] == whole["parts"] - 1
    assert 0 < counted["prompts"] < whole["prompts"]
    expected, found = outputs(tmp_path / "whole"), outputs(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_size_of_a_part_changes_nothing(tmp_path, commands):
    """A kill may lose a larger or smaller part; the setting may even change when the run is
    resumed."""
    words = commands["rejection"]
    assert llama2(*words, "--out", tmp_path / "small") == 0
    status = in_a_process(
        tmp_path / "log", *words, "--out", tmp_path / "run", number=signal.SIGKILL, part=4
    )
    assert status == -signal.SIGKILL
    assert llama2(*words, "--sample.part", 64, "--out", tmp_path / "run") == 0

    for name in ("best.jsonl", "pool.jsonl"):
        texts = [
            [
                line.split(b'"metadata"')[0]
                for line in (tmp_path / run / name).read_bytes().splitlines()
            ]
            for run in ("small", "run")
        ]  # rewards may differ in the last place, as batches do
        assert texts[0] == texts[1]
