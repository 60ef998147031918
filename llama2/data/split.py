"""The held-out share: one rule for everything that is split, whatever its kind.

It goes by the first user turn alone, before anything is copied or weighted: the same opening lies
on the same side in every run, whatever its kind, seed or sources. Copies, answers to one prompt in
several sets, and a conversation cut at several depths therefore never lie on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llama2.hashing import hash_parts
from llama2.records import Messages

ENOUGH = 10
"""conversations of which one can be spared"""


def normalize_opening(turns: Messages, instruction: str = "") -> str:
    """Return the first user turn, case and spacing aside, by which splits and exclusions go.

    `instruction` is what Ghost Attention put in front of it: the question behind it is the
    conversation's own.
    """
    text = next(message.content for message in turns if message.role == "user").strip()
    question = text.removeprefix(instruction.strip()).strip() or text
    return " ".join(question.lower().split())


def is_heldout(turns: Messages, share: float) -> bool:
    """Tell whether a conversation belongs to the held-out share; a larger share contains a smaller
    one."""
    return _place(normalize_opening(turns)) < share * 2.0**64


def choose_heldout(openings: Sequence[str], share: float) -> set[str]:
    """Return those of `openings` (one for each record) that are held out.

    Where `is_heldout` takes none, because there are few or an earlier split has taken its share
    already, return those that it would take next: `share` of the records, and at least one of
    `ENOUGH` conversations or more.
    """
    counts = Counter(openings)
    chosen = {opening for opening in counts if _place(opening) < share * 2.0**64}
    if chosen or not share or len(counts) < ENOUGH:
        return chosen

    wanted = max(1, round(share * len(openings)))
    for opening in sorted(counts, key=_place):
        if wanted <= 0:
            break

        chosen.add(opening)
        wanted -= counts[opening]

    return chosen


def _place(opening: str) -> int:
    return hash_parts("heldout", opening)
