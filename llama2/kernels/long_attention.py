"""Causal attention of long rows without keeping its weights, for a CPU, with its gradient by hand.

The weights of a row of T positions are T² / 2 numbers a head: beyond some hundreds they no longer
stay in the caches between forward and backward pass, and would soon fill the memory.
`long_attention.cpp` computes them block by block in the cache of a core, and once more in the
backward pass (Dao et al. 2022, FlashAttention).

Shapes: B rows of T positions (N = B · T tokens), D hidden, H query heads, K key heads, E head
dimension, P = (H + 2 K) E.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from llama2.kernels import build
from llama2.kernels.fused import View
from llama2.kernels.products import KINDS, flatten, join, part


class LongAttention(build.Struct):
    """See long_attention.cpp."""

    _fields_ = [
        *build.fields(c_int64, "batch", "length", "heads", "kv_heads", "head_dim"),
        *build.fields(c_void_p, "cos", "sin"),
        ("tables", c_int64),
        *build.fields(c_void_p, "starts", "gaps", "products", "out", "log_sums"),
        *build.fields(c_void_p, "grad", "grad_products", "grad_heads"),
    ]


_call = build.Library("long_attention", LongAttention)


def is_built() -> bool:
    """Tell whether the functions of this module can be called."""
    return _call.is_built


def attention(x_BTD: Tensor, weights: Sequence[Tensor], size: int, view: View) -> Tensor:
    """Return causal attention from normed activations to joined heads, [B, T, H · E]; `weights` are
    those of queries, keys and values, `size` is E."""
    out_BTP: Tensor = _Attention.apply(x_BTD, *weights, size, view)  # type: ignore[no-untyped-call]
    return out_BTP


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, size: int, view: View
    ) -> Tensor:
        """Return joined heads; products and, of each query, one number are kept for the
        gradient."""
        x_ND, weight_PD = flatten(x), join((wq, wk, wv), x.dtype)
        y_NP = torch.mm(x_ND, weight_PD.t())
        out, log_sums = attend(y_NP, len(x), len(wq) // size, size, view)
        ctx.save_for_backward(x_ND, weight_PD, y_NP, out, log_sums)
        ctx.size, ctx.view = size, view
        ctx.sizes, ctx.kinds = (len(wq), len(wk), len(wv)), (wq.dtype, wk.dtype, wv.dtype)

        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of activations and matrices."""
        x_ND, weight_PD, y_NP, out, log_sums = ctx.saved_tensors
        grad_y_NP = differentiate(grad, y_NP, out, log_sums, ctx.size, ctx.view)
        grad_x = torch.mm(grad_y_NP, weight_PD).view(*grad.shape[:-1], -1)
        grads = part(torch.mm(grad_y_NP.t(), x_ND), ctx.sizes, ctx.kinds)

        return grad_x, *grads, None, None


def attend(y_NP: Tensor, rows: int, heads: int, size: int, view: View) -> tuple[Tensor, Tensor]:
    """Return joined heads [B, T, H · E] of products whose rows hold queries, keys and values, and
    for the gradient the logarithms [B, H, T] of the sums of each query's exponentials."""
    length = len(y_NP) // rows
    out = y_NP.new_empty((rows, length, heads * size))
    log_sums = y_NP.new_empty((rows, heads, length), dtype=torch.float32)
    arguments = LongAttention(**_describe(y_NP, out, log_sums, size, view))
    _call(f"forward_{KINDS[y_NP.dtype]}", arguments)
    return out, log_sums


def differentiate(
    grad: Tensor, y_NP: Tensor, out: Tensor, log_sums: Tensor, size: int, view: View
) -> Tensor:
    """Return the gradient of the products [N, P] that gave `out` and `log_sums`."""
    grad_y_NP = torch.empty_like(y_NP)
    arguments = LongAttention(
        **_describe(y_NP, out, log_sums, size, view),
        grad=grad.contiguous(),
        grad_products=grad_y_NP,
        grad_heads=log_sums.new_empty((*log_sums.shape, 2 * size)),
    )
    _call(f"backward_{KINDS[y_NP.dtype]}", arguments)
    return grad_y_NP


def _describe(
    y_NP: Tensor, out: Tensor, log_sums: Tensor, size: int, view: View
) -> dict[str, Tensor | int | None]:
    """Return the arguments of both directions."""
    cos, sin, starts, gaps = view
    rows, heads, length = log_sums.shape
    return {
        "batch": rows,
        "length": length,
        "heads": heads,
        "kv_heads": (y_NP.shape[1] // size - heads) // 2,
        "head_dim": size,
        "cos": cos,
        "sin": sin,
        "tables": len(cos),
        "starts": starts,
        "gaps": gaps,
        "products": y_NP,
        "out": out,
        "log_sums": log_sums,
    }
