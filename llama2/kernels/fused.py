"""Operations between the matrix products of a layer, fused for a CPU, with their gradients by hand.

On a processor with matrix instructions the products are cheap, and a step's time goes into passes
over memory: norms, rotations, softmax, gates, each recorded as several operations. `fused.cpp`
makes one pass of each; this file joins them to PyTorch's products and tells autograd their
gradients. `model/llama.py` holds the same mathematics in PyTorch's operations; `modules.py` puts
these in their place.

Shapes: B rows of T positions (N = B · T tokens), D hidden, F feed-forward, H query heads, K key
heads, G = H / K, E head dimension, S keys, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2 import devices
from llama2.kernels import build
from llama2.kernels.products import KINDS, flatten, join, part

BLOCK = 128  # queries that share one product: keys after the last of them are left out


class Norm(build.Struct):
    """See fused.cpp, as for the others."""

    _fields_ = [
        *build.fields(c_int64, "rows", "size"),
        *build.fields(c_void_p, "x", "update", "weight", "stream", "out", "scale"),
        ("eps", c_float),
    ]


class NormGradient(build.Struct):
    """Gradients of `Norm`."""

    _fields_ = [
        *build.fields(c_int64, "rows", "size"),
        *build.fields(c_void_p, "grad", "grad_stream", "stream", "weight", "scale"),
        *build.fields(c_void_p, "grad_x", "grad_update", "grad_weight"),
    ]


class Heads(build.Struct):
    """Heads on their way between rows of products and batches of products."""

    _fields_ = [
        *build.fields(c_int64, "batch", "length", "stride", "first", "heads", "head_dim"),
        *build.fields(c_int64, "begin", "end"),
        *build.fields(c_void_p, "cos", "sin"),
        ("tables", c_int64),
        *build.fields(c_void_p, "products", "split"),
        ("scale", c_float),
        ("join", c_int64),
    ]


class Softmax(build.Struct):
    """Scores and their gradient, of a block of queries."""

    _fields_ = [
        *build.fields(c_int64, "batch", "length", "heads", "begin", "end"),
        *build.fields(c_void_p, "starts", "gaps", "weights", "grad"),
    ]


_call = build.Library("fused", Norm, NormGradient, Heads, Softmax)


def supports(x: Tensor) -> bool:
    """Tell whether the functions of this module take `x`."""
    return (
        devices.is_cpu(x)
        and x.dtype in KINDS
        and not torch.compiler.is_compiling()
        and _call.is_built
    )


# --- residual stream and RMSNorm ----
def normalise(
    x_BTD: Tensor, update_BTD: Tensor | None, weight_D: Tensor, eps: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the stream s = x + update, and s / sqrt(mean(s²) + eps) · weight in `kind`; sums and
    norm in fp32."""
    if update_BTD is not None:
        update_BTD = update_BTD.to(kind).contiguous()

    stream_BTD, out_BTD = _Normalise.apply(  # type: ignore[no-untyped-call]
        x_BTD.contiguous(), update_BTD, weight_D, eps, kind
    )
    return stream_BTD, out_BTD


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, kind: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return stream and norm."""
        stream = x if update is None else torch.empty_like(x)
        out = torch.empty_like(x, dtype=kind)
        scale_N = x.new_empty(x.shape[:-1], dtype=torch.float32)
        norm = Norm(
            rows=scale_N.numel(),
            size=x.shape[-1],
            x=x,
            update=update,
            weight=weight.float(),
            stream=stream,
            out=out,
            scale=scale_N,
            eps=eps,
        )
        _call(f"norm_{KINDS[x.dtype]}_{KINDS[kind]}", norm)
        ctx.save_for_backward(stream, weight, scale_N)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.updated = kind, update is not None

        return stream, out

    @staticmethod
    def backward(ctx: Any, beyond: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return gradients; `beyond` is what reaches the stream from later layers."""
        stream, weight, scale_N = ctx.saved_tensors
        if grad is None:
            passed = beyond.to(ctx.kind) if ctx.updated and beyond is not None else None
            return beyond, passed, None, None, None

        grad_x = torch.empty_like(stream)
        grad_weight = torch.empty_like(weight, dtype=torch.float32)
        grad_update = grad_x if ctx.updated else None
        copied = ctx.updated and ctx.kind != stream.dtype
        if copied:
            grad_update = torch.empty_like(stream, dtype=ctx.kind)

        gradient = NormGradient(
            rows=scale_N.numel(),
            size=stream.shape[-1],
            grad=grad.contiguous(),
            grad_stream=None if beyond is None else beyond.contiguous(),
            stream=stream,
            weight=weight.float(),
            scale=scale_N,
            grad_x=grad_x,
            grad_update=grad_update if copied else None,
            grad_weight=grad_weight,
        )
        _call(f"norm_back_{KINDS[stream.dtype]}_{KINDS[ctx.kind]}", gradient)

        return grad_x, grad_update, grad_weight.to(weight.dtype), None, None


# --- SwiGLU ----
def swiglu(x_BTD: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Return silu(gate(x)) · up(x), [B, T, F]; both products are one."""
    out_BTF: Tensor = _Gated.apply(x_BTD, gate_FD, up_FD)  # type: ignore[no-untyped-call]
    return out_BTF


def swiglu_of_products(gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
    """Return silu(gate) · up without a gradient, of products made apart: joining their matrices
    would cost a copy of both."""
    return _swiglu(gate_BTF.contiguous(), up_BTF.contiguous(), gate_BTF.shape[-1])


def _swiglu(gate: Tensor, up: Tensor, stride: int) -> Tensor:
    """Rows of gate and up lie `stride` numbers apart."""
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    size = out.shape[-1]
    _call(f"swiglu_{KINDS[out.dtype]}", out.numel() // size, size, stride, gate, up, out)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate(x)) · up(x)."""
        x_ND, weight_PD = flatten(x), join((gate, up), x.dtype)
        y_NP = torch.mm(x_ND, weight_PD.t())  # P = 2 F
        out_NF = _swiglu(y_NP, y_NP[:, len(gate) :], y_NP.shape[1])
        ctx.save_for_backward(x_ND, weight_PD, y_NP)
        ctx.kinds = (gate.dtype, up.dtype)

        return out_NF.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of activations and both matrices."""
        x_ND, weight_PD, y_NP = ctx.saved_tensors
        size, grad_y_NP = len(weight_PD) // 2, torch.empty_like(y_NP)
        name = f"swiglu_back_{KINDS[x_ND.dtype]}"
        _call(name, len(x_ND), size, grad.contiguous(), y_NP, grad_y_NP)
        grad_x = torch.mm(grad_y_NP, weight_PD).view(*grad.shape[:-1], -1)

        return grad_x, *part(torch.mm(grad_y_NP.t(), x_ND), (size, size), ctx.kinds)


# --- attention ----
View = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""what all layers share: rotary tables, cosine and sine [B or 1, T, 1, E] in fp32, the sine
negative in the first half; the first position that each query may see, [B, T] (None: position 0);
and those after it that it may not see, begin and end, [B, T, 2] (None: it sees all)"""


def attention(x_BTD: Tensor, weights: Sequence[Tensor], size: int, view: View) -> Tensor:
    """Return causal attention from normed activations to joined heads, [B, T, H · E]; `weights` are
    those of queries, keys and values, `size` is E. Scores are computed a block of queries at a
    time, without keys that none of them may see."""
    out_BTP: Tensor = _Attention.apply(x_BTD, *weights, size, view)  # type: ignore[no-untyped-call]
    return out_BTP


def attention_of_products(
    q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor, size: int, view: View
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same without a gradient, from products made apart: joined heads, and the rotated
    keys and the values, [B, K, T, E] each, for a cache."""
    q_BTD, k_BTD, v_BTD = q_BTD.contiguous(), k_BTD.contiguous(), v_BTD.contiguous()
    rows, length, _ = q_BTD.shape
    heads, kv = q_BTD.shape[-1] // size, k_BTD.shape[-1] // size
    layout = _Layout(rows, length, heads, kv, size, view)
    keys = layout.split(k_BTD, 0, kv, 0, length, 1.0)
    values = layout.split(v_BTD, 0, kv, 0, length)
    out = torch.empty_like(q_BTD)

    for _ in layout.attend(q_BTD, keys, values, out):
        pass

    return out, keys.view(rows, kv, length, size), values.view(rows, kv, length, size)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, size: int, view: View
    ) -> Tensor:
        """Return joined heads; queries and attention weights are kept for the gradient."""
        rows, length, _ = x.shape
        x_ND, weight_PD = flatten(x), join((wq, wk, wv), x.dtype)
        y_NP = torch.mm(x_ND, weight_PD.t())
        heads, kv = len(wq) // size, len(wk) // size
        layout = _Layout(rows, length, heads, kv, size, view)
        keys = layout.split(y_NP, heads, kv, 0, length, 1.0)
        values = layout.split(y_NP, heads + kv, kv, 0, length)
        out = x.new_empty((rows, length, heads * size))
        blocks = list(layout.attend(y_NP, keys, values, out))

        queries, weights = zip(*blocks)
        ctx.save_for_backward(x_ND, weight_PD, keys, values, *queries, *weights)
        ctx.layout, ctx.kinds = layout, (wq.dtype, wk.dtype, wv.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With P = softmax(S), S = q kᵀ: dv = Pᵀ g, dP = g vᵀ, dS = P (dP - Σ P dP), dq = dS k, dk
        = dSᵀ q."""
        x_ND, weight_PD, keys, values, *saved = ctx.saved_tensors
        layout: _Layout = ctx.layout
        heads, kv, length, size = layout.heads, layout.kv, layout.length, layout.size
        grad, grad_y_NP = grad.contiguous(), x_ND.new_empty((len(x_ND), len(weight_PD)))
        grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)
        blocks = layout.blocks()

        for index in reversed(range(len(blocks))):
            begin, end = blocks[index]
            queries, weights = saved[index], saved[len(blocks) + index]
            grad_out = layout.split(flatten(grad), 0, heads, begin, end).view(len(keys), -1, size)
            grad_scores = torch.bmm(grad_out, values[:, :end].mT)
            layout.softmax(begin, end, weights, grad_scores)
            grad_queries = torch.bmm(grad_scores, keys[:, :end])
            layout.move(grad_y_NP, grad_queries, 0, heads, begin, end, size**-0.5, join=True)

            if end == length:  # the last block, taken first, sees all keys
                torch.bmm(grad_scores.mT, queries, out=grad_keys)
                torch.bmm(weights.mT, grad_out, out=grad_values)
            else:
                grad_keys[:, :end] += torch.bmm(grad_scores.mT, queries)
                grad_values[:, :end] += torch.bmm(weights.mT, grad_out)

        layout.move(grad_y_NP, grad_keys, heads, kv, 0, length, 1.0, join=True)
        layout.move(grad_y_NP, grad_values, heads + kv, kv, 0, length, join=True)
        grad_x = torch.mm(grad_y_NP, weight_PD).view(layout.rows, length, -1)
        sizes = (heads * size, kv * size, kv * size)

        return grad_x, *part(torch.mm(grad_y_NP.t(), x_ND), sizes, ctx.kinds), None, None


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
        """Return the first and last (exclusive) query of each block."""
        return [(begin, min(begin + BLOCK, self.length)) for begin in range(0, self.length, BLOCK)]

    def attend(
        self, y: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Fill `out` from the queries that lie first in `y`, block by block; yield the queries and
        the attention weights of each."""
        for begin, end in self.blocks():
            split = self.split(y, 0, self.heads, begin, end, self.size**-0.5)
            queries = split.view(len(keys), -1, self.size)
            weights = torch.bmm(queries, keys[:, :end].mT)
            self.softmax(begin, end, weights)
            mixed = torch.bmm(weights, values[:, :end])
            self.move(out, mixed, 0, self.heads, begin, end, join=True)
            yield queries, weights

    def split(
        self, y: Tensor, first: int, heads: int, begin: int, end: int, scale: float | None = None
    ) -> Tensor:
        """Take heads `first` to `first + heads` of positions `begin` to `end`; with a scale rotated
        and scaled."""
        split = y.new_empty((self.rows * heads, end - begin, self.size))
        self.move(y, split, first, heads, begin, end, scale)
        return split

    def move(
        self,
        y: Tensor,
        split: Tensor,
        first: int,
        heads: int,
        begin: int,
        end: int,
        scale: float | None = None,
        join: bool = False,
    ) -> None:
        """Fill `split` from rows of `y`, or, to `join` them, rows of `y` from `split`, rotated
        back."""
        cos, sin, _, _ = self.view
        arguments = Heads(
            batch=self.rows,
            length=self.length,
            stride=y.shape[-1],
            first=first,
            heads=heads,
            head_dim=self.size,
            begin=begin,
            end=end,
            cos=None if scale is None else cos,
            sin=None if scale is None else sin,
            tables=len(cos),
            products=y,
            split=split,
            scale=1.0 if scale is None else scale,
            join=join,
        )
        _call(f"heads_{KINDS[y.dtype]}", arguments)

    def softmax(self, begin: int, end: int, weights: Tensor, grad: Tensor | None = None) -> None:
        """Turn scores into weights over what each query may see, or the gradient of weights into
        that of scores, in place; 0 elsewhere."""
        arguments = Softmax(
            batch=self.rows,
            length=self.length,
            heads=self.heads,
            begin=begin,
            end=end,
            starts=self.view[2],
            gaps=self.view[3],
            weights=weights,
            grad=grad,
        )
        name = "softmax" if grad is None else "softmax_back"
        _call(f"{name}_{KINDS[weights.dtype]}", arguments)


# --- likelihood ----
def likelihood(
    logits_CV: Tensor, targets_C: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write (softmax - onehot) · total in the place of logits; return log p(target), total (the sum
    of exp(logits - largest)) and, if wanted, the entropy, each [C] in fp32. See
    `model/likelihood.py`."""
    logp_C, total_C, entropies_C = torch.empty(3, len(logits_CV))
    entropy_C = entropies_C if entropy else None
    _call(
        f"likelihood_{KINDS[logits_CV.dtype]}",
        *logits_CV.shape,
        logits_CV,
        targets_C.contiguous(),
        logp_C,
        total_C,
        entropy_C,
    )
    return logp_C, total_C, entropy_C
