"""What one line of the summary says, and how an interval decides it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llama2.evaluate.winrate import Interval
from llama2.report.html import percent
from llama2.results import Proportion, WinShare

State = Literal["reached", "not reached", "too few to tell"]
ORDER: tuple[State, ...] = ("not reached", "too few to tell", "reached")


@dataclass(frozen=True)
class Judgement:
    """One line of the summary."""

    what: str
    target: str
    reached: str
    """what was measured"""
    state: State
    count: str = ""
    """what it stands on; empty where nothing was sampled"""

    @property
    def good(self) -> bool:
        """True if it is reached beyond chance."""
        return self.state == "reached"


def judge_interval(interval: Interval, least: float = -math.inf, most: float = math.inf) -> State:
    """Judge where an interval lies: wholly between `least` and `most`, wholly outside, or
    neither."""
    low, high = interval
    if least <= low and high <= most:
        return "reached"

    return "not reached" if high < least or low > most else "too few to tell"


def combine(states: Sequence[State]) -> State:
    """Return one state for several claims that must all hold."""
    return min(states, key=ORDER.index)


def judge_exactly(good: bool) -> State:
    """Judge what is no sample."""
    return "reached" if good else "not reached"


def format_points(value: float, interval: Interval) -> str:
    """Format a difference of shares in points, with its interval."""
    low, high = (100 * end for end in interval)
    return f"{100 * value:+.1f} points [{low:+.1f},\u00a0{high:+.1f}]"


def format_share(share: Proportion | WinShare) -> str:
    """Format a share with its interval."""
    return f"{percent(share.rate)} [{100 * share.low:.0f},\u00a0{100 * share.high:.0f}]"
