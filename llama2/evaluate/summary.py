"""Summary of the answers of all versions: rates, distributions, win rates, and conversations to
look at.

Everything here is a pure function of answers and scores, so evaluation.json can be made anew from
samples.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from llama2.evaluate.conduct import Conduct
from llama2.evaluate.conduct_summary import measure_conduct
from llama2.evaluate.judges import AXES, KINDS, PromptKind, classify
from llama2.evaluate.winrate import compare, correlate, measure_mean, measure_share
from llama2.generate.dialogue import Answer
from llama2.judging import Rating
from llama2.records import Axis, Messages, Prompt
from llama2.results import (
    Distribution,
    Histogram,
    JudgeComparison,
    Obedience,
    SampledAnswer,
    ShownAnswer,
    ShownPrompt,
    TruthResult,
    VersionComparison,
    VersionResult,
)

BINS = 40
QUANTILES = (5, 25, 50, 75, 95)
T = TypeVar("T")
JudgeName = Literal["truth", "reward"]


@dataclass(frozen=True)
class Version:
    """The answers of one version, one a prompt, and their scores."""

    answers: Sequence[Answer]
    ratings: Sequence[Rating] | None = None
    """by ground truth, where it judges"""
    greedy: Sequence[Rating] | None = None
    """of greedy answers"""
    rewards: Mapping[Axis, Sequence[float]] = field(default_factory=dict)
    """sigma(r) by reward model"""
    ghost: Obedience = field(default_factory=Obedience)
    talks: Sequence[Messages] = ()
    """dialogs under a lasting instruction"""
    conducts: Sequence[Conduct] | None = None
    """by rules, where ground truth does not judge"""
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """sigma(r) by judge that is only a judge"""

    def scores(self, judge: JudgeName, axis: Axis) -> Sequence[float]:
        """Return what a judge gives every answer on an axis; nothing where it is absent."""
        if judge == "truth":
            return [rating.score(axis) for rating in self.ratings or ()]

        return self.rewards.get(axis, ())

    def judge_answer(self, index: int) -> dict[str, Any]:
        """Return all that the judges say of one answer, by the names that results have for it."""
        scores: dict[str, Any] = {
            f"reward_{axis}": values[index] for axis, values in self.rewards.items()
        }
        if self.ratings:
            rating = self.ratings[index]
            scores |= {"helpfulness": rating.helpfulness, "safe": rating.safe}
            scores["refusal"] = rating.refusal

        return scores

    def describe_conduct(self, index: int, kind: PromptKind) -> dict[str, Any]:
        """Return what the rules say of one answer, by the names that results have for it."""
        if self.conducts is None:
            return {}

        conduct = self.conducts[index]
        verdict: dict[str, Any] = {"conduct": conduct.degenerate or conduct.refusal}
        return verdict | ({"violation": conduct.violates} if kind == "unsafe" else {})


def measure(
    prompts: Sequence[Prompt],
    kinds: Sequence[PromptKind],
    version: Version,
    axes: Mapping[str, Axis] | None = None,
) -> VersionResult:
    """Measure one version. Each reward model is shown on the prompts of its own axis, as in
    Figure 20; `axes` are those of the judges that are only judges."""
    others = {
        name: measure_mean(_on(kinds, axis, version.others[name]))
        for name, axis in (axes or {}).items()
    }
    conduct = None
    if version.conducts is not None:
        conduct = measure_conduct(prompts, kinds, version.conducts)

    lengths = [len(answer.completion.tokens) for answer in version.answers]
    ends = sum(answer.completion.finish == "stop" for answer in version.answers)
    distributions, by_kind, correlations = {}, {}, {}
    for axis, scores in version.rewards.items():
        on_axis = _on(kinds, axis, scores)
        if on_axis:
            distributions[axis] = distribute(on_axis)

        by_kind[axis] = {kind: measure_mean(_of(kinds, kind, scores)) for kind in KINDS}
        correlations[axis] = correlate(on_axis, _on(kinds, axis, lengths))

    return VersionResult(
        length=measure_mean(lengths),
        eos=measure_share(ends, len(lengths)),
        rewards=distributions,
        rewards_by_kind=by_kind,
        reward_length_correlation=correlations,
        ghost=version.ghost,
        truth=_measure_truth(prompts, kinds, version, lengths),
        conduct=conduct,
        other_rewards=others,
    )


def _measure_truth(
    prompts: Sequence[Prompt],
    kinds: Sequence[PromptKind],
    version: Version,
    lengths: Sequence[int],
) -> TruthResult | None:
    """Measure helpfulness by family, violations, quality of refusals and false refusals by ground
    truth (§4.2.3)."""
    if version.ratings is None:
        return None

    helpful, unsafe, borderline = (_of(kinds, kind, version.ratings) for kind in KINDS)
    greedy = None if version.greedy is None else _of(kinds, "helpful", version.greedy)
    families: dict[str, list[float]] = {}
    for prompt, rating in zip(_of(kinds, "helpful", prompts), helpful, strict=True):
        family = str(prompt.metadata.get("family", "other"))
        families.setdefault(family, []).append(rating.helpfulness)

    violations = sum(not rating.safe for rating in unsafe)
    return TruthResult(
        helpfulness=measure_mean(_helpfulness(helpful)),
        helpfulness_greedy=None if greedy is None else measure_mean(_helpfulness(greedy)),
        families={name: measure_mean(families[name]) for name in sorted(families)},
        violations=measure_share(violations, len(unsafe)),
        refusal_quality=measure_mean(_helpfulness(unsafe)),
        false_refusals=measure_share(_refusals(borderline), len(borderline)),
        false_refusals_helpful=measure_share(_refusals(helpful), len(helpful)),
        borderline_helpfulness=measure_mean(_helpfulness(borderline)),
        length_correlation=correlate(_helpfulness(version.ratings), lengths),
    )


def _helpfulness(ratings: Sequence[Rating]) -> list[float]:
    return [rating.helpfulness for rating in ratings]


def _refusals(ratings: Sequence[Rating]) -> int:
    return sum(rating.refusal for rating in ratings)


def distribute(scores: Sequence[float]) -> Distribution:
    """Return mean, quantiles and histogram over [0, 1] of probabilities (Figure 20)."""
    cuts = list(scores) * 99
    if len(scores) > 1:
        cuts = statistics.quantiles(sorted(scores), n=100, method="inclusive")

    counts = [0] * BINS
    for score in scores:
        counts[min(int(score * BINS), BINS - 1)] += 1

    edges = [bin / BINS for bin in range(BINS + 1)]
    return Distribution(
        **measure_mean(scores).model_dump(),
        quantiles={str(percent): cuts[percent - 1] for percent in QUANTILES},
        histogram=Histogram(edges=edges, counts=counts),
    )


def compare_versions(
    kinds: Sequence[PromptKind], versions: Mapping[str, Version]
) -> Iterator[VersionComparison]:
    """Compare each version with the first and with its predecessor, on both axes, by every judge
    (Figure 11).

    Helpfulness is compared on helpful prompts, harmlessness on unsafe ones.
    """
    names = list(versions)
    for predecessor, name in itertools.pairwise(names):
        others = dict.fromkeys((names[0], predecessor))
        for against, axis, judge in itertools.product(others, get_args(Axis), get_args(JudgeName)):
            ours = _on(kinds, axis, versions[name].scores(judge, axis))
            theirs = _on(kinds, axis, versions[against].scores(judge, axis))
            if ours and theirs:
                wins = compare(ours, theirs).model_dump()
                yield VersionComparison(
                    version=name, against=against, axis=axis, judge=judge, **wins
                )


def compare_by_others(
    kinds: Sequence[PromptKind], versions: Mapping[str, Version], axes: Mapping[str, Axis]
) -> Iterator[JudgeComparison]:
    """Compare versions as `compare_versions` does, by judges that are only judges, each on the
    prompts of its axis."""
    names = list(versions)
    for predecessor, name in itertools.pairwise(names):
        others = dict.fromkeys((names[0], predecessor))
        for against, (model, axis) in itertools.product(others, axes.items()):
            ours = _on(kinds, axis, versions[name].others[model])
            theirs = _on(kinds, axis, versions[against].others[model])
            if ours and theirs:
                wins = compare(ours, theirs).model_dump()
                yield JudgeComparison(
                    version=name, against=against, axis=axis, reward_model=model, **wins
                )


def show_prompts(
    prompts: Sequence[Prompt], versions: Mapping[str, Version], count: int
) -> list[ShownPrompt]:
    """Choose `count` prompts for the reader's eye, one of each family in turn, with the answers of
    all versions."""
    families: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        families.setdefault(str(prompt.metadata.get("family", classify(prompt))), []).append(index)

    # Unsafe and borderline prompts first: they are what a reader wants to see, and few.
    order = sorted(families, key=lambda family: (family not in ("unsafe", "borderline"), family))
    rounds = itertools.zip_longest(*(families[family] for family in order))
    indices = [index for index in itertools.chain(*rounds) if index is not None]
    return [_show(prompts[index], index, versions) for index in indices[:count]]


def _show(prompt: Prompt, index: int, versions: Mapping[str, Version]) -> ShownPrompt:
    answers = {}
    for name, version in versions.items():
        scores = version.judge_answer(index)
        for axis in version.rewards:
            scores[f"reward_{axis}"] = round(scores[f"reward_{axis}"], 4)

        answers[name] = ShownAnswer(text=version.answers[index].text, **scores)

    return ShownPrompt(
        id=prompt.id,
        kind=classify(prompt),
        family=prompt.metadata.get("family"),
        messages=list_turns(prompt.messages),
        answers=answers,
    )


def list_samples(name: str, prompts: Sequence[Prompt], version: Version) -> Iterator[SampledAnswer]:
    """Yield the rows of samples.jsonl: for each prompt the answer and all that is known about
    it."""
    for index, (prompt, answer) in enumerate(zip(prompts, version.answers, strict=True)):
        yield SampledAnswer(
            version=name,
            id=prompt.id,
            kind=classify(prompt),
            family=prompt.metadata.get("family"),
            prompt=list_turns(prompt.messages),
            answer=answer.text,
            tokens=len(answer.completion.tokens),
            finish=answer.completion.finish,
            **version.judge_answer(index),
            **version.describe_conduct(index, classify(prompt)),
        )


def list_turns(messages: Messages) -> list[tuple[str, str]]:
    """Return messages as (role, text)."""
    return [(message.role, message.content) for message in messages]


def _on(kinds: Sequence[PromptKind], axis: Axis, values: Sequence[T]) -> list[T]:
    """Return the values of an axis's own prompts; none where there are no values."""
    return [value for kind, value in zip(kinds, values) if AXES[kind] == axis]


def _of(kinds: Sequence[PromptKind], kind: PromptKind, values: Sequence[T]) -> list[T]:
    return [value for each, value in zip(kinds, values, strict=True) if each == kind]
