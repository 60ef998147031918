"""Accuracy of a reward model on held-out comparisons, beside judges that understand nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np

from llama2.devices import Precision
from llama2.evaluate.baselines import BagOfWords, judge_by_length
from llama2.evaluate.winrate import measure_share
from llama2.generate.score import score_rows
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.records import DEGREES, Axis
from llama2.results import Baselines, Proportion, SetAccuracy
from llama2.stages.common.reward_pairs import EncodedPair


def measure_accuracies(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    heldout: Mapping[str, Sequence[EncodedPair]],
    precision: Precision,
    ranks: Ranks,
) -> dict[str, SetAccuracy]:
    """Measure accuracy on each held-out set, and on rank 0 beside it that of judges which
    understand nothing."""
    accuracies = {
        name: measure_accuracy(scorer, pairs, precision, ranks) for name, pairs in heldout.items()
    }
    if not heldout or not ranks.is_main:
        return accuracies

    words = BagOfWords([pair.texts for pair in pairs])
    for name, accuracy in accuracies.items():
        texts = [pair.texts for pair in heldout[name]]
        is_safety = [pair.axis == "safe" for pair in heldout[name]]
        baselines = Baselines(
            longer=_proportion(judge_by_length(zip(texts, is_safety))),
            bag_of_words=_proportion(words.judge(texts)),
        )
        accuracies[name] = accuracy.model_copy(update={"baselines": baselines})

    return accuracies


def measure_accuracy(
    scorer: Scorer, pairs: Sequence[EncodedPair], precision: Precision, ranks: Ranks
) -> SetAccuracy:
    """Measure the share of pairs whose preferred answer scores higher (a tie counts half), in all
    and by degree (Table 8)."""
    rows = [pair.chosen for pair in pairs]
    rows += [pair.rejected for pair in pairs]
    scores = score_rows(scorer, rows, precision, ranks=ranks)
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    right = [0.5 * (1 + np.sign(a - b)) for a, b in zip(chosen, rejected)]

    groups: dict[str, list[float]] = {}
    for mark, pair in zip(right, pairs):
        groups.setdefault(DEGREES[pair.degree], []).append(mark)

    degrees = {degree: _proportion(marks) for degree, marks in groups.items()}
    return SetAccuracy(all=_proportion(right), **degrees)


def _proportion(right: Sequence[float]) -> Proportion:
    return measure_share(sum(right), len(right))


def describe_accuracy(name: str, accuracy: SetAccuracy, axes: Set[Axis]) -> str:
    """Say how often a reward model is right about a set of such axes, and how often the baselines
    are."""
    every = accuracy.all
    interval = f"[{100 * every.low:.1f}, {100 * every.high:.1f}]"
    line = f"right on {_percent(every)} {interval} of {every.n:,} pairs of {name}"
    if accuracy.baselines is None:
        return line

    length = "the shorter answer" if axes == {"safe"} else "the longer answer"
    if len(axes) > 1:
        length += " (about safety the shorter)"

    return (
        f"{line}; {length} is on {_percent(accuracy.baselines.longer)}, a bag of words on "
        f"{_percent(accuracy.baselines.bag_of_words)}"
    )


def warn_of_chance(name: str, accuracy: SetAccuracy) -> Iterator[str]:
    """Caution about an accuracy that chance or a baseline explains: it lies within the interval, or
    above."""
    every = accuracy.all
    right = f"right on {_percent(every)} of {every.n:,} pairs of {name}"
    if every.high < 0.5:
        yield f"{right}: worse than chance; look whether the preferences are the wrong way round"
        return

    if every.low <= 0.5:
        yield f"{right}: chance explains that; more pairs or more updates are needed"
        return

    if accuracy.baselines is None:
        return

    baselines = {
        "the length of answers": accuracy.baselines.longer,
        "a bag of words": accuracy.baselines.bag_of_words,
    }
    as_good = [what for what, baseline in baselines.items() if _rate(baseline) >= every.low]
    if as_good:
        yield (
            f"{right}: {' and '.join(as_good)} may explain that; more pairs, more updates or a "
            "larger model are needed to show more"
        )


def _rate(accuracy: Proportion) -> float:
    assert accuracy.rate is not None
    return accuracy.rate


def _percent(accuracy: Proportion) -> str:
    return f"{100 * _rate(accuracy):.1f} %"
