"""Which conversations are held out: one rule for everything that is split, whatever its kind.

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


def opening(turns: Messages, instruction: str = "") -> str:
    """The first user turn, case and spacing aside: what the held-out split and exclusions go by.

    `instruction` is what Ghost Attention put in front of it: the question behind it is the
    conversation's own.
    """
    said = next(message.content for message in turns if message.role == "user").strip()
    asked = said.removeprefix(instruction.strip()).strip() or said
    return " ".join(asked.lower().split())


def is_heldout(turns: Messages, share: float) -> bool:
    """Whether a conversation belongs to the held-out share; a larger share contains a smaller
    one."""
    return _place(opening(turns)) < share * 2.0**64


def heldout_openings(openings: Sequence[str], share: float) -> set[str]:
    """Those of `openings` (one for each record) that are held out.

    Where `is_heldout` takes none, because there are few or an earlier split has taken its share
    already, those that it would take next: `share` of the records, and at least one of `ENOUGH`
    conversations or more.
    """
    counts = Counter(openings)
    chosen = {said for said in counts if _place(said) < share * 2.0**64}
    if chosen or not share or len(counts) < ENOUGH:
        return chosen

    wanted = max(1, round(share * len(openings)))
    for said in sorted(counts, key=_place):
        if wanted <= 0:
            break

        chosen.add(said)
        wanted -= counts[said]

    return chosen


def _place(said: str) -> int:
    return hash_parts("heldout", said)
