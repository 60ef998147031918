"""Accuracy of a reward model on comparisons it has not seen, beside judges that understand
nothing.

What decides is how much more often the model is right than they are *on the same pairs*: two
intervals that overlap do not say that nothing lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeVar

import numpy as np

from llama2.devices import Precision
from llama2.evaluate.baselines import BagOfWords, judge_by_length
from llama2.evaluate.winrate import compare_marks, measure_share
from llama2.generate.score import check_finite, run_batches, score_rows
from llama2.model.scorer import Scorer
from llama2.ranks import Ranks
from llama2.records import DEGREES, Axis
from llama2.results import Baselines, PairedDifference, Proportion, SetAccuracy
from llama2.stages.common.reward_pairs import EncodedPair, collate_shared, list_sources

T = TypeVar("T")
JOINT_TOKENS = 16384
"""the most padded tokens of a forward pass"""


def measure_accuracies(
    scorer: Scorer,
    words: BagOfWords | None,
    sets: Mapping[str, Sequence[EncodedPair]],
    precision: Precision,
    ranks: Ranks,
    share_prompts: bool = False,
) -> dict[str, SetAccuracy]:
    """Measure accuracy on each set of pairs, beside that of judges which understand nothing; of
    `words` where it is given."""
    mark = mark_joint_pairs if share_prompts else mark_pairs
    marks = {name: mark(scorer, pairs, precision, ranks) for name, pairs in sets.items()}
    return measure_sets(sets, marks, words)


def measure_sets(
    sets: Mapping[str, Sequence[EncodedPair]],
    marks: Mapping[str, Sequence[float]],
    words: BagOfWords | None,
) -> dict[str, SetAccuracy]:
    """Return the accuracy of marks: of each set, then of the sources of those that have several."""
    accuracies = {name: summarise_marks(pairs, marks[name], words) for name, pairs in sets.items()}
    for part, (name, places) in list_sources(sets).items():
        of_source = _take(sets[name], places), _take(marks[name], places)
        accuracies[part] = summarise_marks(*of_source, words)

    return accuracies


def mark_pairs(
    scorer: Scorer,
    pairs: Sequence[EncodedPair],
    precision: Precision,
    ranks: Ranks,
    name: object = "the reward model",
) -> list[float]:
    """Return 1 for each pair whose preferred answer scores higher, 0.5 for a tie, else 0."""
    rows = [pair.chosen for pair in pairs]
    rows += [pair.rejected for pair in pairs]
    scores = score_rows(scorer, rows, precision, ranks=ranks, name=name)
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    return list(map(_compare, chosen, rejected))


def mark_joint_pairs(
    scorer: Scorer, pairs: Sequence[EncodedPair], precision: Precision, ranks: Ranks
) -> list[float]:
    """Return the marks of `mark_pairs`; what both conversations of a pair begin with is computed
    once, in one row for both."""
    device = next(scorer.parameters()).device

    def work(batch: Sequence[int]) -> list[tuple[float, float]]:
        joint = collate_shared([pairs[index] for index in batch])
        tokens_BT, branches_BT, ends_BK = (
            joint[name].to(device) for name in ("tokens_BT", "branches_BT", "ends_BK")
        )
        scores_BK = scorer(tokens_BT, branches_BT=branches_BT, ends_BK=ends_BK)
        return list(map(tuple, scores_BK.float().tolist()))

    sizes = [pair.joint_size for pair in pairs]
    scores = run_batches(scorer, sizes, work, precision, JOINT_TOKENS, ranks)
    check_finite([sum(pair) for pair in scores], sizes, "the reward model")

    return [_compare(*pair) for pair in scores]


def _compare(chosen: float, rejected: float) -> float:
    return 0.5 * (1 + float(np.sign(chosen - rejected)))


def summarise_marks(
    pairs: Sequence[EncodedPair], marks: Sequence[float], words: BagOfWords | None = None
) -> SetAccuracy:
    """Return the share of pairs judged rightly, in all and by degree (Table 8), and how far it lies
    above the baselines'."""
    texts = [pair.texts for pair in pairs]
    is_safety = [pair.axis == "safe" for pair in pairs]
    judges = [list(marks), judge_by_length(zip(texts, is_safety))]
    if words is not None:
        judges.append(words.judge(texts))

    openings = [pair.conversation for pair in pairs]
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(DEGREES[pair.degree], []).append(index)

    degrees, beside = {}, {}
    for degree in filter(groups.__contains__, DEGREES):
        chosen = groups[degree]
        columns = [_take(judge, chosen) for judge in judges]
        degrees[degree] = _share(columns[0])
        beside[degree] = _measure_baselines(columns, _take(openings, chosen))

    return SetAccuracy(
        all=_share(marks),
        baselines=_measure_baselines(judges, openings),
        baselines_by_degree=beside if len(beside) > 1 else {},
        **degrees,
    )


def _measure_baselines(judges: Sequence[Sequence[float]], openings: Sequence[int]) -> Baselines:
    """Measure baselines on some pairs. `judges`: the marks of the reward model, by length and, if
    there is one, by a bag of words."""
    marks, longer, *rest = judges
    baselines = Baselines(longer=_share(longer), over_longer=compare_marks(marks, longer, openings))
    for words in rest:
        over = compare_marks(marks, words, openings)
        baselines = baselines.model_copy(
            update={"bag_of_words": _share(words), "over_bag_of_words": over}
        )

    return baselines


def _take(values: Sequence[T], places: Sequence[int]) -> list[T]:
    return [values[place] for place in places]


def _share(marks: Sequence[float]) -> Proportion:
    return measure_share(sum(marks), len(marks))


# --- in words ---
def describe_accuracies(
    sets: Mapping[str, Sequence[EncodedPair]], accuracies: Mapping[str, SetAccuracy]
) -> Iterator[str]:
    """Yield what is to be said of each set: by source, by degree, and last of it all."""
    parts = list_sources(sets)
    for name, pairs in sets.items():
        axes = {pair.axis for pair in pairs}
        for part, (parent, _) in parts.items():
            if parent == name:
                yield describe_accuracy(part, accuracies[part], axes)

        yield from describe_degrees(name, accuracies[name])
        yield describe_accuracy(name, accuracies[name], axes)


def describe_accuracy(name: str, accuracy: SetAccuracy, axes: Set[Axis]) -> str:
    """Say how often a reward model is right about a set of such axes, and how far it is ahead of
    the baselines on the same pairs."""
    every = accuracy.all
    line = f"right on {_percent(every)} {_bounds(every)} of {every.n:,} pairs of {name}"
    if accuracy.baselines is None:
        return line

    length = "the shorter answer" if axes == {"safe"} else "the longer answer"
    if len(axes) > 1:
        length += " (about safety the shorter)"

    return f"{line}; {_describe_lead(accuracy.baselines, length)}"


def describe_degrees(name: str, accuracy: SetAccuracy) -> Iterator[str]:
    """Say the same of each degree, where there are several."""
    for degree, share in accuracy.by_degree.items():
        baselines = accuracy.baselines_by_degree.get(degree)
        if baselines is not None:
            line = f"{name}, {degree}: {_percent(share)} {_bounds(share)} of {share.n:,} pairs"
            yield f"{line}; {_describe_lead(baselines, 'length')}"


def _describe_lead(baselines: Baselines, length: str) -> str:
    parts = [f"{length} is on {_percent(baselines.longer)}{_lead(baselines.over_longer)}"]
    if baselines.bag_of_words is not None:
        lead = _lead(baselines.over_bag_of_words)
        parts.append(f"a bag of words on {_percent(baselines.bag_of_words)}{lead}")

    return ", ".join(parts)


def _lead(difference: PairedDifference | None) -> str:
    """Say how many points the model is ahead of a baseline."""
    if difference is None:
        return ""

    return f" (the model {100 * difference.difference:+.1f} points {_bounds(difference)})"


def warn_of_chance(name: str, accuracy: SetAccuracy) -> Iterator[str]:
    """Caution about an accuracy that chance or a baseline explains: chance lies within its
    interval, or no lead within that of the difference on the same pairs."""
    every = accuracy.all
    right = f"right on {_percent(every)} of {every.n:,} pairs of {name}"
    if every.high < 0.5:
        yield f"{right}: worse than chance; look whether the preferences are the wrong way round"
        return

    if every.low <= 0.5:
        yield f"{right}: chance explains that; more pairs or more updates are needed"
        return

    judges = {"length": "the length of answers", "bag of words": "a bag of words"}
    leads = accuracy.leads
    as_good = [what for name, what in judges.items() if _is_no_lead(leads.get(name))]
    if as_good:
        yield (
            f"{right}: {' and '.join(as_good)} may explain that; more pairs, more updates or a "
            "larger model are needed to show more"
        )


def _is_no_lead(difference: PairedDifference | None) -> bool:
    return difference is not None and difference.low <= 0


def _percent(accuracy: Proportion) -> str:
    assert accuracy.rate is not None
    return f"{100 * accuracy.rate:.1f} %"


def _bounds(interval: Proportion | PairedDifference) -> str:
    sign = "+" if isinstance(interval, PairedDifference) else ""
    return f"[{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
