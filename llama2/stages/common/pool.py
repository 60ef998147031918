"""The pool of all rounds of rejection sampling (§3.2.3): the best answers to each prompt, of any
round.

Up to V3 the paper's pool was only the newest round, and skills were lost (rhyming); then the best
of all rounds joined it. Reward models change from round to round, so old and new answers are scored
anew by the newest. The paper does not say how many answers a prompt keeps.
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
from llama2.stages.common.sampling import Sample, open_records, sample_in_parts
from llama2.tokenizer.template import encode_answered, encode_cut
from llama2.tokenizer.tokenizer import Tokenizer

Choice = tuple[float, int]  # the reward of an answer, and its index over all rounds


class Pool:
    """The answers in `best.jsonl` of several rounds, the newest first, of which `keep` a prompt are
    chosen."""

    def __init__(self, keep: int, finished_only: bool, rounds: Sequence[Path]) -> None:
        """UserError for a file that is missing, or empty though no finished run wrote it."""
        self.keep, self.finished_only = keep, finished_only
        self._rounds = [StoredRecords(Dialog, path / "best.jsonl") for path in rounds]
        for path, answers in zip(rounds[1:], self._rounds[1:]):
            if not answers and not is_output(path / "best.jsonl"):
                raise UserError(
                    f"{path / 'best.jsonl'}: the file is empty",
                    "it should hold Dialog records, one a line",
                )

        self._ends = list(accumulate(map(len, self._rounds)))

    def write(self, run: Run, chat: Chat, rewards: Rewards, sample: Sample) -> list[int]:
        """Write pool.jsonl: this round's prompts in their order, then those of earlier rounds only.
        Returns the answers of each round.

        A round without earlier ones is the pool as it is.
        """
        if len(self._rounds) == 1:
            choices = [
                (float(dialog.metadata["reward"]), index)
                for index, dialog in enumerate(self._rounds[0])
            ]
        else:
            choices = self._choose(run, chat, rewards, sample)

        sizes = [0] * len(self._rounds)
        with open_records(run.path / "pool.jsonl", run.ranks) as put:
            for reward, index in choices:
                number, dialog = self._find(index)
                metadata = {**dialog.metadata, "reward": round(reward, 4)}
                put(replace(dialog, train="last", metadata=metadata))
                sizes[number] += 1

        return sizes

    def _choose(self, run: Run, chat: Chat, rewards: Rewards, sample: Sample) -> list[Choice]:
        """Score every answer of every round, and take the best different ones of each prompt."""
        tally = run.tally("pool")
        indices = range(self._ends[-1])

        def work(part: Sequence[int], first: int) -> list[tuple[str, str, float | None]]:
            dialogs = [self._find(index)[1] for index in part]
            return rescore(dialogs, chat.tokenizer, rewards, self.finished_only)

        by_prompt: dict[str, dict[str, Choice]] = {}
        rows = sample_in_parts(run, [], "pool", indices, work, sample)
        for index, (prompt, answer, reward) in enumerate(rows):
            if reward is None:
                tally.skip("cut off, or too long for the reward models")
            else:
                by_prompt.setdefault(prompt, {}).setdefault(answer, (reward, index))

        choices: list[Choice] = []
        for answers in by_prompt.values():
            best = sorted(answers.values(), key=lambda choice: (-choice[0], choice[1]))
            choices += best[: self.keep]

        tally.read, tally.kept = len(indices), len(choices)
        tally.skip(
            "said twice, or not among the best of its prompt",
            count=tally.read - tally.kept - tally.skipped.total(),
        )
        return choices

    def _find(self, index: int) -> tuple[int, Dialog]:
        """Return the answer with this index over all rounds, and the number of its round."""
        number = bisect_right(self._ends, index)
        answers = self._rounds[number]
        return number, answers[index - (self._ends[number] - len(answers))]


def rescore(
    dialogs: Sequence[Dialog], tokenizer: Tokenizer, rewards: Rewards, finished_only: bool
) -> list[tuple[str, str, float | None]]:
    """Return for each dialog a digest of the prompt, one of the answer, and its reward; None if it
    may not be kept."""
    rows = [_encode(dialog, tokenizer) for dialog in dialogs]
    usable = [
        index
        for index, (dialog, row) in enumerate(zip(dialogs, rows))
        if len(row) <= rewards.context
        and dialog.messages[-1].content
        and not (finished_only and _is_cut(dialog))
    ]
    tags = [bool(dialogs[index].metadata.get("safety")) for index in usable]
    scores = rewards([rows[index] for index in usable], tags)
    by_index = {index: score.reward for index, score in zip(usable, scores)}
    return [
        (
            hash_content(records.to_json(Prompt(dialog.messages[:-1]))),
            hash_content(dialog.messages[-1].content),
            by_index.get(index),
        )
        for index, dialog in enumerate(dialogs)
    ]


def _encode(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialog; an answer that was cut off has no end."""
    encode = encode_cut if _is_cut(dialog) else encode_answered
    return encode(tokenizer, dialog.messages)


def _is_cut(dialog: Dialog) -> bool:
    return dialog.metadata.get("cut") is True
