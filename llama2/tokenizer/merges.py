"""A vocabulary as a list of merges, which is how `tokenizer.json` orders what SentencePiece orders
by scores.

SentencePiece joins the two neighbours whose union has the highest score, and of equal scores the
leftmost. A list of merges joins the pair that stands first in it, wherever the pair is. Both do the
same to a text if every way to divide an item into two items is listed, the items in the order of
their scores.

Equal scores need care: those of runs of spaces in the published model (-1e9 each). SentencePiece
lets such a run grow from the left until it is the longest item. So does a list in which divisions
with a long left part come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from llama2.tokenizer.sentencepiece_model import BYTE, NORMAL, SPACE, VocabularyItem

Merge = tuple[str, str]

_LONGEST = 1024  # characters at which an item is divided; Llama 2's have 16 at most
_LOWEST = -1e9  # the score that the published model gives to runs of spaces


# ---- items to merges
# ------------------------------------------------------------------------------------------------
def listed(items: Sequence[VocabularyItem]) -> list[Merge]:
    """The merges of a vocabulary, those to be tried first in front."""
    known = {item.text for item in items if item.kind == NORMAL}
    found = [
        (-item.score, left, right)
        for item in items
        if item.kind == NORMAL
        for left, right in _divisions(item.text, known)
    ]

    return [
        (left, right)
        for _, left, right in sorted(found, key=lambda one: (one[0], -len(one[1]), -len(one[2])))
    ]


def _divisions(text: str, known: set[str]) -> list[Merge]:
    """Every way to divide an item into two."""
    return [
        (text[:cut], text[cut:])
        for cut in range(min(len(text), _LONGEST) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]


# ---- merges to items
# ------------------------------------------------------------------------------------------------
def scored(texts: Mapping[str, int], merges: Sequence[Merge]) -> dict[str, float] | None:
    """The score of each item (text -> id) under which SentencePiece merges in this order; None if
    it never would.

    It never would if a way to divide an item is not listed, for SentencePiece takes every way.
    Items whose merges stand among one another get the same score. Scores go by the ids where that
    gives the order of the merges: then a model that was written by `listed` has the scores it had.
    """
    spans: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        first, _ = spans.get(left + right, (rank, rank))
        spans[left + right] = first, rank

    known = set(texts)
    if len(set(merges)) != len(merges) or sum(
        len(_divisions(text, known)) for text in texts
    ) != len(merges):
        return None

    groups = list(_groups(spans))
    if groups[-1:] == [[SPACE * 2]] and len(groups) > 1 and not "".join(groups[-2]).strip(SPACE):
        # the shortest run of spaces comes last by length, not by its score
        groups[-2:] = [groups[-2] + groups[-1]]

    scores = _by_ids(texts, groups) or {
        text: -float(rank) for rank, group in enumerate(groups) for text in group
    }
    first = min(texts.values(), default=0)
    lowest = _LOWEST in scores.values()

    for text, token in texts.items():
        scores.setdefault(text, _LOWEST if lowest and text == SPACE else float(first - token))

    return scores


def _groups(spans: Mapping[str, tuple[int, int]]) -> Iterator[list[str]]:
    """Items in the order of their merges, those together whose merges stand among one another."""
    group: list[str] = []
    last = -1
    for text, (first, end) in sorted(spans.items(), key=lambda entry: entry[1]):
        if group and first > last:
            yield group
            group = []

        group.append(text)
        last = max(last, end)

    if group:
        yield group


def _by_ids(texts: Mapping[str, int], groups: Sequence[list[str]]) -> dict[str, float] | None:
    """Scores as SentencePiece's trainer gives them, 0, -1, -2, ... by id, and lowest for runs of
    spaces at the end."""
    begin = min(texts.values(), default=0)
    found: list[float] = [float(begin - min(texts[text] for text in group)) for group in groups]
    if groups and len(groups[-1]) > 1:
        found[-1] = _LOWEST

    if any(later >= earlier for earlier, later in pairwise(found)):
        return None

    return {text: score for group, score in zip(groups, found) for text in group}


# ---- what a list of merges does to a text
# ---------------------------------------------------------------------------
class Merger:
    """Encodes as programs do that go by a list of merges, in plain Python: to hold such a list
    against SentencePiece.

    `texts` are the ids of all items; characters outside become bytes. For short texts: the time
    grows as the square.
    """

    def __init__(self, texts: Mapping[str, int], merges: Sequence[Merge]) -> None:
        self._texts = texts
        self._ranks = {merge: rank for rank, merge in reversed(list(enumerate(merges)))}

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with a space put in front."""
        symbols = list(SPACE + text.replace(" ", SPACE)) if text else []
        while merges := [
            (self._ranks[pair], at)
            for at, pair in enumerate(pairwise(symbols))
            if pair in self._ranks
        ]:
            _, at = min(merges)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]

        return [token for symbol in symbols for token in self._ids(symbol)]

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self._texts:
            return [self._texts[symbol]]

        return [self._texts[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def merger(items: Sequence[VocabularyItem]) -> Merger:
    """The list of merges of a vocabulary, at work."""
    texts = {item.text: token for token, item in enumerate(items) if item.kind in (NORMAL, BYTE)}
    return Merger(texts, listed(items))
