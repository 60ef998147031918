"""The pool of all rounds of rejection sampling (§3.2.3): the best answers to each prompt, whatever
round they are of.

Up to V3 the paper's pool was the newest round alone, and skills were lost (rhyming); then the best
of all rounds joined it. Reward models change from round to round, so old and new answers are scored
anew by the newest. How many answers a prompt keeps is left open by the paper.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from llama2 import records
from llama2.errors import UserError
from llama2.generate.dialogue import Chat
from llama2.generate.rewards import Rewards
from llama2.hashing import hash_content
from llama2.records import Dialog, Prompt, StoredRecords
from llama2.runs import Run, is_output
from llama2.stages.common.sampling import Sample, part_by_part, writing
from llama2.tokenizer.template import encode_dialog, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

Chosen = list[tuple[float, int]]


class Pool:
    """The `best.jsonl` of several rounds, the newest first; `keep` answers a prompt are chosen of
    them."""

    def __init__(self, keep: int, finished_only: bool, rounds: Sequence[Path]) -> None:
        """UserError for a file that is missing, or empty though no finished run wrote it."""
        self.keep, self.finished_only = keep, finished_only
        self._rounds = [StoredRecords(Dialog, path / "best.jsonl") for path in rounds]
        for path, found in zip(rounds[1:], self._rounds[1:]):
            if not found and not is_output(path / "best.jsonl"):
                raise UserError(
                    f"{path / 'best.jsonl'}: the file is empty",
                    "it should hold Dialog records, one a line",
                )

        self._ends = list(accumulate(map(len, self._rounds)))

    def write(self, run: Run, chat: Chat, rewards: Rewards, sample: Sample) -> list[int]:
        """Write pool.jsonl: this round's prompts in their order, then those of earlier rounds
        alone; the size by round.

        A round without earlier ones is the pool as it is.
        """
        chosen = self._all() if len(self._rounds) == 1 else self._choose(run, chat, rewards, sample)
        sizes = [0] * len(self._rounds)
        with writing(run.path / "pool.jsonl", run.ranks) as put:
            for mark, place in chosen:
                one = self._record(place)
                put(replace(one, train="last", metadata={**one.metadata, "reward": round(mark, 4)}))
                sizes[self._round(place)] += 1

        return sizes

    def _all(self) -> Chosen:
        return [(float(one.metadata["reward"]), place) for place, one in enumerate(self._rounds[0])]

    def _choose(self, run: Run, chat: Chat, rewards: Rewards, sample: Sample) -> Chosen:
        """Score every answer of every round, and take the best different ones of each prompt."""
        tally = run.tally("pool")
        places = range(self._ends[-1])

        def work(some: Sequence[int], first: int) -> list[tuple[str, str, float | None]]:
            return rescored(
                [self._record(place) for place in some], chat.tokenizer, rewards, self.finished_only
            )

        by_prompt: dict[str, dict[str, tuple[float, int]]] = {}
        for place, (asked, said, mark) in enumerate(
            part_by_part(run, [], "pool", places, work, sample)
        ):
            if mark is None:
                tally.skip("cut off, or too long for the reward models")
            else:
                by_prompt.setdefault(asked, {}).setdefault(said, (mark, place))

        best = [
            sorted(mine.values(), key=lambda one: (-one[0], one[1]))[: self.keep]
            for mine in by_prompt.values()
        ]
        tally.read, tally.kept = len(places), sum(map(len, best))
        tally.skip(
            "said twice, or not among the best of its prompt",
            count=tally.read - tally.kept - tally.skipped.total(),
        )

        return [one for mine in best for one in mine]

    def _round(self, place: int) -> int:
        return bisect_right(self._ends, place)

    def _record(self, place: int) -> Dialog:
        number = self._round(place)
        return self._rounds[number][place - (self._ends[number] - len(self._rounds[number]))]


def rescored(
    dialogs: Sequence[Dialog], tokenizer: Tokenizer, rewards: Rewards, finished_only: bool
) -> list[tuple[str, str, float | None]]:
    """Of each dialog a digest of what was asked, one of the answer, and its reward; None if it may
    not be kept."""
    rows = [_row(one, tokenizer) for one in dialogs]
    usable = [
        len(row) <= rewards.context
        and bool(one.messages[-1].content)
        and not (finished_only and one.metadata.get("cut") is True)
        for one, row in zip(dialogs, rows)
    ]
    places = [place for place, fine in enumerate(usable) if fine]
    tags = [bool(dialogs[place].metadata.get("safety")) for place in places]
    marks = rewards([rows[place] for place in places], tags)
    found = {place: mark.joined for place, mark in zip(places, marks)}

    return [
        (
            hash_content(records.to_json(Prompt(one.messages[:-1]))),
            hash_content(one.messages[-1].content),
            found.get(place),
        )
        for place, one in enumerate(dialogs)
    ]


def _row(one: Dialog, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a dialog; an answer that was cut off has no EOS."""
    if one.metadata.get("cut") is True:
        return [
            *encode_prompt(tokenizer, one.messages[:-1]),
            *tokenizer.encode(one.messages[-1].content),
        ]

    return encode_dialog(tokenizer, one.messages)[0]
