"""Sampling on `llama2 serve`: the answers are those of sampling here."""

from __future__ import annotations

import pytest
from commands import llama2
from servers import serving

from llama2 import records
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.grammar import json_grammar
from llama2.generate.remote import Server, connect
from llama2.generate.sampling import Sampling
from llama2.records import Dialog, Message
from llama2.tokenizer.template import encode_prompt

GREEDY = {"temperature": 0, "max_tokens": 40}
WAYS = {
    "an end": {"stop": (2,)},
    "other ends": {"stop": (2, 300, 340, 360)},
    "no end": {"stop": ()},
    "penalties": {
        "stop": (2,),
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
    },
    "a bias": {"stop": (2,), "logit_bias": ((2, -100.0), (350, 3.0))},
    "a schema": {
        "stop": (2,),
        "grammar": {
            "type": "object",
            "properties": {"mood": {"enum": ["glad", "sad"]}},
            "required": ["mood"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def pair(policy, tokenizer):
    """The engine here, and one on a server of the same model."""
    with serving(policy) as served:
        here = Engine(checkpoint.load(policy).eval(), precision="fp32")
        yield here, connect(Server(url=served.url), tokenizer, 10**6)


@pytest.mark.parametrize("way", WAYS)
def test_completions_of_a_server_are_those_of_the_engine_here(pair, tokenizer, way):
    here, remote = pair
    assert remote.context == here.context
    given = dict(WAYS[way])

    if "grammar" in given:
        given["grammar"] = json_grammar(tokenizer, given["grammar"])

    sampling = Sampling(**GREEDY, **given)
    prompts = [
        encode_prompt(tokenizer, (Message("user", text),))
        for text in ("Who are you?", "Name a colour.")
    ]
    prompts += [[1, 300 + row, 350, 360 + row] for row in range(5)]

    for (mine,), (its,) in zip(
        remote.generate(prompts, sampling), here.generate(prompts, sampling)
    ):
        assert (mine.prompt, mine.tokens, mine.finish) == (its.prompt, its.tokens, its.finish)
        # an error of fp32 through JSON
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-5)
        assert list(remote.stream(mine.prompt, sampling)) == list(its.tokens)


def test_rejection_sampling(tmp_path, base, scorers, prompts):
    words = [
        "rejection",
        "--policy",
        base,
        "--rewards.helpful",
        scorers[0],
        "--prompts",
        prompts,
        "--k",
        2,
        "--limit",
        6,
        "--temperatures",
        0.0,
        "--sample.precision",
        "fp32",
        "--sample.max-tokens",
        16,
        "--no-finished-only",
    ]
    with serving(base) as served:
        assert llama2(*words, "--sample.server.url", served.url, "--out", tmp_path / "there") == 0

    assert llama2(*words, "--out", tmp_path / "here") == 0
    here, there = (
        list(records.read(Dialog, tmp_path / name / "best.jsonl")) for name in ("here", "there")
    )
    assert [one.messages for one in there] == [one.messages for one in here]
