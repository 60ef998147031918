"""A micro-batch: tensors by name, as data gives them and training computes them.

    tokens_BT     token ids that the model reads, padded on the right
    targets_BT    the token to predict at each position
    weights...    what counts: of each target (weights_BT), of each item (weights_P, ...)
    read_B        the tokens of each row that are real; without it all are

Shapes: B rows, T positions. An objective may want others besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

Batch = dict[str, Tensor]
COUNTS = ("weights", "read_B")
"""how names begin of tensors that say what counts"""


def blank(batch: Batch) -> Batch:
    """Return the same batch with nothing in it that counts; {} if nothing says what counts."""
    counts = {
        name: torch.zeros_like(tensor) for name, tensor in batch.items() if name.startswith(COUNTS)
    }
    if not counts.keys() - {"read_B"}:
        return {}

    return batch | counts


def count_tokens(batch: Batch) -> tuple[int, int]:
    """Count the real tokens of a micro-batch, and those that carry loss.

    A row without `weights_BT` is scored at its last token: all of them are learnt from.
    """
    if "tokens_BT" not in batch:
        return 0, 0

    rows, length = batch["tokens_BT"].shape
    read_B = batch.get("read_B", torch.full((rows,), length))
    under_loss = batch.get("weights_BT", read_B)

    return int(read_B.sum()), int((under_loss > 0).sum())
