"""The one source of training batches over a list: packed text, packed dialogs, reward pairs or
anything else.

The order of items is a function of (seed, epoch) alone and is cut into global batches before ranks
take their shares, so another number of ranks or another micro-batch size gives the same optimizer
steps. It satisfies `train`'s Source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from llama2.batches import Batch, blank
from llama2.errors import UserError
from llama2.ranks import Ranks

Item = TypeVar("Item")


class Rows(Generic[Item]):
    """`epochs` passes over `items`, `batch_size` of them an optimizer step over all ranks; each
    item once an epoch.

    `collate` makes a micro-batch of at most `micro_batch_size` items. The last batch of an epoch
    may be smaller; a summed loss divided by its weight keeps it exact. Every rank gets the same
    number of micro-batches: one without items gets a copy of another's with all `weights...` and
    `read_B` zeroed, or none if the batch has no weights.

    With `shuffle` each epoch has an order of its own. With `size` the items of a step are sorted by
    it before they are dealt out, so that those of a micro-batch need little padding; which items a
    step has stays the same.
    """

    def __init__(
        self,
        items: Sequence[Item],
        collate: Callable[[Sequence[Item]], Batch],
        ranks: Ranks,
        *,
        batch_size: int,
        micro_batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        size: Callable[[Item], int] | None = None,
    ) -> None:
        if not len(items):
            raise UserError(
                "there is nothing to train on", "check the data files and what was filtered out"
            )
        if min(batch_size, micro_batch_size, epochs) < 1:
            raise UserError(
                f"batch_size {batch_size}, micro_batch_size {micro_batch_size}, epochs {epochs}",
                "each must be at least 1",
            )

        self._items, self._collate, self._size = items, collate, size
        self._batch_size, self._micro_batch_size, self._epochs = (
            batch_size,
            micro_batch_size,
            epochs,
        )
        self._seed, self._shuffle = seed, shuffle
        self._axis = ranks.data
        self._epoch = self._cursor = 0
        self._order = self._permutation()

    @property
    def steps(self) -> int:
        """Optimizer steps in all epochs."""
        return self._epochs * -(-len(self._items) // self._batch_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next optimizer step on this rank; StopIteration after the last
        epoch."""
        if self._cursor >= len(self._items):
            self._epoch, self._cursor = self._epoch + 1, 0
            if self._epoch < self._epochs:
                self._order = self._permutation()

        if self._epoch >= self._epochs:
            raise StopIteration

        chosen = [
            int(index) for index in self._order[self._cursor : self._cursor + self._batch_size]
        ]
        self._cursor += self._batch_size
        if self._size is not None:
            size = self._size
            chosen.sort(key=lambda index: size(self._items[index]))

        share = chosen[self._axis.index :: self._axis.size]
        largest = -(-len(chosen) // self._axis.size)
        parts = np.array_split(
            np.array(share, dtype=np.int64), -(-largest // self._micro_batch_size)
        )
        batches = [
            self._collate([self._items[index] for index in part])
            if len(part)
            else blank(self._collate([self._items[chosen[0]]]))
            for part in parts
        ]

        return [batch for batch in batches if batch]

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what it is a place in."""
        return {"epoch": self._epoch, "cursor": self._cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; UserError if the data, the seed or the batch size is
        another."""
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(
                    f"the checkpoint was taken with {name} {state[name]}, now it is {value}",
                    "resume with the data and settings of the checkpoint, or start a new run",
                )

        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()

    def _identity(self) -> dict[str, Any]:
        return {"items": len(self._items), "batch_size": self._batch_size, "seed": self._seed}

    def _permutation(self) -> Any:
        count = len(self._items)
        return (
            np.random.default_rng([self._seed, self._epoch]).permutation(count)
            if self._shuffle
            else range(count)
        )
