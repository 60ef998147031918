"""Modules of the network with one pass over memory for what the plain ones do in several, and
`install`, which puts them in the place of those.

An installed module is the plain one with another class: it keeps its weights, names and hooks, so
state dicts, FSDP, copies and checkpoints of activations see no difference. At each call it asks
whether the kernels can do this call and whether the projections whose weights they would read do
nothing but multiply; else it runs the plain body. So what wraps or hooks a projection takes effect,
before and after `install`. A subclass is never replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2 import devices
from llama2.kernels import fused, long_attention
from llama2.model import llama
from llama2.model.likelihood import Likelihood
from llama2.model.linear import Embedding, Linear, is_bare, is_hooked
from llama2.model.llama import (
    Attend,
    Attention,
    Cache,
    Context,
    FeedForward,
    Layer,
    Llama,
    RMSNorm,
    Trunk,
    dtype_of_products,
)
from llama2.model.positions import branch_gaps, document_starts

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class FusedAttend:
    """The first position that each query may see, [B, T] (None: position 0), and those after it
    that it may not see, [B, T, 2] (None: it sees all); called, it attends in PyTorch's operations,
    for a layer that the kernels leave alone."""

    starts_BT: Tensor | None
    gaps_BT2: Tensor | None
    plain: Callable[[], Attend]  # makes the mask when it is first wanted

    def __call__(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        return self.plain()(q_BHTE, k_BKSE, v_BKSE)


class FusedRMSNorm(RMSNorm):
    """Sum and norm in one pass, its gradient by hand on every device."""

    def forward(self, x_BTD: Tensor, update_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the stream x + update (x without one), and its norm."""
        # a compiler fuses as well, and in PyTorch 2.11 it loses gradients made by hand
        if torch.compiler.is_compiling():
            return super().forward(x_BTD, update_BTD)

        kind = dtype_of_products(x_BTD)
        if fused.supports(x_BTD):
            return fused.normalise(x_BTD, update_BTD, self.weight, self.eps, kind)

        x_BTD = x_BTD if update_BTD is None else x_BTD + update_BTD
        if is_decoding(x_BTD) and x_BTD.dtype == self.weight.dtype == kind:
            return x_BTD, F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)

        normed_BTD: Tensor = _Normalise.apply(x_BTD, self.weight, self.eps, kind)  # type: ignore[no-untyped-call]
        return x_BTD, normed_BTD


class _Normalise(torch.autograd.Function):
    """RMSNorm in PyTorch's operations with its gradient by hand: half the passes over memory that
    recorded operations take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kind: torch.dtype) -> Tensor:
        """Return the norm in precision `kind`."""
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)

        return (x32 * scale).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        unit, grad = x * scale, grad.float()
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        along = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad * weight).sub_(unit.mul_(along)).mul_(scale)

        return grad_x.to(x.dtype), grad_weight, None, None


def is_decoding(x_BTD: Tensor) -> bool:
    """Tell whether these are the newest tokens of rows on a GPU: the time of such a step goes with
    the number of its kernels. Scores of whole rows stay those of training, to the bit."""
    return devices.is_gpu(x_BTD) and x_BTD.shape[1] == 1 and torch.is_inference_mode_enabled()


def rotate_together(
    q_BTHE: Tensor, k_BTKE: Tensor, cos_BT1E: Tensor, sin_BT1E: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys as one, as `positions.rotate` does to the bit, in five kernels in the
    place of twelve. No gradient flows through it."""
    heads = q_BTHE.shape[2]
    x_BTGE = torch.cat((q_BTHE, k_BTKE), 2)
    swapped_BTGE = x_BTGE.roll(x_BTGE.shape[-1] // 2, dims=-1)
    # products with the tables are in fp32, and so is their sum, before it is rounded
    torch.add(x_BTGE * cos_BT1E, swapped_BTGE * sin_BT1E, out=x_BTGE)
    return x_BTGE[:, :, :heads], x_BTGE[:, :, heads:]


def is_long(x_BTD: Tensor) -> bool:
    """Tell whether rows are so long that their attention weights should not be kept."""
    return x_BTD.shape[1] > llama.EXPLICIT_LENGTH


class FusedTrunk(Trunk):
    """Makes no mask where the layers' kernels need none."""

    def attention(
        self,
        x_BTD: Tensor,
        documents_BT: Tensor | None,
        cache: Cache | None,
        branches_BT: Tensor | None = None,
    ) -> Attend:
        """Choose how the layers of this pass attend: training, scoring, and reading whole prompts
        of up to EXPLICIT_LENGTH tokens into a cache go to the kernels."""
        plain = functools.partial(super().attention, x_BTD, documents_BT, cache, branches_BT)
        if not fused.supports(x_BTD):
            return plain()

        if is_long(x_BTD):
            takes = cache is None and long_attention.is_built()
        else:
            prompt = cache is not None and cache.mask_BTS is None and not torch.is_grad_enabled()
            takes = cache is None or prompt

        if not takes:
            return plain()

        starts_BT = None if documents_BT is None else document_starts(documents_BT)
        gaps_BT2 = None if branches_BT is None else branch_gaps(branches_BT)
        return FusedAttend(starts_BT, gaps_BT2, functools.cache(plain))


class FusedAttention(Attention):
    """From normed activations to joined heads without a mask and without keys repeated."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return what each position reads at those it may look at, [B, T, D]."""
        attend, projections = context.attend, (self.q_proj, self.k_proj, self.v_proj)
        if not isinstance(attend, FusedAttend) or not is_bare(*projections):
            return super().forward(x_BTD, context)

        view = (context.cos_BT1E, context.sin_BT1E, attend.starts_BT, attend.gaps_BT2)
        if context.cache is None:
            weights = [projection.weight for projection in projections]
            attention = long_attention.attention if is_long(x_BTD) else fused.attention
            joined_BTD = attention(x_BTD, weights, self.head_dim, view)
        else:
            q_BTD, k_BTD, v_BTD = (projection(x_BTD) for projection in projections)
            joined_BTD, k_BKTE, v_BKTE = fused.attention_of_products(
                q_BTD, k_BTD, v_BTD, self.head_dim, view
            )
            context.cache.update(self.layer, k_BKTE, v_BKTE)

        out_BTD: Tensor = self.o_proj(joined_BTD)
        return out_BTD

    def rotate(self, q_BTHE: Tensor, k_BTKE: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions, together where that is quicker."""
        if is_decoding(q_BTHE):
            return rotate_together(q_BTHE, k_BTKE, context.cos_BT1E, context.sin_BT1E)

        return super().rotate(q_BTHE, k_BTKE, context)


class FusedFeedForward(FeedForward):
    """Gate and up as one product, or, in front of a cache, one pass over both."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """Return [B, T, D]."""
        if not fused.supports(x_BTD) or not is_bare(self.gate_proj, self.up_proj):
            return super().forward(x_BTD, context)

        if context.cache is None:
            gated_BTF = fused.swiglu(x_BTD, self.gate_proj.weight, self.up_proj.weight)
        elif not torch.is_grad_enabled():
            gated_BTF = fused.swiglu_of_products(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        else:
            return super().forward(x_BTD, context)

        out_BTD: Tensor = self.down_proj(gated_BTF)
        return out_BTD


class FusedLikelihood(Likelihood):
    """Softmax, target and entropy of a row of logits in two passes, so that none is kept in
    fp32."""

    def chunk_rows(self, hidden_ND: Tensor, vocabulary: int, keep: bool) -> int:
        """Count the tokens of one chunk: all of them, where q is kept."""
        if keep and fused.supports(hidden_ND):
            return len(hidden_ND)

        return super().chunk_rows(hidden_ND, vocabulary, keep)

    def subtract_targets(
        self, q_CV: Tensor, targets_C: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn logits into q · total in place; return logp_C, total_C and, if wanted, the
        entropy_C."""
        if not fused.supports(q_CV):
            return super().subtract_targets(q_CV, targets_C, entropy)

        return fused.likelihood(q_CV, targets_C, entropy)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FusedRMSNorm,
    Attention: FusedAttention,
    FeedForward: FusedFeedForward,
    Trunk: FusedTrunk,
    Likelihood: FusedLikelihood,
}
_KNOWN = {Llama, Layer, Linear, Embedding, nn.ModuleList, *_FUSED, *_FUSED.values()}


def install(model: Module) -> Module:
    """Let kernels compute those modules of `model` that are exactly the network's own; return
    `model`. Subclasses stay as they are. Calling it again changes nothing."""
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]

    return model


def is_known(model: nn.Module) -> bool:
    """Tell whether every module of `model` is exactly the network's own, without hooks, so that its
    weights say all that it does."""
    return all(type(module) in _KNOWN and not is_hooked(module) for module in model.modules())
