"""Keys and values of tokens already read (§2.2, A.2.1), so that each new token costs one position.

One block of memory holds a row per slot. A *prefill* writes whole prompts into slots, starting at column 0; a *decode*
appends one token to each of the first slots. Rows keep their own lengths, so ragged sequences live side by side and a
finished one gives its slot to the next. A decode reads only as many columns as the longest live row has.

Shapes: L layers, P the pair (keys, values), N slots, K key/value heads, C capacity in tokens, D head width;
B rows of a batch, T new tokens, S columns read.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `slots` sequences of at most `capacity` tokens."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.capacity = slots, capacity
        # Zeros, not empty: masked columns get weight 0, and 0 times an uninitialised NaN would be NaN.
        self._data_LPNKCD = torch.zeros(layers, 2, slots, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self._flat = [[pair.view(-1, head_dim) for pair in layer] for layer in self._data_LPNKCD]
        self._row_offsets_NK = torch.arange(slots * kv_heads, device=device).view(slots, kv_heads) * capacity
        self._columns_C = torch.arange(capacity, device=device)
        self._targets = self._columns_C  # rows of the flat views that the next update writes
        self._read: tuple[int, int] | None = None  # slots and columns that a decode reads
        self.mask_BTS: Tensor | None = None

    def prefill(self, slots_B: Tensor, width: int) -> None:
        """The next forward pass reads B right-padded prompts of `width` tokens into `slots_B`, from column 0.

        What padding leaves behind a prompt is never attended to: decoding overwrites it first.
        """
        rows_BK1 = self._row_offsets_NK[slots_B][:, :, None]
        self._targets = (rows_BK1 + self._columns_C[:width]).flatten()
        self._read, self.mask_BTS = None, None

    def decode(self, positions_B: Tensor, columns: int) -> None:
        """The next forward pass appends one token, at column `positions_B`, to each of the first B slots.

        `columns`: how many columns to read, more than the largest position.
        """
        rows = positions_B.shape[0]
        self._targets = (self._row_offsets_NK[:rows] + positions_B[:, None]).flatten()
        self._read = rows, columns
        self.mask_BTS = self._columns_C[:columns] <= positions_B[:, None, None]

    def update(self, layer: int, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; returns keys_BKSD, values_BKSD to attend to under `mask_BTS`."""
        flat_keys, flat_values = self._flat[layer]
        width = keys_BKTD.shape[-1]
        flat_keys.index_copy_(0, self._targets, keys_BKTD.reshape(-1, width).to(flat_keys.dtype))
        flat_values.index_copy_(0, self._targets, values_BKTD.reshape(-1, width).to(flat_values.dtype))
        if self._read is None:
            return keys_BKTD, values_BKTD
        rows, columns = self._read
        keys_NKCD, values_NKCD = self._data_LPNKCD[layer]
        return keys_NKCD[:rows, :, :columns], values_NKCD[:rows, :, :columns]

    def copy(self, sources_B: Tensor, targets_B: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of some slots to others (a shared prompt; filling a gap)."""
        self._data_LPNKCD[:, :, targets_B, :, :columns] = self._data_LPNKCD[:, :, sources_B, :, :columns]
