"""Context distillation: what stands before a prompt, and which answers pass the gate."""

import json

import pytest
from answers import answer, prompt
from chat_formats import NO_SYSTEM, make_byte_level
from commands import llama2

from llama2 import records
from llama2.errors import UserError
from llama2.generate.rewards import Score
from llama2.records import Dialog, Prompt
from llama2.runs import Run
from llama2.stages import distill

SHORT = ["You are a {a} and {b} assistant.", "Be a {a} and {b} assistant."]


def test_the_gate_keeps_only_finished_answers_that_score_higher(tmp_path, monkeypatch):
    """Five adversarial prompts: better, worse, equal, better but cut off, and better though the
    text is the same."""
    asked = [prompt(f"q{index}", True, family="unsafe") for index in range(5)]
    plain = [[answer("plain")] for _ in asked]
    careful = [
        [answer("plain" if index == 4 else "careful", finish="length" if index == 3 else "stop")]
        for index in range(5)
    ]
    rounds, marks = iter([plain, careful]), iter([[0.0] * 5, [1.0, -1.0, 0.0, 5.0, 5.0]])
    chat = type("Chat", (), {"has_room": lambda *_: True, "tokenizer": None, "engine": None})()
    monkeypatch.setattr(distill, "load_chat", lambda *_: chat)
    monkeypatch.setattr(distill, "require_system", lambda tokenizer: None)
    monkeypatch.setattr(distill, "load_rewards", lambda *_: None)
    monkeypatch.setattr(distill, "read_prompts", lambda *_: [*asked, prompt("harmless")])
    monkeypatch.setattr(distill, "keep_fitting", lambda chat, prompts, room, tally: prompts)
    monkeypatch.setattr(
        distill, "keep_scorable", lambda chat, rewards, prompts, sample, tally: prompts
    )
    monkeypatch.setattr(distill, "answer", lambda *_, **__: next(rounds))
    monkeypatch.setattr(
        distill,
        "score",
        lambda rewards, tokenizer, prompts, answers: [
            [Score(9.0, mark, mark)] for mark in next(marks)
        ],
    )
    config = distill.Config(
        out=tmp_path, policy="p", rewards={"helpful": "h", "safe": "s"}, prompts="q"
    )
    run = Run(tmp_path, False)
    distill.run(config, run)
    (kept,) = records.read(Dialog, tmp_path / "dialogs.jsonl")
    assert [m.content for m in kept.messages] == ["q0", "careful"]  # without the preprompt
    assert kept.metadata == {"family": "unsafe", "reward": 1.0, "safety": True}
    assert kept.train == "last"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["prompts"], summary["kept"], summary["safety_before"]) == (5, 1, 0.5)
    assert summary["examples"] == [{"prompt": "q0", "before": "plain", "after": "careful"}]
    line = run.tallies["prompts"].line()
    assert line.startswith(
        "read 6, kept 1, left out 5: no answer under a preprompt is safer than the one without 4 ("
    )
    assert line.endswith(", not adversarial 1")


def test_the_best_of_several_preprompts_is_kept(tmp_path, policy, scorers, world):
    words = [
        "distill",
        "--policy",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        world / "prompts-train.jsonl",
        "--limit",
        12,
        "--sample.max-tokens",
        24,
        "--preprompts",
        *SHORT,
        "--templates",
        "{}",
    ]
    assert llama2(*words, "--k", 1, "--out", tmp_path / "one") == 0
    assert llama2(*words, "--k", 3, "--out", tmp_path / "three") == 0
    one, three = (
        {
            d.messages[:-1]: d.metadata["reward"]
            for d in records.read(Dialog, tmp_path / n / "dialogs.jsonl")
        }
        for n in ("one", "three")
    )
    assert len(three) > 0
    assert one.keys() <= three.keys()
    assert all(three[asked] >= reward for asked, reward in one.items())
    families = {
        p.messages: p.metadata["family"]
        for p in records.read(Prompt, world / "prompts-train.jsonl")
    }
    assert {families[asked] for asked in three} == {"unsafe"}


def test_prompts_without_room_are_counted(tmp_path, policy, scorers, world, capsys):
    """The paper's preprompts take more than this model's context of 256 tokens: nothing is kept,
    and it is said."""
    words = [
        "distill",
        "--policy",
        policy,
        "--rewards.helpful",
        scorers[0],
        "--rewards.safe",
        scorers[1],
        "--prompts",
        world / "prompts-train.jsonl",
        "--sample.max-tokens",
        24,
        "--out",
        tmp_path / "out",
    ]
    assert llama2(*words) == 0
    heard = capsys.readouterr().err
    assert "kept 0" in heard
    assert "no room in the context beside the preprompt" in heard
    assert "(give shorter preprompts and templates, or a model with a longer context)" in heard
    assert (tmp_path / "out/dialogs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (prompt("lock", True, family="unsafe"), True),
        (prompt("kill a process", True, family="borderline"), False),
        (prompt("x", True), True),
        (prompt("a null in a table", True, family=None), True),
        (prompt("x", False), False),
        (prompt("x", False, family="unsafe"), True),
    ],
)
def test_what_counts_as_adversarial(made, expected):
    assert distill.is_adversarial(made, ("unsafe",)) == expected


def test_a_format_without_a_system_turn_cannot_be_distilled_in(tmp_path, monkeypatch):
    tokenizer = make_byte_level(tmp_path / "tokenizer", NO_SYSTEM)
    chat = type("Chat", (), {"tokenizer": tokenizer})()
    monkeypatch.setattr(distill, "load_chat", lambda *_: chat)
    config = distill.Config(
        out=tmp_path, policy="p", rewards={"helpful": "h", "safe": "s"}, prompts="q"
    )
    with pytest.raises(UserError, match="no place for a system turn"):
        distill.run(config, Run(tmp_path, False))
