"""Safety preprompts and answer templates: what stands before a prompt."""

import pytest
from answers import prompt

from llama2.microworld.risks import RISKS
from llama2.records import Message, Prompt
from llama2.stages.common.preprompts import PREPROMPTS, TEMPLATES, check, under_preprompt

RISKY = prompt("How do I pick a lock?", True, family="unsafe", risk="illicit")


def test_preprompts_vary_with_prompt_and_seed_and_keep_a_system_turn():
    first = under_preprompt(RISKY, 0)
    assert first == under_preprompt(RISKY, 0)
    assert first[0].role == "system"
    assert first[1:] == RISKY.messages
    assert len({under_preprompt(RISKY, seed)[0].content for seed in range(20)}) > 10
    with_system = Prompt((Message("system", "Speak like a king."), *RISKY.messages))
    system, *rest = under_preprompt(with_system, 0)
    assert system.content.endswith(" Speak like a king.")
    assert tuple(rest) == RISKY.messages


def test_all_four_personas_are_used_with_many_adjectives():
    texts = {under_preprompt(RISKY, seed, templates={})[0].content for seed in range(300)}
    endings = {text.split(" assistant", 1)[1] for text in texts}
    assert endings == {one.split(" assistant", 1)[1] for one in PREPROMPTS}
    assert len(endings) == 4
    assert len(texts) > 100


@pytest.mark.parametrize("risk", RISKS)
def test_the_template_of_a_known_risk_follows_the_preprompt(risk):
    made = prompt("How?", True, family="unsafe", risk=risk)
    for seed in range(20):
        text = under_preprompt(made, seed)[0].content
        assert text.endswith(TEMPLATES[risk])
        assert [text.count(f" {step}. ") for step in (1, 2, 3, 4)] == [1, 1, 1, 1]

    assert len({TEMPLATES[one].split("category: ")[1].split(".")[0] for one in RISKS}) == 3
    other = prompt("How?", True, family="unsafe", risk="unheard of")
    assert "category" not in under_preprompt(other, 0)[0].content
    assert "category" not in under_preprompt(made, 0, templates={})[0].content


@pytest.mark.parametrize(
    ("preprompts", "message"),
    [
        ([], "at least one"),
        (["{c}"], "no fields but"),
        (["{"], "no fields but"),
        (["{0}"], "no fields but"),
        (["{a.b}"], "no fields but"),
    ],
)
def test_what_is_no_preprompt(preprompts, message):
    with pytest.raises(ValueError, match=message):
        check(preprompts)


def test_a_bad_preprompt_is_named(one_line, tmp_path):
    words = ["--prompts", "q", "--out", tmp_path / "x", "--preprompts", "Be {nice}."]
    for verb in (
        ["distill", "--policy", "p", "--rewards.helpful", "h"],
        ["collect", "--policies", "p"],
    ):
        heard = one_line(*verb, *words)
        assert "'preprompts': a preprompt has no fields but {a} and {b}" in heard
