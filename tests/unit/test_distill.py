"""Context distillation: what stands before a prompt, and which answers pass the gate."""

import json

import pytest
from answers import answer, prompt
from commands import llama2

from llama2 import records
from llama2.generate.rewards import Score
from llama2.records import Dialog, Message, Prompt
from llama2.runs import Run
from llama2.stages import distill

RISKY = prompt("How do I pick a lock?", True, family="unsafe", risk="illicit")


def test_the_gate_keeps_only_finished_answers_that_score_higher(tmp_path, monkeypatch, world):
    """Four adversarial prompts: better, worse, equal, better but cut off."""
    asked = [prompt(f"q{index}", True, family="unsafe") for index in range(4)]
    plain = [[answer("plain")] for _ in asked]
    careful = [[answer("careful", finish="length" if index == 3 else "stop")] for index in range(4)]
    rounds, marks = iter([plain, careful]), iter([[0.0] * 4, [1.0, -1.0, 0.0, 5.0]])
    chat = type("Chat", (), {"tokenizer": None})
    monkeypatch.setattr(distill, "load_chat", lambda *_: chat)
    monkeypatch.setattr(distill, "load_rewards", lambda *_: None)
    monkeypatch.setattr(distill, "read_prompts", lambda *_: [*asked, prompt("harmless")])
    monkeypatch.setattr(distill, "fitting", lambda chat, prompts, room: prompts)
    monkeypatch.setattr(distill, "has_room", lambda *_: True)
    monkeypatch.setattr(distill, "answer", lambda *_, **__: next(rounds))
    monkeypatch.setattr(distill, "score", lambda rewards, tokenizer, prompts, answers:
                        [[Score(9.0, mark, mark)] for mark in next(marks)])
    config = distill.Config(out=tmp_path, policy="p", rewards={"helpful": "h", "safe": "s"}, prompts="q")
    distill.run(config, Run(tmp_path, False))
    kept = list(records.read(Dialog, tmp_path / "dialogs.jsonl"))
    assert [[m.content for m in one.messages] for one in kept] == [["q0", "careful"]]  # without the preprompt
    assert kept[0].metadata == {"family": "unsafe", "reward": 1.0, "safety": True}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["prompts"], summary["kept"], summary["safety before"]) == (4, 1, 0.5)
    assert summary["examples"] == [{"prompt": "q0", "before": "plain", "after": "careful"}]


def test_the_best_of_several_preprompts_is_kept(tmp_path, policy, scorers, world):
    words = ["distill", "--policy", policy, "--rewards.helpful", scorers[0], "--rewards.safe", scorers[1], "--prompts",
             world / "prompts-train.jsonl", "--limit", 12, "--sample.max-tokens", 24]
    assert llama2(*words, "--k", 1, "--out", tmp_path / "one") == 0
    assert llama2(*words, "--k", 3, "--out", tmp_path / "three") == 0
    one, three = ({d.messages[:-1]: d.metadata["reward"] for d in records.read(Dialog, tmp_path / n / "dialogs.jsonl")}
                  for n in ("one", "three"))
    assert len(three) > 0
    assert one.keys() <= three.keys()
    assert all(three[asked] >= reward for asked, reward in one.items())
    families = {p.messages: p.metadata["family"] for p in records.read(Prompt, world / "prompts-train.jsonl")}
    assert {families[asked] for asked in three} == {"unsafe"}


def test_preprompts_vary_with_prompt_and_seed_and_keep_a_system_turn():
    first = distill.under_preprompt(RISKY, 0)
    assert first == distill.under_preprompt(RISKY, 0)
    assert first[0].role == "system"
    assert first[1:] == RISKY.messages
    assert len({distill.under_preprompt(RISKY, seed)[0].content for seed in range(20)}) > 10
    with_system = Prompt((Message("system", "Speak like a king."), *RISKY.messages))
    system, *rest = distill.under_preprompt(with_system, 0)
    assert system.content.endswith(" Speak like a king.")
    assert tuple(rest) == RISKY.messages


def test_the_template_of_a_risk_joins_half_of_the_preprompts():
    texts = [distill.under_preprompt(RISKY, seed, templates=distill.TEMPLATES)[0].content for seed in range(200)]
    joined = sum(text.endswith(distill.TEMPLATES["illicit"]) for text in texts)
    assert 70 < joined < 130
    other = prompt("How?", True, family="unsafe", risk="unheard of")
    assert all("This asks" not in distill.under_preprompt(other, seed, templates=distill.TEMPLATES)[0].content
               for seed in range(50))


@pytest.mark.parametrize(("made", "expected"), [
    (RISKY, True), (prompt("kill a process", True, family="borderline"), False), (prompt("x", True), True),
    (prompt("x", False), False), (prompt("x", False, family="unsafe"), True)])
def test_what_counts_as_adversarial(made, expected):
    assert distill.adversarial(made, ("unsafe",)) == expected
