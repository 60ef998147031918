"""Win rates with ties removed, and 95 % intervals of what an evaluation counts (§3.4, Figures 2 and
11).

Shares: Wilson. Differences and ratios of two shares are made of two Wilson intervals: Newcombe's
method 10 (Statistics in Medicine 17, 1998), and Donner and Zou's MOVER-R (Statistical Methods in
Medical Research 21, 2012). Differences on the same cases: the paired interval of Agresti and Min
(Statistics in Medicine 24, 2005), half a case added to each of four cells; where several cases have
one origin, they vary together, and the variance is that of the sums over each origin.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence

from llama2.results import Mean, PairedDifference, Proportion, WinShare

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
Interval = tuple[float, float]


def bound_share(successes: float, trials: int, z: float = Z95) -> Interval:
    """Return Wilson's interval of a proportion, of 95 % unless `z` says otherwise; (0, 1) without
    trials. Unlike the normal one it stays within [0, 1]."""
    if trials == 0:
        return 0.0, 1.0

    rate, square = successes / trials, z**2
    scale = 1 + square / trials
    centre = (rate + square / (2 * trials)) / scale
    variance = rate * (1 - rate) / trials + square / (4 * trials**2)
    half = z / scale * math.sqrt(variance)

    # Its ends are exact where nothing or everything succeeded: rounding would leave them a hair
    # beside 0 and 1.
    low = centre - half if successes else 0.0
    return low, centre + half if successes < trials else 1.0


def compare(ours: Sequence[float], theirs: Sequence[float], tolerance: float = 1e-9) -> WinShare:
    """Compare scores of two versions on the same prompts, in the same order; closer than
    `tolerance` is a tie."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins = sum(difference > tolerance for difference in differences)
    losses = sum(difference < -tolerance for difference in differences)
    return measure_wins(wins, losses, len(differences) - wins - losses)


def measure_wins(wins: int, losses: int, ties: int) -> WinShare:
    """Return the outcome of one version against another on the same prompts, its rate wins /
    (wins + losses) as in Figure 2."""
    share = measure_share(wins, wins + losses)
    return WinShare(
        wins=wins, losses=losses, ties=ties, rate=share.rate, low=share.low, high=share.high
    )


def measure_share(successes: float, trials: int) -> Proportion:
    """Return a rate with its size and interval; the rate is None without trials."""
    low, high = bound_share(successes, trials)
    rate = successes / trials if trials else None
    return Proportion(rate=rate, n=trials, low=low, high=high)


def bound_difference(after: Proportion, before: Proportion) -> Interval:
    """Return the interval of after - before, of prompts that need not be the same.

    Neither may be without cases.
    """
    p, q = before.rate or 0.0, after.rate or 0.0
    down = math.hypot(q - after.low, before.high - p)
    up = math.hypot(after.high - q, p - before.low)

    return q - p - down, q - p + up


def bound_ratio(before: Proportion, after: Proportion) -> Interval:
    """Return the interval of before / after: how many times fewer cases there are now.

    Neither may be without cases. It is (0, inf) where there were none and are none.
    """
    p, q = before.rate or 0.0, after.rate or 0.0
    # Each end solves a quadratic in the ratio r: edge · r² - 2 p q r + room = 0.
    low_edge, high_edge = after.high * (2 * q - after.high), after.low * (2 * q - after.low)
    low_room, high_room = before.low * (2 * p - before.low), before.high * (2 * p - before.high)
    low = low_room / (p * q + math.sqrt((p * q) ** 2 - low_room * low_edge)) if low_room else 0.0
    root = math.sqrt(max(0.0, (p * q) ** 2 - high_room * high_edge))

    return low, (p * q + root) / high_edge if high_edge > 0 else math.inf


def bound_net_wins(wins: int, losses: int, ties: int) -> Interval:
    """Return the interval of (wins - losses) / comparisons: by how much more of all prompts one
    version is better on than the other is.

    Ties count as comparisons, so that many of them make a small difference certain.
    """
    count, gain = wins + losses + ties + 2, wins - losses
    half = Z95 * math.sqrt(wins + losses + 1 - gain**2 / count) / count
    return gain / count - half, gain / count + half


def compare_marks(
    ours: Sequence[float],
    theirs: Sequence[float],
    origins: Sequence[Hashable] | None = None,
) -> PairedDifference:
    """Return the share of marks (0, 1, or 0.5 for a tie) that we have beyond theirs on the same
    cases, of which there must be some.

    `origins` names what each case comes from, such as a question with several answers: cases of one
    origin count together. Where each has its own, and no mark is a half, the interval is that of
    `bound_net_wins`; its ends stay within [-1, 1].
    """
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    groups: dict[Hashable, list[float]] = {}
    for case, gain in enumerate(gains):
        groups.setdefault(case if origins is None else origins[case], []).append(gain)

    count = len(gains) + 2
    centre = sum(gains) / count
    # the four half cases are +1, -1, 0 and 0, each an origin of its own
    squares = 1 + 2 * centre**2
    squares += sum((sum(group) - len(group) * centre) ** 2 for group in groups.values())
    half = Z95 * math.sqrt(squares) / count
    return PairedDifference(
        difference=sum(gains) / len(gains),
        n=len(gains),
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
    )


def measure_mean(values: Sequence[float]) -> Mean:
    """Return a mean with its size and normal 95 % interval; the mean is None without values."""
    n = len(values)
    if n == 0:
        return Mean(mean=None, n=0, low=None, high=None)

    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    half = Z95 * math.sqrt(squares / max(1, n - 1)) / math.sqrt(n)
    return Mean(mean=mean, n=n, low=mean - half, high=mean + half)


def correlate(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where one side does not vary."""
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:
        return None
