"""Rejection sampling: which answer is kept, what the curves mean, and how earlier rounds join."""

import json

import pytest
from answers import answer, prompt, score
from commands import llama2

from llama2 import records
from llama2.generate.rewards import probability
from llama2.records import Dialog, Prompt
from llama2.stages import rejection


def test_the_best_finished_answer_is_kept():
    answers = [answer("low"), answer("cut", finish="length"), answer("high"), answer("")]
    marks = [score(0.1), score(9.0), score(2.0), score(8.0)]
    kept = rejection.best_of(prompt("Hi", safety=True, family="unsafe"), answers, marks, finished_only=True)
    assert kept.messages[-1].content == "high"
    assert kept.messages[:-1] == prompt("Hi").messages
    assert kept.metadata == {"family": "unsafe", "reward": 2.0, "safety": True}
    kept = rejection.best_of(prompt(), answers, marks, finished_only=False)
    assert kept.messages[-1].content == "cut"


def test_a_prompt_without_a_usable_answer_is_left_out():
    assert rejection.best_of(prompt(), [answer("a", finish="length"), answer("")], [score(1), score(2)], True) is None
    assert rejection.best_of(prompt(), [], [], True) is None


def test_curves_of_the_first_k_samples():
    found = rejection.curves([[score(0.0), score(2.0), score(1.0)], [score(3.0), score(-1.0), score(1.0)]])
    p = probability
    assert found["k"] == [1, 2, 3]
    assert found["max"] == pytest.approx([(p(0) + p(3)) / 2, (p(2) + p(3)) / 2, (p(2) + p(3)) / 2])
    assert found["median"] == pytest.approx([(p(0) + p(3)) / 2, (p(0) + p(2) + p(3) + p(-1)) / 4, p(1)])
    assert found["max"] == sorted(found["max"])
    assert rejection.curves([]) == {"k": [], "max": [], "median": []}


@pytest.fixture
def words(policy, scorers, prompts):
    return ["rejection", "--policy", policy, "--rewards.helpful", scorers[0], "--rewards.safe", scorers[1], "--prompts",
            prompts, "--k", 4, "--sample.max-tokens", 24]


def test_a_round_joins_the_best_of_earlier_ones(tmp_path, words, prompts):
    assert llama2(*words, "--temperatures", 1.0, "--limit", 6, "--out", tmp_path / "one") == 0
    assert llama2(*words, "--temperatures", 1.0, "--limit", 6, "--seed", 5, "--out", tmp_path / "two",
                  "--earlier", tmp_path / "one") == 0
    first, second = ([one.messages[0] for one in records.read(Dialog, tmp_path / name / "best.jsonl")]
                     for name in ("one", "two"))
    assert set(first) - set(second)  # another choice of prompts
    pool = list(records.read(Dialog, tmp_path / "two/pool.jsonl"))
    assert [one.messages[0] for one in pool[: len(second)]] == second
    assert {one.messages[0] for one in pool} == {*first, *second}
    assert len(pool) == len({*first, *second})  # each prompt once, answered by the newest round that has it
    known = {one.messages for one in records.read(Prompt, prompts)}
    assert {one.messages[:-1] for one in pool} <= known


def test_the_temperature_is_searched(tmp_path, words):
    assert llama2(*words, "--temperatures", 0.7, 1.3, "--search-prompts", 5, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/curves.json").read_text())
    assert set(found["temperatures"]) == {"0.7", "1.3"}
    assert found["temperatures"][str(found["temperature"])] == max(found["temperatures"].values())
    assert len(found["max"]) == 4
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["prompts"] == 16
    example = summary["examples"][0]
    assert example["best_reward"] >= example["worst_reward"]
