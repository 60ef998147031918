"""Matrices with one input as one product, for layers that need several at once.

Shapes: B rows of T positions, N = B · T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
"""how the C++ functions for numbers of a kind are named"""


def flatten(x: Tensor) -> Tensor:
    """Return [N, ...] of [B, T, ...], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def join(weights: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    """Return matrices with one input as one, in the precision of the product."""
    sizes = [len(weight) for weight in weights]
    out = weights[0].new_empty((sum(sizes), weights[0].shape[1]), dtype=kind)
    for part, weight in zip(torch.split(out, sizes), weights):
        part.copy_(weight)

    return out


def part(grad: Tensor, sizes: Sequence[int], kinds: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """Return the gradients of joined matrices, one each."""
    return tuple(each.to(kind) for each, kind in zip(torch.split(grad, list(sizes)), kinds))
