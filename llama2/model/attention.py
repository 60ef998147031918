"""Attention of queries to keys and values: by plain products, by PyTorch's fused kernels, or, for
packed rows on a GPU, by the kernel that knows where documents begin and end.

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
from llama2.model.positions import same_document

# q_NHE, k_NKE, v_NKE, bounds_C, longest
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
# what the kernel for documents takes
DEVICES, KINDS = (devices.CUDA,), (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# largest relative error of the kernel: some roundings of bf16; a wrong mask is off by about 1
AGREEMENT = 0.02


@dataclass(frozen=True)
class Documents:
    """Bounds of the documents of a batch, its rows written one after another."""

    bounds_C: Tensor  # int32: the first token of each document, and behind the last one
    longest: int  # no document is longer
    kernel: Kernel


# --- for any batch ----
def explicit_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, bias_B1TS: Tensor | None
) -> Tensor:
    """Attend by two batched products; the G query heads of a key head are rows of one product, so
    keys are never repeated. The softmax runs in fp32 inside its kernel."""
    rows, heads, length, size = q_BHTE.shape
    kv_heads, keys = k_BKSE.shape[1:3]
    q_BKRE = (q_BHTE * size**-0.5).reshape(rows, kv_heads, -1, size)  # R = G · T rows
    scores_BHTS = (q_BKRE @ k_BKSE.transpose(-1, -2)).view(rows, heads, length, keys)
    if bias_B1TS is not None:
        # in place it would be slower: these scores are a view
        scores_BHTS = scores_BHTS + bias_B1TS

    weights_BHTS = torch.softmax(scores_BHTS, dim=-1).to(v_BKSE.dtype)
    return (weights_BHTS.view(rows, kv_heads, -1, keys) @ v_BKSE).view(rows, heads, length, size)


def sdpa_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, bias_B1TS: Tensor | None
) -> Tensor:
    """Attend by PyTorch's fused kernels: for long sequences, for one query (decoding) and for
    GPUs."""
    shape = q_BHTE.shape
    length, groups = shape[2], shape[1] // k_BKSE.shape[1]
    shared = length > 1 and groups > 1
    # with one query, the G heads that share keys can pass as G queries of one head
    if length == 1 and groups > 1:
        q_BHTE = q_BHTE.view(shape[0], -1, groups, shape[3])

    if shared and not takes_shared_keys(q_BHTE, bias_B1TS):
        k_BKSE = k_BKSE.repeat_interleave(groups, 1)
        v_BKSE = v_BKSE.repeat_interleave(groups, 1)
        shared = False

    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        attn_mask=bias_B1TS,
        is_causal=bias_B1TS is None and length > 1,
        enable_gqa=shared,
    )
    return out_BHTE.reshape(shape) if length == 1 else out_BHTE


def takes_shared_keys(q_BHTE: Tensor, bias_B1TS: Tensor | None) -> bool:
    """Tell whether a fused kernel reads keys that several heads share. On a GPU only FlashAttention
    does, which takes no mask and nothing but 16 bits."""
    return devices.is_cpu(q_BHTE) or (bias_B1TS is None and q_BHTE.dtype in KINDS)


# --- for packed rows on a GPU ----
def document_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, documents: Documents
) -> Tensor:
    """Attend causally inside each document: what lies outside is neither computed nor masked."""
    rows, heads, length, size = q_BHTE.shape
    q_NHE, k_NKE, v_NKE = (
        x.transpose(1, 2).reshape(rows * length, -1, size) for x in (q_BHTE, k_BKTE, v_BKTE)
    )
    out_NHE = documents.kernel(q_NHE, k_NKE, v_NKE, documents.bounds_C, documents.longest)
    return out_NHE.view(rows, length, heads, size).transpose(1, 2)


def documents_of(documents_BT: Tensor, kind: torch.dtype, size: int) -> Documents | None:
    """Return the bounds of a batch's documents, if there is a kernel for products in `kind` and
    heads of `size`; else None: a mask must do."""
    return _find_documents(documents_BT, kind, size)


def leave_documents_uncompiled() -> None:
    """Keep the search for documents out of graphs: none can know beforehand how many there are.

    For whoever compiles a model, who calls this before: a decorator would import the compiler,
    which takes a second, into every command.
    """
    global _find_documents
    _find_documents = torch.compiler.disable(_search_documents)  # type: ignore[no-untyped-call]


def _search_documents(documents_BT: Tensor, kind: torch.dtype, size: int) -> Documents | None:
    kernel = kernel_for(documents_BT.device, kind, size)
    if kernel is None:
        return None

    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    bounds_C = F.pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=documents_BT.numel())

    # The row's length, not that of the longest document: asking the device for a second number
    # would be a second wait.
    return Documents(bounds_C.to(torch.int32), documents_BT.shape[1], kernel)


_find_documents: Callable[[Tensor, torch.dtype, int], Documents | None] = _search_documents


@cache
def kernel_for(device: torch.device, kind: torch.dtype, size: int) -> Kernel | None:
    """Return the kernel for documents on a device, once a small example has shown that it agrees
    there with fp32 in values and gradients: it is young, and its interface differs between releases
    of PyTorch."""
    if device.type not in DEVICES or kind not in KINDS or size % 8 or size > LARGEST_HEAD:
        return None

    cause = "results differ from fp32"
    for repeated in (False, True):
        try:
            kernel = _varlen(repeated)
            if _agrees(kernel, device, kind, size):
                return kernel
        except Exception as error:  # whatever it is, the mask does the same
            cause = f"{type(error).__name__}: {error}".splitlines()[0]

    print(
        "packed rows are masked, which is slower: torch.nn.attention.varlen does not work here "
        f"({cause})",
        file=sys.stderr,
    )
    return None


def _varlen(repeated: bool) -> Kernel:
    """PyTorch's kernel as this release has it; `repeated`: keys are repeated for the heads that
    share them."""
    # imports the compiler: a second, only for those who need it
    from torch.nn.attention.varlen import varlen_attn

    theirs: Any = varlen_attn
    known = inspect.signature(theirs).parameters
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in known:
        options = {"window_size": (-1, 0)}

    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(
        q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, bounds_C: Tensor, longest: int
    ) -> Tensor:
        """Attend inside the documents between `bounds_C`."""
        if repeated:
            groups = q_NHE.shape[1] // k_NKE.shape[1]
            k_NKE = k_NKE.repeat_interleave(groups, 1)
            v_NKE = v_NKE.repeat_interleave(groups, 1)

        bounds = (bounds_C, bounds_C, longest, longest)
        out_NHE: Tensor = theirs(q_NHE, k_NKE, v_NKE, *bounds, **options)
        return out_NHE

    return attend


def _agrees(kernel: Kernel, device: torch.device, kind: torch.dtype, size: int) -> bool:
    """Compare a kernel with products in fp32, for three documents and two heads a key."""
    ids_1N = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 32, 11]))[None].to(device)
    bounds_C = torch.tensor([0, 5, 37, 48], dtype=torch.int32, device=device)
    tokens, generator = ids_1N.shape[1], torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        """Draw queries, keys or values [N, heads, E]."""
        return torch.randn(tokens, heads, size, generator=generator).to(device, kind)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        inputs = [random(heads).requires_grad_() for heads in (4, 2, 2)]
        inputs32 = [x.detach().float().requires_grad_() for x in inputs]
        upstream = random(4)
        bias_11NN = torch.zeros(1, 1, tokens, tokens, device=device).masked_fill(
            ~same_document(ids_1N), torch.finfo(torch.float32).min
        )
        q, k, v = inputs
        q32, k32, v32 = (x.transpose(0, 1)[None] for x in inputs32)
        exact = explicit_attention(q32, k32, v32, bias_11NN)[0].transpose(0, 1)
        result = kernel(q, k, v, bounds_C, tokens)
        results = (result, *torch.autograd.grad(result, inputs, upstream))
        expected = (exact, *torch.autograd.grad(exact, inputs32, upstream.float()))

    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(results, expected)]
    return all(bool(error <= AGREEMENT) for error in errors)
