"""Turn a vocabulary into a list of merges, as in `tokenizer.json`, and back.

SentencePiece joins the two neighbours whose union has the highest score, and of equal scores the
leftmost. A list of merges joins the pair that stands first in the list, wherever the pair is. Both
give the same ids if every way to divide an item into two items is listed, the items in the order of
their scores.

Equal scores need care: those of runs of spaces in the published model (-1e9 each). SentencePiece
lets such a run grow from the left until it is the longest item. So does a list in which divisions
with a long left part come first.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise

from llama2.tokenizer.sentencepiece_model import BYTE, NORMAL, SPACE, VocabularyItem

Merge = tuple[str, str]

_LONGEST = 1024  # characters at which an item is divided; Llama 2's have 16 at most
_LOWEST = -1e9  # the score of runs of spaces in the published model


# --- items to merges ---
def list_merges(items: Sequence[VocabularyItem]) -> list[Merge]:
    """Return the merges of a vocabulary, the first to be tried in front."""
    normal = [item for item in items if item.kind == NORMAL]
    known = {item.text for item in normal}
    ranked = [
        (-item.score, -len(left), -len(right), left, right)
        for item in normal
        for left, right in _divide(item.text, known)
    ]
    ranked.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in ranked]


def _divide(text: str, known: Container[str]) -> list[Merge]:
    """List every way to divide an item into two."""
    return [
        (text[:cut], text[cut:])
        for cut in range(min(len(text), _LONGEST) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]


# --- merges to items ---
def score_items(texts: Mapping[str, int], merges: Sequence[Merge]) -> dict[str, float] | None:
    """Return the score of each item (text -> id) by which SentencePiece merges in this order.

    None if no scores do: SentencePiece takes every way to divide an item, and one is not listed.
    Items whose merges are interleaved get the same score. Scores follow the ids where that gives
    the order of the merges: a model that `list_merges` wrote has its old scores again.
    """
    divisions = sum(len(_divide(text, texts)) for text in texts)
    if not len(set(merges)) == len(merges) == divisions:
        return None

    groups = list(_group_items(merges))
    if len(groups) > 1 and groups[-1] == [SPACE * 2] and not "".join(groups[-2]).strip(SPACE):
        # the shortest run of spaces comes last by length, not by its score
        groups[-2:] = [groups[-2] + groups[-1]]

    scores = _score_by_ids(texts, groups)
    if scores is None:
        scores = {text: -float(rank) for rank, group in enumerate(groups) for text in group}

    if _LOWEST in scores.values():
        scores.setdefault(SPACE, _LOWEST)

    first = min(texts.values(), default=0)
    return {text: float(first - token) for text, token in texts.items()} | scores


def _group_items(merges: Sequence[Merge]) -> Iterator[list[str]]:
    """Yield items in the order of their merges; items with interleaved merges form one group."""
    spans: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        first, _ = spans.get(left + right, (rank, rank))
        spans[left + right] = first, rank

    group: list[str] = []
    end = -1
    for text, (first, last) in sorted(spans.items(), key=lambda entry: entry[1]):
        if group and first > end:
            yield group
            group = []

        group.append(text)
        end = max(end, last)

    if group:
        yield group


def _score_by_ids(texts: Mapping[str, int], groups: Sequence[list[str]]) -> dict[str, float] | None:
    """Score items as SentencePiece's trainer does: 0, -1, -2, ... by id.

    Runs of spaces at the end get the lowest score. None if that is not the order of the groups.
    """
    begin = min(texts.values(), default=0)
    scores = [float(begin - min(map(texts.__getitem__, group))) for group in groups]
    if groups and len(groups[-1]) > 1:
        scores[-1] = _LOWEST

    if scores != sorted(set(scores), reverse=True):
        return None

    return {text: score for group, score in zip(groups, scores) for text in group}


# --- a list of merges at work ---
class Merger:
    """Encode by a list of merges, in plain Python, to compare such a list with SentencePiece.

    `texts` are the ids of all items; unknown characters become bytes. For short texts: time grows
    as the square of the length.
    """

    def __init__(self, texts: Mapping[str, int], merges: Sequence[Merge]) -> None:
        self._texts = texts
        self._ranks = {merge: rank for rank, merge in reversed(list(enumerate(merges)))}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` with a space put in front."""
        symbols = list(SPACE + text.replace(" ", SPACE)) if text else []
        while merges := [
            (self._ranks[pair], at)
            for at, pair in enumerate(pairwise(symbols))
            if pair in self._ranks
        ]:
            _, at = min(merges)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]

        return [token for symbol in symbols for token in self._look_up(symbol)]

    def _look_up(self, symbol: str) -> list[int]:
        if symbol in self._texts:
            return [self._texts[symbol]]

        return [self._texts[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def make_merger(items: Sequence[VocabularyItem]) -> Merger:
    """Return the merges of a vocabulary, ready to encode."""
    texts = {item.text: token for token, item in enumerate(items) if item.kind in (NORMAL, BYTE)}
    return Merger(texts, list_merges(items))
