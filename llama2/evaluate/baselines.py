"""What a reward model has to beat: judges of answers that understand nothing.

`by_length` prefers the longer answer (the shorter where safety was judged). `BagOfWords` is a
logistic regression on which words an answer holds and on its length. Where they are as often right
as a reward model, its accuracy shows no more than length and words. The paper compares with other
reward models instead (Table 7).

Shapes: N pairs, F features (words, and length as the last).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

WORDS = 1200
MOST_PAIRS = 8192
"""pairs to learn from: more would hardly change 1,200 weights"""
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0)
"""weights of the squared weights to choose from, the strongest first: few pairs need more, many
clear ones less"""
ITERATIONS = 20
_WORD = re.compile(r"\w+")

Answers = tuple[str, str]
"""the preferred answer and the other"""


def by_length(pairs: Iterable[tuple[Answers, bool]]) -> list[float]:
    """1 where the longer answer was preferred (where the flag is set: the shorter), 0 where not,
    0.5 for a tie."""
    marks = []
    for (chosen, rejected), shorter in pairs:
        longer = _sign(len(chosen) - len(rejected))
        marks.append(0.5 * (1 - longer if shorter else 1 + longer))

    return marks


class BagOfWords:
    """Fitted to pairs: the difference of two answers' features decides.

    Features: presence of the `WORDS` words that most answers hold, and the logarithm of the length.
    The penalty is the one with the smallest loss on a fifth of the pairs after a fit to the rest.
    The same pairs give the same weights.
    """

    def __init__(self, pairs: Sequence[Answers]) -> None:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:MOST_PAIRS]
        pairs = [pairs[index] for index in order.tolist()]
        held = Counter(word for pair in pairs for answer in pair for word in words(answer))
        frequent = sorted(held, key=lambda word: (-held[word], word))[:WORDS]
        self.places = {word: place for place, word in enumerate(frequent)}
        features_NF = self.differences(pairs)
        self.weights_F = fit_logistic(features_NF, best_penalty(features_NF))

    def differences(self, pairs: Sequence[Answers]) -> Tensor:
        """Features of the preferred answers less those of the others, float32 NF."""
        features_NF = torch.zeros(len(pairs), len(self.places) + 1)
        for row, pair in enumerate(pairs):
            for answer, sign in zip(pair, (1.0, -1.0)):
                for word in words(answer):
                    if word in self.places:
                        features_NF[row, self.places[word]] += sign

                features_NF[row, -1] += sign * math.log1p(len(answer))

        return features_NF

    def judge(self, pairs: Sequence[Answers]) -> list[float]:
        """1 where the preferred answer is preferred here too, 0 where not, 0.5 where nothing tells
        them apart."""
        return [
            0.5 * (1 + _sign(margin))
            for margin in (self.differences(pairs) @ self.weights_F).tolist()
        ]


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(_WORD.findall(text.lower()))


def best_penalty(features_NF: Tensor) -> float:
    """The one of `PENALTIES` with the smallest loss on the first fifth of the pairs after a fit to
    the rest."""
    aside_MF, rest_NF = features_NF.tensor_split([len(features_NF) // 5])
    weights_F: Tensor | None = None
    losses = []

    for penalty in PENALTIES:
        weights_F = fit_logistic(rest_NF, penalty, weights_F)
        losses.append(_penalised(aside_MF, weights_F, 0.0))

    return PENALTIES[losses.index(min(losses))]


def fit_logistic(features_NF: Tensor, penalty: float, start_F: Tensor | None = None) -> Tensor:
    """The weights that minimise sum log(1 + exp(-x w)) + penalty |w|^2 / 2, by Newton's method.

    A step that makes it worse is halved; the function is convex, so a small enough one makes it
    better.
    """
    weights_F = torch.zeros(features_NF.shape[1]) if start_F is None else start_F
    value = _penalised(features_NF, weights_F, penalty)
    for _ in range(ITERATIONS):
        right_N = torch.sigmoid(features_NF @ weights_F)
        gradient_F = penalty * weights_F - features_NF.T @ (1 - right_N)
        curvature_FF = features_NF.T @ (features_NF * (right_N * (1 - right_N))[:, None])
        curvature_FF.diagonal().add_(penalty)
        step_F = torch.linalg.solve(curvature_FF, gradient_F)
        before = value

        for part in (1.0, 0.5, 0.25, 0.125, 0.0625):
            found = _penalised(features_NF, weights_F - part * step_F, penalty)
            if found < value:
                weights_F, value = weights_F - part * step_F, found
                break

        if before - value < 1e-6 * before:
            break

    return weights_F


def _penalised(features_NF: Tensor, weights_F: Tensor, penalty: float) -> float:
    losses_N = torch.nn.functional.softplus(-(features_NF @ weights_F))
    return float(losses_N.double().sum() + penalty * weights_F.double().square().sum() / 2)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
