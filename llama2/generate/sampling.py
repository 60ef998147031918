"""How the next token is drawn: temperature, top-k, top-p, min-p, penalties, and random numbers that
belong to a sample (§3.4.1, §3.2.3).

Randomness is a function of (seed, prompt index, sample index, step), computed in bulk by a
counter-based generator [Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators"]. So a sample does not depend on what else is in the batch, on the number of slots, or
on the number of ranks. Tokens come from the inverse of the cumulative distribution, which on a CPU
costs a twentieth of `torch.multinomial`.

Shapes: B rows, V vocabulary, U uniform numbers a token, M tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2 import devices
from llama2.errors import UserError
from llama2.kernels import build

UNIFORMS = 2  # the second is used where the first drew a token outside of the nucleus
_CANDIDATES = 256  # of the likeliest tokens, tried before a whole vocabulary is sorted
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 32


class Draw(build.Struct):
    """See sample.cpp."""

    _fields_ = [
        *build.fields(ctypes.c_int64, "rows", "vocabulary"),
        *build.fields(ctypes.c_void_p, "logits", "changed", "uniforms"),
        ("scale", ctypes.c_float),
        *build.fields(ctypes.c_void_p, "tokens", "logprobs", "likelier"),
    ]


_call = build.Library("sample", Draw)


class Grammar(Protocol):
    """Says, token after token, what may follow. Each sample needs one of its own."""

    def mask(self) -> Tensor:
        """Bool [V]: the tokens that may come next, EOS among them where the text may end."""
        ...

    def accept(self, token: int) -> None:
        """A token was drawn."""
        ...

    def fresh(self) -> Grammar:
        """The same grammar at its beginning."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to sample. The defaults are the model's own distribution.

    `temperature` 0 is greedy. `min_p` keeps tokens at least that share as likely as the likeliest,
    `top_k` the k likeliest (0: all), then `top_p` the likeliest tokens up to and including the one
    that brings their mass over p; tokens exactly as likely as the last one kept are kept too. `n`
    samples a prompt; `stop` ids end a sample and are part of it; at most `max_tokens` new tokens.

    Before all that, logits change: `logit_bias` is added to those of single tokens;
    `repetition_penalty` divides the positive and multiplies the negative ones of tokens that stand
    in prompt or answer (Keskar et al. 2019); `presence_penalty` is subtracted for tokens of the
    answer, `frequency_penalty` for each time they stand there (OpenAI's definitions). A `grammar`
    says which tokens may follow. With `top_logprobs` the likeliest alternatives of each token are
    reported.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    n: int = 1
    stop: tuple[int, ...] = ()
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    grammar: Grammar | None = None

    @property
    def penalised(self) -> bool:
        """Whether the next token depends on which tokens stand already."""
        return (
            self.repetition_penalty != 1
            or bool(self.presence_penalty)
            or bool(self.frequency_penalty)
        )

    @property
    def plain(self) -> bool:
        """Whether logits are used as the model makes them."""
        return not (self.penalised or self.logit_bias or self.grammar)

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < float("inf"),
                "above 0 (1 changes nothing)",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("top_logprobs", self.top_logprobs >= 0, "at least 0"),
        ):
            if not good:
                raise UserError(f"sampling: {name} is {getattr(self, name)}", f"it must be {rule}")


def uniforms(seed: int, streams: Sequence[tuple[int, int]], tokens: int) -> NDArray[np.float32]:
    """Numbers in [0, 1) for `streams` of (prompt index, sample index): shape [streams, tokens,
    UNIFORMS].

    A stream's numbers depend on nothing but the seed, the stream and their place in it.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        prompt, sample = np.array(streams, dtype=np.uint64).reshape(-1, 2).T
        key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
        key = _mix(_mix(key + prompt * _GOLDEN) + sample * _GOLDEN)
        counter = np.arange(1, tokens * UNIFORMS + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(key[:, None] + counter)

    values = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return values.reshape(len(streams), tokens, UNIFORMS)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: each output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    logits_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling, changed_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """tokens_B drawn from `changed_BV` (else from the logits), and their logprobs_B under the
    model's own distribution: without temperature, truncation and changes (fp32)."""
    logits_BV = logits_BV.float()
    source_BV = logits_BV if changed_BV is None else changed_BV
    if devices.is_cpu(logits_BV) and _call.found and not (sampling.top_k or sampling.min_p):
        return _drawn_natively(logits_BV, source_BV, uniforms_BU, sampling)

    if sampling.temperature == 0:
        tokens_B = _argmax(source_BV)
    else:
        tokens_B = _sample(_weights(source_BV, sampling), uniforms_BU, sampling)

    return tokens_B, logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)


def _drawn_natively(
    logits_BV: Tensor, source_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """`draw` in two passes over the logits; a row that leaves the nucleus is drawn again from the
    nucleus alone."""
    rows, size = logits_BV.shape
    logits_BV, source_BV = logits_BV.contiguous(), source_BV.contiguous()
    tokens_B, logprobs_B = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    likelier_B = torch.empty(rows) if sampling.top_p < 1 and sampling.temperature else None
    arguments = Draw(
        rows=rows,
        vocabulary=size,
        logits=logits_BV,
        changed=source_BV,
        uniforms=uniforms_BU[:, 0].contiguous(),
        scale=1 / sampling.temperature if sampling.temperature else 0.0,
        tokens=tokens_B,
        logprobs=logprobs_B,
        likelier=likelier_B,
    )
    _call("draw", arguments)

    if likelier_B is not None and len(
        outside := (likelier_B > sampling.top_p).nonzero().squeeze(1)
    ):
        weights_BV = _weights(source_BV[outside], sampling)
        nucleus_BV = _nucleus(weights_BV, sampling.top_p * weights_BV.sum(-1, keepdim=True))
        tokens_B[outside], own_BV = (
            _invert(nucleus_BV, uniforms_BU[outside, 1:])[0],
            logits_BV[outside],
        )
        logprobs_B[outside] = own_BV.gather(1, tokens_B[outside, None]).squeeze(
            1
        ) - own_BV.logsumexp(-1)

    return tokens_B, logprobs_B


def _weights(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    return (logits_BV if sampling.temperature == 1 else logits_BV / sampling.temperature).softmax(
        -1
    )


def change(
    logits_BV: Tensor,
    sampling: Sampling,
    seen_BV: Tensor | None,
    counts_BV: Tensor | None,
    allowed_BV: Tensor | None,
) -> Tensor:
    """The logits under bias, penalties and grammar. seen_BV: tokens of prompt or answer (bool);
    counts_BV: how often each stands in the answer; allowed_BV: what the grammar lets follow."""
    logits_BV = logits_BV.float().clone()
    if sampling.penalised:
        assert seen_BV is not None
        assert counts_BV is not None
        factor = sampling.repetition_penalty

        if factor != 1:
            punished_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
            logits_BV = torch.where(seen_BV, punished_BV, logits_BV)

        logits_BV -= (
            sampling.presence_penalty * (counts_BV > 0) + sampling.frequency_penalty * counts_BV
        )

    for token, bias in sampling.logit_bias:
        logits_BV[:, token] += bias

    if allowed_BV is not None:
        logits_BV.masked_fill_(~allowed_BV, float("-inf"))

    return logits_BV


def _sample(weights_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling) -> Tensor:
    if sampling.min_p:
        weights_BV = weights_BV.masked_fill(
            weights_BV < sampling.min_p * weights_BV.amax(-1, keepdim=True), 0
        )

    if 0 < sampling.top_k < weights_BV.shape[1]:
        least_B1 = weights_BV.topk(sampling.top_k, -1).values[:, -1:]
        weights_BV = weights_BV.masked_fill(weights_BV < least_B1, 0)

    tokens_B, total_B1 = _invert(weights_BV, uniforms_BU[:, :1])
    if sampling.top_p < 1:
        limit_B1 = total_B1 * sampling.top_p
        outside = _outside_nucleus(weights_BV, tokens_B, limit_B1).nonzero().squeeze(1)
        if len(outside):
            nucleus_BV = _nucleus(weights_BV[outside], limit_B1[outside])
            tokens_B[outside] = _invert(nucleus_BV, uniforms_BU[outside, 1:])[0]

    return tokens_B


def _invert(weights_BV: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """tokens_B in proportion to their weights, by the inverse of the cumulative sum; and the
    total_B1."""
    cumulative_BV = weights_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, uniforms_B1 * total_B1, right=True)

    return tokens_B1.clamp_(max=weights_BV.shape[1] - 1).squeeze(1), total_B1


def _outside_nucleus(weights_BV: Tensor, tokens_B: Tensor, limit_B1: Tensor) -> Tensor:
    """Whether the tokens likelier than `tokens_B` already weigh more than `limit_B1`.

    Drawing from everything and drawing again only where this is so is exact, and spares most rows
    the sort.
    """
    own_B1 = weights_BV.gather(1, tokens_B[:, None])
    if not devices.is_cpu(weights_BV):
        return weights_BV.where(weights_BV > own_B1, 0).sum(-1) > limit_B1.squeeze(1)

    # A comparison written as floats: six times faster on a CPU than through a boolean mask.
    likelier_BV = torch.gt(weights_BV, own_B1, out=torch.empty_like(weights_BV))
    return likelier_BV.mul_(weights_BV).sum(-1) > limit_B1.squeeze(1)


def _nucleus(weights_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """`weights_BV` with all outside of the nucleus set to 0."""
    top_BC = weights_BV.topk(min(_CANDIDATES, weights_BV.shape[1]), -1).values
    if bool((top_BC.sum(-1, keepdim=True) <= limit_B1).any()):
        top_BC = weights_BV.sort(-1, descending=True).values

    kept_B1 = (top_BC.cumsum(-1) - top_BC <= limit_B1).sum(-1, keepdim=True)
    return weights_BV.masked_fill(weights_BV < top_BC.gather(1, kept_B1 - 1), 0)


def _argmax(logits_BV: Tensor) -> Tensor:
    """The first largest entry of each row: the largest block, then inside it, 3-5 times faster than
    torch on a CPU."""
    rows, size = logits_BV.shape
    if size % _BLOCK:
        return logits_BV.argmax(-1)

    blocks_BNK = logits_BV.reshape(rows, -1, _BLOCK)
    block_B1 = blocks_BNK.amax(-1).argmax(-1, keepdim=True)
    inside_BK = blocks_BNK.gather(1, block_B1[..., None].expand(rows, 1, _BLOCK)).squeeze(1)

    return block_B1.squeeze(1) * _BLOCK + inside_BK.argmax(-1)
