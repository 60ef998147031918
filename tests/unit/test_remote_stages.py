"""Stages that sample on a server: as if they sampled here, and after a kill they go on with what
they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from commands import llama2
from completions_server import serving

from llama2 import records
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.records import Dialog


@pytest.fixture
def server(base, tokenizer):
    with serving(Engine(checkpoint.load(base).eval(), precision="fp32"), tokenizer) as state:
        yield state


@pytest.fixture
def rejection(base, scorers, prompts):
    return [
        "rejection",
        "--policy",
        base,
        "--rewards.helpful",
        scorers[0],
        "--prompts",
        prompts,
        "--k",
        3,
        "--temperatures",
        0.0,
        "--sample.precision",
        "fp32",
        "--sample.max-tokens",
        24,
        "--no-finished-only",
    ]


def test_rejection_sampling_on_a_server_is_that_of_here(tmp_path, rejection, server):
    assert llama2(*rejection, "--out", tmp_path / "here") == 0
    assert llama2(*rejection, "--sample.server.url", server.url, "--out", tmp_path / "there") == 0
    assert len(server.asked) == 16 * 3
    here, there = (
        list(records.read(Dialog, tmp_path / name / "best.jsonl")) for name in ("here", "there")
    )
    assert [one.messages for one in there] == [one.messages for one in here]
    assert len(here) == 16
    assert not (tmp_path / "there/checkpoints").exists()


def test_a_killed_stage_asks_for_nothing_twice_and_may_go_to_another_address(
    tmp_path, rejection, server, tokenizer, one_line
):
    server.delay = 0.05
    # of two prompts
    words = [
        *rejection,
        "--sample.server.concurrency",
        2,
        "--sample.slots",
        6,
        "--sample.part",
        1,
        "--out",
        tmp_path / "run",
    ]
    command = [
        sys.executable,
        "-m",
        "llama2.cli",
        *map(str, words),
        "--sample.server.url",
        server.url,
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})

    try:
        while sum(server.answered.values()) < 9:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()

    checkpoints = tmp_path / "run/checkpoints"
    parts = len((checkpoints / "parts/samples.jsonl").read_bytes().splitlines())
    (journal,) = checkpoints.glob("answers/*/0.jsonl")  # those of finished parts are gone
    assert journal.parent.name == f"samples-{2 * parts}"
    kept = 6 * parts + len(journal.read_bytes().splitlines())
    assert kept >= 7
    said = one_line(*words, "--sample.server.url", server.url, "--sample.server.model", "another")
    # what changes the result is refused, as ever
    assert "sample.server.model: None -> another" in said

    with serving(server.engine, tokenizer) as other:
        assert llama2(*words, "--sample.server.url", other.url) == 0
        assert len(other.asked) == 48 - kept

    assert json.loads((tmp_path / "run/summary.json").read_text())["prompts"] == 16


def test_other_stages(tmp_path, policy, scorers, prompts, server):
    on_a_server = [
        "--sample.max-tokens",
        12,
        "--sample.server.url",
        server.url,
        "--sample.server.model",
        "tiny",
    ]
    assert (
        llama2(
            "collect",
            "--policies",
            policy,
            "--prompts",
            prompts,
            *on_a_server,
            "--out",
            tmp_path / "a",
        )
        == 0
    )
    assert (
        llama2(
            "ghost",
            "--policy",
            policy,
            "--questions",
            prompts,
            "--turns",
            2,
            *on_a_server,
            "--out",
            tmp_path / "b",
        )
        == 0
    )
    assert (
        llama2(
            "distill",
            "--policy",
            policy,
            "--rewards.helpful",
            scorers[0],
            "--rewards.safe",
            scorers[1],
            "--prompts",
            prompts,
            *on_a_server,
            "--preprompts",
            "Be a {a} and {b} assistant.",
            "--templates",
            "{}",
            "--out",
            tmp_path / "c",
        )
        == 0
    )
    asked = len(server.asked)
    assert (
        llama2(
            "evaluate",
            "--versions.SFT",
            policy,
            "--versions.V1",
            policy,
            "--servers.SFT.url",
            server.url,
            "--prompts",
            prompts,
            "--max-tokens",
            12,
            "--out",
            tmp_path / "d",
        )
        == 0
    )
    assert len(server.asked) == asked + 32  # sampled and greedy; V1 has the same weights


def test_a_server_that_fails_and_what_it_cannot_do(
    tmp_path, policy, base, scorers, prompts, one_line, server
):
    to = ["--sample.server.url", server.url, "--out", tmp_path / "out"]
    ppo = ["ppo", "--policy", policy, "--rewards.helpful", scorers[0], "--prompts", prompts]
    assert "not for PPO" in one_line(*ppo, *to)
    assert "one model" in one_line("collect", "--policies", policy, base, "--prompts", prompts, *to)
    assert "two are compared" in one_line(
        "select", "--candidate", policy, "--predecessor", base, "--prompts", prompts, *to
    )
    assert "no version 'V2'" in one_line(
        "evaluate",
        "--versions.SFT",
        policy,
        "--servers.V2.url",
        server.url,
        "--prompts",
        prompts,
        "--out",
        tmp_path / "out",
    )
    ghost = ["ghost", "--policy", policy, "--questions", prompts, "--out", tmp_path / "ghost"]
    assert "url" in one_line(*ghost, "--sample.server.url", "localhost:8000")
    server.plan.extend(["broken"] * 100)
    said = one_line(*ghost, "--sample.server.url", server.url, "--sample.server.retries", 0)
    assert "completions failed" in said
    assert "HTTP 500: oh no" in said
    server.plan.clear()
    assert llama2(*ghost, "--sample.server.url", server.url, "--sample.server.retries", 1) == 0
