"""Stages that sample write on two ranks what they write on one, also where one rank began and two
go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_ranks import together

from llama2.config import build
from llama2.ranks import Ranks
from llama2.recipe import launch
from llama2.recipe.workers import execute
from llama2.runs import parts

SAMPLE = {"max_tokens": 16, "slots": 4, "part": 3, "precision": "fp32"}
SHORT = {"preprompts": ["Be a {a} and {b} assistant."], "templates": {}}


def carry_out(out: Path, ranks: Ranks | None = None) -> None:
    """Every stage below `out`; the environment says on what. Each joins the other ranks itself."""
    given = json.loads(os.environ["SAMPLING"])
    rewards, prompts = given["rewards"], given["prompts"]
    values: dict[str, dict[str, Any]] = {
        "rejection": {
            "policy": given["policy"],
            "rewards": rewards,
            "prompts": prompts,
            "k": 3,
            "limit": 14,
            "temperatures": [0.7, 1.0],
            "search_prompts": 4,
            "earlier": [given["earlier"]],
        },
        "distill": {
            "policy": given["policy"],
            "rewards": rewards,
            "prompts": prompts,
            "limit": 14,
            **SHORT,
        },
        "ghost": {"policy": given["policy"], "conversations": given["conversations"], "limit": 9},
        "collect": {
            "policies": [given["policy"]],
            "prompts": prompts,
            "limit": 30,
            "swapped": 0.4,
            "heldout": 0.3,
        },
    }

    for verb, own in values.items():
        execute(
            verb,
            build(launch.load(verb).Config, {"out": str(out / verb), "sample": SAMPLE, **own}),
        )


def texts(out: Path) -> dict[str, list[Any]]:
    """What was written, rewards aside: in batches of other rows their last places may differ."""
    found = {}
    for file in sorted(out.glob("*/*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["metadata"].pop("reward", None)

        found[f"{file.parent.name}/{file.name}"] = rows

    return found


def test_two_ranks_write_what_one_writes(
    tmp_path: Path,
    policy: Path,
    scorers: tuple[Path, Path],
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards = {"helpful": str(scorers[0]), "safe": str(scorers[1])}
    prompts = str(world / "prompts-train.jsonl")
    execute(
        "rejection",
        build(
            launch.load("rejection").Config,
            {
                "out": str(tmp_path / "earlier"),
                "policy": str(policy),
                "rewards": rewards,
                "prompts": prompts,
                "k": 2,
                "limit": 10,
                "temperatures": [1.0],
                "seed": 1,
                "sample": SAMPLE,
            },
        ),
    )
    monkeypatch.setenv(
        "SAMPLING",
        json.dumps(
            {
                "policy": str(policy),
                "rewards": rewards,
                "prompts": prompts,
                "earlier": str(tmp_path / "earlier"),
                "conversations": str(world / "ghost-train.jsonl"),
            }
        ),
    )
    carry_out(tmp_path / "one")
    expected = texts(tmp_path / "one")
    assert len(expected) == 6
    assert all(expected.values())
    together(carry_out, tmp_path / "two")
    assert texts(tmp_path / "two") == expected

    append = parts._Finished.append

    def interrupted(self: Any, first: int, count: int, rows: Any) -> None:
        if self.path.name == "samples.jsonl" and first:
            raise KeyboardInterrupt

        append(self, first, count, rows)

    monkeypatch.setattr(parts._Finished, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out(tmp_path / "mixed")  # the first stage loses its second part

    monkeypatch.setattr(parts._Finished, "append", append)
    together(carry_out, tmp_path / "mixed")
    assert texts(tmp_path / "mixed") == expected
