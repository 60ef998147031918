"""Comparisons as pairs of token rows, as a reward model learns from them (§3.2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from llama2 import records
from llama2.batches import Batch
from llama2.config import Config as Section
from llama2.data.split import normalize_opening
from llama2.evaluate.baselines import RankedTexts
from llama2.hashing import hash_parts
from llama2.records import DEGREES, Axis, Message, Messages, Preference
from llama2.runs import Run, is_output
from llama2.stages.common.shares import count_pairs
from llama2.stages.common.training import check_left
from llama2.tally import Tally
from llama2.tokenizer.template import encode_answered
from llama2.tokenizer.tokenizer import Tokenizer

TOO_LONG = "too long"


class Comparisons(Section):
    """One set of comparisons."""

    incidental: ClassVar[frozenset[str]] = frozenset({"license"})

    path: Path
    """JSONL of preferences"""
    axis: Axis | None = None
    """take only those made on this axis"""
    share: float | None = Field(None, gt=0, le=1)
    """of all training pairs, which must be reached; without it every pair is taken once"""
    limit: int | None = Field(None, gt=0)
    """use at most this many pairs, chosen at random"""
    repeat: bool = False
    """draw pairs more than once where there are too few for the share"""
    license: str | None = None
    """its licence, for the papers of a release; nothing depends on it"""


@dataclass(frozen=True)
class EncodedPair:
    """A comparison in token ids."""

    chosen: list[int]
    """the conversation with the preferred answer"""
    rejected: list[int]
    degree: int
    """place in `DEGREES`: how clearly the chosen answer is better"""
    safe: tuple[int, int]
    """1 for a safe answer, 0 for an unsafe one, -1 for one that nobody labelled"""
    axis: Axis = "helpful"
    texts: RankedTexts = ("", "")
    conversation: int = 0
    """a digest of how it opens"""
    source: str = ""
    """the public set it comes from; empty where that is not known"""

    @property
    def size(self) -> int:
        """Tokens of the longer conversation."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def shared(self) -> int:
        """Tokens with which both conversations begin, the last token of neither among them."""
        count = 0
        for chosen, rejected in zip(self.chosen[:-1], self.rejected[:-1]):
            if chosen != rejected:
                break

            count += 1

        return count

    @property
    def joint_size(self) -> int:
        """Tokens of both conversations, those that they share counted once."""
        return len(self.chosen) + len(self.rejected) - self.shared


def read_heldout(
    sets: Mapping[str, Comparisons], encoder: Encoder, run: Run, seed: int
) -> dict[str, list[EncodedPair]]:
    """Return the pairs to measure accuracy on, of every set that has any."""
    heldout = {}
    for name, comparisons in sets.items():
        pairs = _read_set(comparisons, encoder, run.tally(f"heldout.{name}"), seed)
        if pairs:
            heldout[name] = pairs

    return heldout


def _read_set(
    comparisons: Comparisons, encoder: Encoder, tally: Tally, seed: int
) -> list[EncodedPair]:
    """Return the pairs of one set that can be used, at most as many as its limit."""
    pairs = encoder.encode(select(comparisons, tally), tally)
    if comparisons.limit is None or len(pairs) <= comparisons.limit:
        return pairs

    left_out = len(pairs) - comparisons.limit
    tally.kept -= left_out
    tally.skip("over the limit", count=left_out)
    order = np.random.default_rng([seed, len(pairs)]).permutation(len(pairs))
    return [pairs[index] for index in sorted(order[: comparisons.limit])]


def mean_length(pairs: Sequence[EncodedPair]) -> float:
    """Return the mean length of the rows, each token counted once: what attention has to look back
    over, doubled."""
    lengths = [len(pair.chosen) for pair in pairs]
    lengths += [len(pair.rejected) for pair in pairs]
    return sum(length * length for length in lengths) / sum(lengths)


def select(comparisons: Comparisons, tally: Tally) -> Iterator[Preference]:
    """Yield the preferences of a set, of its axis alone."""
    path = comparisons.path
    for preference in records.read(Preference, path, may_be_empty=is_output(path)):
        tally.read += 1
        if comparisons.axis in (None, preference.axis):
            yield preference
        else:
            tally.skip("of the other axis")


@dataclass(frozen=True)
class Encoder:
    """Makes pairs of token rows of preferences. Pairs that tell nothing, or are too long, are left
    out and counted; with `shorten` a prompt loses its oldest turns first."""

    tokenizer: Tokenizer
    max_tokens: int
    context: int
    shorten: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that stays."""
        return min(self.max_tokens, self.context)

    def encode(self, preferences: Iterable[Preference], tally: Tally) -> list[EncodedPair]:
        """Return the pairs whose answers say something, say different things, and fit in
        `max_tokens` and the model's context."""
        pairs = []
        longest = 0
        for preference in preferences:
            pair = self.encode_pair(preference)
            if not all(answer.text.strip() for answer in preference.responses):
                tally.skip("empty answer")
            elif pair.chosen == pair.rejected:
                tally.skip("identical answers")
            elif pair.size > self.longest:
                longest = max(longest, pair.size)
                tally.skip(TOO_LONG, self._suggest(longest))
            else:
                pairs.append(pair)

        tally.kept += len(pairs)
        return pairs

    def _suggest(self, longest: int) -> str:
        """Suggest what would keep a pair of so many tokens."""
        if longest <= self.context:
            return f"--max-tokens {longest} holds the longest"

        return f"the longest has {longest:,} tokens, the model's context {self.context:,}"

    def encode_pair(self, preference: Preference) -> EncodedPair:
        """Return a comparison in token ids, whatever it says."""
        chosen, rejected = preference.chosen.text, preference.rejected.text
        rows = self._encode_rows(preference.prompt, chosen, rejected)
        return EncodedPair(
            *rows,
            DEGREES.index(preference.degree),
            (_label(preference.chosen_safe), _label(preference.rejected_safe)),
            preference.axis,
            (chosen, rejected),
            hash_parts(normalize_opening(preference.prompt)),
            str(preference.metadata.get("source", "")),
        )

    def _encode_rows(
        self, prompt: Messages, chosen: str, rejected: str
    ) -> tuple[list[int], list[int]]:
        """Return both conversations, without the oldest exchanges of a prompt that is too long."""
        rows = self._encode(prompt, chosen), self._encode(prompt, rejected)
        system = int(prompt[0].role == "system")
        while self.shorten and max(map(len, rows)) > self.longest and len(prompt) > system + 2:
            prompt = (*prompt[:system], *prompt[system + 2 :])
            rows = self._encode(prompt, chosen), self._encode(prompt, rejected)

        return rows

    def _encode(self, prompt: Messages, answer: str) -> list[int]:
        return encode_answered(self.tokenizer, (*prompt, Message("assistant", answer)))


def _label(safe: bool | None) -> int:
    return -1 if safe is None else int(safe)


def read_pairs(
    preferences: Mapping[str, Comparisons], encoder: Encoder, run: Run, seed: int
) -> dict[str, list[EncodedPair]]:
    """Return the training pairs, set by set: those without a share whole, the others drawn until
    they make up their shares."""
    sets, shares, repeated = {}, {}, set()
    for name, comparisons in preferences.items():
        sets[name] = _read_set(comparisons, encoder, run.tally(f"preferences.{name}"), seed)
        if comparisons.share is not None:
            shares[name] = comparisons.share
        if comparisons.repeat:
            repeated.add(name)

    check_left(run, "preferences.")
    sizes = {name: len(pairs) for name, pairs in sets.items()}
    total = count_pairs(sizes, shares, frozenset(repeated))
    generator = np.random.default_rng(seed)
    for name, share in shares.items():
        pairs, wanted = sets[name], round(share * total)
        passes, rest = divmod(wanted, len(pairs)) if pairs else (0, 0)
        drawn = generator.permutation(len(pairs))[:rest]
        sets[name] = pairs * passes + [pairs[index] for index in drawn]

        if wanted < len(pairs):
            tally = run.tally(f"preferences.{name}")
            tally.kept = wanted
            tally.skip(f"beyond its share of {share:g}", count=len(pairs) - wanted)

    return sets


def collate(pairs: Sequence[EncodedPair]) -> Batch:
    """Collate pairs to one right-padded batch, the chosen rows first (see
    `objectives.make_ranking_loss`)."""
    rows = [pair.chosen for pair in pairs]
    rows += [pair.rejected for pair in pairs]
    labels = [pair.safe[0] for pair in pairs]
    labels += [pair.safe[1] for pair in pairs]
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)

    lengths_B = torch.tensor([len(row) for row in rows])
    return {
        "tokens_BT": tokens_BT,
        "lengths_B": lengths_B,
        "read_B": lengths_B,
        "degrees_P": torch.tensor([pair.degree for pair in pairs]),
        "weights_P": torch.ones(len(pairs)),
        "safe_B": torch.tensor(labels),
    }


def collate_shared(pairs: Sequence[EncodedPair]) -> Batch:
    """Collate pairs to one right-padded batch with a row a pair: what both conversations begin
    with, the rest of the chosen one, the rest of the rejected one (see `positions`)."""
    shape = (len(pairs), max(pair.joint_size for pair in pairs))
    tokens_BT = torch.zeros(shape, dtype=torch.long)
    branches_BT = torch.full(shape, 3)  # what pads a row is one branch more
    ends_BK = torch.zeros(len(pairs), 2, dtype=torch.long)

    for index, pair in enumerate(pairs):
        shared, chosen, size = pair.shared, len(pair.chosen), pair.joint_size
        tokens_BT[index, :chosen] = torch.tensor(pair.chosen)
        tokens_BT[index, chosen:size] = torch.tensor(pair.rejected[shared:])
        branches_BT[index, :shared] = 0
        branches_BT[index, shared:chosen] = 1
        branches_BT[index, chosen:size] = 2
        ends_BK[index] = torch.tensor((chosen - 1, size - 1))

    weights_BT = torch.zeros(shape).scatter(1, ends_BK, 1.0)  # an answer is scored at its end
    labels = [pair.safe[0] for pair in pairs]
    labels += [pair.safe[1] for pair in pairs]
    return {
        "tokens_BT": tokens_BT,
        "branches_BT": branches_BT,
        "ends_BK": ends_BK,
        "read_B": (branches_BT < 3).sum(1),
        "weights_BT": weights_BT,
        "degrees_P": torch.tensor([pair.degree for pair in pairs]),
        "weights_P": torch.ones(len(pairs)),
        "safe_B": torch.tensor(labels),
    }


def find_axis(pairs: Sequence[EncodedPair]) -> Axis:
    """Find the axis on which most of the pairs were compared."""
    safe = sum(pair.axis == "safe" for pair in pairs)
    return "safe" if 2 * safe > len(pairs) else "helpful"


def warn_of_trained(
    trained: Set[int], sets: Mapping[str, Sequence[EncodedPair]], prefix: str = "heldout."
) -> Iterator[str]:
    """Caution about conversations that are measured on and open like one that was `trained` on."""
    for name, of_set in sets.items():
        known = sum(pair.conversation in trained for pair in of_set)
        if known:
            yield (
                f"{known:,} of {len(of_set):,} pairs of {prefix}{name} open like pairs that are "
                "trained on: accuracy flatters there; split by question, as `llama2 prepare "
                "--heldout` does"
            )


def list_sources(
    sets: Mapping[str, Sequence[EncodedPair]],
) -> dict[str, tuple[str, list[int]]]:
    """Return `set/source` -> (set, places of its pairs in it) for every set of several sources."""
    parts: dict[str, tuple[str, list[int]]] = {}
    for name, pairs in sets.items():
        places: dict[str, list[int]] = {}
        for place, pair in enumerate(pairs):
            places.setdefault(pair.source, []).append(place)

        for source in sorted(places) if len(places) > 1 else ():
            parts[f"{name}/{source or 'unknown'}"] = (name, places[source])

    return parts
