"""Rows of equal length from texts and dialogs (§2.1, §3.1: "we concatenate all the prompts and
answers").

A *segment* is a document, dialog, or piece of one: n ids of which n - 1 are inputs and the n - 1
that follow them are targets. A row is a list of segments. Segments never see one another: each has
its number in documents_BT and its positions begin at 0, so a packed row gives the same loss as its
segments one by one.

Shapes: B rows, T places in a row, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llama2.batches import Batch
from llama2.data.shards import Shards


@dataclass(frozen=True)
class Segment:
    """`ids` and, for each, whether it is to be predicted under loss (the first never is: nothing
    comes before it)."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """The places it takes in a row."""
        return len(self.ids) - 1


Row = Sequence[Segment]


@dataclass(frozen=True)
class Packed:
    """Rows of segments."""

    rows: list[list[Segment]]
    fill: float  # share of places that hold a segment


def cut_segment(ids: Sequence[int], mask: Sequence[bool], sequence_length: int) -> Segment | None:
    """Return a segment of at most `sequence_length` places; None where nothing in it carries loss.

    A longer one loses its right end: what remains keeps its system prompt and context, and an
    answer cut in the middle does not teach a false end.
    """
    segment = Segment(
        np.array(ids[: sequence_length + 1], np.int64), np.array(mask[: sequence_length + 1], bool)
    )
    return segment if segment.mask[1:].any() else None


def pack(segments: Sequence[Segment], sequence_length: int) -> Packed:
    """Pack segments into rows of `sequence_length` places, each into the fullest row that still has
    room."""
    sizes = [len(segment) for segment in segments]
    rows: list[list[Segment]] = []
    for indices in fill_bins(sizes, sequence_length):
        rows.append([segments[index] for index in indices])

    return Packed(rows, sum(sizes) / (len(rows) * sequence_length) if rows else 0.0)


def fill_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put indices of `sizes` into bins of `capacity`: longest first, each into the fullest bin that
    has room."""
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where a bin with space s exists

    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        fitting = spaces >> sizes[index]
        if fitting:
            space = sizes[index] + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, chosen = capacity, len(bins)
            bins.append([])

        bins[chosen].append(index)
        left = space - sizes[index]
        by_space[left].append(chosen)
        spaces |= 1 << left

    return bins


class TextRows(Sequence[Row]):
    """The rows of a pretraining stream: documents in the given order, cut into rows of
    `sequence_length` places.

    Nothing is copied before a row is asked for. Each id but the first of each document is a target
    exactly once; a document that a row's end cuts goes on in the next row as a segment of its own.

    `shards` are the sources; document n of the stream is document `document_N[n]` of
    `shards[source_N[n]]` (as in `mix.Mixture`).
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        source_N: npt.NDArray[np.int32],
        document_N: npt.NDArray[np.int64],
        sequence_length: int,
    ) -> None:
        self._shards, self._source_N, self._document_N, self._length = (
            shards,
            source_N,
            document_N,
            sequence_length,
        )
        places_N = np.zeros(len(source_N), np.int64)
        for index, shard in enumerate(shards):
            here_N = source_N == index
            places_N[here_N] = shard.lengths_N[document_N[here_N]] - 1

        self._ends_N = np.cumsum(places_N)

    @property
    def places(self) -> int:
        """Targets in all rows."""
        return int(self._ends_N[-1]) if len(self._ends_N) else 0

    def __len__(self) -> int:
        return -(-self.places // self._length)

    def __getitem__(self, row: int) -> list[Segment]:  # type: ignore[override]  # no slices
        if not 0 <= row < len(self):
            raise IndexError(row)

        place, end = row * self._length, min((row + 1) * self._length, self.places)
        number = int(np.searchsorted(self._ends_N, place, side="right"))
        segments: list[Segment] = []

        while place < end:
            start = int(self._ends_N[number - 1]) if number else 0
            stop = min(int(self._ends_N[number]), end)
            document = self._shards[self._source_N[number]].document(int(self._document_N[number]))
            ids = document[place - start : stop - start + 1].astype(np.int64)
            segments.append(Segment(ids, np.ones(len(ids), bool)))
            place, number = stop, number + 1

        return segments


def collate(
    rows: Sequence[Row], sequence_length: int | None = None, *, separate: bool = True
) -> Batch:
    """Make a batch of rows, padded at the right to `sequence_length` or to the longest row.

    tokens_BT, targets_BT int64; weights_BT float32, 1 where the target carries loss; documents_BT
    (number of the segment within its row; padding counts as one more) and positions_BT (place
    within the segment) int64; read_B int64, the places of a row that hold a token. With `separate`
    off documents and positions are left out, and segments of a row see those before them.
    """
    read_B = np.array([sum(map(len, row)) for row in rows], np.int64)
    longest = int(read_B.max())
    shape = (len(rows), sequence_length or longest)

    if longest > shape[1]:
        raise ValueError(f"a row of {longest} places in a batch of {shape[1]}")

    tokens_BT, targets_BT, documents_BT, positions_BT = (
        np.zeros(shape, np.int64) for _ in range(4)
    )
    weights_BT = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        place = 0
        for number, segment in enumerate(row):
            here = slice(place, place + len(segment))
            tokens_BT[index, here] = segment.ids[:-1]
            targets_BT[index, here] = segment.ids[1:]
            weights_BT[index, here] = segment.mask[1:]
            documents_BT[index, here] = number
            positions_BT[index, here] = np.arange(len(segment))
            place += len(segment)

        documents_BT[index, place:] = len(row)
        positions_BT[index, place:] = np.arange(shape[1] - place)

    batch = {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "weights_BT": weights_BT,
        "read_B": read_B,
    }
    if separate:
        batch |= {"documents_BT": documents_BT, "positions_BT": positions_BT}

    return {name: torch.from_numpy(array) for name, array in batch.items()}
