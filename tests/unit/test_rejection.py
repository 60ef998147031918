"""Rejection sampling: which answers are kept, what the search and the curves count, and what is
said of the rest."""

import json

import pytest
from answers import answer, prompt, score
from commands import llama2

from llama2 import records
from llama2.generate.rewards import to_probability
from llama2.records import Dialog, Message, Prompt
from llama2.stages import rejection
from llama2.stages.rejection import Curves, average_best, make_dialogs, rank_answers
from llama2.tokenizer.template import encode_dialog, encode_prompt


def row(answers, marks, keep=1, finished_only=True):
    return rank_answers(answers, [score(mark) for mark in marks], keep, finished_only)


ANSWERS = [answer("low"), answer("cut", finish="length"), answer("high"), answer("")]
MARKS = [0.1, 9.0, 2.0, 8.0]


def test_the_best_finished_answer_is_kept():
    (kept,) = make_dialogs(prompt("Hi", safety=True, family="unsafe"), row(ANSWERS, MARKS))
    assert kept.messages[-1].content == "high"
    assert kept.messages[:-1] == prompt("Hi").messages
    assert kept.metadata == {"family": "unsafe", "reward": 2.0, "safety": True}
    (kept,) = make_dialogs(prompt(), row(ANSWERS, MARKS, finished_only=False))
    assert kept.messages[-1].content == "cut"
    assert kept.metadata["cut"] is True


def test_several_different_answers_may_be_kept():
    answers = [answer("a"), answer("b"), answer("a"), answer("c"), answer("")]
    found = row(answers, [1.0, 2.0, 3.0, -1.0, 9.0], keep=3)
    assert [(one["text"], one["reward"]) for one in found["best"]] == [
        ("a", 3.0),
        ("b", 2.0),
        ("c", -1.0),
    ]
    # the first of equals
    assert [one["text"] for one in row(answers, [1.0] * 5, keep=2)["best"]] == ["a", "b"]


def test_a_prompt_without_a_usable_answer_is_left_out():
    assert make_dialogs(prompt(), row([answer("a", finish="length"), answer("")], [1.0, 2.0])) == []


def test_only_the_sampled_answer_is_learnt_not_earlier_turns(tokenizer):
    asked = Prompt(
        (
            Message("user", "How do I get in?"),
            Message("assistant", "Break the window."),
            Message("user", "And then?"),
        )
    )
    (kept,) = make_dialogs(asked, row([answer("I cannot help with that.")], [1.0]))
    assert kept.train == "last"
    ids, mask = encode_dialog(tokenizer, kept.messages, kept.train)
    before = len(encode_prompt(tokenizer, asked.messages))
    assert mask == [False] * before + [True] * (len(ids) - before)


def test_curves_of_the_first_k_samples():
    curves = Curves(3)
    for marks in ([0.0, 2.0, 1.0], [3.0, -1.0, 1.0]):
        curves.add(row([answer("x")] * 3, marks))

    found, p = curves.means(), to_probability
    assert found["k"] == [1, 2, 3]
    assert found["max"] == pytest.approx([(p(0) + p(3)) / 2, (p(2) + p(3)) / 2, (p(2) + p(3)) / 2])
    assert found["median"] == pytest.approx(
        [(p(0) + p(3)) / 2, (p(0) + p(2) + p(3) + p(-1)) / 4, p(1)]
    )
    assert found["max"] == sorted(found["max"])
    assert Curves(3).means() == {"k": [], "max": [], "median": []}


def test_curves_count_what_may_be_kept():
    curves = Curves(4)
    curves.add(row(ANSWERS, MARKS))
    p = to_probability
    assert curves.means()["max"] == pytest.approx([p(0.1), p(0.1), p(2.0), p(2.0)])
    assert curves.means()["median"] == pytest.approx([p(0.1), p(0.1) / 2, p(0.1), p(0.1) / 2])


def test_the_search_counts_what_may_be_kept():
    """The second temperature rambles: its cut-off answers score high and may not be kept."""
    steady = [
        row([answer("a"), answer("b")], [1.0, 0.0]),
        row([answer("a"), answer("b")], [2.0, -1.0]),
    ]
    rambling = [
        row([answer("a", finish="length"), answer("b")], [9.0, 0.5]),
        row([answer("a", finish="length"), answer("b", finish="length")], [9.0, 8.0]),
    ]
    # -1: the worst of that prompt
    assert average_best([steady, rambling]) == pytest.approx([1.5, (0.5 - 1.0) / 2])


@pytest.fixture
def words(policy, scorers, prompts):
    return [
        "rejection",
        "--policy",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        prompts,
        "--k",
        4,
        "--sample.max-tokens",
        24,
    ]


def test_the_temperature_is_searched(tmp_path, words):
    assert (
        llama2(*words, "--temperatures", 0.7, 1.3, "--search-prompts", 5, "--out", tmp_path / "out")
        == 0
    )
    found = json.loads((tmp_path / "out/curves.json").read_text())
    assert set(found["temperatures"]) == {"0.7", "1.3"}
    assert found["temperatures"][str(found["temperature"])] == max(found["temperatures"].values())
    assert len(found["max"]) == 4
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["prompts"] == 16
    example = summary["examples"][0]
    assert example["best_reward"] >= example["worst_reward"]


def test_what_is_left_out_is_said_with_cause_and_cure(tmp_path, words, prompts, policy, capsys):
    some = list(records.read(Prompt, prompts))[:2]
    long = [Prompt((Message("user", "many words " * 400),))] * 3
    records.write(tmp_path / "prompts.jsonl", [*some, *long])
    words[words.index(prompts)] = tmp_path / "prompts.jsonl"
    assert (
        llama2(*words, "--temperatures", 1.0, "--sample.max-tokens", 1, "--out", tmp_path / "out")
        == 0
    )
    heard = capsys.readouterr().err
    assert (
        "out: prompts: read 5, kept 0, left out 5: longer than the context leaves room for 3 ("
        in heard
    )
    assert "no answer ended within 1 tokens 2 (raise sample.max_tokens" in heard
    curves = json.loads((tmp_path / "out/curves.json").read_text())
    assert curves["max"] == [0.0] * 4  # nothing may be kept
    assert (tmp_path / "out/pool.jsonl").read_text() == ""


def test_several_answers_a_prompt(tmp_path, words):
    assert llama2(*words, "--temperatures", 1.0, "--keep", 3, "--out", tmp_path / "out") == 0
    best = list(records.read(Dialog, tmp_path / "out/best.jsonl"))
    assert len(best) > 16
    by_prompt: dict = {}

    for one in best:
        by_prompt.setdefault(one.messages[:-1], []).append(one)

    for mine in by_prompt.values():
        assert len({one.messages[-1].content for one in mine}) == len(mine) <= 3
        assert [one.metadata["reward"] for one in mine] == sorted(
            (o.metadata["reward"] for o in mine), reverse=True
        )
        assert all(one.train == "last" for one in mine)

    assert (tmp_path / "out/pool.jsonl").read_bytes() == (tmp_path / "out/best.jsonl").read_bytes()


def test_seeds_of_a_stage_never_meet(tmp_path, words, monkeypatch):
    """The search, the samples, and another seed's search and samples draw different random
    numbers."""
    seen = []
    original = rejection.answer

    def recorded(*values, seed, **more):
        seen.append(seed)
        return original(*values, seed=seed, **more)

    monkeypatch.setattr(rejection, "answer", recorded)
    for seed in (0, 1):
        out = tmp_path / f"{seed}"
        assert (
            llama2(*words, "--temperatures", 0.7, 1.3, "--limit", 3, "--seed", seed, "--out", out)
            == 0
        )

    assert len(seen) == 6
    assert len(set(seen)) == 4  # candidates of one search share their numbers, nothing else does
