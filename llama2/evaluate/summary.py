"""What the answers of all versions come to: rates, distributions, win rates, and conversations to
look at.

Everything here is a pure function of answers and scores, so evaluation.json can be made anew from
samples.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from llama2.evaluate.ghost import InstructionRole
from llama2.evaluate.judges import AXES, KINDS, PromptKind, classify
from llama2.evaluate.winrate import compare, correlation, mean_interval, proportion
from llama2.generate.dialogue import Answer
from llama2.judging import Rating
from llama2.records import Axis, Messages, Prompt

BINS = 40
QUANTILES = (5, 25, 50, 75, 95)
T = TypeVar("T")
JudgeName = Literal["truth", "reward"]


@dataclass(frozen=True)
class Version:
    """The answers of one version, one a prompt, and their scores. `rewards` are sigma(r) by reward
    model."""

    answers: Sequence[Answer]
    ratings: Sequence[Rating] | None = None
    greedy: Sequence[Rating] | None = None
    rewards: Mapping[Axis, Sequence[float]] = field(default_factory=dict)
    ghost: Mapping[InstructionRole, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    talks: Sequence[Messages] = ()

    def scores(self, judge: JudgeName, axis: Axis) -> Sequence[float]:
        """Return what a judge gives every answer on an axis; nothing where it is absent."""
        if judge == "truth":
            return [rating.score(axis) for rating in self.ratings or ()]

        return self.rewards.get(axis, ())


def describe(
    prompts: Sequence[Prompt], results: Mapping[str, Version], conversations: int
) -> dict[str, Any]:
    """The content of evaluation.json. `versions` keeps their order; all else is by name."""
    kinds = [classify(prompt) for prompt in prompts]
    return {
        "versions": list(results),
        "prompts": {kind: kinds.count(kind) for kind in KINDS},
        "results": {
            name: describe_version(prompts, kinds, result) for name, result in results.items()
        },
        "win_rates": win_rates(kinds, results),
        "conversations": choose(prompts, results, conversations),
        "ghost_dialogs": {
            name: [[m.role, m.content] for m in result.talks[0]]
            for name, result in results.items()
            if result.talks
        },
    }


def describe_version(
    prompts: Sequence[Prompt], kinds: Sequence[PromptKind], result: Version
) -> dict[str, Any]:
    """The figures of one version. Each reward model is shown on the prompts of its own axis, as in
    Figure 20."""
    lengths = [len(answer.completion.tokens) for answer in result.answers]
    ends = sum(answer.completion.finish == "stop" for answer in result.answers)
    described: dict[str, Any] = {
        "length": mean_interval(lengths),
        "eos": proportion(ends, len(lengths)),
        "rewards": {
            axis: distribution(_on(kinds, axis, scores))
            for axis, scores in result.rewards.items()
            if _on(kinds, axis, scores)
        },
        "rewards_by_kind": {
            axis: {kind: mean_interval(_of(kinds, kind, scores)) for kind in KINDS}
            for axis, scores in result.rewards.items()
        },
        "reward_length_correlation": {
            axis: correlation(_on(kinds, axis, scores), _on(kinds, axis, lengths))
            for axis, scores in result.rewards.items()
        },
        "ghost": {place: list(turns) for place, turns in result.ghost.items()},
    }

    if result.ratings is not None:
        described["truth"] = truth_figures(prompts, kinds, result.ratings)
        described["truth"]["length_correlation"] = correlation(
            [r.helpfulness for r in result.ratings], lengths
        )

    if result.greedy is not None:
        described["truth"]["helpfulness_greedy"] = mean_interval(
            [r.helpfulness for r in _of(kinds, "helpful", result.greedy)]
        )

    return described


def truth_figures(
    prompts: Sequence[Prompt], kinds: Sequence[PromptKind], ratings: Sequence[Rating]
) -> dict[str, Any]:
    """Ground truth: helpfulness by family, violations, quality of refusals, false refusals
    (§4.2.3)."""
    helpful = _of(kinds, "helpful", ratings)
    families: dict[str, list[float]] = {}
    for prompt, kind, rating in zip(prompts, kinds, ratings, strict=True):
        if kind == "helpful":
            families.setdefault(str(prompt.metadata.get("family", "other")), []).append(
                rating.helpfulness
            )

    unsafe, borderline = _of(kinds, "unsafe", ratings), _of(kinds, "borderline", ratings)
    return {
        "helpfulness": mean_interval([rating.helpfulness for rating in helpful]),
        "families": {name: mean_interval(values) for name, values in sorted(families.items())},
        "violations": proportion(sum(not rating.safe for rating in unsafe), len(unsafe)),
        "refusal_quality": mean_interval([rating.helpfulness for rating in unsafe]),
        "false_refusals": proportion(sum(rating.refusal for rating in borderline), len(borderline)),
        "false_refusals_helpful": proportion(
            sum(rating.refusal for rating in helpful), len(helpful)
        ),
        "borderline_helpfulness": mean_interval([rating.helpfulness for rating in borderline]),
    }


def distribution(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, quantiles and histogram over [0, 1] of probabilities (Figure 20)."""
    ordered = sorted(scores)
    cuts = (
        statistics.quantiles(ordered, n=100, method="inclusive")
        if len(ordered) > 1
        else ordered * 99
    )
    counts = [0] * BINS

    for score in scores:
        counts[min(int(score * BINS), BINS - 1)] += 1

    return {
        **mean_interval(scores),
        "quantiles": {str(q): cuts[q - 1] for q in QUANTILES},
        "histogram": {"edges": [i / BINS for i in range(BINS + 1)], "counts": counts},
    }


def win_rates(kinds: Sequence[PromptKind], results: Mapping[str, Version]) -> list[dict[str, Any]]:
    """Each version against the first and against its predecessor, on both axes, by every judge
    (Figure 11).

    Helpfulness is compared on helpful prompts, harmlessness on unsafe ones.
    """
    names = list(results)
    rows = []
    for index, name in enumerate(names[1:], 1):
        for against in dict.fromkeys((names[0], names[index - 1])):
            for axis, judge in itertools.product(get_args(Axis), get_args(JudgeName)):
                ours = _on(kinds, axis, results[name].scores(judge, axis))
                theirs = _on(kinds, axis, results[against].scores(judge, axis))
                if ours and theirs:
                    rows.append(
                        {
                            "version": name,
                            "against": against,
                            "axis": axis,
                            "judge": judge,
                            **compare(ours, theirs).as_json(),
                        }
                    )

    return rows


def choose(
    prompts: Sequence[Prompt], results: Mapping[str, Version], count: int
) -> list[dict[str, Any]]:
    """`count` prompts for the reader's eye, one of each family in turn, with the answers of all
    versions."""
    families: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        families.setdefault(str(prompt.metadata.get("family", classify(prompt))), []).append(index)

    # Unsafe and borderline prompts first: they are what a reader wants to see, and few.
    order = sorted(families, key=lambda family: (family not in ("unsafe", "borderline"), family))
    layers = itertools.zip_longest(*(families[family] for family in order))
    chosen = [index for layer in layers for index in layer if index is not None][:count]
    rows = []

    for index in chosen:
        prompt = prompts[index]
        answers = {}
        for name, result in results.items():
            rating = result.ratings[index] if result.ratings else None
            answers[name] = {
                "text": result.answers[index].text,
                **({"helpfulness": rating.helpfulness, "safe": rating.safe} if rating else {}),
                **{
                    f"reward_{axis}": round(scores[index], 4)
                    for axis, scores in result.rewards.items()
                },
            }

        rows.append(
            {
                "id": prompt.id,
                "kind": classify(prompt),
                "family": prompt.metadata.get("family"),
                "messages": [[m.role, m.content] for m in prompt.messages],
                "answers": answers,
            }
        )

    return rows


def samples(version: str, prompts: Sequence[Prompt], result: Version) -> list[dict[str, Any]]:
    """One row of samples.jsonl for each prompt: the answer and all that is known about it."""
    rows = []
    for index, (prompt, answer) in enumerate(zip(prompts, result.answers, strict=True)):
        rating = result.ratings[index] if result.ratings else None
        rows.append(
            {
                "version": version,
                "id": prompt.id,
                "kind": classify(prompt),
                "family": prompt.metadata.get("family"),
                "prompt": [[message.role, message.content] for message in prompt.messages],
                "answer": answer.text,
                "tokens": len(answer.completion.tokens),
                "finish": answer.completion.finish,
                **(
                    {
                        "helpfulness": rating.helpfulness,
                        "safe": rating.safe,
                        "refusal": rating.refusal,
                    }
                    if rating
                    else {}
                ),
                **{f"reward_{axis}": scores[index] for axis, scores in result.rewards.items()},
            }
        )

    return rows


def _on(kinds: Sequence[PromptKind], axis: Axis, values: Sequence[T]) -> list[T]:
    """The values of an axis's own prompts; none where there are no values."""
    return [value for kind, value in zip(kinds, values) if AXES[kind] == axis]


def _of(kinds: Sequence[PromptKind], kind: PromptKind, values: Sequence[T]) -> list[T]:
    return [value for each, value in zip(kinds, values, strict=True) if each == kind]
