"""What stands between the matrix products of a layer, fused for a CPU: forward and gradient, by
hand.

On a processor with matrix instructions the products are cheap, and a step's time goes into passes
over memory: norms, rotations, softmax, gates, each recorded as several operations. `fused.cpp`
makes one pass of each; this file joins them to PyTorch's products and tells autograd their
gradients. `llama.py` holds the same mathematics in PyTorch's operations, which every other device
runs, and a CPU without a compiler.

Shapes: B rows of T positions (N = B · T tokens), D hidden, F feed-forward, H query heads, K key
heads, G = H / K, E head dimension, S keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2 import devices
from llama2.kernels import build

BLOCK = 128  # queries that share one product: keys after the last of them are left out
_LETTER = {torch.float32: "f", torch.bfloat16: "b"}
_call = build.Library("fused")


def runs(x: Tensor) -> bool:
    """Whether the functions of this module take `x`."""
    return (
        devices.is_cpu(x)
        and x.dtype in _LETTER
        and not torch.compiler.is_compiling()
        and _call.found
    )


# ---- residual stream and RMSNorm ----
def normalise(
    x_BTD: Tensor, update_BTD: Tensor | None, weight_D: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream s = x + update, and s / sqrt(mean(s²) + eps) · weight in `kind`; sums and norm in
    fp32."""
    stream_BTD, out_BTD = _Normalise.apply(  # type: ignore[no-untyped-call]
        x_BTD, None if update_BTD is None else update_BTD.to(kind), weight_D, eps, kind
    )
    return stream_BTD, out_BTD


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, kind: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        x, update = x.contiguous(), None if update is None else update.contiguous()
        stream = x if update is None else torch.empty_like(x)
        out, scale_N = (
            x.new_empty(x.shape, dtype=kind),
            x.new_empty(x.shape[:-1], dtype=torch.float32),
        )
        _call(
            f"norm_{_LETTER[x.dtype]}{_LETTER[kind]}",
            scale_N.numel(),
            x.shape[-1],
            x,
            update,
            weight.float(),
            eps,
            stream,
            out,
            scale_N,
        )
        ctx.save_for_backward(stream, weight, scale_N)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.updated = kind, update is not None

        return stream, out

    @staticmethod
    def backward(ctx: Any, beyond: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, scale_N = ctx.saved_tensors
        if grad is None:
            return (
                beyond,
                beyond.to(ctx.kind) if ctx.updated and beyond is not None else None,
                None,
                None,
                None,
            )

        grad, beyond = grad.contiguous(), None if beyond is None else beyond.contiguous()
        grad_x, grad_weight = (
            torch.empty_like(stream),
            torch.empty_like(weight, dtype=torch.float32),
        )
        # Where the stream has the update's precision, both have one gradient.
        apart = ctx.updated and ctx.kind != stream.dtype
        grad_update = torch.empty_like(stream, dtype=ctx.kind) if apart else None
        _call(
            f"norm_back_{_LETTER[stream.dtype]}{_LETTER[ctx.kind]}",
            scale_N.numel(),
            stream.shape[-1],
            grad,
            beyond,
            stream,
            weight.float(),
            scale_N,
            grad_x,
            grad_update,
            grad_weight,
        )
        grad_update = grad_update if apart else grad_x if ctx.updated else None

        return grad_x, grad_update, grad_weight.to(weight.dtype), None, None


# ---- SwiGLU ----
def gated(x_BTD: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """silu(gate(x)) · up(x), [B, T, F]; both products are one."""
    out_BTF: Tensor = _Gated.apply(x_BTD, gate_FD, up_FD)  # type: ignore[no-untyped-call]
    return out_BTF


def gated_apart(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """silu(gate) · up without a gradient, of products made apart: joining their matrices would cost
    a copy of both."""
    gate_BTF, up_BTF = gate_BTF.contiguous(), up_BTF.contiguous()
    out_BTF, size = torch.empty_like(gate_BTF), gate_BTF.shape[-1]
    _call(
        f"swiglu_{_LETTER[out_BTF.dtype]}",
        out_BTF.numel() // size,
        size,
        size,
        gate_BTF,
        up_BTF,
        out_BTF,
    )

    return out_BTF


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        x_ND, weight_PD = _rows(x), _joined((gate, up), x.dtype)
        y_NP = torch.mm(x_ND, weight_PD.t())  # P = 2 F
        out = x.new_empty((*x.shape[:-1], len(gate)))
        _call(
            f"swiglu_{_LETTER[x.dtype]}",
            len(x_ND),
            len(gate),
            y_NP.shape[1],
            y_NP,
            y_NP[:, len(gate) :],
            out,
        )
        ctx.save_for_backward(x_ND, weight_PD, y_NP)
        ctx.kinds = (gate.dtype, up.dtype)

        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x_ND, weight_PD, y_NP = ctx.saved_tensors
        grad_y_NP = torch.empty_like(y_NP)
        _call(
            f"swiglu_back_{_LETTER[x_ND.dtype]}",
            len(x_ND),
            y_NP.shape[1] // 2,
            grad.contiguous(),
            y_NP,
            grad_y_NP,
        )
        grad_x = torch.mm(grad_y_NP, weight_PD).view(*grad.shape[:-1], -1)

        return grad_x, *_parted(
            torch.mm(grad_y_NP.t(), x_ND), (len(weight_PD) // 2,) * 2, ctx.kinds
        )


# ---- attention ----
@dataclass(frozen=True)
class View:
    """What all layers share: rotary tables [B or 1, T, 1, E] in fp32, the sine negative in the
    first half, and the first position each query may see, [B, T] (None: position 0)."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None


def attention(x_BTD: Tensor, weights: Sequence[Tensor], size: int, view: View) -> Tensor:
    """Causal attention from normed activations to joined heads, [B, T, H · E]; `weights` are those
    of queries, keys and values, `size` is E. Scores are computed a block of queries at a time,
    without keys that none of them may see."""
    out_BTP: Tensor = _Attention.apply(x_BTD, *weights, size, view)  # type: ignore[no-untyped-call]
    return out_BTP


def attention_apart(
    q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, size: int, view: View
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without a gradient, from products made apart: joined heads, and the rotated keys and
    the values, [B, K, T, E] each, for a cache."""
    q_BTD, k_BTD, v_BTD = q_BTD.contiguous(), k_BTD.contiguous(), v_BTD.contiguous()
    rows, length, _ = q_BTD.shape
    heads, kv = q_BTD.shape[-1] // size, k_BTD.shape[-1] // size
    layout = _Layout(rows, length, heads, kv, size, view)
    keys = layout.split(k_BTD, 0, kv, 0, length, turned=True)
    values = layout.split(v_BTD, 0, kv, 0, length)
    out = torch.empty_like(q_BTD)

    for begin, end in layout.blocks():
        queries = layout.split(q_BTD, 0, heads, begin, end, turned=True, scale=size**-0.5).view(
            rows * kv, -1, size
        )
        weights = torch.bmm(queries, keys[:, :end].mT)
        layout.softmax(weights, begin, end)
        layout.join(torch.bmm(weights, values[:, :end]), out, 0, heads, begin, end)

    return out, keys.view(rows, kv, length, size), values.view(rows, kv, length, size)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, size: int, view: View
    ) -> Tensor:
        rows, length, _ = x.shape
        x_ND, weight_PD = _rows(x), _joined((wq, wk, wv), x.dtype)
        y_NP = torch.mm(x_ND, weight_PD.t())
        heads, kv = len(wq) // size, len(wk) // size
        layout = _Layout(rows, length, heads, kv, size, view)
        keys = layout.split(y_NP, heads, kv, 0, length, turned=True)
        values = layout.split(y_NP, heads + kv, kv, 0, length)
        out = x.new_empty((rows, length, heads * size))
        kept = []

        for begin, end in layout.blocks():
            queries = layout.split(y_NP, 0, heads, begin, end, turned=True, scale=size**-0.5).view(
                rows * kv, -1, size
            )
            weights = torch.bmm(queries, keys[:, :end].mT)
            layout.softmax(weights, begin, end)
            layout.join(torch.bmm(weights, values[:, :end]), out, 0, heads, begin, end)
            kept += [queries, weights]

        ctx.save_for_backward(x_ND, weight_PD, keys, values, *kept)
        ctx.layout, ctx.kinds, ctx.sizes = (
            layout,
            (wq.dtype, wk.dtype, wv.dtype),
            (len(wq), len(wk), len(wv)),
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With P = softmax(S), S = q kᵀ: dv = Pᵀ g, dP = g vᵀ, dS = P (dP - Σ P dP), dq = dS k, dk
        = dSᵀ q."""
        x_ND, weight_PD, keys, values, *kept = ctx.saved_tensors
        layout: _Layout = ctx.layout
        heads, kv, length, size = layout.heads, layout.kv, layout.length, layout.size
        grad, grad_y_NP = grad.contiguous(), x_ND.new_empty((len(x_ND), len(weight_PD)))
        grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)

        for index, (begin, end) in reversed(list(enumerate(layout.blocks()))):
            queries, weights = kept[2 * index : 2 * index + 2]
            grad_out = layout.split(_rows(grad), 0, heads, begin, end).view(len(keys), -1, size)
            grad_scores = torch.bmm(grad_out, values[:, :end].mT)
            layout.softmax_back(weights, grad_scores, begin, end)
            grad_queries = torch.bmm(grad_scores, keys[:, :end])
            layout.join(
                grad_queries, grad_y_NP, 0, heads, begin, end, turned=True, scale=size**-0.5
            )

            if end == length:  # the last block, taken first, sees all keys
                torch.bmm(grad_scores.mT, queries, out=grad_keys)
                torch.bmm(weights.mT, grad_out, out=grad_values)
            else:
                grad_keys[:, :end] += torch.bmm(grad_scores.mT, queries)
                grad_values[:, :end] += torch.bmm(weights.mT, grad_out)

        layout.join(grad_keys, grad_y_NP, heads, kv, 0, length, turned=True)
        layout.join(grad_values, grad_y_NP, heads + kv, kv, 0, length)
        grad_x = torch.mm(grad_y_NP, weight_PD).view(layout.rows, length, -1)

        return grad_x, *_parted(torch.mm(grad_y_NP.t(), x_ND), ctx.sizes, ctx.kinds), None, None


@dataclass(frozen=True)
class _Layout:
    """Moves heads between rows of products, [N, heads · E], and batches of products, [B · heads,
    positions, E]."""

    rows: int
    length: int
    heads: int
    kv: int
    size: int
    view: View

    def blocks(self) -> list[tuple[int, int]]:
        """First and last (exclusive) query of each block."""
        return [(begin, min(begin + BLOCK, self.length)) for begin in range(0, self.length, BLOCK)]

    def split(
        self,
        y: Tensor,
        first: int,
        heads: int,
        begin: int,
        end: int,
        *,
        turned: bool = False,
        scale: float = 1.0,
    ) -> Tensor:
        """Heads `first` to `first + heads` of positions `begin` to `end`, rotated if `turned`."""
        out = y.new_empty((self.rows * heads, end - begin, self.size))
        self._move(y, out, (y.shape[-1], first, heads, begin, end), turned, scale, 0)
        return out

    def join(
        self,
        split: Tensor,
        y: Tensor,
        first: int,
        heads: int,
        begin: int,
        end: int,
        *,
        turned: bool = False,
        scale: float = 1.0,
    ) -> None:
        """The way back: into rows of `y`, rotated back if `turned`."""
        self._move(y, split, (y.shape[-1], first, heads, begin, end), turned, scale, 1)

    def _move(
        self, y: Tensor, split: Tensor, place: Sequence[int], turned: bool, scale: float, back: int
    ) -> None:
        stride, first, heads, begin, end = place
        cos, sin = (self.view.cos, self.view.sin) if turned else (None, None)
        _call(
            f"heads_{_LETTER[y.dtype]}",
            self.rows,
            self.length,
            stride,
            first,
            heads,
            self.size,
            begin,
            end,
            cos,
            sin,
            len(self.view.cos),
            y,
            split,
            scale,
            back,
        )

    def softmax(self, scores: Tensor, begin: int, end: int) -> None:
        """Over what each query may see, in place; 0 elsewhere."""
        _call(
            f"softmax_{_LETTER[scores.dtype]}",
            self.rows,
            self.length,
            self.heads,
            begin,
            end,
            self.view.starts,
            scores,
        )

    def softmax_back(self, weights: Tensor, grad: Tensor, begin: int, end: int) -> None:
        """The gradient of scores from that of weights, in place."""
        _call(
            f"softmax_back_{_LETTER[grad.dtype]}",
            self.rows,
            self.length,
            self.heads,
            begin,
            end,
            self.view.starts,
            weights,
            grad,
        )


# ---- likelihood ----
def likelihood(
    logits_CV: Tensor, targets_C: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes (softmax - onehot) · total in the place of logits; returns log p(target), total (the
    sum of exp(logits - largest)) and, if wanted, the entropy, each [C] in fp32. See
    `likelihood.py`."""
    logp_C, total_C, entropy_C = torch.empty(3, len(logits_CV))
    _call(
        f"likelihood_{_LETTER[logits_CV.dtype]}",
        *logits_CV.shape,
        logits_CV,
        targets_C.contiguous(),
        logp_C,
        total_C,
        entropy_C if entropy else None,
    )
    return logp_C, total_C, entropy_C if entropy else None


def scaled(x_ND: Tensor, scale_N1: Tensor) -> Tensor:
    """Every row times its own number."""
    out = torch.empty_like(x_ND)
    _call(f"scaled_{_LETTER[x_ND.dtype]}", *x_ND.shape, x_ND, scale_N1.contiguous(), out)
    return out


# ---- products ----
def _rows(x: Tensor) -> Tensor:
    """[N, ...] of [B, T, ...], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _joined(weights: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    """Matrices with one input as one, in the precision of the product."""
    out = weights[0].new_empty((sum(map(len, weights)), weights[0].shape[1]), dtype=kind)
    for part, weight in zip(torch.split(out, [len(weight) for weight in weights]), weights):
        part.copy_(weight)

    return out


def _parted(grad: Tensor, sizes: Sequence[int], kinds: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """Gradients of joined matrices, one each."""
    return tuple(part.to(kind) for part, kind in zip(torch.split(grad, list(sizes)), kinds))
