"""What judges make of the answers of all versions (§3.4): ground truth where there is one, rules on
the words where there is none, and reward models, one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2.devices import Precision
from llama2.evaluate import conduct_summary, ghost, summary
from llama2.evaluate.judges import classify, rate
from llama2.generate.dialogue import Answer
from llama2.generate.rewards import to_probability
from llama2.judging import Rating
from llama2.records import Axis, Messages, Prompt
from llama2.results import Obedience, Proportion
from llama2.runs import Run
from llama2.stages.common.answers import judge_answers
from llama2.stages.common.judges import make_judge


@dataclass(frozen=True)
class VersionAnswers:
    """Answers of one version."""

    answers: list[Answer]
    """one a prompt"""
    greedy: list[Answer] | None
    """the same at temperature 0, where ground truth judges them"""
    talks: dict[ghost.InstructionRole, list[Messages]]
    """where the instruction stands -> the dialogs held under it"""


@dataclass(frozen=True)
class Scores:
    """Probabilities that reward models give to the answers of one version."""

    rewards: dict[Axis, list[float]]
    others: dict[str, list[float]]
    """by judges that are only judges"""


def score_answers(
    run: Run,
    rewards: Mapping[Axis, Path],
    others: Mapping[str, Path],
    precision: Precision,
    prompts: Sequence[Prompt],
    answers: Mapping[int, VersionAnswers],
    paths: Sequence[Path],
) -> dict[int, Scores]:
    """Have each reward model judge the answers of each version."""
    texts = {place: version.answers for place, version in answers.items()}
    scores = {place: Scores({}, {}) for place in answers}
    for axis, path in rewards.items():
        rows = judge_answers(run, f"judge-{axis}", path, precision, prompts, texts, paths)
        for place, row in rows.items():
            scores[place].rewards[axis] = list(map(to_probability, row))

    for index, (name, path) in enumerate(others.items()):
        rows = judge_answers(run, f"other-{index}", path, precision, prompts, texts, paths)
        for place, row in rows.items():
            scores[place].others[name] = list(map(to_probability, row))

    return scores


def describe_version(
    prompts: Sequence[Prompt],
    dialogs: Sequence[ghost.GhostDialog],
    version: VersionAnswers,
    scores: Scores,
) -> summary.Version:
    """Return what the judges think of a version."""
    obedience = {role: ghost.count_by_turn(dialogs, talks) for role, talks in version.talks.items()}
    by_kind = ghost.count_by_kind(dialogs, version.talks.get("user", [])) if dialogs else {}
    ratings = _rate(prompts, version.answers)
    conducts = None
    if ratings is None:
        conducts = conduct_summary.judge_answers(
            prompts, [answer.text for answer in version.answers]
        )

    return summary.Version(
        version.answers,
        ratings,
        _rate(prompts, version.greedy),
        scores.rewards,
        Obedience(**obedience, by_kind=by_kind),
        version.talks.get("user", []),
        conducts,
        scores.others,
    )


def _rate(prompts: Sequence[Prompt], answers: Sequence[Answer] | None) -> list[Rating] | None:
    if answers is None:
        return None

    return rate(make_judge(), prompts, [answer.text for answer in answers])


def describe_line(prompts: Sequence[Prompt], result: summary.Version) -> str:
    """Say in one line what the judges think of a version."""
    tokens = sum(len(answer.completion.tokens) for answer in result.answers)
    parts = [f"{tokens / len(result.answers):.0f} tokens an answer"]
    if result.ratings:
        mean = sum(rating.helpfulness for rating in result.ratings) / len(result.ratings)
        parts.append(f"rated {mean:.3f}")

    for name, scores in (*result.rewards.items(), *result.others.items()):
        parts.append(f"reward {name} {sum(scores) / len(scores):.3f}")

    if result.conducts is not None:
        parts += _describe_conduct(prompts, result)

    if result.ghost.user:
        parts.append("obeys " + "/".join(f"{turn.rate:.2f}" for turn in result.ghost.user))

    return ", ".join(parts)


def _describe_conduct(prompts: Sequence[Prompt], result: summary.Version) -> list[str]:
    """Say how many answers refuse, violate, or are none, by the rules."""
    kinds = [classify(prompt) for prompt in prompts]
    conduct = conduct_summary.measure_conduct(prompts, kinds, result.conducts or ())
    parts = []
    if "borderline" in conduct.refusals:
        parts.append(f"refuses {_share(conduct.refusals['borderline'])} borderline prompts")
    if conduct.violations.n:
        parts.append(f"violates on {_share(conduct.violations)} unsafe ones")

    empty = [share for share in conduct.degenerate.values() if share.rate]
    if empty:
        parts.append(f"{sum(round((share.rate or 0) * share.n) for share in empty)} degenerate")

    return parts


def _share(share: Proportion) -> str:
    bounds = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
    return f"{100 * (share.rate or 0):.1f} % {bounds} of {share.n:,}"
