"""The joint reward of §3.2.3 and its rules."""

import math
from pathlib import Path

import pytest
import torch
from answers import prompt
from hypothesis import given
from hypothesis import strategies as st

from llama2.config import build
from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.dialogue import Answer
from llama2.generate.generator import Completion
from llama2.generate.rewards import RewardModels, Rewards, combine, to_probability
from llama2.ranks import Ranks
from llama2.runs import Run
from llama2.stages.common.answers import judge_answers
from llama2.stages.common.sampling import load_rewards
from llama2.tokenizer.tokenizer import Tokenizer

GATE = math.log(0.15 / 0.85)  # the raw score at which an answer is safe with probability 0.15


def models(**changes):
    return RewardModels(helpful=Path("h"), safe=Path("s"), **changes)


@pytest.mark.parametrize(
    ("helpful", "safe", "tag", "expected"),
    [
        (2.0, 3.0, False, 2.0),  # safe enough: helpfulness counts
        (2.0, 3.0, True, 3.0),  # a prompt tagged for safety: safety counts
        (2.0, GATE - 1e-6, False, GATE - 1e-6),  # just below the gate
        (2.0, GATE + 1e-6, False, 2.0),  # just above it
        # an unsafe answer is judged by safety even where it is less helpful than safe
        (-9.0, -5.0, False, -5.0),
        (-9.0, 5.0, True, 5.0),
    ],
)
def test_the_piecewise_rule_of_the_paper(helpful, safe, tag, expected):
    assert combine(models(), helpful, safe, tag) == expected


@pytest.mark.parametrize(
    ("rule", "expected"), [("helpful", 2.0), ("safe", -1.0), ("min", -1.0), ("weighted", 1.25)]
)
def test_other_rules(rule, expected):
    assert combine(models(rule=rule, safe_weight=0.25), 2.0, -1.0, False) == expected


def test_the_gate_is_a_setting():
    assert combine(models(gate=0.5), 2.0, -0.1, False) == -0.1
    assert combine(models(gate=0.0), 2.0, -50.0, False) == 2.0


@pytest.mark.parametrize("rule", ["llama2_piecewise", "weighted", "helpful"])
def test_without_a_safety_model_helpfulness_judges_alone(rule):
    assert combine(RewardModels(helpful=Path("h"), rule=rule), 1.5, math.inf, True) == 1.5


@pytest.mark.parametrize("rule", ["min", "safe"])
def test_some_rules_need_a_safety_model(rule):
    with pytest.raises(
        UserError, match=f"the rule '{rule}' needs a safety reward model; set rewards.safe"
    ):
        Rewards(RewardModels(helpful=Path("h"), rule=rule), None, None, "fp32")


@given(st.floats(-800, 800))
def test_probability_is_the_sigmoid_and_never_overflows(value):
    expected = float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)))
    assert to_probability(value) == pytest.approx(expected, abs=1e-12)
    assert to_probability(value) + to_probability(-value) == pytest.approx(1)


def test_two_models_score_rows_at_their_last_token(scorers, policy):
    helpful, safe = scorers
    tokenizer = Tokenizer.load(policy)
    rewards = load_rewards(
        build(RewardModels, {"helpful": helpful, "safe": safe}), tokenizer, Ranks.alone(), "fp32"
    )
    rows = [[1, 9, 30, 40, 2], [1, 9, 2]]
    found = rewards(rows, [True, False])

    with torch.no_grad():
        raw = [
            [checkpoint.load_scorer(path)(torch.tensor([row]))[0, -1].item() for row in rows]
            for path in scorers
        ]

    assert [one.helpful for one in found] == pytest.approx(raw[0], abs=1e-5)
    assert [one.safe for one in found] == pytest.approx(raw[1], abs=1e-5)
    assert found[0].reward == found[0].safe
    assert abs(found[0].helpful - found[0].safe) > 1e-3


@pytest.mark.parametrize("which", [0, 1])
def test_a_language_model_does_not_judge(scorers, policy, which):
    """With a fresh head it would, by chance, and nobody would hear of it."""
    paths = [policy if index == which else path for index, path in enumerate(scorers)]
    with pytest.raises(UserError, match="policy: not a reward model"):
        load_rewards(
            RewardModels(helpful=paths[0], safe=paths[1]),
            Tokenizer.load(policy),
            Ranks.alone(),
            "fp32",
        )


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_whose_scores_are_not_numbers_is_named(tmp_path, scorers, policy, which):
    """The better of two answers would otherwise be the first, or the last, whatever they are."""
    broken = checkpoint.load_scorer(scorers[which])
    with torch.no_grad():
        broken.score.weight[0, 0] = math.nan

    checkpoint.save(broken, tmp_path / "broken")
    Tokenizer.load(policy).save(tmp_path / "broken")
    paths = [tmp_path / "broken" if index == which else path for index, path in enumerate(scorers)]
    rewards = load_rewards(
        RewardModels(helpful=paths[0], safe=paths[1]), Tokenizer.load(policy), Ranks.alone(), "fp32"
    )

    with pytest.raises(
        UserError,
        match=r"broken: 2 of 2 scores are not finite numbers \(the first is nan, of row 1",
    ):
        rewards([[1, 9, 30, 40, 2], [1, 9, 2]], [False, False])

    with pytest.raises(UserError, match="broken: 1 of 1 scores are not finite"):
        judge_answers(
            Run(tmp_path / "run", False),
            "judge",
            tmp_path / "broken",
            "fp32",
            [prompt("Hi")],
            {0: [Answer("Yes.", Completion((), (9, 2), (), "stop"))]},
            [policy],
        )
