"""Baselines that a reward model has to beat: judges of answers that understand nothing.

`judge_by_length` prefers the longer answer (the shorter where safety was judged). `BagOfWords` is a
logistic regression on which words an answer holds and on its length. Where they are as often right
as a reward model, its accuracy shows no more than length and words. The paper compares with other
reward models instead (Table 7).

Shapes: N pairs, F features (words, and length as the last).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llama2.results import WordWeights

WORDS = 1200
MOST_PAIRS = 8192
"""pairs to learn from: more would hardly change 1,200 weights"""
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0)
"""weights of the squared weights to choose from, the strongest first: few pairs need more, many
clear ones less"""
ITERATIONS = 20
_WORD = re.compile(r"\w+")

RankedTexts = tuple[str, str]
"""the preferred answer and the other"""


def judge_by_length(pairs: Iterable[tuple[RankedTexts, bool]]) -> list[float]:
    """Return 1 where the longer answer was preferred (where the flag is set: the shorter), 0 where
    not, 0.5 for a tie."""
    scores = []
    for (chosen, rejected), shorter in pairs:
        margin = len(rejected) - len(chosen) if shorter else len(chosen) - len(rejected)
        scores.append(_score(margin))

    return scores


class BagOfWords:
    """Fitted to pairs: the difference of two answers' features decides.

    Features: presence of the `WORDS` words that most answers hold, and the logarithm of the length.
    The penalty is the one with the smallest loss on a fifth of the pairs after a fit to the rest.
    The same pairs give the same weights.
    """

    def __init__(self, words: Sequence[str], weights_F: Tensor, count: int = 0) -> None:
        self.columns = {word: column for column, word in enumerate(words)}
        self.weights_F = weights_F
        self.count = count
        """pairs it was fitted to"""

    @classmethod
    def fit(cls, pairs: Sequence[RankedTexts]) -> BagOfWords:
        """Choose the words that decide and their weights."""
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:MOST_PAIRS]
        pairs = [pairs[index] for index in order.tolist()]
        counts = Counter(itertools.chain(*map(split_words, itertools.chain(*pairs))))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
        words = cls(frequent, torch.zeros(0), len(pairs))
        features_NF = words.subtract_features(pairs)
        words.weights_F = fit_logistic(features_NF, choose_penalty(features_NF))
        return words

    @classmethod
    def load(cls, stored: WordWeights) -> BagOfWords:
        """Return the one whose `words` and `weights_F` were stored beside a reward model."""
        return cls(stored.words, torch.tensor(stored.word_weights), stored.fitted_to)

    @property
    def words(self) -> list[str]:
        """The words that decide, a column each."""
        return list(self.columns)

    def subtract_features(self, pairs: Sequence[RankedTexts]) -> Tensor:
        """Return the features of the preferred answers less those of the others, float32 NF."""
        features_NF = torch.zeros(len(pairs), len(self.columns) + 1)
        for row, pair in enumerate(pairs):
            for answer, sign in zip(pair, (1.0, -1.0)):
                for word in split_words(answer) & self.columns.keys():
                    features_NF[row, self.columns[word]] += sign

                features_NF[row, -1] += sign * math.log1p(len(answer))

        return features_NF

    def judge(self, pairs: Sequence[RankedTexts]) -> list[float]:
        """Return 1 where the preferred answer is preferred here too, 0 where not, 0.5 where nothing
        tells them apart."""
        margins_N = self.subtract_features(pairs) @ self.weights_F
        return [_score(margin) for margin in margins_N.tolist()]


def split_words(text: str) -> set[str]:
    """Return the different words of a text, in lower case."""
    return set(_WORD.findall(text.lower()))


def choose_penalty(features_NF: Tensor) -> float:
    """Return the one of `PENALTIES` with the smallest loss on the first fifth of the pairs after a
    fit to the rest."""
    heldout_MF, rest_NF = features_NF.tensor_split([len(features_NF) // 5])
    weights_F: Tensor | None = None
    losses = {}

    for penalty in PENALTIES:
        weights_F = fit_logistic(rest_NF, penalty, weights_F)
        losses[penalty] = _penalised_loss(heldout_MF, weights_F, 0.0)

    return min(losses, key=losses.__getitem__)


def fit_logistic(features_NF: Tensor, penalty: float, start_F: Tensor | None = None) -> Tensor:
    """Return the weights that minimise sum log(1 + exp(-x w)) + penalty |w|^2 / 2.

    By Newton's method. A step that makes it worse is halved; the function is convex, so a small
    enough one makes it better.
    """
    weights_F = torch.zeros(features_NF.shape[1]) if start_F is None else start_F
    loss = _penalised_loss(features_NF, weights_F, penalty)
    for _ in range(ITERATIONS):
        right_N = torch.sigmoid(features_NF @ weights_F)
        gradient_F = penalty * weights_F - features_NF.T @ (1 - right_N)
        curvature_FF = features_NF.T @ (features_NF * (right_N * (1 - right_N))[:, None])
        curvature_FF.diagonal().add_(penalty)
        step_F = torch.linalg.solve(curvature_FF, gradient_F)
        before = loss

        for part in (1.0, 0.5, 0.25, 0.125, 0.0625):
            moved_F = weights_F - part * step_F
            moved_loss = _penalised_loss(features_NF, moved_F, penalty)
            if moved_loss < loss:
                weights_F, loss = moved_F, moved_loss
                break

        if before - loss < 1e-6 * before:
            break

    return weights_F


def _penalised_loss(features_NF: Tensor, weights_F: Tensor, penalty: float) -> float:
    losses_N = torch.nn.functional.softplus(-(features_NF @ weights_F))
    return float(losses_N.double().sum() + penalty * weights_F.double().square().sum() / 2)


def _score(margin: float) -> float:
    """Return 1 for a positive margin, 0 for a negative one, 0.5 for none."""
    return 0.5 * (1 + (margin > 0) - (margin < 0))
