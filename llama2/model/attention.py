"""How queries, keys and values become attention: by plain products, by PyTorch's fused kernels, or,
for packed rows on a GPU, by the kernel that knows where documents begin and end.

The paper trains on rows of several documents (§2.2, §3.1) and shares keys between queries from 34B
on (grouped-query attention, §2.2). On a GPU the fused kernels take a mask, or shared keys, but not
both: asked for both, PyTorch falls back to products whose scores fill the memory. So documents go
to a kernel without masks, and where a mask must be, keys are repeated for it.

Shapes: B rows, T query positions, S key positions, H query heads, K key/value heads, G = H / K
query heads that share one key head, E head dimension, N = B · T tokens, C the bounds of documents.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2 import devices

# q_NHE, k_NKE, v_NKE, bounds_C, longest
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
# what the kernel for documents takes
DEVICES, KINDS = (devices.CUDA,), (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# of the kernel with fp32, relative: some roundings of bf16; a wrong mask is off by about 1
AGREEMENT = 0.02


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, its rows written one after another."""

    bounds_C: Tensor  # int32: the first token of each document, and behind the last one
    longest: int  # no document is longer
    kernel: Kernel


# ---- for any batch ----
def explicit_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, bias_B1TS: Tensor | None
) -> Tensor:
    """Attention by two batched products; the G query heads of a key head are rows of one product,
    so keys are never repeated. The softmax runs in fp32 inside its kernel."""
    rows, heads, length, size = q_BHTE.shape
    kv_heads, keys = k_BKSE.shape[1:3]
    q_BKRE = (q_BHTE * size**-0.5).reshape(rows, kv_heads, -1, size)  # R = G · T rows
    scores_BHTS = (q_BKRE @ k_BKSE.transpose(-1, -2)).view(rows, heads, length, keys)

    if bias_B1TS is not None:
        # in place it would be slower: these scores are a view
        scores_BHTS = scores_BHTS + bias_B1TS

    weights_BKRS = (
        torch.softmax(scores_BHTS, dim=-1).to(v_BKSE.dtype).view(rows, kv_heads, -1, keys)
    )
    return (weights_BKRS @ v_BKSE).view(rows, heads, length, size)


def fused_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, bias_B1TS: Tensor | None
) -> Tensor:
    """Attention by PyTorch's fused kernels: for long sequences, for one query (decoding) and for
    GPUs."""
    rows, heads, length, size = q_BHTE.shape
    groups = heads // k_BKSE.shape[1]
    # with one query, the G heads that share keys can pass as G queries of one head
    if length == 1 and groups > 1:
        q_BHTE = q_BHTE.view(rows, -1, groups, size)

    shared = length > 1 and groups > 1
    if shared and not takes_shared_keys(q_BHTE, bias_B1TS):
        k_BKSE, v_BKSE, shared = (
            k_BKSE.repeat_interleave(groups, 1),
            v_BKSE.repeat_interleave(groups, 1),
            False,
        )

    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        attn_mask=bias_B1TS,
        is_causal=bias_B1TS is None and length > 1,
        enable_gqa=shared,
    )
    return out_BHTE.view(rows, heads, length, size) if length == 1 else out_BHTE


def takes_shared_keys(q_BHTE: Tensor, bias_B1TS: Tensor | None) -> bool:
    """Whether a fused kernel reads keys that several heads share. On a GPU only FlashAttention
    does, which takes no mask and nothing but 16 bits."""
    return devices.is_cpu(q_BHTE) or (bias_B1TS is None and q_BHTE.dtype in KINDS)


# ---- for packed rows on a GPU ----
def document_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, documents: Documents
) -> Tensor:
    """Causal attention inside each document: what lies outside is neither computed nor masked."""
    rows, heads, length, size = q_BHTE.shape
    q_NHE, k_NKE, v_NKE = (
        x.transpose(1, 2).reshape(rows * length, -1, size) for x in (q_BHTE, k_BKTE, v_BKTE)
    )
    out_NHE = documents.kernel(q_NHE, k_NKE, v_NKE, documents.bounds_C, documents.longest)

    return out_NHE.view(rows, length, heads, size).transpose(1, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def documents_of(documents_BT: Tensor, kind: torch.dtype, size: int) -> Documents | None:
    """The bounds of a batch's documents, if there is a kernel for products in `kind` and heads of
    `size`; else None: a mask must do. Not compiled: how many documents there are, a graph cannot
    know beforehand."""
    kernel = kernel_for(documents_BT.device, kind, size)
    if kernel is None:
        return None

    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    bounds_C = F.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=documents_BT.numel())

    # The row's length, not that of the longest document: asking the device for a second number
    # would be a second wait.
    return Documents(bounds_C.to(torch.int32), documents_BT.shape[1], kernel)


@cache
def kernel_for(where: torch.device, kind: torch.dtype, size: int) -> Kernel | None:
    """The kernel for documents on a device, once it has shown there, on a small example, that it
    agrees with fp32 in values and gradients: it is young, and its interface differs between
    releases of PyTorch."""
    if where.type not in DEVICES or kind not in KINDS or size % 8 or size > LARGEST_HEAD:
        return None

    cause = "results differ from fp32"
    for repeated in (False, True):
        try:
            kernel = _varlen(repeated)
            if _agrees(kernel, where, kind, size):
                return kernel
        except Exception as error:  # whatever it is, the mask does the same
            cause = f"{type(error).__name__}: {error}".splitlines()[0]

    print(
        f"packed rows are masked, which is slower: torch.nn.attention.varlen does not work here ({cause})",
        file=sys.stderr,
    )
    return None


def _varlen(repeated: bool) -> Kernel:
    """PyTorch's kernel as this release has it; `repeated`: keys are repeated for the heads that
    share them."""
    from torch.nn.attention.varlen import (
        varlen_attn,  # imports the compiler: a second, only for those who need it
    )

    theirs: Any = varlen_attn
    known = inspect.signature(theirs).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )

    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(
        q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, bounds_C: Tensor, longest: int
    ) -> Tensor:
        if repeated:
            k_NKE, v_NKE = (
                x.repeat_interleave(q_NHE.shape[1] // x.shape[1], 1) for x in (k_NKE, v_NKE)
            )

        out_NHE: Tensor = theirs(
            q_NHE, k_NKE, v_NKE, bounds_C, bounds_C, longest, longest, **options
        )
        return out_NHE

    return attend


def _agrees(kernel: Kernel, where: torch.device, kind: torch.dtype, size: int) -> bool:
    """Whether a kernel and products in fp32 come to the same for three documents and two heads a
    key."""
    lengths = (5, 32, 11)
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(where.type, enabled=False),
    ):
        q, k, v = inputs = [
            torch.randn(total, heads, size, generator=generator).to(where, kind).requires_grad_()
            for heads in (4, 2, 2)
        ]
        q32, k32, v32 = exact_inputs = [one.detach().float().requires_grad_() for one in inputs]
        upstream = torch.randn(total, 4, size, generator=generator).to(where, kind)
        bounds_C = torch.tensor([0, *lengths], device=where).cumsum(0).to(torch.int32)
        ids_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(where)
        seen_TT = (ids_N[:, None] == ids_N) & torch.ones(
            total, total, dtype=torch.bool, device=where
        ).tril()
        bias_11TT = torch.zeros(1, 1, total, total, device=where).masked_fill(
            ~seen_TT, torch.finfo(torch.float32).min
        )
        found = kernel(q, k, v, bounds_C, total)
        exact = explicit_attention(*_batch_of_one(q32, k32, v32), bias_11TT)[0].transpose(0, 1)
        pairs = [
            (found, exact),
            *zip(
                torch.autograd.grad(found, inputs, upstream),
                torch.autograd.grad(exact, exact_inputs, upstream.float()),
            ),
        ]

        return all(
            bool((one.float() - other).norm() <= AGREEMENT * other.norm()) for one, other in pairs
        )


def _batch_of_one(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, heads, N, E] of each."""
    return q_NHE.transpose(0, 1)[None], k_NKE.transpose(0, 1)[None], v_NKE.transpose(0, 1)[None]
