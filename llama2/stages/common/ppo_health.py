"""Alarms of PPO: rules on a run's metrics, each with cause and remedy.

A flat reward and gibberish look alike in a log; these alarms tell the usual causes apart. Each
names the metric, the step where it first went wrong, the cause, and the remedy. They are printed as
they happen, and kept in health.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llama2.devices import Precision
from llama2.ranks import Ranks
from llama2.results import Alarm
from llama2.train.loop import Hook, TrainingState

Row = Mapping[str, float]

# How far two passes over the same tokens may differ, in nats a token, before they no longer speak
# of one policy. On a CPU they are equal to the bit. Kernels of a GPU may add in another order each
# time: rounding of logits of about 10, 2^-24 of them in fp32 and 2^-8 in bf16, averaged over tokens
# and with room to spare.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 1e-2}


@dataclass(frozen=True)
class Rule:
    """A condition on one metric that means harm."""

    metric: str
    is_broken: Callable[[float, float], bool]
    """compares the metric's value at the start with a later one"""
    cause: str
    remedy: str
    settled: float = 0.0
    """share of the run before which the rule does not apply"""
    absolute: bool = False
    """the rule needs no start to compare with: it holds for the first value too"""
    certain: bool = False
    """one bad value is no noise"""
    unless: str = ""
    """a metric whose alarm explains this one"""


SAME_REWARDS = Rule(
    "reward/deviation",
    lambda first, now: now < 1e-3,
    "rewards do not vary: all answers of an iteration score alike, and whitened there is nothing "
    "to learn",
    "look at the samples; sample at temperature 1, raise max_tokens, or use another reward model; "
    "a score for `unfinished` answers makes all equal that are cut off",
    absolute=True,
)
RULES = (
    Rule(
        "ppo/kl_reference",
        lambda first, now: now < -1.0,
        "a negative KL: sampling and training disagree about the policy",
        "sample without top_p and at temperature 1; look at ppo/engine_gap",
    ),
    Rule(
        "ppo/entropy",
        lambda first, now: now < 0.25 * first,
        "the policy has collapsed to few answers",
        "raise beta or lower the learning rate",
    ),
    Rule(
        "ppo/clip_fraction",
        lambda first, now: now > 0.3,
        "updates are too large: most of them are cut",
        "lower the learning rate or the number of epochs",
    ),
    Rule(
        "ppo/explained_variance",
        lambda first, now: now < -0.5,
        "the critic predicts worse than a constant",
        "raise critic_learning_rate or use more iterations",
        settled=0.3,
        unless="reward/deviation",
    ),
    Rule(
        "ppo/eos_rate",
        lambda first, now: now < 0.5,
        "most answers do not end: they are cut off at max_tokens, where reward models were never "
        "trained to judge",
        "raise sample.max_tokens, or fine-tune the policy on answers that end; set `unfinished` "
        "to a low score",
        absolute=True,
    ),
    Rule(
        "ppo/eos_rate",
        lambda first, now: 0.5 <= now < 0.7 and now < first - 0.05,
        "answers no longer end",
        "set `unfinished` to a low score, or raise max_tokens",
    ),
    Rule(
        "ppo/length",
        lambda first, now: now > 2 * first or now < 0.5 * first,
        "answers have doubled or halved in length: the reward models may judge length",
        "look at reward/length_correlation and at samples; balance lengths in the comparisons",
    ),
    Rule(
        "reward/length_correlation",
        lambda first, now: now > 0.7 and now > first + 0.2,
        "longer answers are rewarded for their length",
        "balance lengths in the comparisons",
    ),
    Rule(
        "ppo/engine_gap",
        lambda first, now: now > 0.1,
        "sampler and trainer disagree about log-probabilities",
        "sample in fp32",
    ),
    Rule(
        "heldout/reward",
        lambda first, now: now < first - 0.05,
        "held-out prompts get worse while training goes on: over-optimisation",
        "stop earlier (patience), raise beta, refresh the reward models",
    ),
)
"""rules that neither the precision nor the settings of a run decide"""


def list_rules(kl_stop: float, precision: Precision = "bf16") -> list[Rule]:
    """Return all rules; `kl_stop` is where training stops by itself."""
    tolerance = TOLERANCE[precision]
    return [
        Rule(
            "ppo/first_kl",
            lambda first, now: now > tolerance,
            f"before the first update policy and reference differ, by more than {tolerance:g} "
            "nats a token",
            "policy and reference are the same weights: look for a device or a kernel that "
            "computes wrongly",
            absolute=True,
            certain=True,
        ),
        Rule(
            "ppo/first_ratio_deviation",
            lambda first, now: now > tolerance,
            f"the first ratios of an iteration are not 1, by more than {tolerance:g}: rollout and "
            "update compute differently",
            "train in fp32, or with deterministic kernels; clipping and KL count this as movement",
            absolute=True,
            certain=True,
        ),
        SAME_REWARDS,
        Rule(
            "ppo/kl_reference",
            lambda first, now: now > 0.8 * kl_stop,
            "the policy runs away from its start: it may have found an answer that fools the "
            "reward models",
            "raise beta, lower the learning rate, or refresh the reward models on the policy's "
            "own answers",
        ),
        *RULES,
    ]


def find_alarms(
    metrics: Sequence[Row],
    kl_stop: float,
    precision: Precision = "bf16",
    *,
    steps: int | None = None,
    finished: bool = True,
) -> list[Alarm]:
    """Return the rules a run broke, with the first step at which it did.

    `steps` is the length of the run, the last step logged unless given. While a run is not
    `finished`, its last value may still turn out to be noise.
    """
    last = steps or max((int(row["step"]) for row in metrics), default=0)
    alarms: dict[str, Alarm] = {}
    broken = []
    for rule in list_rules(kl_stop, precision):
        alarm = _find_alarm(rule, metrics, last, finished)
        if alarm is None:
            continue

        explanation = alarms.get(rule.unless)
        if explanation is None or explanation.step > alarm.step:
            alarms.setdefault(alarm.name, alarm)
            broken.append(alarm)

    return broken


def _find_alarm(rule: Rule, metrics: Sequence[Row], last: int, finished: bool) -> Alarm | None:
    """Find where a rule was first broken for good: one bad value is noise; two in a row, or the
    run's last, are none."""
    rows = [(int(row["step"]), row[rule.metric]) for row in metrics if rule.metric in row]
    bad = [rule.is_broken(rows[0][1], value) for _, value in rows]
    for place, (step, value) in enumerate(rows):
        lasting = rule.certain or (bad[place + 1] if place + 1 < len(rows) else finished)
        applies = (place > 0 or rule.absolute) and step >= rule.settled * last
        if bad[place] and lasting and applies:
            return Alarm(
                name=rule.metric, step=step, value=value, cause=rule.cause, remedy=rule.remedy
            )

    return None


class Doctor(Hook):
    """Prints every alarm on standard error, once, as soon as it is one (rank 0)."""

    def __init__(
        self,
        read: Callable[[], Sequence[Row]],
        kl_stop: float,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        """`read` gives what was logged so far."""
        self.read, self.kl_stop, self.precision, self.ranks = read, kl_stop, precision, ranks
        self.steps: int | None = None
        self.rows: list[Row] = []
        self.printed: set[tuple[str, str]] = set()

    def on_start(self, training: TrainingState) -> None:
        """Read the rows of a run that resumes, which has printed their alarms before."""
        self.steps = training.plan.max_steps
        if self.ranks.is_main:
            self.rows = list(self.read())
            alarms = self._find(finished=False)
            self.printed = {(alarm.name, alarm.cause) for alarm in alarms}

    def on_log(self, step: int, metrics: Row) -> None:
        """Look at one more row."""
        if self.ranks.is_main:
            self.rows.append({"step": step, **metrics})
            self.report(finished=False)

    def report(self, finished: bool) -> list[Alarm]:
        """Return all alarms so far, and print those that are new."""
        alarms = self._find(finished)
        for alarm in alarms:
            if (alarm.name, alarm.cause) not in self.printed:
                self.printed.add((alarm.name, alarm.cause))
                print(
                    f"alarm at step {alarm.step}: {alarm.cause} ({alarm.name} {alarm.value:.3g}); "
                    f"{alarm.remedy}",
                    file=sys.stderr,
                    flush=True,
                )

        return alarms

    def _find(self, finished: bool) -> list[Alarm]:
        steps = None if finished else self.steps
        return find_alarms(self.rows, self.kl_stop, self.precision, steps=steps, finished=finished)
