"""Keys and values of tokens already read (§2.2, A.2.1), so that each new token costs one position.

One block of memory holds a row per slot. A *prefill* writes whole prompts into slots, starting at
column 0; a *decode* appends one token to each of the first slots. Rows keep their own lengths, so
ragged sequences live side by side and a finished one gives its slot to the next. A decode reads
only as many columns as the longest live row has.

Shapes: L layers, P the pair (keys, values), N slots, C capacity in tokens, K key/value heads, D
head width; B rows of a batch, T new tokens (M = B · T), S columns read.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `slots` sequences of at most `capacity` tokens."""

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.capacity = slots, capacity
        # Zeros, not empty: masked columns get weight 0, and 0 times an uninitialised NaN would be
        # NaN. All heads of a token lie together, so that a row is written and read in one piece: on
        # a CPU up to twice as fast.
        self.data_LPNCKD = torch.zeros(
            layers, 2, slots, capacity, kv_heads, head_dim, dtype=dtype, device=device
        )
        self._offsets_N = torch.arange(slots, device=device) * capacity
        self._columns_C = torch.arange(capacity, device=device)
        # tokens that the next update writes, counted over all slots
        self._targets = self._columns_C
        # slots and columns to read; None: the new keys are all there are
        self._read: tuple[slice, int] | None = None
        self.mask_BTS: Tensor | None = None

    def prefill(self, slots_B: Tensor, width: int) -> None:
        """The next forward pass reads B right-padded prompts of `width` tokens into `slots_B`, from
        column 0.

        What padding leaves behind a prompt is never attended to: decoding overwrites it first.
        """
        self._targets = (self._offsets_N[slots_B, None] + self._columns_C[:width]).flatten()
        self._read, self.mask_BTS = None, None

    def decode(self, positions_B: Tensor, columns: int) -> None:
        """The next forward pass appends one token, at column `positions_B`, to each of the first B
        slots.

        `columns`: how many columns to read, more than the largest position.
        """
        rows = positions_B.shape[0]
        self._targets = self._offsets_N[:rows] + positions_B
        self._read = slice(rows), columns
        self.mask_BTS = self._columns_C[:columns] <= positions_B[:, None, None]

    def extend(self, slot: int, start: int, width: int) -> None:
        """The next forward pass reads `width` more tokens of a prompt into `slot`, from column
        `start`."""
        columns_T = self._columns_C[start : start + width]
        self._targets = self._offsets_N[slot] + columns_T
        self._read = slice(slot, slot + 1), start + width
        self.mask_BTS = (self._columns_C[: start + width] <= columns_T[:, None])[None]

    def update(self, layer: int, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; return keys_BKSD and values_BKSD to attend to
        under `mask_BTS`."""
        keys_NCKD, values_NCKD = self.data_LPNCKD[layer]
        for new_BKTD, held_NCKD in ((keys_BKTD, keys_NCKD), (values_BKTD, values_NCKD)):
            new_MKD = new_BKTD.transpose(1, 2).flatten(0, 1).to(held_NCKD.dtype)
            held_NCKD.view(-1, *new_MKD.shape[1:]).index_copy_(0, self._targets, new_MKD)

        if self._read is None:
            return keys_BKTD, values_BKTD

        rows, columns = self._read
        keys_BSKD, values_BSKD = keys_NCKD[rows, :columns], values_NCKD[rows, :columns]
        return keys_BSKD.transpose(1, 2), values_BSKD.transpose(1, 2)

    def copy(self, sources_B: Tensor, targets_B: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of some slots to others (a shared prompt; filling a
        gap)."""
        # what is copied exists twice for a moment: of one layer at a time
        for data_PNCKD in self.data_LPNCKD:
            data_PNCKD[:, targets_B, :columns] = data_PNCKD[:, sources_B, :columns]
