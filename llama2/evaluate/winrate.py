"""Win rates with ties removed, and 95 % intervals of what an evaluation counts (§3.4, Figures 2 and
11).

Shares: Wilson. Differences and ratios of two shares are made of two Wilson intervals: Newcombe's
method 10 (Statistics in Medicine 17, 1998), and Donner and Zou's MOVER-R (Statistical Methods in
Medical Research 21, 2012). Wins less losses on the same prompts: the paired interval of Agresti and
Min (Statistics in Medicine 24, 2005), half a case added to each of four cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a proportion, of 95 % unless `z` says otherwise; (0, 1) without trials.
    Unlike the normal one it stays within [0, 1]."""
    if trials == 0:
        return 0.0, 1.0

    rate, square = successes / trials, z**2
    centre = (rate + square / (2 * trials)) / (1 + square / trials)
    half = (
        z / (1 + square / trials) * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    )

    # Its ends are exact where nothing or everything succeeded: rounding would leave them a hair
    # beside 0 and 1.
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)


@dataclass(frozen=True)
class WinRate:
    """Outcome of one version against another on the same prompts."""

    wins: int
    losses: int
    ties: int

    @property
    def rate(self) -> float | None:
        """wins / (wins + losses), as in Figure 2; None if every comparison was a tie."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    def as_json(self) -> dict[str, Any]:
        low, high = wilson(self.wins, self.wins + self.losses)
        return {
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "rate": self.rate,
            "low": low,
            "high": high,
        }


def compare(ours: Sequence[float], theirs: Sequence[float], tolerance: float = 1e-9) -> WinRate:
    """Scores of two versions on the same prompts, in the same order; closer than `tolerance` is a
    tie."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins = sum(d > tolerance for d in differences)
    losses = sum(d < -tolerance for d in differences)

    return WinRate(wins, losses, len(differences) - wins - losses)


def proportion(successes: int, trials: int) -> dict[str, Any]:
    """A rate with its size and interval: {"rate", "n", "low", "high"}; the rate is None without
    trials."""
    low, high = wilson(successes, trials)
    return {"rate": successes / trials if trials else None, "n": trials, "low": low, "high": high}


Interval = tuple[float, float]


def share_difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> Interval:
    """The interval of after - before, two `proportion`s of prompts that need not be the same."""
    gain = after["rate"] - before["rate"]
    down = math.hypot(after["rate"] - after["low"], before["high"] - before["rate"])
    up = math.hypot(after["high"] - after["rate"], before["rate"] - before["low"])

    return gain - down, gain + up


def share_ratio(before: Mapping[str, Any], after: Mapping[str, Any]) -> Interval:
    """The interval of before / after, two `proportion`s: how many times fewer cases there are now.
    It is (0, inf) where there were none and are none."""
    p, q = before["rate"], after["rate"]
    # Each end solves a quadratic in the ratio r: edge · r² - 2 p q r + room = 0.
    low_edge, high_edge = (after[end] * (2 * q - after[end]) for end in ("high", "low"))
    low_room, high_room = (before[end] * (2 * p - before[end]) for end in ("low", "high"))
    low = low_room / (p * q + math.sqrt((p * q) ** 2 - low_room * low_edge)) if low_room else 0.0
    root = math.sqrt(max(0.0, (p * q) ** 2 - high_room * high_edge))

    return low, (p * q + root) / high_edge if high_edge > 0 else math.inf


def net_wins(wins: int, losses: int, ties: int) -> Interval:
    """The interval of (wins - losses) / comparisons: by how much more of all prompts one version is
    better on than the other is. Ties count as comparisons, so that many of them make a small
    difference certain."""
    count, gain = wins + losses + ties + 2, wins - losses
    half = Z95 * math.sqrt(wins + losses + 1 - gain**2 / count) / count
    return gain / count - half, gain / count + half


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its size and normal 95 % interval: {"mean", "n", "low", "high"}; the mean is None
    without values."""
    n = len(values)
    if n == 0:
        return {"mean": None, "n": 0, "low": None, "high": None}

    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else 0.0
    half = Z95 * deviation / math.sqrt(n)

    return {"mean": mean, "n": n, "low": mean - half, "high": mean + half}


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one side does not vary."""
    n = len(xs)
    if n < 2:
        return None

    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    scale = math.sqrt(sum(d * d for d in dx) * sum(d * d for d in dy))

    return sum(a * b for a, b in zip(dx, dy)) / scale if scale > 1e-12 else None
