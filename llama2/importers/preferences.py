"""Importers of public human preference data (§3.2.1, Table 6) into `records.Preference`.

Among the formats are those of all seven open sets of Table 6. Three conventions hold for every one
of them:

- the degree of §3.2.1 is "better" (the margin of a middling pair) but for the one set whose
  annotators stated it (HelpSteer2); scores of two answers decide ties and nothing else, for no two
  sets score alike;
- public sets do not tell in which order the answers were shown, so the order is drawn from a hash
  of the two texts, never of the label: position carries no information, and the same file always
  gives the same order;
- a well-formed row that teaches nothing (a tie, an empty or identical answer) is skipped and
  counted by reason; a malformed row is an error that names file and line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llama2.hashing import hash_parts
from llama2.importers.preference_formats import PREFERENCE_FORMATS, RatedPair
from llama2.importers.tables import (
    AUTO,
    ReadOptions,
    read_records,
    read_sample,
)
from llama2.reading.files import Row, tidy
from llama2.records import Axis, Preference, Response
from llama2.tally import Tally

_HARMLESS = re.compile(
    r"(hh.*[-_])?harmless([-_]base)?([-_.](train|test|valid|validation|dev|eval).*)?", re.IGNORECASE
)


def import_preferences(
    path: str | os.PathLike[str],
    options: ReadOptions = AUTO,
    axis: Axis | None = None,
    name: str = "",
    tally: Tally | None = None,
) -> Iterator[Preference]:
    """The comparisons in a file, a directory of files or a zip archive.

    options: the format, one of `PREFERENCE_FORMATS` or "auto", and what becomes of malformed rows.
    axis: what the answers were compared for; None: what the format says (PKU-SafeRLHF), "safe" for
    Anthropic's harmless sets, which the name of the file or of its directory tells, else "helpful".
    name: the set, kept as `metadata["source"]`; "" takes the name of the file. tally: counts rows
    read, records kept and skipped by reason, and the axis of those kept.
    """
    tally = Tally() if tally is None else tally
    for row, item in read_records(path, PREFERENCE_FORMATS, options, tally):
        is_other = axis and item.axis and axis != item.axis
        reason = "other axis" if is_other else _why_useless(item)
        if reason:
            tally.skip(reason)
            continue

        try:
            if isinstance(item, RatedPair):
                item = _show(item, axis or item.axis or _read_axis(row), name or row.name)
        except ValueError as error:
            if options.malformed == "stop":
                raise row.error(str(error)) from None

            tally.skip("malformed")
            continue

        tally.kept += 1
        tally.note("axis", item.axis)
        yield item


def holds_preferences(path: str | os.PathLike[str], format: str = "auto") -> bool:
    """Return whether a path holds comparisons: most rows of the first file that has any."""
    if format != "auto":
        return any(known.name == format for known in PREFERENCE_FORMATS)

    for rows in read_sample(path):
        matching = sum(map(_is_comparison, rows))
        if matching:
            return 2 * matching >= len(rows)

    return False


def _is_comparison(row: Row) -> bool:
    return any(known.matches(row) for known in PREFERENCE_FORMATS)


def _read_axis(row: Row) -> Axis:
    """Return what a set was compared for, by the names that Anthropic gave to its files and
    directories."""
    file, _, member = row.where.rpartition(":")[0].partition("!")
    parts = (*Path(file).parts[-2:], *Path(member).parts[-2:])
    is_harmless = any(_HARMLESS.fullmatch(part.partition(".")[0]) for part in parts)
    return "safe" if is_harmless else "helpful"


def _why_useless(item: RatedPair | Preference) -> str:
    """Return why a comparison teaches nothing, "" if it does."""
    chosen, rejected = item.chosen, item.rejected
    texts = [tidy(side.text if isinstance(side, Response) else side) for side in (chosen, rejected)]
    if not all(message.content.strip() for message in item.prompt):
        return "empty turn"
    if not all(texts):
        return "empty answer"

    return "identical answers" if texts[0] == texts[1] else ""


def _show(item: RatedPair, axis: Axis, source: str) -> Preference:
    """Return a comparison with an id, and with an order in which the answers were shown."""
    low, high = sorted((item.chosen, item.rejected))
    turns = json.dumps([(message.role, message.content) for message in item.prompt])
    key = hash_parts(turns, low, high)
    first, second = (low, high) if key & 1 else (high, low)
    preferred: Literal[0, 1] = 0 if first == item.chosen else 1
    category = {"category": item.category} if item.category else {}
    return Preference(
        f"{source}:{axis}:{key:016x}",
        item.prompt,
        (Response(first), Response(second)),
        preferred,
        item.degree,
        item.safety,
        axis,
        metadata={"source": source} | category,
    )
