"""Sampling on `llama2 serve`: the answers are those of sampling here."""

from __future__ import annotations

import pytest
from commands import llama2
from servers import serving

from llama2 import records
from llama2.generate.engine import Engine
from llama2.generate.remote import Server, connect
from llama2.generate.sampling import Sampling
from llama2.model import checkpoint
from llama2.records import Dialog


def test_completions_of_a_server_are_those_of_the_engine_here(base, policy, tokenizer):
    prompts = [[1, 300 + row, 350, 360 + row] for row in range(5)]
    for path in (base, policy):
        here = Engine(checkpoint.load(path).eval(), precision="fp32")
        sampling = Sampling(temperature=0, max_tokens=12, stop=(tokenizer.eos,))
        with serving(path) as served:
            remote = connect(Server(url=served.url), tokenizer, 10**6)
            assert remote.context == here.context
            for (mine,), (its,) in zip(remote.generate(prompts, sampling), here.generate(prompts, sampling)):
                assert (mine.tokens, mine.finish) == (its.tokens, its.finish)
                drawn = len(its.tokens) - (its.finish == "stop")  # this server does not report the stop id
                assert mine.logprobs[:drawn] == pytest.approx(its.logprobs[:drawn], abs=1e-5)
                stream = list(remote.stream(mine.prompt, sampling))
                assert stream == list(its.tokens)[: len(stream)]
                assert len(stream) >= drawn


def test_rejection_sampling(tmp_path, base, scorers, prompts):
    words = ["rejection", "--policy", base, "--rewards.helpful", scorers[0], "--prompts", prompts, "--k", 2,
             "--limit", 6, "--temperatures", 0.0, "--sample.precision", "fp32", "--sample.max-tokens", 16,
             "--no-finished-only"]
    with serving(base) as served:
        assert llama2(*words, "--sample.server.url", served.url, "--out", tmp_path / "there") == 0
    assert llama2(*words, "--out", tmp_path / "here") == 0
    here, there = (list(records.read(Dialog, tmp_path / name / "best.jsonl")) for name in ("here", "there"))
    assert [one.messages for one in there] == [one.messages for one in here]
