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
from torch import Tensor, nn

from llama2 import devices

# a larger q is computed again in the backward pass instead of kept (a third more products)
KEEP_BYTES = 256 << 20
# fp32 logits of one chunk: what the caches of a processor hold
CHUNK_BYTES = {devices.CPU: 4 << 20}
LARGE_CHUNK_BYTES = 256 << 20  # elsewhere: enough rows to fill the device
CHUNK_ROWS = 128  # at least, so that a chunk is still an efficient matrix product


class Likelihood(nn.Module):
    """log softmax(W x)[target] and the entropy of each predicted distribution.

    A module without weights, so that kernels can take the place of its steps: `chunk_rows` and
    `subtract_targets`.
    """

    def forward(
        self, hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities, differentiable in `hidden` and `weight`, and entropies in nats
        (no gradient; zeros if not wanted), both in fp32 and of the shape of the targets.

        `hidden` and `weight` must have one dtype, that of the products. Targets are any valid ids:
        weighting positions is the caller's.
        """
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logp_N, entropy_N = _LogLikelihood.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, targets_BT.reshape(-1), entropy, self
        )
        return logp_N.view(targets_BT.shape), entropy_N.view(targets_BT.shape)

    def chunk_rows(self, hidden_ND: Tensor, vocabulary: int, keep: bool) -> int:
        """Count the tokens of one chunk. A compiler fuses what follows the product, so that fp32
        logits never exist: where q is kept, chunks would only hinder."""
        if keep and torch.compiler.is_compiling():
            return len(hidden_ND)

        limit = CHUNK_BYTES.get(hidden_ND.device.type, LARGE_CHUNK_BYTES)
        return max(CHUNK_ROWS, limit // (4 * vocabulary) // CHUNK_ROWS * CHUNK_ROWS)

    def subtract_targets(
        self, q_CV: Tensor, targets_C: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn logits into q · total in place; return logp_C, total_C (the sum of
        exp(logits - largest)) and, if wanted, the entropy_C."""
        work_CV = q_CV.float() if q_CV.dtype != torch.float32 else q_CV
        work_CV.sub_(work_CV.amax(-1, keepdim=True))
        target_C1 = work_CV.gather(1, targets_C[:, None])
        shifted_CV = work_CV.clone() if entropy else None

        total_C1 = work_CV.exp_().sum(-1, keepdim=True)
        logp_C1 = target_C1 - total_C1.log()
        entropy_C = None

        if shifted_CV is not None:  # H = log total - Σ p · shifted
            mean_C1 = shifted_CV.mul_(work_CV).sum(-1, keepdim=True) / total_C1
            entropy_C = (total_C1.log() - mean_C1)[:, 0]

        if work_CV is not q_CV:
            q_CV.copy_(work_CV)

        row_C = torch.arange(len(targets_C), device=targets_C.device)
        # scatter_ would copy it all
        q_CV[row_C, targets_C] = (torch.expm1(logp_C1) * total_C1).to(q_CV.dtype)[:, 0]
        return logp_C1[:, 0], total_C1[:, 0], entropy_C


def of_logits(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from logits, for a head that is more than a matrix: whatever it has added
    takes effect, at the price of holding them all."""
    logp_BTV = logits_BTV.log_softmax(-1)
    entropy_BT = -(logp_BTV.detach().exp() * logp_BTV.detach()).sum(-1)
    return logp_BTV.gather(2, targets_BT[..., None])[..., 0], entropy_BT


class _LogLikelihood(torch.autograd.Function):
    """(hidden_ND, weight_VD, targets_N, entropy?, steps) -> logp_N, entropy_N."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        entropy: bool,
        steps: Likelihood,
    ) -> tuple[Tensor, Tensor]:
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        train = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = train and tokens * vocabulary * hidden_ND.element_size() <= KEEP_BYTES
        rows = steps.chunk_rows(hidden_ND, vocabulary, keep)
        logp_N = hidden_ND.new_zeros(tokens, dtype=torch.float32)
        entropy_N, total_N = torch.zeros_like(logp_N), torch.ones_like(logp_N)
        q_NV = hidden_ND.new_empty((tokens if keep else min(rows, tokens), vocabulary))

        for begin in range(0, tokens, rows):
            part = slice(begin, min(begin + rows, tokens))
            q_CV = q_NV[part] if keep else q_NV[: part.stop - part.start]
            torch.mm(hidden_ND[part], weight_VD.t(), out=q_CV)
            logp_N[part], total_N[part], entropy_C = steps.subtract_targets(
                q_CV, targets_N[part], entropy
            )
            if entropy_C is not None:
                entropy_N[part] = entropy_C

        if train:
            ctx.steps = steps
            saved = (q_NV,) if keep else ()
            ctx.save_for_backward(hidden_ND, weight_VD, targets_N, total_N, *saved)

        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, total_N, *saved = ctx.saved_tensors
        steps: Likelihood = ctx.steps
        scale_N1 = (-grad_N / total_N)[:, None]
        scaled_ND = _scale(hidden_ND, scale_N1)

        if saved:
            q_NV: Tensor = saved[0]
            grad_hidden_ND = _scale(q_NV @ weight_VD, scale_N1)
            return grad_hidden_ND, q_NV.t() @ scaled_ND, None, None, None

        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        rows = steps.chunk_rows(hidden_ND, vocabulary, False)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        q_CV = hidden_ND.new_empty((min(rows, tokens), vocabulary))

        for begin in range(0, tokens, rows):
            part = slice(begin, min(begin + rows, tokens))
            q_CV = q_CV[: part.stop - part.start]
            torch.mm(hidden_ND[part], weight_VD.t(), out=q_CV)
            steps.subtract_targets(q_CV, targets_N[part], False)
            grad_hidden_ND[part] = _scale(q_CV @ weight_VD, scale_N1[part])
            grad_weight_VD += q_CV.t() @ scaled_ND[part]

        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None, None


def _scale(x_ND: Tensor, scale_N1: Tensor) -> Tensor:
    """x · scale, multiplied in fp32, in the precision of x."""
    return (x_ND * scale_N1).to(x_ND.dtype)
