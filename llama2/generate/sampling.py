"""The draw of the next token: temperature, top-k, top-p, min-p, penalties, and random numbers that
belong to a sample (§3.4.1, §3.2.3).

Randomness is a function of (seed, prompt index, sample index, step), computed in bulk by a
counter-based generator [Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators"]. So a sample does not depend on what else is in the batch, on the number of slots, or
on the number of ranks. Tokens come from the inverse of the cumulative distribution, which on a CPU
costs a twentieth of `torch.multinomial`.

Shapes: B rows, S some of them, V vocabulary, U uniform numbers a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


class Draw(build.Struct):
    """The arguments of `draw` in sample.cpp."""

    _fields_ = [
        *build.fields(ctypes.c_int64, "rows", "vocabulary"),
        *build.fields(ctypes.c_void_p, "logits", "changed", "uniforms"),
        ("scale", ctypes.c_float),
        *build.fields(ctypes.c_void_p, "tokens", "logprobs", "likelier"),
    ]


_call = build.Library("sample", Draw)


class Grammar(Protocol):
    """Decides, token after token, what may follow. Each sample needs one of its own."""

    def mask(self) -> Tensor:
        """Return bool [V]: the tokens that may come next, EOS too where the text may end."""

    def accept(self, token: int) -> None:
        """Go on by a token that was drawn."""

    def fresh(self) -> Grammar:
        """Return the same grammar at its beginning."""


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling. The defaults are the model's own distribution.

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
    def has_penalties(self) -> bool:
        """The next token depends on which tokens stand already."""
        additive = self.presence_penalty or self.frequency_penalty
        return self.repetition_penalty != 1 or bool(additive)

    @property
    def is_plain(self) -> bool:
        """Logits are used as the model makes them."""
        return not (self.has_penalties or self.logit_bias or self.grammar)

    def restart(self) -> Sampling:
        """Return the sampling of one more sample: its grammar, if any, is at its beginning."""
        return self if self.grammar is None else replace(self, grammar=self.grammar.fresh())

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


def draw_uniforms(streams: Sequence[tuple[int, int, int]], tokens: int) -> NDArray[np.float32]:
    """Return numbers in [0, 1) for streams of (seed, prompt index, sample index): shape [streams,
    tokens, UNIFORMS].

    A stream's numbers depend on nothing but its name and their place in it.
    """
    names = [(seed % 2**64, prompt, sample) for seed, prompt, sample in streams]
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        seed, prompt, sample = np.array(names, dtype=np.uint64).reshape(-1, 3).T
        key = _mix(seed + _GOLDEN)
        key = _mix(_mix(key + prompt * _GOLDEN) + sample * _GOLDEN)
        counter = np.arange(1, tokens * UNIFORMS + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(key[:, None] + counter)

    values = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return values.reshape(len(streams), tokens, UNIFORMS)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix bits by the finaliser of SplitMix64: each output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    logits_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling, changed_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return tokens_B drawn from `changed_BV` (else from the logits), and their logprobs_B (fp32)
    under the model's own distribution: without temperature, truncation and changes."""
    logits_BV = logits_BV.float()
    source_BV = logits_BV if changed_BV is None else changed_BV
    if devices.is_cpu(logits_BV) and _call.is_built and not (sampling.top_k or sampling.min_p):
        return _draw_natively(logits_BV, source_BV, uniforms_BU, sampling)

    if sampling.temperature == 0:
        tokens_B = source_BV.argmax(-1)
    else:
        tokens_B = _sample(_weigh(source_BV, sampling), uniforms_BU, sampling)

    return tokens_B, _gather_logprobs(logits_BV, tokens_B)


def _draw_natively(
    logits_BV: Tensor, source_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draw in two passes over the logits; a row that leaves the nucleus is drawn again inside of
    it."""
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

    if likelier_B is not None and bool((likelier_B > sampling.top_p).any()):
        outside_S = (likelier_B > sampling.top_p).nonzero().squeeze(1)
        weights_SV = _weigh(source_BV[outside_S], sampling)
        nucleus_SV = _cut_nucleus(weights_SV, sampling.top_p * weights_SV.sum(-1, keepdim=True))
        tokens_B[outside_S] = _invert(nucleus_SV, uniforms_BU[outside_S, 1:])[0]
        logprobs_B[outside_S] = _gather_logprobs(logits_BV[outside_S], tokens_B[outside_S])

    return tokens_B, logprobs_B


def _gather_logprobs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return logits_BV.gather(1, tokens_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)


def _weigh(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature

    return logits_BV.softmax(-1)


def penalize(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor, counts_BV: Tensor) -> Tensor:
    """Return logits under the penalties. seen_BV: tokens of prompt or answer (bool); counts_BV: how
    often each stands in the answer."""
    factor = sampling.repetition_penalty
    if factor != 1:
        punished_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
        logits_BV = torch.where(seen_BV, punished_BV, logits_BV)

    presence_BV = sampling.presence_penalty * (counts_BV > 0)
    return logits_BV - (presence_BV + sampling.frequency_penalty * counts_BV)


def _sample(weights_BV: Tensor, uniforms_BU: Tensor, sampling: Sampling) -> Tensor:
    if sampling.min_p:
        least_B1 = sampling.min_p * weights_BV.amax(-1, keepdim=True)
        weights_BV = weights_BV.masked_fill(weights_BV < least_B1, 0)

    if 0 < sampling.top_k < weights_BV.shape[1]:
        least_B1 = weights_BV.topk(sampling.top_k, -1).values[:, -1:]
        weights_BV = weights_BV.masked_fill(weights_BV < least_B1, 0)

    tokens_B, total_B1 = _invert(weights_BV, uniforms_BU[:, :1])
    if sampling.top_p < 1:
        limit_B1 = total_B1 * sampling.top_p
        outside_S = _is_outside(weights_BV, tokens_B, limit_B1).nonzero().squeeze(1)
        if len(outside_S):
            nucleus_SV = _cut_nucleus(weights_BV[outside_S], limit_B1[outside_S])
            tokens_B[outside_S] = _invert(nucleus_SV, uniforms_BU[outside_S, 1:])[0]

    return tokens_B


def _invert(weights_BV: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens_B drawn in proportion to their weights, by the inverse of the cumulative sum;
    and the total_B1."""
    cumulative_BV = weights_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, uniforms_B1 * total_B1, right=True)

    return tokens_B1.clamp_(max=weights_BV.shape[1] - 1).squeeze(1), total_B1


def _is_outside(weights_BV: Tensor, tokens_B: Tensor, limit_B1: Tensor) -> Tensor:
    """Return whether the tokens likelier than `tokens_B` already weigh more than `limit_B1`.

    Drawing from everything and drawing again only where this is so is exact, and spares most rows
    the sort.
    """
    drawn_B1 = weights_BV.gather(1, tokens_B[:, None])
    likelier_BV = weights_BV.where(weights_BV > drawn_B1, 0)
    return likelier_BV.sum(-1) > limit_B1.squeeze(1)


def _cut_nucleus(weights_BV: Tensor, limit_B1: Tensor) -> Tensor:
    """Return the weights with those outside of the nucleus set to 0."""
    top_BC = weights_BV.topk(min(_CANDIDATES, weights_BV.shape[1]), -1).values
    if bool((top_BC.sum(-1, keepdim=True) <= limit_B1).any()):
        top_BC = weights_BV.sort(-1, descending=True).values

    kept_B1 = (top_BC.cumsum(-1) - top_BC <= limit_B1).sum(-1, keepdim=True)
    return weights_BV.masked_fill(weights_BV < top_BC.gather(1, kept_B1 - 1), 0)
