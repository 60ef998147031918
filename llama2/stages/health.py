"""The PPO doctor: what a run's metrics say is wrong, why, and what to do about it.

A flat reward and gibberish look alike in a log; these alarms tell the usual causes apart. Each names the metric, the
step where it first went wrong, the cause, and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """`wrong(first, now)` compares a metric's value with its value at the start."""

    metric: str
    wrong: Callable[[float, float], bool]
    cause: str
    remedy: str
    settled: float = 0.0  # share of the run before which the rule does not apply


@dataclass(frozen=True)
class Alarm:
    """A rule that was broken."""

    name: str
    step: int
    value: float
    cause: str
    remedy: str


def rules(kl_stop: float) -> list[Rule]:
    """All rules; `kl_stop` is where training stops by itself."""
    return [
        Rule("ppo/kl_reference", lambda first, now: now > 0.8 * kl_stop,
             "the policy runs away from its start: it may have found an answer that fools the reward models",
             "raise beta, lower the learning rate, or refresh the reward models on the policy's own answers"),
        Rule("ppo/kl_reference", lambda first, now: now < -1.0,
             "a negative KL: sampling and training disagree about the policy",
             "sample without top_p and at temperature 1; look at ppo/engine_gap"),
        Rule("ppo/entropy", lambda first, now: now < 0.25 * first,
             "the policy has collapsed to few answers", "raise beta or lower the learning rate"),
        Rule("ppo/clip_fraction", lambda first, now: now > 0.3,
             "updates are too large: most of them are cut", "lower the learning rate or the number of epochs"),
        Rule("ppo/explained_variance", lambda first, now: now < -0.5,
             "the critic predicts worse than a constant", "raise critic_learning_rate or use more iterations",
             settled=0.3),
        Rule("ppo/eos_rate", lambda first, now: now < 0.7 and now < first - 0.05,
             "answers no longer end", "set `unfinished` to a low score, or raise max_tokens"),
        Rule("ppo/length", lambda first, now: now > 2 * first or now < 0.5 * first,
             "answers have doubled or halved in length: the reward models may judge length",
             "look at reward/length_correlation and at samples; balance lengths in the comparisons"),
        Rule("reward/length_correlation", lambda first, now: now > 0.7 and now > first + 0.2,
             "longer answers are rewarded for their length", "balance lengths in the comparisons"),
        Rule("ppo/engine_gap", lambda first, now: now > 0.1,
             "sampler and trainer disagree about log-probabilities", "sample in fp32"),
        Rule("heldout/reward", lambda first, now: now < first - 0.05,
             "held-out prompts get worse while training goes on: over-optimisation",
             "stop earlier (patience), raise beta, refresh the reward models"),
    ]


def alarms(metrics: Sequence[Row], kl_stop: float) -> list[dict[str, Any]]:
    """The rules a run broke, with the first step at which it did."""
    found = []
    for rule in rules(kl_stop):
        rows = [(int(row["step"]), row[rule.metric]) for row in metrics if rule.metric in row]
        if not rows:
            continue
        first = rows[0][1]
        # one bad value is noise; two in a row, or the last one, is a finding
        bad = [rule.wrong(first, value) for _, value in rows]
        for place, (step, value) in enumerate(rows):
            lasting = bad[place] and (place + 1 == len(rows) or bad[place + 1])
            if lasting and place > 0 and place >= rule.settled * len(rows):
                found.append(asdict(Alarm(rule.metric, step, value, rule.cause, rule.remedy)))
                break
    return found
