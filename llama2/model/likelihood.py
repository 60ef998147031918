"""Log-probabilities of given tokens without ever holding a vocabulary of fp32 logits: the output
side of every loss.

Pretraining and SFT (§2, §3.1) sum them, PPO (§3.2.3) exponentiates their differences; both need
exactly log softmax(W x)[target] in fp32 and its gradient for any upstream weight. With 32,000 words
the logits outweigh all other activations, so they are made a few rows at a time, and what the
backward pass needs is stored in their place, in the precision of the products (bf16 under
autocast):

    q = softmax(W x) - onehot(target)      d logp/dx = -q W      d logp/dW = -q xᵀ

The target's entry of q is -(1 - p) computed by expm1, so that it stays accurate where the model is
sure. Shapes: N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama2 import devices
from llama2.kernels import fused

# a larger q is computed again in the backward pass instead of kept (a third more products)
KEEP_BYTES = 256 << 20
# fp32 logits of one chunk: what the caches of a processor hold
CHUNK_BYTES = {devices.CPU: 4 << 20}
LARGE_CHUNK_BYTES = 256 << 20  # elsewhere: enough rows to fill the device
CHUNK_ROWS = 128  # at least, so that a chunk is still an efficient matrix product


def log_likelihood(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """log softmax(W x)[target] in fp32, of the shape of the targets; differentiable in `hidden` and
    `weight`.

    Both must have one dtype, that of the products. Targets are any valid ids: weighting positions
    is the caller's.
    """
    logp, _ = log_likelihood_and_entropy(hidden_BTD, weight_VD, targets_BT, entropy=False)
    return logp


def log_likelihood_and_entropy(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """`log_likelihood`, and the entropy of each predicted distribution in nats (no gradient; zeros
    if not wanted)."""
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    logp_N, entropy_N = _LogLikelihood.apply(hidden_ND, weight_VD, targets_N, entropy)  # type: ignore[no-untyped-call]
    return logp_N.view(targets_BT.shape), entropy_N.view(targets_BT.shape)


class _LogLikelihood(torch.autograd.Function):
    """(hidden_ND, weight_VD, targets_N, entropy?) -> logp_N, entropy_N."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = train and tokens * vocabulary * hidden_ND.element_size() <= KEEP_BYTES
        # A compiler fuses what follows the product, as our own kernel does, so that fp32 logits
        # never exist: slices would only hinder.
        whole = keep and (torch.compiler.is_compiling() or fused.runs(hidden_ND))
        rows = tokens if whole else _rows(hidden_ND, vocabulary)
        logp_N = hidden_ND.new_zeros(tokens, dtype=torch.float32)
        entropy_N, total_N = torch.zeros_like(logp_N), torch.ones_like(logp_N)
        q_NV = hidden_ND.new_empty((tokens if keep else min(rows, tokens), vocabulary))

        for begin in range(0, tokens, rows):
            part = slice(begin, min(begin + rows, tokens))
            q_CV = q_NV[part] if keep else q_NV[: part.stop - part.start]
            logp_N[part], total_N[part], entropy_C = _chunk(
                hidden_ND[part], weight_VD, targets_N[part], q_CV, entropy
            )

            if entropy_C is not None:
                entropy_N[part] = entropy_C

        if train:
            ctx.keep = keep
            ctx.save_for_backward(
                hidden_ND, weight_VD, targets_N, total_N, *((q_NV,) if keep else ())
            )

        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, total_N, *kept = ctx.saved_tensors
        scale_N1 = (-grad_N / total_N)[:, None]
        scaled_ND = _scaled(hidden_ND, scale_N1)

        if kept:
            q_NV: Tensor = kept[0]
            return _scaled(q_NV @ weight_VD, scale_N1), q_NV.t() @ scaled_ND, None, None

        rows = _rows(hidden_ND, len(weight_VD))
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        q_CV = hidden_ND.new_empty((min(rows, len(hidden_ND)), len(weight_VD)))

        for begin in range(0, len(hidden_ND), rows):
            part = slice(begin, min(begin + rows, len(hidden_ND)))
            q_CV = q_CV[: part.stop - part.start]
            _chunk(hidden_ND[part], weight_VD, targets_N[part], q_CV, False)
            grad_hidden_ND[part] = _scaled(q_CV @ weight_VD, scale_N1[part])
            grad_weight_VD += q_CV.t() @ scaled_ND[part]

        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None


def _chunk(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, q_CV: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes q · total into `q_CV`; returns logp_C, total_C (the sum of exp(logits - largest)) and
    the entropy_C."""
    torch.mm(hidden_CD, weight_VD.t(), out=q_CV)
    if fused.runs(q_CV):
        return fused.likelihood(q_CV, targets_C, entropy)

    work_CV = q_CV.float() if q_CV.dtype != torch.float32 else q_CV
    work_CV.sub_(work_CV.amax(-1, keepdim=True))
    target_C1 = work_CV.gather(1, targets_C[:, None])

    if entropy:
        shifted_CV = work_CV.clone()

    total_C1 = work_CV.exp_().sum(-1, keepdim=True)
    logp_C1 = target_C1 - total_C1.log()
    entropy_C = None

    if entropy:  # H = log total - Σ p · shifted
        entropy_C = (total_C1.log() - (shifted_CV.mul_(work_CV).sum(-1, keepdim=True) / total_C1))[
            :, 0
        ]

    if work_CV is not q_CV:
        q_CV.copy_(work_CV)

    row_C = torch.arange(len(targets_C), device=targets_C.device)
    # scatter_ would copy it all
    q_CV[row_C, targets_C] = (torch.expm1(logp_C1) * total_C1).to(q_CV.dtype)[:, 0]
    return logp_C1[:, 0], total_C1[:, 0], entropy_C


def _scaled(x_ND: Tensor, scale_N1: Tensor) -> Tensor:
    """x · scale in fp32, in the precision of x."""
    return fused.scaled(x_ND, scale_N1) if fused.runs(x_ND) else (x_ND * scale_N1).to(x_ND.dtype)


def _rows(hidden_ND: Tensor, vocabulary: int) -> int:
    """Tokens of one chunk."""
    limit = CHUNK_BYTES.get(hidden_ND.device.type, LARGE_CHUNK_BYTES)
    return max(CHUNK_ROWS, limit // (4 * vocabulary) // CHUNK_ROWS * CHUNK_ROWS)
