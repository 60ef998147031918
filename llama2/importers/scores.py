"""Scores beside two answers: what says that they tie, or that the choice is not the better one.

`score_chosen` and `score_rejected`, `chosen_rating`, `margin`, ...: every set spells them in its
own way. Equal scores are a tie; scores that contradict the choice make the row worthless. How far
apart they lie is not used: no two sets score on the same scale, and the degrees of §3.2.1 are words
of people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llama2.importers.marks import read_row_flags
from llama2.importers.tables import SkippedRow
from llama2.reading.files import Row

T = TypeVar("T")
_SCORE = re.compile(r"score|rating|reward|helpfulness|quality", re.IGNORECASE)
_DIFFERENCE = ("margin", "score_diff", "score_difference", "rating_diff")


def drop_by_score(
    convert: Callable[[Row], Iterable[T | SkippedRow]],
) -> Callable[[Row], Iterator[T | SkippedRow]]:
    """Return a reader of comparisons that leaves out those without weight, and what the scores
    beside the two answers call a tie or a contradiction."""

    def read(row: Row) -> Iterator[T | SkippedRow]:
        if read_row_flags(row) not in ("all", "last"):
            raise row.error("a comparison has no turns to mask", "give the row a weight of 0 or 1")

        yield from convert(row)
        for difference in _read_differences(row):
            if difference == 0:
                raise SkippedRow("tie")
            if difference < 0:
                raise SkippedRow("the scores contradict the choice")

    return read


def _read_differences(row: Row) -> Iterator[float]:
    """Every statement of how much better the chosen answer is."""
    for key in row.value if isinstance(row.value, dict) else ():
        if "chosen" in key and _SCORE.search(key):
            other = key.replace("chosen", "rejected")
            better, worse = _read_number(row, key), _read_number(row, other)
            if better is not None and worse is not None:
                yield better - worse
            else:
                # half a comparison is none: it is named as unread
                row.read.difference_update((key, other))
        elif key in _DIFFERENCE and (difference := _read_number(row, key)) is not None:
            yield difference


def _read_number(row: Row, key: str) -> float | None:
    """Return the finite number of a column, None where it holds none."""
    try:
        number = float(row.get(key))
    except (TypeError, ValueError):
        return None

    return number if math.isfinite(number) else None
