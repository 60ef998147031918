"""Judges without understanding: right values where they are known, and the optimum of the fit."""

import math
import random

import pytest
import torch

from llama2.evaluate.baselines import (
    MOST_PAIRS,
    PENALTIES,
    WORDS,
    BagOfWords,
    choose_penalty,
    fit_logistic,
    judge_by_length,
)
from llama2.results import WordWeights


def test_the_longer_answer_wins_and_on_safety_the_shorter():
    pairs = [("long answer", "short"), ("a", "bc"), ("ab", "cd")]
    assert judge_by_length((pair, False) for pair in pairs) == [1.0, 0.0, 0.5]
    assert judge_by_length((pair, True) for pair in pairs) == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 30.0])
def test_one_feature_has_the_weight_of_the_closed_equation(penalty):
    """A word that 30 preferred answers have and 10 others: 30 (1 - s(w)) - 10 s(w) = penalty w at
    the optimum."""
    features_NF = torch.tensor([[1.0]] * 30 + [[-1.0]] * 10)
    weight = float(fit_logistic(features_NF, penalty))
    right = 1 / (1 + math.exp(-weight))
    assert 30 * (1 - right) - 10 * right == pytest.approx(penalty * weight, abs=1e-3)


def test_noise_is_given_a_stronger_penalty_than_what_decides():
    draw = torch.Generator().manual_seed(1)
    noise_NF = torch.randint(-1, 2, (500, 300), generator=draw).float()
    clear_NF = noise_NF * noise_NF[:, :1].sign() + torch.eye(300)[0]
    assert choose_penalty(noise_NF) == max(PENALTIES)
    assert choose_penalty(clear_NF) < max(PENALTIES)


def test_the_fit_is_the_optimum_where_features_depend_on_one_another():
    draw = torch.Generator().manual_seed(0)
    features_NF = torch.randint(-1, 2, (300, 80), generator=draw).float()
    features_NF[:, 40:60] = features_NF[:, :20]
    features_NF[:, -1] = 30 * torch.randn(300, generator=draw)
    weights_F = fit_logistic(features_NF, 2.0)
    gradient_F = 2 * weights_F - features_NF.T @ (1 - torch.sigmoid(features_NF @ weights_F))
    assert float(gradient_F.norm()) < 0.05
    assert torch.equal(weights_F, fit_logistic(features_NF, 2.0))


def test_words_decide_where_length_does_not():
    draw = random.Random(0)
    nouns = [f"noun{number}" for number in range(50)]

    def answer(kind: str) -> str:
        return " ".join([*draw.choices(nouns, k=draw.randint(3, 9)), kind])

    train, test = ([(answer("kind"), answer("rude")) for _ in range(200)] for _ in range(2))
    assert BagOfWords.fit(train).judge(test) == [1.0] * 200
    assert (
        BagOfWords.fit([(rejected, chosen) for chosen, rejected in train]).judge(test)
        == [0.0] * 200
    )
    # case and signs aside
    assert BagOfWords.fit(train).judge([("Kind!", "KIND?"), ("same", "same")]) == [0.5, 0.5]


def test_a_bag_of_words_judges_alike_after_it_was_stored():
    draw = random.Random(1)

    def answer() -> str:
        return " ".join(draw.choices("abcdefghij", k=6))

    pairs = [(answer(), answer()) for _ in range(60)]
    words = BagOfWords.fit(pairs)
    stored = WordWeights(
        fitted_to=words.count, words=words.words, word_weights=words.weights_F.tolist()
    )
    again = BagOfWords.load(WordWeights.model_validate_json(stored.model_dump_json()))
    assert torch.equal(again.weights_F, words.weights_F)
    assert (again.judge(pairs), again.count) == (words.judge(pairs), 60)

    with pytest.raises(ValueError, match="not every word has a weight"):
        WordWeights(fitted_to=1, words=["a", "b"], word_weights=[1.0, 2.0])


def test_only_the_commonest_words_and_a_part_of_many_pairs_are_used():
    pairs = [(f"common w{number}", f"common v{number}") for number in range(WORDS)]
    judge = BagOfWords.fit(pairs)
    assert len(judge.columns) == WORDS
    assert judge.columns["common"] == 0
    assert judge.weights_F.shape == (WORDS + 1,)
    many = BagOfWords.fit([("yes", "no")] * (MOST_PAIRS + 5))
    assert many.judge([("yes", "no"), ("no", "yes")]) == [1.0, 0.0]
    assert BagOfWords.fit([]).judge([("a", "bb")]) == [0.5]
